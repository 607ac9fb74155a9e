"""Maps of a model, and how far to trust them: what happens to its answer when patches are taken away.

Takes a model, unlike attention.py. Letters as in the model file; S is a number of steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchmetrics.functional import spearman_corrcoef

from ..errors import UserError
from ..modeling_vit_cifar import ViTCifarForImageClassification
from .attention import AttentionMap, cls_map, gradient_rollout, rollout

MEAN_COLOUR = 0.0  # what stands for a patch that is taken away: of normalised pixels, the dataset's mean
STEPS = 16  # points of a curve, after the first
OCCLUDED_AT_ONCE = 16  # patches, each a copy of the batch


@dataclass(frozen=True, eq=False)
class Look:
    """One forward and one backward pass of a batch: what every map is made of.

    Attributes:
        model, pixel_values: what looked at what, (B, C, H, W), normalised.
        classes: (B,), for each image the class whose logit the gradients are of.
        logits: (B, classes).
        attentions: each layer's map, (B, A, N, N).
        gradients: of the class's logit, one for each of `attentions`.
    """

    model: ViTCifarForImageClassification
    pixel_values: torch.Tensor
    classes: torch.Tensor
    logits: torch.Tensor
    attentions: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the patches."""
        height, width = (length // self.model.config.patch_size for length in self.pixel_values.shape[-2:])
        return height, width


def look(
    model: ViTCifarForImageClassification, pixel_values: torch.Tensor, classes: torch.Tensor | None = None
) -> Look:
    """Both passes.

    Args:
        pixel_values: (B, C, H, W), normalised.
        classes: (B,), the class to explain in each image; None for the model's answers.
    """
    with torch.enable_grad():
        # Gradients flow from the pixels on, so that frozen weights change nothing.
        output = model(pixel_values.detach().clone().requires_grad_(), output_attentions=True)
        classes = output.logits.argmax(-1) if classes is None else classes
        chosen = output.logits.gather(1, classes[:, None]).sum()
    gradients = torch.autograd.grad(chosen, output.attentions)
    attentions = tuple(attention.detach() for attention in output.attentions)
    return Look(model, pixel_values, classes, output.logits.detach(), attentions, gradients)


def hide_patches(pixel_values: torch.Tensor, gone: torch.Tensor, patch_size: int) -> torch.Tensor:
    """pixel_values (B, C, H, W), normalised, with the mean colour where `gone` (B, h, w), booleans, is true."""
    return pixel_values.masked_fill(_on_pixels(gone, patch_size), MEAN_COLOUR)


def _on_pixels(patches: torch.Tensor, size: int) -> torch.Tensor:
    """(B, h, w) -> (B, 1, H, W): each pixel gets what its patch has."""
    return patches[:, None].repeat_interleave(size, 2).repeat_interleave(size, 3)


def feature_ablation() -> type:
    """captum's class.

    Raises:
        UserError: captum is not installed.
    """
    try:
        from captum.attr import FeatureAblation
    except ModuleNotFoundError as error:
        raise UserError('occlusion: expected captum, got none: pip install "vit-cifar[demo]"') from error
    return FeatureAblation


@torch.no_grad()
def occlusion(seen: Look) -> AttentionMap:
    """How far the probability of the class falls when one patch gets the mean colour (Zeiler and Fergus 2014,
    arXiv:1311.2901, section 4.2): (B, h, w), in -1..1.

    Raises:
        UserError: captum is not installed.
    """
    (height, width), size = seen.grid, seen.model.config.patch_size
    patches = _on_pixels(torch.arange(height * width, device=seen.pixel_values.device).view(1, height, width), size)
    ablation = feature_ablation()(lambda pixels: seen.model(pixels).logits.float().softmax(-1))
    falls = ablation.attribute(
        seen.pixel_values,
        MEAN_COLOUR,
        target=seen.classes,
        feature_mask=patches,
        perturbations_per_eval=OCCLUDED_AT_ONCE,
    )
    return AttentionMap(falls[:, 0, ::size, ::size])  # every pixel of a patch holds the patch's number


def random_map(seen: Look) -> AttentionMap:
    """The baseline that a method must beat: (B, h, w), uniform in 0..1; it depends on the place in the batch alone."""
    values = torch.rand(len(seen.pixel_values), *seen.grid, generator=torch.Generator().manual_seed(0))
    return AttentionMap(values.to(seen.pixel_values.device))


# Name: look -> map. `attention` takes the layer and head of `cls_map` as well. Occlusion alone asks the model again.
METHODS: dict[str, Callable[..., AttentionMap]] = {
    "attention": lambda seen, **options: cls_map(seen.attentions, grid=seen.grid, **options),
    "rollout": lambda seen: rollout(seen.attentions, grid=seen.grid),
    "gradient rollout": lambda seen: gradient_rollout(seen.attentions, seen.gradients, grid=seen.grid),
    "occlusion": occlusion,
    "random": random_map,
}


@dataclass(frozen=True, eq=False)
class Curves:
    """Probability of the class, (B, S + 1), while patches go or come in the order of a map, largest first.

    Attributes:
        deletion: from the whole image to none of it. A map that finds what matters makes it fall early.
        insertion: from none of the image to the whole. Such a map makes it rise early.
    """

    deletion: torch.Tensor
    insertion: torch.Tensor

    @property
    def score(self) -> torch.Tensor:
        """(B,), the area between insertion and deletion, in -1..1. An order that says nothing gets about 0 on
        average; larger is better."""
        return (torch.trapezoid(self.insertion) - torch.trapezoid(self.deletion)) / (self.deletion.shape[1] - 1)


@torch.no_grad()
def deletion_insertion(
    model: ViTCifarForImageClassification, pixel_values: torch.Tensor, classes: torch.Tensor, values: torch.Tensor
) -> Curves:
    """Deletion and insertion (Petsiuk et al. 2018, arXiv:1806.07421, section 4.1), whole patches at a time; what is
    gone has the mean colour in both, where theirs inserts into a blurred image.

    Args:
        pixel_values: (B, C, H, W), normalised. classes: (B,). values: (B, h, w), a map of each image.
    """
    order = values.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank, count = order.argsort(dim=1).view_as(values), values[0].numel()  # 0 is the largest
    deletion, insertion = [], []
    for step in range(STEPS + 1):
        taken = rank < round(count * step / STEPS)
        for curve, gone in ((deletion, taken), (insertion, ~taken)):
            logits = model(hide_patches(pixel_values, gone, model.config.patch_size)).logits
            curve.append(logits.float().softmax(-1).gather(1, classes[:, None])[:, 0])
    return Curves(torch.stack(deletion, dim=1), torch.stack(insertion, dim=1))


def bootstrap_interval(values: torch.Tensor) -> tuple[float, float]:
    """The middle 95% of 2000 means, each of as many values, drawn from `values` (B,) with replacement (Efron 1979)."""
    drawn = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values.cpu()[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def randomized(model: ViTCifarForImageClassification) -> ViTCifarForImageClassification:
    """The same architecture with new weights (seed 0): a map that looks the same on it does not show what was learned
    (Adebayo et al. 2018, arXiv:1810.03292, section 3)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)(model.config).to(model.device, model.dtype).eval()


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's, of two maps (B, h, w) of each image: (B,), in -1..1; 0 if one is the same everywhere."""
    return spearman_corrcoef(a.flatten(1).T.float(), b.flatten(1).T.float())
