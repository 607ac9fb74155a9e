"""From rows to a model folder: arguments, data, augmentation, optimizer, trainer."""
