import math

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from vit_cifar.training.data import load_split
from vit_cifar.training.trivial_augment import LEVELS, OPERATIONS, trivial_augment

IMAGES = load_split("sample", "train").images[:LEVELS]
BLACK = torch.zeros(3, 1, 1, dtype=torch.uint8)


def torchvisions(name: str, image: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    """As torchvision.transforms.v2.TrivialAugmentWide does it to one image."""
    affine = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "center": [0, 0]}
    degrees = math.degrees(math.atan(0.99 * level * sign))
    match name:
        case "identity":
            return image
        case "shear_x":
            return F.affine(image, **affine | {"shear": [degrees, 0.0]})
        case "shear_y":
            return F.affine(image, **affine | {"shear": [0.0, degrees]})
        case "translate_x":
            return F.affine(image, **affine | {"translate": [int(32 * level * sign), 0], "center": None})
        case "translate_y":
            return F.affine(image, **affine | {"translate": [0, int(32 * level * sign)], "center": None})
        case "rotate":
            return F.rotate(image, 135 * level * sign)
        case "brightness":
            return F.adjust_brightness(image, 1 + 0.99 * level * sign)
        case "color":
            return F.adjust_saturation(image, 1 + 0.99 * level * sign)
        case "contrast":
            return F.adjust_contrast(image, 1 + 0.99 * level * sign)
        case "sharpness":
            return F.adjust_sharpness(image, 1 + 0.99 * level * sign)
        case "posterize":
            return F.posterize(image, 8 - round(level * 6))
        case "solarize":
            return F.solarize(image, 255 * (1 - level))
        case "autocontrast":
            return F.autocontrast(image)
        case "equalize":
            return F.equalize(image)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_operation_at_every_level_is_torchvisions(name, sign):
    count = len(OPERATIONS)
    operation = torch.full((LEVELS,), (list(OPERATIONS).index(name) + 0.5) / count)
    level = (torch.arange(LEVELS) + 0.5) / LEVELS
    draws = torch.stack([operation, level, torch.full((LEVELS,), 0.5 + 0.25 * sign)], dim=1)
    results = trivial_augment(IMAGES, draws, BLACK)
    moved = name in ("shear_x", "shear_y", "rotate")
    for i, (image, result) in enumerate(zip(IMAGES, results, strict=True)):
        difference = (result.int() - torchvisions(name, image, i / (LEVELS - 1), sign).int()).abs()
        # A pixel half way between two may go to either; a mixture of two whole numbers is rounded once or twice.
        assert (difference > 2).float().mean() < (0.03 if moved else 1e-9), i
    if name != "identity":
        assert not torch.equal(results, IMAGES)


def test_each_image_has_its_own_operation_wherever_it_stands():
    draws = torch.rand(LEVELS, 3, generator=torch.Generator().manual_seed(0))
    fill = torch.tensor([125, 123, 114], dtype=torch.uint8)[:, None, None]
    whole = trivial_augment(IMAGES, draws, fill)
    order = torch.tensor([7, 2, 11])
    assert torch.equal(trivial_augment(IMAGES[order], draws[order], fill), whole[order])


def test_what_moves_in_has_the_colour_asked_for():
    index = list(OPERATIONS).index("translate_x")
    draws = torch.tensor([[(index + 0.5) / len(OPERATIONS), 0.99, 0.99]])
    fill = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]
    assert torch.equal(trivial_augment(IMAGES[:1], draws, fill), fill.expand(1, 3, 32, 32))
