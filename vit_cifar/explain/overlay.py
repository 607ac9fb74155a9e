"""Map + image -> picture. Images are batches of float tensors in 0..1; maps may have any scale."""

from collections.abc import Sequence

import matplotlib
import torch
from matplotlib.figure import Figure
from torch.nn.functional import interpolate

COLORMAP = "viridis"  # any of matplotlib's; a perceptual one shows equal steps as equal


def denormalize(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """What an image processor made, (B, 3, H, W), back to 0..1: what the model sees, in float32 on the CPU."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (pixel_values.float().cpu() * std + mean).clamp(0, 1)


def resize(attention_map: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, h, w) -> (B, H, W), bilinear, unscaled."""
    return interpolate(attention_map[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]


def upscale(attention_map: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, h, w) -> (B, H, W): bilinear, then scaled so that each map's minimum is 0 and its maximum 1.

    A map that is the same everywhere becomes 0.
    """
    resized = resize(attention_map, size)
    low, high = resized.amin(dim=(1, 2), keepdim=True), resized.amax(dim=(1, 2), keepdim=True)
    return (resized - low) / (high - low).clamp_min(torch.finfo(resized.dtype).tiny)


def classic_overlay(attention_map: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The tutorial's picture: the image darkened where the class token does not look.

    Its six steps: last layer, class token's row over the patches, mean over heads (`cls_map` gives these three);
    bilinear to the image's size; scaled to 0..1; times the image, times 2, clipped.

    Args:
        attention_map: (B, h, w). images: (B, 3, H, W), 0..1.

    Returns: (B, 3, H, W), 0..1.
    """
    return (upscale(attention_map, images.shape[-2:])[:, None] * images * 2).clamp(0, 1)


def colour_overlay(
    attention_map: torch.Tensor, images: torch.Tensor, colormap: str = COLORMAP, alpha: float = 0.6
) -> torch.Tensor:
    """The map in colours, over the image: (1 - alpha) * image + alpha * colour.

    Args:
        attention_map: (B, h, w). images: (B, 3, H, W), 0..1.
        colormap: any of matplotlib's.
        alpha: 0 shows the image alone, 1 the map alone.

    Returns: (B, 3, H, W), 0..1.
    """
    colours = matplotlib.colormaps[colormap](upscale(attention_map, images.shape[-2:]).cpu().numpy())  # (B, H, W, 4)
    colours = torch.from_numpy(colours[..., :3]).to(images).permute(0, 3, 1, 2)
    return (1 - alpha) * images + alpha * colours


def figure_with_colourbar(attention_map: torch.Tensor, image: torch.Tensor, title: str, unit: str) -> Figure:
    """`colour_overlay` of one image, and beside it what its colours stand for, in the map's own numbers.

    Args:
        attention_map: (h, w). image: (3, H, W), 0..1.
        unit: what the numbers are, as in "attention, share of 1".
    """
    resized = resize(attention_map[None], image.shape[-2:])
    picture = colour_overlay(attention_map[None], image[None])[0].permute(1, 2, 0)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, parse_math=False)  # a class may be called $
    scale = matplotlib.colors.Normalize(resized.min().item(), resized.max().item())
    figure.colorbar(matplotlib.cm.ScalarMappable(scale, COLORMAP), ax=axes, label=unit)
    return figure
