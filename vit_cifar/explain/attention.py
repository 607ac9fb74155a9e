"""Attention tensors -> maps over the image. Pure functions on tensors; letters as in the model file."""

from collections.abc import Sequence

import torch


def cls_map(
    attentions: Sequence[torch.Tensor], layer: int = -1, head: int | None = None, grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """How much the class token attends to each patch (Dosovitskiy et al. 2021, figure 6; DINO, arXiv:2104.14294).

    Args:
        attentions: one (B, A, N, N) map per layer, as `output_attentions=True` gives them; token 0 is the class token.
        layer: which one; negative numbers count from the last.
        head: which one; None for the mean over heads.
        grid: (h, w) of the patches; None for a square.

    Returns: (B, h, w). With the class token's attention to itself, each image's numbers add up to 1.

    Raises:
        ValueError: no maps, a layer or head that is not there, or patches that do not fill the grid.
    """
    if len(attentions) == 0:
        raise ValueError("attentions: expected one map per layer, got none: call the model with output_attentions=True")
    if not -len(attentions) <= layer < len(attentions):
        raise ValueError(f"layer: expected {-len(attentions)} to {len(attentions) - 1}, got {layer}")
    attention = attentions[layer]
    if head is not None and not 0 <= head < attention.shape[1]:
        raise ValueError(f"head: expected 0 to {attention.shape[1] - 1}, got {head}")
    row = attention[:, :, 0, 1:]  # (B, A, N - 1): the class token's row, without its attention to itself
    row = row.mean(dim=1) if head is None else row[:, head]
    height, width = grid or (round(row.shape[-1] ** 0.5),) * 2
    if height * width != row.shape[-1]:
        raise ValueError(f"grid: expected {row.shape[-1]} patches, got {height} x {width}")
    return row.unflatten(-1, (height, width))
