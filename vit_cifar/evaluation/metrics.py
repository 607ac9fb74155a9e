"""Numbers of a model on a split."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..training.data import DataError, ImageDataset, normalize


@dataclass
class Evaluation:
    """Result on one split.

    Attributes:
        accuracy: share of images classified rightly, 0..1.
        loss: mean cross-entropy in nats.
        per_class: class name -> accuracy on the images of that class (recall); a class without images is left out.
        confusion: (classes, classes) counts; row: label, column: prediction.
    """

    accuracy: float
    loss: float
    per_class: dict[str, float]
    confusion: torch.Tensor


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, processor: BaseImageProcessor, dataset: ImageDataset, batch_size: int = 500
) -> Evaluation:
    """Every image once, in evaluation mode, in the model's own number format.

    Raises:
        DataError: the dataset's classes are not those of the model.
    """
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if list(dataset.classes) != names:
        raise DataError(
            f"classes: expected those of the model ({', '.join(names)}), got those of the dataset "
            f"({', '.join(dataset.classes)})"
        )
    model.eval()
    logits = []
    for images in dataset.images.split(batch_size):
        images = normalize(images.to(model.device), processor.image_mean, processor.image_std)
        logits.append(model(images.to(model.dtype)).logits.float().cpu())
    logits = torch.cat(logits)

    count = len(names)
    confusion = torch.bincount(dataset.labels * count + logits.argmax(-1), minlength=count**2).view(count, count)
    per_class = {
        name: row[i].item() / row.sum().item()
        for i, (name, row) in enumerate(zip(names, confusion, strict=True))
        if row.sum()
    }
    return Evaluation(
        accuracy=confusion.trace().item() / len(dataset),
        loss=torch.nn.functional.cross_entropy(logits, dataset.labels).item(),
        per_class=per_class,
        confusion=confusion,
    )
