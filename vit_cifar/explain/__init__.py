"""Where a model looks: attention maps, and pictures of them."""
