"""Numbers of a model on a split."""

from dataclasses import dataclass

import torch
from torchmetrics.functional.classification import multiclass_calibration_error
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..models import ModelError, class_names
from ..training.data import DataError, ImageDataset, normalize

BINS = 15  # of equal width, over the confidence: of the calibration error and of the reliability diagram


@dataclass
class Evaluation:
    """Result on one split.

    Attributes:
        accuracy: share of images classified correctly, 0..1.
        loss: mean cross-entropy in nats.
        per_class: class name -> accuracy on the images of that class (recall); a class without images is left out.
        confusion: (classes, classes) counts; row: label, column: prediction.
        logits: (images, classes), float32, in the split's order.
    """

    accuracy: float
    loss: float
    per_class: dict[str, float]
    confusion: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, processor: BaseImageProcessor, dataset: ImageDataset, batch_size: int = 500
) -> Evaluation:
    """Every image once, in evaluation mode, in the model's own number format.

    Raises:
        DataError: the dataset's classes are not those of the model.
        ModelError: the model's answers are not finite numbers.
    """
    names = class_names(model.config)
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
    if broken := (~logits.isfinite().all(-1)).sum().item():
        raise ModelError(f"logits: expected finite numbers, got NaN or infinity for {broken} of {len(logits)} images")

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
        logits=logits,
    )


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """What to divide the logits by for the smallest cross-entropy (Guo et al. 2017, arXiv:1706.04599, section 4.2).

    A result above 1 means that the model was too sure of itself. Fit it on images held out of training, never on the
    test split. It is 1 if every answer is right: the loss would fall without end as the temperature falls. Otherwise
    it is from 1 / 20 to 20: only few images lead farther.

    Args:
        logits: (N, classes). labels: (N,).
    """
    if (logits.argmax(-1) == labels).all():
        return 1.0
    log_temperature = torch.zeros(1, requires_grad=True)  # its exponential stays positive
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits.float() / log_temperature.exp(), labels)
        value.backward()
        return value

    optimizer.step(loss)
    return log_temperature.exp().clamp(1 / 20, 20).item()


def doubtful_below(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The largest confidence such that at most half of the answers given with it or less were right;
    0 if there is none, 1 if at most half of all are.

    Args:
        probabilities: (N, classes), of images held out of training. labels: (N,).
    """
    confidence, prediction = probabilities.max(dim=1)
    order = confidence.argsort()
    right = (prediction == labels)[order].float()
    share = right.cumsum(0) / torch.arange(1, len(right) + 1)
    half = (share <= 0.5).nonzero()
    if not len(half):
        return 0.0
    return confidence[order][half[-1]].item() if half[-1] + 1 < len(right) else 1.0


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): how far the confidence in the answer and the share of
    right answers are apart, on average over images, in 0..1.

    Args:
        probabilities: (N, classes). labels: (N,).
    """
    probabilities = probabilities.clamp(max=1 - torch.finfo(torch.float32).eps)  # torchmetrics gives 1 a bin of its own
    return multiclass_calibration_error(probabilities, labels, probabilities.shape[1], BINS, norm="l1").item()


def reliability(probabilities: torch.Tensor, labels: torch.Tensor) -> list[dict[str, float]]:
    """The points of a reliability diagram: for each bin of confidence that has images, their mean confidence, their
    accuracy and their number."""
    confidence, prediction = probabilities.max(dim=1)
    bin_of = (confidence * BINS).long().clamp(max=BINS - 1)  # [low, high), as in the calibration error
    points = []
    for number in bin_of.unique().tolist():
        inside = bin_of == number
        points.append(
            {
                "confidence": confidence[inside].mean().item(),
                "accuracy": (prediction == labels)[inside].float().mean().item(),
                "images": int(inside.sum()),
            }
        )
    return points
