"""What is true of a model folder: its numbers and the records that hold them."""
