"""Draws docs/overlays.png, README's picture: image, attention map, classic and colour overlay, prediction.

python docs/overlays.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from vit_cifar.explain.attention import cls_map
from vit_cifar.explain.overlay import classic_overlay, colour_overlay, denormalize
from vit_cifar.models import load_model

EXAMPLES = Path(__file__).parents[1] / "vit_cifar" / "demo" / "assets" / "examples"
NAMES = ("ship", "bird", "horse")


def main() -> None:
    model, processor = load_model()
    files = [Image.open(EXAMPLES / f"{name}.png").convert("RGB") for name in NAMES]
    pixels = processor(files, return_tensors="pt").pixel_values
    with torch.inference_mode():
        outputs = model(pixels, output_attentions=True)
    maps = cls_map(outputs.attentions).values
    images = denormalize(pixels, processor.image_mean, processor.image_std)
    scores, labels = outputs.logits.softmax(-1).max(-1)

    columns = {
        "what the model sees": images,
        "class-token attention": maps,
        "classic": classic_overlay(maps, images),
        "colour": colour_overlay(maps, images),
    }
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(NAMES), len(columns))):
        for (title, pictures), axis in zip(columns.items(), axes, strict=True):
            picture = pictures[row]
            axis.imshow(picture if picture.ndim == 2 else picture.permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[], title=title if row == 0 else "")
        axes[0].set_ylabel(f"{model.config.id2label[labels[row].item()]} {scores[row]:.0%}")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
