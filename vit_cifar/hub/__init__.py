"""Into the package and out of it: other formats of the same models."""
