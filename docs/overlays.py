"""Draws docs/overlays.png, README's picture: image, attention map, classic and colour overlay, prediction.

python docs/overlays.py
"""

from pathlib import Path

from vit_cifar.explain.pictures import draw_overlays
from vit_cifar.images import open_image
from vit_cifar.models import load_model

EXAMPLES = Path(__file__).parents[1] / "vit_cifar" / "demo" / "assets" / "examples"
NAMES = ("ship", "bird", "horse")


def main() -> None:
    images = [open_image(EXAMPLES / f"{name}.png") for name in NAMES]
    figure = draw_overlays(*load_model(), images, notes=[""] * len(images))
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
