"""Out into the world and back: cards, Hub repositories, Spaces, other formats."""
