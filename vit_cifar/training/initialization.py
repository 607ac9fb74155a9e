"""What a training starts from: a new model of the recipe, or a trained one made to fit other classes and sizes."""

from pathlib import Path

import torch
from torch import nn
from transformers import ViTImageProcessor

from ..configuration_vit_cifar import ViTCifarConfig
from ..modeling_vit_cifar import ViTCifarForImageClassification
from ..models import class_names, load_model
from .arguments import RecipeArguments
from .data import ImageDataset, image_processor, normalize

# What can change about a trained model; other fields would change what its weights mean.
ADAPTABLE = ("image_size", "drop_path_rate", "patch_drop_rate", "hidden_dropout_prob", "attention_probs_dropout_prob")


def load_start(
    recipe: RecipeArguments, folder: Path | None
) -> tuple[ViTCifarForImageClassification | None, ViTImageProcessor]:
    """(the trained model in the folder, or None without one; the processor of the model to come).

    Raises:
        ModelError: there is no such model.
        ValueError: the recipe's config fields are wrong, or not among ADAPTABLE for a trained model.
    """
    if named := {"id2label", "label2id", "num_labels"} & set(recipe.model):
        raise ValueError(
            f"config fields: expected none of the classes, which are the dataset's, got {', '.join(sorted(named))}"
        )
    if folder is None:
        pretrained, config, normalization = None, ViTCifarConfig(**recipe.model), ()
    elif others := [name for name in recipe.model if name not in ADAPTABLE]:
        raise ValueError(
            f"config_overrides: expected {', '.join(ADAPTABLE)} with --model_name_or_path, got {', '.join(others)}"
        )
    else:
        pretrained, processor = load_model(str(folder))
        config = ViTCifarConfig.from_dict(pretrained.config.to_dict() | recipe.model)
        normalization = processor.image_mean, processor.image_std
    if config.num_channels != 3:
        raise ValueError(f"num_channels: expected 3, as images are decoded to RGB, got {config.num_channels}")
    return pretrained, image_processor(config.image_size, *normalization)


def initial_model(
    recipe: RecipeArguments,
    pretrained: ViTCifarForImageClassification | None,
    processor: ViTImageProcessor,
    train_set: ImageDataset,
    attn_implementation: str,
) -> tuple[ViTCifarForImageClassification, str]:
    """(The model that training starts with, one line that says what it is); seed before.

    Raises:
        ValueError: a single class, or whitening without a convolutional stem.
    """
    if len(train_set.classes) < 2:
        raise ValueError(f"label_column: expected two classes or more, got {', '.join(train_set.classes)} alone")
    if pretrained is not None:
        model, said = adapt(pretrained, train_set.classes, attn_implementation, **recipe.model)
        if recipe.freeze_body:
            model.vit.requires_grad_(False)
            said += ", body frozen"
        return model, f"from {recipe.model_name_or_path}: {said}"
    config = ViTCifarConfig(**recipe.model, id2label=dict(enumerate(train_set.classes)))
    model = ViTCifarForImageClassification._from_config(config, attn_implementation=attn_implementation)
    if not recipe.whiten_first_convolution:
        return model, "from random weights"
    if config.patch_embedding != "conv_stem":
        raise ValueError(f"whiten_first_convolution: expected patch_embedding conv_stem, got {config.patch_embedding}")
    whiten(model.vit.embeddings.patch_embeddings.projection[0], train_set, processor.image_mean, processor.image_std)
    return model, "from random weights, the first convolution from training patches"


@torch.no_grad()
def adapt(
    pretrained: ViTCifarForImageClassification, classes: list[str], attn_implementation: str, **fields: object
) -> tuple[ViTCifarForImageClassification, str]:
    """(A trained model with other classes or another image size, one line that says what is new); seed before.

    Another list of classes gets a new head. Another image size gets a learned position table that starts as the old
    table, learned or sinusoidal, interpolated to the new grid.

    Args:
        fields: of the config, from ADAPTABLE.
    """
    old, weights, said = pretrained.config, pretrained.state_dict(), []
    old_classes = class_names(old)
    if classes == old_classes:
        said.append(f"head kept: {len(classes)} classes")
    else:
        said.append(f"new head: {len(classes)} classes ({_some(classes)}) in place of {len(old_classes)}")
    config = ViTCifarConfig.from_dict(
        old.to_dict() | fields | {"id2label": dict(enumerate(classes)), "label2id": None, "num_labels": len(classes)}
    )
    if config.image_size != old.image_size:
        config.position_embedding = "learned"
        size = config.image_size
        weights["vit.embeddings.position_embeddings"] = pretrained.vit.embeddings.positions(size, size)
        said.append(f"positions interpolated from {old.image_size} to {size} px")
    # float32, whatever the weights were saved in: a step of 1e-4 is below bf16's resolution.
    model = ViTCifarForImageClassification._from_config(
        config, attn_implementation=attn_implementation, dtype=torch.float32
    )
    if classes != old_classes:
        weights |= {f"classifier.{name}": value for name, value in model.classifier.state_dict().items()}
    model.load_state_dict(weights)
    return model, ", ".join(said)


def _some(classes: list[str]) -> str:
    return ", ".join(classes) if len(classes) <= 10 else f"{', '.join(classes[:9])} … {classes[-1]}"


@torch.no_grad()
def whiten(convolution: nn.Conv2d, train_set: ImageDataset, mean: list[float], std: list[float]) -> None:
    """Filters of the first convolution from the training images: the principal components of their patches, largest
    first, then the same with the other sign (airbench, arXiv:2404.00498, section 3.2); what is left stays random.

    The scale that makes the outputs white is left to the BatchNorm behind it.
    """
    size, count = convolution.kernel_size[0], len(convolution.weight)
    some = train_set.images[:: max(1, len(train_set) // 2000)]  # from everywhere: folders are sorted by class
    covariance = 0
    for images in some.split(100):
        # float64: the smallest components are 1/500 of the largest.
        patches = nn.functional.unfold(normalize(images, mean, std).double(), size).transpose(1, 2).flatten(0, 1)
        covariance += patches.T @ patches  # (channels * size * size, the same)
    filters = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)
    filters = torch.cat([filters, -filters])[:count]
    convolution.weight[: len(filters)] = filters.view(-1, *convolution.weight.shape[1:])
