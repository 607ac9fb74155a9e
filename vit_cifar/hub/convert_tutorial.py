"""`vit-cifar convert-tutorial`: a checkpoint of the tutorial that this package grew out of -> a model folder.

The tutorial saves `model.state_dict()` with torch.save. Its three models are those of the recipes tutorial_basic,
tutorial_pe and tutorial_pe_conv; a checkpoint's keys tell which one it is.
"""

from pathlib import Path

import torch

from ..configuration_vit_cifar import ViTCifarConfig
from ..errors import UserError, first_line
from ..integrity import write_checksums
from ..modeling_vit_cifar import ViTCifarForImageClassification
from ..training.arguments import recipe_model
from ..training.data import image_processor
from .folder import new_folder

# What to replace, in this order, to get from our names to the tutorial's.
RENAMES = (
    ("vit.embeddings.position_embeddings", "patchembedding.positions"),
    ("vit.embeddings.patch_embeddings.", "patchembedding."),
    ("vit.embeddings.", "patchembedding."),
    ("vit.layers.", "transformer."),
    ("layernorm_before.", "work1.fn.0."),
    ("attention.q_proj.", "work1.fn.1.query."),
    ("attention.k_proj.", "work1.fn.1.key."),
    ("attention.v_proj.", "work1.fn.1.value."),
    ("layernorm_after.", "work2.fn.0."),
    ("mlp.fc1.", "work2.fn.1.mlp.0."),
    ("mlp.fc2.", "work2.fn.1.mlp.3."),  # 1 and 2 are GELU and dropout
    ("vit.layernorm.", "mlp_head.0."),
    ("classifier.", "mlp_head.1."),
)


class ConversionError(UserError):
    """A checkpoint that is not one of the tutorial's; the message is one line."""


def convert_tutorial(checkpoint: str | Path, output_dir: str | Path) -> tuple[str, ViTCifarForImageClassification]:
    """Writes a checkpoint of the tutorial as a folder that `from_pretrained` loads: model, processor, remote code.

    Args:
        checkpoint: file with the tutorial's state dict; read with weights_only=True, so that it cannot run code.
        output_dir: a new or empty folder. It appears whole or not at all.

    Returns: the name of the recipe that describes the model, and the model.

    Raises:
        ConversionError: no such file, no state dict in it, or keys that are missing, unexpected or of another shape
            than the variant's.
        FolderError: an output_dir that holds something or cannot be written.
    """
    with new_folder(output_dir) as folder:
        tensors = _read_state_dict(checkpoint)
        if "patchembedding.projection.0.weight" in tensors:  # the convolution; elsewhere the linear layer comes second
            recipe = "tutorial_pe_conv"
        else:
            recipe = "tutorial_basic" if "patchembedding.positions" in tensors else "tutorial_pe"
        model = ViTCifarForImageClassification(ViTCifarConfig(**recipe_model(recipe)))
        model.load_state_dict(_rename(tensors, model.state_dict(), recipe))
        model.save_pretrained(folder)
        image_processor(model.config.image_size).save_pretrained(folder)
        write_checksums(folder)
    return recipe, model.eval()


def _read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise ConversionError(f"checkpoint: expected a file, got {path}: no such file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise what they like on a file that is none of theirs
        raise ConversionError(
            f"checkpoint: expected a state dict saved by torch.save, got {path}: {first_line(error)}"
        ) from error
    if not isinstance(tensors, dict):
        raise ConversionError(f"checkpoint: expected a state dict, got {type(tensors).__name__} in {path}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(
                f"checkpoint: expected a state dict with tensors alone, got {type(tensor).__name__} at {name!r}: {path}"
            )
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
            raise ConversionError(f"checkpoint: expected dense tensors, got another kind at {name!r}: {path}")
    return tensors


def _rename(tensors: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], recipe: str) -> dict[str, torch.Tensor]:
    """The tutorial's tensors under our names, in our shapes."""
    theirs = {name: _tutorial_name(name, recipe) for name in ours}
    shapes = {theirs[name]: tuple(tensor.shape) for name, tensor in ours.items()}
    if "patchembedding.positions" in shapes:
        shapes["patchembedding.positions"] = shapes["patchembedding.positions"][1:]  # it has no batch dimension
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [name for name in tensors if name not in shapes],
        "misshapen": [
            f"{name} {tuple(tensors[name].shape)} instead of {shape}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    found = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if found:
        raise ConversionError(f"checkpoint: expected the {len(shapes)} tensors of {recipe}, got some {found}")
    if odd := [n for n, t in tensors.items() if not (t.is_floating_point() and t.float().isfinite().all())]:
        raise ConversionError(f"checkpoint: expected finite real numbers, got others in {_some(odd)}")
    return {name: tensors[theirs[name]].view_as(ours[name]) for name in ours}


def _tutorial_name(name: str, recipe: str) -> str:
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    place = 0 if recipe == "tutorial_pe_conv" else 1
    return name.replace("patchembedding.projection.", f"patchembedding.projection.{place}.")


def _some(names: list) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
