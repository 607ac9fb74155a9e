"""Attention tensors -> maps over the image. Pure functions on tensors; letters as in the model file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Fusion = Literal["mean", "max"]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """One map per image, with what a picture of it hides: a picture is scaled to its own minimum and maximum.

    Attributes:
        values: (B, h, w), as the method gives them, unscaled.
        to_itself: (B,), what the class token's row holds for the class token; None if the method has no such number.
    """

    values: torch.Tensor
    to_itself: torch.Tensor | None = None

    @property
    def minimum(self) -> torch.Tensor:
        """(B,) the smallest value."""
        return self.values.amin(dim=(1, 2))

    @property
    def maximum(self) -> torch.Tensor:
        """(B,) the largest value."""
        return self.values.amax(dim=(1, 2))

    @property
    def entropy(self) -> torch.Tensor:
        """(B,) in bits, of the values as shares of their sum, negative ones as 0: log2(h * w) if all patches are
        alike, 0 if one has everything or none has anything."""
        values = self.values.flatten(1).clamp_min(0)
        shares = values / values.sum(dim=1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        return -torch.special.xlogy(shares, shares).sum(dim=1) / torch.tensor(2.0).log()


def cls_map(
    attentions: Sequence[torch.Tensor],
    layer: int = -1,
    head: int | Fusion = "mean",
    grid: tuple[int, int] | None = None,
) -> AttentionMap:
    """How much the class token attends to each patch (as in DINO, Caron et al. 2021, arXiv:2104.14294).

    Args:
        attentions: one (B, A, N, N) map per layer, as `output_attentions=True` gives them; token 0 is the class token.
        layer: which one; negative numbers count from the last.
        head: which one; or the mean, or the largest, over heads.
        grid: (h, w) of the patches; None for a square.

    Returns: an AttentionMap with `values` (B, h, w). For one head or the mean, each image's numbers and `to_itself`
    add up to 1.

    Raises:
        ValueError: no maps, a layer or head that is not there, or patches that do not fill the grid.
    """
    _check(attentions)
    if not -len(attentions) <= layer < len(attentions):
        raise ValueError(f"layer: expected {-len(attentions)} to {len(attentions) - 1}, got {layer}")
    rows = attentions[layer][:, :, 0]  # (B, A, N): the class token's row
    if isinstance(head, str):
        return _on_grid(_fuse(rows, head), grid)
    if not 0 <= head < rows.shape[1]:
        raise ValueError(f"head: expected 0 to {rows.shape[1] - 1}, mean or max, got {head}")
    return _on_grid(rows[:, head], grid)


def rollout(
    attentions: Sequence[torch.Tensor],
    fusion: Fusion = "mean",
    discard_ratio: float = 0.0,
    grid: tuple[int, int] | None = None,
) -> AttentionMap:
    """How much of each patch reaches the class token through all layers, each half attention, half residual
    connection (Abnar and Zuidema 2020, arXiv:2005.00928, section 3; Dosovitskiy et al. 2021, figure 6).

    Args:
        attentions, grid: as for `cls_map`.
        fusion: how the heads of a layer become one; the paper's is the mean.
        discard_ratio: this share of each layer's entries, the smallest, count as 0: less noise, not the paper's.

    Returns: an AttentionMap with `values` (B, h, w). Each image's numbers and `to_itself` add up to 1.

    Raises:
        ValueError: no maps, an unknown fusion, a ratio outside 0..1, or patches that do not fill the grid.
    """
    _check(attentions)
    if not 0 <= discard_ratio < 1:
        raise ValueError(f"discard_ratio: expected at least 0 and less than 1, got {discard_ratio}")
    result = None
    for attention in attentions:
        fused = _fuse(attention, fusion)  # (B, N, N)
        if discarded := int(fused[0].numel() * discard_ratio):
            bound = fused.flatten(1).kthvalue(discarded, dim=1).values
            fused = torch.where(fused <= bound[:, None, None], 0, fused)
        step = fused + torch.eye(fused.shape[-1]).to(fused)
        step = step / step.sum(dim=-1, keepdim=True)
        result = step if result is None else step @ result
    return _on_grid(result[:, 0], grid)


def gradient_rollout(
    attentions: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], grid: tuple[int, int] | None = None
) -> AttentionMap:
    """Rollout for one class: each map is weighted with the class's gradient, and what speaks against it is left out
    (Chefer et al. 2021, "Generic Attention-model Explainability", arXiv:2103.15679, equations 5 and 6).

    Args:
        attentions, grid: as for `cls_map`.
        gradients: of the class's logit, one (B, A, N, N) for each of `attentions`.

    Returns: an AttentionMap with `values` (B, h, w), at least 0.

    Raises:
        ValueError: no maps, gradients that do not belong to them, or patches that do not fill the grid.
    """
    _check(attentions)
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (attentions, gradients)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"gradients: expected the shapes of the maps, {shapes[0]}, got {shapes[1]}")
    result = torch.eye(attentions[0].shape[-1]).to(attentions[0]).expand(len(attentions[0]), -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        result = result + (gradient * attention).clamp_min(0).mean(dim=1) @ result  # (B, N, N)
    # The class token's own number starts at the identity's 1 and is no share beside the others.
    return AttentionMap(_on_grid(result[:, 0], grid).values)


def _check(attentions: Sequence[torch.Tensor]) -> None:
    if len(attentions) == 0:
        raise ValueError("attentions: expected one map per layer, got none: call the model with output_attentions=True")


def _fuse(attention: torch.Tensor, fusion: str) -> torch.Tensor:
    """(B, A, …) -> (B, …)"""
    if fusion not in get_args(Fusion):
        raise ValueError(f"fusion of heads: expected one of {', '.join(get_args(Fusion))}, got {fusion!r}")
    return attention.mean(dim=1) if fusion == "mean" else attention.amax(dim=1)


def _on_grid(row: torch.Tensor, grid: tuple[int, int] | None) -> AttentionMap:
    """The class token's row, (B, N)."""
    patches = row.shape[-1] - 1
    height, width = grid or (round(patches**0.5),) * 2
    if height * width != patches:
        raise ValueError(f"grid: expected {patches} patches, got {height} x {width}")
    return AttentionMap(row[:, 1:].unflatten(-1, (height, width)), row[:, 0])
