import pytest
import torch
from torch.nn.functional import pad

from vit_cifar.training.augmentation import Augmentation

IMAGES = torch.randint(1, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
INDEX = torch.arange(12)


def slow(augmentation: Augmentation, image: torch.Tensor, draw: list[float]) -> torch.Tensor:
    """One image, step by step: flip, pad and crop, paint the square."""
    down, right, flip, row, column = draw[:5]
    shift, size = augmentation.max_shift, image.shape[-1]
    if augmentation.flip != "none" and flip < 0.5:
        image = image.flip(-1)
    mode = {"zeros": "constant", "reflect": "reflect"}[augmentation.shift_fill]
    padded = pad(image.float(), (shift, shift, shift, shift), mode=mode).to(torch.uint8)
    top, left = int(down * (2 * shift + 1)), int(right * (2 * shift + 1))
    image = padded[:, top : top + size, left : left + size].clone()
    half = augmentation.cutout_size // 2
    for y in range(int(row * size) - half, int(row * size) - half + augmentation.cutout_size):
        for x in range(int(column * size) - half, int(column * size) - half + augmentation.cutout_size):
            if 0 <= y < size and 0 <= x < size:
                image[:, y, x] = torch.tensor(augmentation.fill, dtype=torch.uint8)
    return image


@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
@pytest.mark.parametrize("shift_fill", ["zeros", "reflect"])
@pytest.mark.parametrize(("max_shift", "cutout_size"), [(0, 0), (4, 0), (4, 8), (2, 5)])
def test_whole_batch_equals_image_by_image(flip, shift_fill, max_shift, cutout_size):
    augmentation = Augmentation(12, 3, flip, max_shift, shift_fill, cutout_size, fill=(125, 123, 114))
    for epoch in (0, 1):
        batch = augmentation(IMAGES, INDEX, epoch)
        draws = augmentation.draws(epoch).tolist()
        for image, draw, result in zip(IMAGES, draws, batch, strict=True):
            assert torch.equal(slow(augmentation, image, draw), result)


def test_neither_order_nor_batch_size_nor_a_new_start_changes_an_image():
    first, second = (Augmentation(12, 3, "random", 4, "zeros", 8) for _ in range(2))
    order = torch.tensor([7, 2, 11])
    for epoch in (4, 1):  # any order of epochs too: a resume starts in the middle
        assert torch.equal(first(IMAGES, INDEX, epoch)[order], second(IMAGES[order], order, epoch))


def test_epochs_seeds_and_images_differ():
    augmentation = Augmentation(12, 3, "random", 4)
    same = IMAGES[:1].expand(12, -1, -1, -1)
    assert len(augmentation(same, INDEX, 0).flatten(1).unique(dim=0)) > 6
    assert not torch.equal(augmentation(IMAGES, INDEX, 0), augmentation(IMAGES, INDEX, 1))
    assert not torch.equal(augmentation(IMAGES, INDEX, 0), Augmentation(12, 4, "random", 4)(IMAGES, INDEX, 0))


def test_alternating_flips_show_both_sides_in_any_two_epochs():
    augmentation = Augmentation(12, 0, "alternating")
    for epoch in range(3):
        first, second = augmentation(IMAGES, INDEX, epoch), augmentation(IMAGES, INDEX, epoch + 1)
        assert torch.equal(first, second.flip(-1))
    flipped = (augmentation(IMAGES, INDEX, 0) != IMAGES).flatten(1).any(1)
    assert 0 < flipped.sum() < 12  # each image has its own start


def test_shifts_are_uniform():
    augmentation = Augmentation(9000, 0, max_shift=4, flip="none")
    image = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    image[0, 0, 16, 16] = 255
    shifted = augmentation(image.expand(9000, -1, -1, -1), torch.arange(9000), 0)
    rows = shifted.flatten(1).argmax(1).div(32, rounding_mode="floor")
    counts = rows.bincount(minlength=32)[12:21]
    assert counts.sum() == 9000
    assert counts.min() > 850  # 1000 expected, standard deviation 30


def slow_cutmix(image: torch.Tensor, other: torch.Tensor, draw: list[float], probability: float):
    """Pixel by pixel: a square of the other image, and the share that is left of the first."""
    mixed, _, share, row, column = draw[5:10]
    size, image = image.shape[-1], image.clone()
    side = int(torch.tensor(share).sqrt() * size) if mixed < probability else 0
    top, left = int(row * size) - side // 2, int(column * size) - side // 2
    taken = 0
    for y in range(max(top, 0), min(top + side, size)):
        for x in range(max(left, 0), min(left + side, size)):
            image[:, y, x] = other[:, y, x]
            taken += 1
    return image, 1 - taken / size**2


def test_cutmix_equals_pixel_by_pixel_and_the_share_is_what_is_left():
    augmentation = Augmentation(12, 5, cutmix_probability=0.7)
    for epoch in (0, 1):
        partners = augmentation.partners(INDEX, epoch)
        mixed, shares = augmentation.cutmix(IMAGES, IMAGES[partners], INDEX, epoch)
        draws = augmentation.draws(epoch).tolist()
        for i, draw in enumerate(draws):
            expected, share = slow_cutmix(IMAGES[i], IMAGES[int(draw[6] * 12)], draw, 0.7)
            assert torch.equal(mixed[i], expected)
            assert shares[i] == pytest.approx(share)
        assert (shares == 1).any() and (shares < 1).any()


def test_cutmix_does_not_depend_on_the_batch():
    augmentation, order = Augmentation(12, 5, cutmix_probability=1.0), torch.tensor([7, 2, 11])
    whole, part = (
        augmentation.cutmix(IMAGES[rows], IMAGES[augmentation.partners(rows, 3)], rows, 3) for rows in (INDEX, order)
    )
    assert torch.equal(whole[0][order], part[0]) and torch.equal(whole[1][order], part[1])


def test_a_draw_of_exactly_0_flips_and_its_alternate_does_not():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augmentation = Augmentation(2, 0, flip="alternating")
    for epoch, flip, expected in ((0, 0.0, images.flip(3)), (1, 1.0, images)):
        augmentation.draws(epoch)[:, 2] = flip
        assert torch.equal(augmentation(images, torch.arange(2), epoch), expected)
