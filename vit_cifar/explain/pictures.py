"""A model and an image -> a picture of where it looks, as a PNG that says in its metadata what it shows."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import ViTImageProcessor

from ..configuration_vit_cifar import ViTCifarConfig
from ..errors import UserError
from ..images import FORMATS, ImageError
from ..modeling_vit_cifar import ViTCifarForImageClassification
from ..models import DEFAULT_MODEL, class_names, split_revision
from .attention import AttentionMap, cls_map
from .overlay import classic_overlay, colour_overlay, denormalize, figure_with_colourbar
from .perturbation import METHODS, Look, look

UNITS = {
    "attention": "attention of the class token, share of 1",
    "rollout": "attention through all layers, share of 1",
    "gradient rollout": "attention × gradient of the logit",
    "occlusion": "fall of the probability",
    "random": "random number",
}
OF_A_CLASS = ("gradient rollout", "occlusion")  # the methods whose map depends on the class


class ExplanationError(UserError):
    """A map that cannot be made; the message is one line."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """One image's map.

    Attributes:
        answer, confidence: the class that the model answers, and its probability.
        image: (3, H, W), 0..1, as the model saw it.
        map: a batch of one.
        description: what is shown: model, method, class, and for attention layer and head.
    """

    answer: str
    confidence: float
    image: torch.Tensor
    map: AttentionMap
    description: dict[str, str]

    def numbers(self) -> dict[str, str]:
        """The raw numbers, which the colours hide."""
        found, patches = self.map, self.map.values[0].numel()
        most = torch.tensor(float(patches)).log2().item()
        numbers = {
            "minimum": f"{found.minimum.item():.4g}",
            "maximum": f"{found.maximum.item():.4g}",
            "entropy": f"{found.entropy.item():.2f} of {most:.3g} bits",
        }
        if found.to_itself is not None:
            numbers["class token to itself"] = f"{found.to_itself.item():.4g}"
        return numbers

    def __str__(self) -> str:
        (_, answer), *rest = self.metadata().items()
        return f"{answer}; {', '.join(f'{name} {value}' for name, value in rest)}"

    def metadata(self) -> dict[str, str]:
        """The text chunks of a PNG of this map."""
        return {"answer": f"{self.answer} {self.confidence:.1%}"} | self.description | self.numbers()

    def save(self, path: Path) -> None:
        """A PNG with a colourbar, which carries `metadata`."""
        method = self.description["method"]
        details = [f"{name} {value}" for name, value in self.description.items() if name not in ("model", "method")]
        title = ", ".join([method, *details])
        figure = figure_with_colourbar(self.map.values[0].cpu(), self.image, title, UNITS[method])
        figure.savefig(path, format="png", dpi=128, metadata=self.metadata())


def name_of(model: str | None) -> str:
    """What pictures call a model: its folder's name or its Hub id."""
    return Path(model).resolve().name if model and Path(model).is_dir() else split_revision(model or DEFAULT_MODEL)[0]


def files_in(paths: list[Path]) -> list[Path]:
    """Files as they are, folders as the image files in them, by name.

    Raises:
        ImageError: a folder without images, or two files whose pictures would have one name.
    """
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        kinds = Image.registered_extensions()
        inside = sorted(file for file in path.glob("[!.]*") if kinds.get(file.suffix.lower()) in FORMATS)
        if not inside:
            raise ImageError(f"{path}: expected image files in the folder, got none")
        files += inside
    for stem, count in Counter(file.stem for file in files).items():
        if count > 1:
            raise ImageError(f"images: expected a different name for each, got {stem!r} {count} times")
    return files


def class_index(config: ViTCifarConfig, class_name: str) -> int:
    """By the name that is shown: label2id may be of other names, after `from_pretrained(folder, id2label=...)`.

    Raises:
        ExplanationError: the model has no such class.
    """
    names = class_names(config)
    if class_name not in names:
        raise ExplanationError(f"class: expected one of {', '.join(names)}, got {class_name!r}")
    return names.index(class_name)


def map_options(
    config: ViTCifarConfig,
    method: str = "attention",
    layer: int | None = None,
    head: str = "mean",
    class_name: str | None = None,
) -> dict:
    """A user's words, checked, as arguments of `explain_image`.

    Args:
        layer, head: from 1, as people count.

    Raises:
        ExplanationError: something that this model or this method does not have.
    """
    if method not in METHODS:
        raise ExplanationError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method != "attention" and (layer is not None or head != "mean"):
        raise ExplanationError(f"layer and head: expected them for the method attention alone, got them for {method}")
    if class_name is not None and method not in OF_A_CLASS:
        raise ExplanationError(f"class: expected it for {' or '.join(OF_A_CLASS)}, got it for {method}")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    layer = layers if layer is None else layer
    if not 1 <= layer <= layers:
        raise ExplanationError(f"layer: expected 1 to {layers}, got {layer}")
    if head not in ("mean", "max", *map(str, range(1, heads + 1))):
        raise ExplanationError(f"head: expected 1 to {heads}, mean or max, got {head!r}")
    if class_name is not None:
        class_index(config, class_name)
    return {"method": method, "layer": layer, "head": head, "class_name": class_name}


def to_pixels(
    model: ViTCifarForImageClassification, processor: ViTImageProcessor, images: Image.Image | list[Image.Image]
) -> torch.Tensor:
    """RGB images of any size -> (B, C, H, W), normalised, as the model takes them."""
    return processor(images, return_tensors="pt").pixel_values.to(model.device, model.dtype)


def look_at(model: ViTCifarForImageClassification, pixel_values: torch.Tensor, class_name: str | None = None) -> Look:
    """Both passes for a batch (B, C, H, W), towards one class; None for the model's answers.

    Raises:
        ExplanationError: the model has no such class.
    """
    if class_name is None:
        return look(model, pixel_values)
    index = class_index(model.config, class_name)
    return look(model, pixel_values, torch.full((len(pixel_values),), index, device=pixel_values.device))


def explain_image(
    model: ViTCifarForImageClassification,
    processor: ViTImageProcessor,
    image: Image.Image,
    model_name: str,
    method: str,
    layer: int,
    head: str,
    class_name: str | None,
) -> Explanation:
    """One RGB image's map; see `map_options` for what the arguments may be."""
    seen = look_at(model, to_pixels(model, processor, image), class_name)
    return explain(seen, processor, model_name, method, layer, head)


def explain(
    seen: Look, processor: ViTImageProcessor, model_name: str, method: str, layer: int, head: str
) -> Explanation:
    """One map of the one image that was looked at."""
    options, description = {}, {"model": model_name, "method": method}
    names, probabilities = seen.model.config.id2label, seen.logits[0].float().softmax(-1)
    if method == "attention":
        options = {"layer": layer - 1, "head": int(head) - 1 if head.isdigit() else head}
        description |= {"layer": str(layer), "head": head}
    elif method in OF_A_CLASS:
        description["class"] = names[seen.classes.item()]
    image = denormalize(seen.pixel_values, processor.image_mean, processor.image_std)[0]
    confidence, answer = probabilities.max(dim=0)
    return Explanation(names[answer.item()], confidence.item(), image, METHODS[method](seen, **options), description)


def draw_overlays(
    model: ViTCifarForImageClassification, processor: ViTImageProcessor, images: list[Image.Image], notes: list[str]
) -> Figure:
    """A row an RGB image: as the model sees it, the last layer's attention, both overlays, the answer and a note."""
    pixel_values = to_pixels(model, processor, images)
    with torch.inference_mode():
        outputs = model(pixel_values, output_attentions=True)
    maps = cls_map(outputs.attentions).values.float().cpu()
    images_seen = denormalize(pixel_values, processor.image_mean, processor.image_std)
    scores, labels = outputs.logits.softmax(-1).max(-1)
    columns = {
        "what the model sees": images_seen,
        "class-token attention": maps,
        "classic": classic_overlay(maps, images_seen),
        "colour": colour_overlay(maps, images_seen),
    }
    figure = Figure(figsize=(8, 2.07 * len(images)), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(images), len(columns), squeeze=False)):
        for (title, pictures), axis in zip(columns.items(), axes, strict=True):
            picture = pictures[row] if pictures.ndim == 3 else pictures[row].permute(1, 2, 0)
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[], title=title if row == 0 else "")
        answer = f"{model.config.id2label[labels[row].item()]} {scores[row]:.0%}"
        axes[0].set_ylabel("\n".join(filter(None, [answer, notes[row]])), parse_math=False)  # a class may be called $
    return figure
