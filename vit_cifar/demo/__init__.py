"""The page that shows what a model answers and where it looks."""
