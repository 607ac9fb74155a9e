"""What the page shows, computed without gradio. Letters in shapes as in the model file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import ViTImageProcessor

from ..explain.attention import cls_map
from ..explain.overlay import classic_overlay, colour_overlay, denormalize
from ..images import ImageError, open_image
from ..modeling_vit_cifar import ViTCifarForImageClassification

MEAN = "mean"  # the choice of all heads together
PICTURE_SIZE = 256  # pixels; the model's own 32 are far too few for a screen


def open_upload(upload: dict | None, folder: str) -> Image.Image:
    """The uploaded file as RGB; `upload` is what the browser sends: {"path": ..., ...}.

    Raises:
        ImageError: it is no readable image, or no file that gradio put into `folder`.
    """
    path = Path((upload or {}).get("path") or "")
    if not path.resolve().is_relative_to(Path(folder).resolve()) or not path.is_file():
        raise ImageError("the upload: expected a file, got none")
    with path.open("rb") as file:
        return open_image(file)


@dataclass(frozen=True, eq=False)
class Look:
    """What one forward pass leaves behind: enough for every picture, small enough to keep for each visitor.

    Attributes:
        image: (1, 3, H, W) what the model saw, 0..1.
        attentions: one (1, A, 1, N) map per layer: the class token's row.
    """

    image: torch.Tensor
    attentions: tuple[torch.Tensor, ...]


@torch.inference_mode()
def look(
    model: ViTCifarForImageClassification, processor: ViTImageProcessor, image: Image.Image
) -> tuple[dict[str, float], Look]:
    """An RGB image -> (class name -> probability, what the pictures are made of)."""
    pixel_values = processor(image, return_tensors="pt").pixel_values  # (1, 3, H, W)
    output = model(pixel_values.to(model.device, model.dtype), output_attentions=True)
    probabilities = output.logits[0].float().softmax(-1).tolist()
    attentions = tuple(attention[:, :, :1].float().cpu() for attention in output.attentions)
    names = model.config.id2label
    image = denormalize(pixel_values, processor.image_mean, processor.image_std)
    return {names[i]: p for i, p in enumerate(probabilities)}, Look(image, attentions)


def attention_pictures(seen: Look, layer: int, head: int | str) -> tuple[Image.Image, Image.Image]:
    """(classic, colour) overlay of one layer, counted from 1, and one head, counted from 1 or "mean"."""
    attention_map = cls_map(seen.attentions, layer - 1, head if head == MEAN else head - 1).values  # (1, h, w)
    return to_picture(classic_overlay(attention_map, seen.image)), to_picture(colour_overlay(attention_map, seen.image))


def to_picture(image: torch.Tensor) -> Image.Image:
    """(1, 3, H, W), 0..1 -> an image of PICTURE_SIZE in which every pixel of the model is a visible square."""
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.NEAREST)
