"""TrivialAugment (Müller and Hutter 2021, arXiv:2103.10158) of a whole batch, each image with its own operation.

`torchvision.transforms.v2.TrivialAugmentWide` draws one operation for a whole batch. The operations and ranges are
its own; what torchvision can do to a batch of images that differ in strength is left to it.
"""

from collections.abc import Callable

import torch
from torchvision.transforms.v2 import functional as F

LEVELS = 31  # strengths from none to the whole range


def trivial_augment(images: torch.Tensor, draws: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """One random operation for each image.

    Args:
        images: (B, 3, H, W), uint8.
        draws: (B, 3), uniform in 0..1: operation, level, sign.
        fill: (3, 1, 1), uint8, what moves in at the border.

    Returns: (B, 3, H, W), uint8.
    """
    operation = (draws[:, 0] * len(OPERATIONS)).long()
    level = (draws[:, 1] * LEVELS).floor() / (LEVELS - 1)
    signed = torch.where(draws[:, 2] < 0.5, -level, level)
    result = images.clone()
    for index, (apply, has_sign) in enumerate(OPERATIONS.values()):
        rows = (operation == index).nonzero().flatten()
        if len(rows):
            strength = (signed if has_sign else level)[rows, None, None, None]
            result[rows] = apply(images[rows], strength, fill)
    return result


def _moved(source: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple]) -> Callable:
    """An operation that takes the pixel at (y, x) from the one nearest to `source(y, x, strength)`."""

    def apply(images: torch.Tensor, strength: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        y, x = (torch.arange(size, device=images.device, dtype=torch.float32) for size in (height, width))
        y, x = (place.round().long() for place in source(y[:, None], x, strength))  # broadcast to (B, 1, H, W)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        moved = images.flatten(2).gather(2, index.flatten(2).expand(-1, images.shape[1], -1))
        return torch.where(inside, moved.view_as(images), fill)

    return apply


def _rotated(y: torch.Tensor, x: torch.Tensor, strength: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    middle_y, middle_x, angle = y[-1] / 2, x[-1] / 2, torch.deg2rad(135.0 * strength)
    y, x = y - middle_y, x - middle_x
    return angle.sin() * x + angle.cos() * y + middle_y, angle.cos() * x - angle.sin() * y + middle_x


def _towards(without: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """An operation that mixes the image with itself without colour, contrast …: less of it, or more than there was."""

    def apply(images: torch.Tensor, strength: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        factor = 1 + 0.99 * strength
        return (factor * images + (1 - factor) * without(images)).clamp(0, 255).to(torch.uint8)

    return apply


def _posterize(images: torch.Tensor, strength: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    lost_bits = (strength * 6).round().to(torch.uint8)
    return (images >> lost_bits) << lost_bits


def _solarize(images: torch.Tensor, strength: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    return torch.where(images >= 255 * (1 - strength), 255 - images, images)


# Name: (what to do, whether its strength has a sign)
OPERATIONS = {
    "identity": (lambda images, strength, fill: images, False),
    "shear_x": (_moved(lambda y, x, strength: (y, x + 0.99 * strength * (y + 0.5))), True),
    "shear_y": (_moved(lambda y, x, strength: (y + 0.99 * strength * (x + 0.5), x)), True),
    "translate_x": (_moved(lambda y, x, strength: (y, x - (32.0 * strength).trunc())), True),
    "translate_y": (_moved(lambda y, x, strength: (y - (32.0 * strength).trunc(), x)), True),
    "rotate": (_moved(_rotated), True),
    "brightness": (_towards(torch.zeros_like), True),
    "color": (_towards(lambda images: F.adjust_saturation(images, 0.0)), True),
    "contrast": (_towards(lambda images: F.adjust_contrast(images, 0.0)), True),
    "sharpness": (_towards(lambda images: F.adjust_sharpness(images, 0.0)), True),
    "posterize": (_posterize, False),
    "solarize": (_solarize, False),
    "autocontrast": (lambda images, strength, fill: F.autocontrast(images), False),
    "equalize": (lambda images, strength, fill: F.equalize(images), False),
}
