import matplotlib
import pytest
import torch

from vit_cifar.explain.overlay import classic_overlay, colour_overlay, denormalize, upscale
from vit_cifar.training.data import normalize

GENERATOR = torch.Generator().manual_seed(0)
MAPS = torch.rand(3, 8, 8, generator=GENERATOR)
IMAGES = torch.rand(3, 3, 32, 32, generator=GENERATOR)


def slow_bilinear(grid: list[list[float]], y: int, x: int, size: int) -> float:
    """The value at a pixel's centre, between the centres of the four nearest cells; the border is repeated."""
    cells = len(grid)
    top, left = ((position + 0.5) * cells / size - 0.5 for position in (y, x))
    total = 0.0
    for i in (int(top // 1), int(top // 1) + 1):
        for j in (int(left // 1), int(left // 1) + 1):
            weight = (1 - abs(top - i)) * (1 - abs(left - j))
            total += weight * grid[min(max(i, 0), cells - 1)][min(max(j, 0), cells - 1)]
    return total


def test_denormalize_undoes_what_the_processor_does():
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=GENERATOR, dtype=torch.uint8)
    torch.testing.assert_close(denormalize(normalize(images, mean, std), mean, std), images / 255)


def test_classic_overlay_equals_its_six_steps_pixel_by_pixel():
    result = classic_overlay(MAPS, IMAGES)
    for image, grid, picture in zip(IMAGES, MAPS.tolist(), result, strict=True):
        values = [[slow_bilinear(grid, y, x, 32) for x in range(32)] for y in range(32)]
        low, high = min(map(min, values)), max(map(max, values))
        for y in range(32):
            for x in range(32):
                scaled = (values[y][x] - low) / (high - low)
                for channel in range(3):
                    expected = min(scaled * image[channel, y, x].item() * 2, 1.0)
                    assert picture[channel, y, x].item() == pytest.approx(expected, abs=1e-5)


def test_classic_overlay_is_black_where_attention_is_least():
    attention = torch.ones(1, 8, 8)
    attention[0, 0, 0] = 0
    picture = classic_overlay(attention, torch.full((1, 3, 32, 32), 0.4))
    assert picture[0, :, 0, 0].tolist() == [0, 0, 0]
    assert picture[0, :, -1, -1].tolist() == pytest.approx([0.8] * 3)


def test_colour_overlay_mixes_image_and_colormap():
    assert torch.equal(colour_overlay(MAPS, IMAGES, alpha=0), IMAGES)
    scaled = upscale(MAPS, (32, 32))
    picture = colour_overlay(MAPS, IMAGES, "magma", alpha=0.25)
    for y, x in ((0, 0), (5, 20), (31, 31)):
        colour = torch.tensor(matplotlib.colormaps["magma"](scaled[1, y, x].item())[:3])
        expected = 0.75 * IMAGES[1, :, y, x] + 0.25 * colour
        torch.testing.assert_close(picture[1, :, y, x], expected.float(), atol=1e-2, rtol=0)


def test_each_map_is_scaled_by_itself_and_a_flat_one_is_zero():
    maps = torch.stack([MAPS[0], MAPS[0] * 0.1 + 5, torch.full((8, 8), 0.5)])
    scaled = upscale(maps, (32, 32))
    torch.testing.assert_close(scaled[0], scaled[1], atol=1e-3, rtol=0)
    assert scaled[0].min() == 0 and scaled[0].max() == 1
    assert torch.equal(scaled[2], torch.zeros(32, 32))
