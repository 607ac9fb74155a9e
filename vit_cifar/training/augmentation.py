"""Augmentation of a whole batch at once, on the device that the batch is on.

torchvision's transforms draw once for a batch; here each image has its own draw, taken from (seed, epoch, index of the
image in the dataset). So neither the order of the images, nor the number of processes, nor a resume changes it.
"""

from dataclasses import dataclass, field

import torch
from torchvision.transforms.v2 import functional as F

from .trivial_augment import trivial_augment

# Columns of `Augmentation.draws`.
SHIFT, FLIP, CUTOUT, CUTMIX, TRIVIAL_AUGMENT = slice(0, 2), 2, slice(3, 5), slice(5, 10), slice(10, 14)


@dataclass
class Augmentation:
    """Flip, shift, TrivialAugment and cutout of each image, in this order; CutMix of two.

    Attributes:
        num_samples: number of images in the training set.
        seed: of every draw.
        flip: "random" flips each image with probability 1/2; "alternating" flips every second epoch, each image from
            its own start, so that any two epochs in a row show both sides (airbench, arXiv:2404.00498, section 3.6);
            "none".
        max_shift: largest shift in pixels along each axis; the same as a random crop after padding by as much.
        shift_fill: what moves in at the border: "zeros" (black) or "reflect".
        cutout_size: side in pixels of a square that is painted with `fill` (DeVries and Taylor 2017,
            arXiv:1708.04552); it may stand partly outside the image. 0 leaves it out.
        fill: (C,) uint8 colour for cutout, and for what TrivialAugment moves in; near the dataset's mean.
        cutmix_probability: share of the images that get a window from another one (Yun et al. 2019,
            arXiv:1905.04899). The other is drawn from the whole dataset, not from the batch, whose members depend on
            the number of processes.
        trivial_augment_probability: share of the images that get one operation of TrivialAugment; see there.
    """

    num_samples: int
    seed: int
    flip: str = "random"
    max_shift: int = 0
    shift_fill: str = "zeros"
    cutout_size: int = 0
    fill: tuple[int, ...] = (0, 0, 0)
    cutmix_probability: float = 0.0
    trivial_augment_probability: float = 0.0
    _draws: tuple[int, torch.Tensor] | None = field(default=None, init=False, repr=False)

    def draws(self, epoch: int) -> torch.Tensor:
        """(num_samples, 14) uniform numbers of this epoch: shift down, shift right, flip, cutout row, cutout column;
        CutMix: whether, partner, share of the area, window row, window column; TrivialAugment: whether, operation,
        level, sign."""
        if self._draws is None or self._draws[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            # In two parts: the first ten are those of before TrivialAugment, so that older trainings can be repeated.
            draws = torch.cat([torch.rand(self.num_samples, n, generator=generator) for n in (10, 4)], dim=1)
            if self.flip == "alternating":
                draws[:, FLIP] = torch.rand(self.num_samples, generator=generator.manual_seed(self.seed))
                if epoch % 2:
                    draws[:, FLIP] = 1 - draws[:, FLIP]
            self._draws = (epoch, draws)
        return self._draws[1]

    def __call__(self, images: torch.Tensor, sample_index: torch.Tensor, epoch: int) -> torch.Tensor:
        """images (B, C, H, W), uint8; sample_index (B,), their rows in the dataset, on the CPU -> the same shape."""
        batch, channels, height, width = images.shape
        device = images.device
        draws = self.draws(epoch)[sample_index].to(device)
        down, right = draws[:, SHIFT].unbind(1)

        # index_select copies what lies together in memory, where an index or a mask takes it pixel by pixel: one side
        # of each image, then the rows of its window in the padded image, each from where it begins.
        if self.flip != "none":
            side = (draws[:, FLIP] >= 0.5).long() * batch + torch.arange(batch, device=device)
            images = torch.cat([images.flip(3), images]).index_select(0, side)
        span = 2 * self.max_shift + 1
        mode = "reflect" if self.shift_fill == "reflect" else "constant"
        padded = F.pad(images, [self.max_shift] * 4, padding_mode=mode)
        planes = torch.arange(batch * channels, device=device).view(batch, channels, 1) * padded.shape[2]
        rows = planes + (down * span).long()[:, None, None] + torch.arange(height, device=device)
        starts = rows * padded.shape[3] + (right * span).long()[:, None, None]
        images = padded.flatten().unfold(0, width, 1).index_select(0, starts.flatten()).view_as(images)

        fill = torch.tensor(self.fill, dtype=images.dtype, device=device)[:, None, None]
        whether, what = draws[:, TRIVIAL_AUGMENT].split([1, 3], dim=1)
        chosen = whether[:, 0] < self.trivial_augment_probability
        if self.trivial_augment_probability and chosen.any():
            images[chosen] = trivial_augment(images[chosen], what[chosen], fill)

        if self.cutout_size:
            # The centre is anywhere in the image; an even size reaches one pixel further up and left.
            row, column = draws[:, CUTOUT, None].unbind(1)  # (B, 1) each
            window = _window(row, column, height, width, self.cutout_size, self.cutout_size)
            images = torch.where(window, fill, images)
        return images

    def partners(self, sample_index: torch.Tensor, epoch: int) -> torch.Tensor:
        """(B,) indices of the images that those of sample_index (B,) are mixed with."""
        _, partner, *_ = self.draws(epoch)[sample_index, CUTMIX].unbind(1)
        return (partner * self.num_samples).long()

    def cutmix(
        self, images: torch.Tensor, others: torch.Tensor, sample_index: torch.Tensor, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A window of `others` put into `images`, both augmented: (B, C, H, W), and the share (B,) of each image
        that is still its own. The window's share of the area is uniform in 0..1 before the border cuts it."""
        height, width = images.shape[-2:]
        draws = self.draws(epoch)[sample_index].to(images.device)
        mixed, _, share, row, column = draws[:, CUTMIX, None].unbind(1)  # (B, 1) each
        side = share.sqrt() * (mixed < self.cutmix_probability)
        window = _window(row, column, height, width, (side * height).long(), (side * width).long())
        return torch.where(window, others, images), 1 - window.flatten(1).float().mean(1)


def _window(
    row: torch.Tensor,
    column: torch.Tensor,
    height: int,
    width: int,
    window_height: torch.Tensor | int,
    window_width: torch.Tensor | int,
) -> torch.Tensor:
    """(B, 1) draws -> (B, 1, H, W) booleans, true in a window around a centre that is anywhere in the image."""

    def inside(draw: torch.Tensor, length: int, size: torch.Tensor | int) -> torch.Tensor:
        offset = torch.arange(length, device=draw.device) - (draw * length).long() + size // 2
        return (offset >= 0) & (offset < size)

    rows, columns = inside(row, height, window_height), inside(column, width, window_width)
    return rows[:, None, :, None] & columns[:, None, None, :]
