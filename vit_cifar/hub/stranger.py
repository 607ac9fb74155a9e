"""Uses a model folder as a stranger does, who has transformers and not this package. A program: publish.py runs it.

python -P stranger.py MODEL_FOLDER IMAGES.safetensors ANSWER.safetensors
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor


@torch.inference_mode()
def answer(model: PreTrainedModel, processor: BaseImageProcessor, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """uint8 images (B, 3, H, W) -> `logits` (B, classes) and `attentions` (B, layers, heads, N, N)."""
    outputs = model(**processor(list(images), return_tensors="pt"), output_attentions=True)
    return {"logits": outputs.logits, "attentions": torch.stack(outputs.attentions, dim=1)}


def main(folder: str, images: str, output: str) -> None:
    sys.modules["vit_cifar"] = None  # importing it raises ImportError from here on
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    AutoModel.from_pretrained(folder, trust_remote_code=True)  # the other class of the folder
    save_file(answer(model, processor, load_file(images)["images"]), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
