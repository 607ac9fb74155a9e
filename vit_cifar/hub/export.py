"""`vit-cifar export`: a model folder -> a folder for onnxruntime, or one that transformers' own ViT loads.

Whatever is written is read back as its user would, compared with the model it was made of, and only then appears.

Letters in shapes: B batch, C channels, H and W image height and width, L layers, A heads, N tokens.
"""

import importlib.metadata
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from ..configuration_vit_cifar import ViTCifarConfig
from ..errors import UserError
from ..evaluation import records
from ..evaluation.metrics import evaluate
from ..integrity import WEIGHTS_NAME, sha256
from ..modeling_vit_cifar import ViTCifarForImageClassification
from ..models import load_model, local_folder
from ..training.data import load_split
from .folder import new_folder

ONNX, VIT = "onnx", "vit"
FILES = {ONNX: "model.onnx", VIT: WEIGHTS_NAME}  # what holds the weights of each
OPSET = 20  # the first one with GELU
EXPORT_RECORD_NAME = "export_record.json"
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 5)  # neither is the one that the graph is traced with
VIT_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "image_size", "patch_size", "num_channels", "qkv_bias"),
    *("id2label", "label2id", "problem_type"),
)


class ExportError(UserError):
    """A model that has no such form, or a missing package; the message is one line."""


def export_model(
    name: str,
    kind: str,
    output_dir: str | Path,
    dataset_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> dict:
    """Writes a model, in float32, in a form that needs none of this package's code.

    "onnx": `model.onnx` with input `pixel_values` (B, C, H, W), any B, and outputs `logits` (B, classes) and
    `attentions` (B, L, A, N, N), the maps of all layers, first layer first. config.json beside it names the classes.
    "vit": a folder that `AutoModelForImageClassification` and `ViTForImageClassification` load without remote code,
    with explicit attention unless another one is asked for, so that `output_attentions=True` gives the maps.

    Args:
        name: as for `load_model`.
        kind: "onnx" or "vit".
        output_dir: a new or empty folder. It appears whole or not at all.
        dataset_name, image_column, label_column: as for `load_split`: the exported model is measured on the test split.
            Without a dataset it is not measured.

    Returns: what export_record.json says: source, checksums, the largest differences from the model in PyTorch,
        `test_accuracy` (0..1, or None), versions.

    Raises:
        ExportError: another kind, a model that stock ViT cannot hold, packages that are not installed, or outputs
            further than 1e-4 from the model's.
        ModelError, DataError, FolderError: the model, the dataset or output_dir cannot be used.
    """
    if kind not in FILES:
        raise ExportError(f"format: expected {' or '.join(FILES)}, got {kind!r}")
    versions = records.versions() | (_onnx_versions() if kind == ONNX else {})
    source = local_folder(name)
    model, processor = load_model(str(source))
    model.float()
    if not (source / WEIGHTS_NAME).is_file():
        raise ExportError(f"model: expected one file {WEIGHTS_NAME} in {name}, got none")
    if kind == VIT and model.config.patch_embedding == "conv_stem":
        raise ExportError(
            "format: expected onnx for this model, got vit: transformers' ViT has a single convolution with kernel and "
            f"stride {model.config.patch_size} where this model has the convolutional stem of patch_embedding=conv_stem"
        )
    with new_folder(output_dir) as folder:
        columns = (model.config.image_size, image_column, label_column)
        dataset = load_split(dataset_name, "test", *columns) if dataset_name else None
        processor.save_pretrained(folder)
        exported = (_export_onnx if kind == ONNX else _export_vit)(model, folder)
        record = {
            "format": kind,
            "model": records.public_name(name),
            "source_weights_sha256": records.weights_sha256(source),
            "file": FILES[kind],
            "sha256": sha256(folder / FILES[kind]),
            "opset": OPSET if kind == ONNX else None,
            "largest_difference": _compare(model, exported),
            "dataset": records.public_name(dataset_name) if dataset_name else None,
            "images": len(dataset) if dataset else None,
            # In small batches: an ONNX file always gives all maps.
            "test_accuracy": evaluate(exported, processor, dataset, batch_size=100).accuracy if dataset else None,
            "versions": versions,
        }
        records.write_json(folder / EXPORT_RECORD_NAME, record)
    return record


def report(record: dict) -> str:
    """Two lines: how close the export is, and what it scores."""
    far = record["largest_difference"]
    first = f"largest difference from PyTorch: logits {far['logits']:.1e}, attentions {far['attentions']:.1e}"
    if record["test_accuracy"] is None:
        return f"{first}\ntest accuracy not measured: name a dataset with --dataset_name"
    return f"{first}\ntest accuracy {record['test_accuracy']:.2%} on {record['images']:,} images of {record['dataset']}"


class OnnxModel(nn.Module):
    """An exported file in onnxruntime, called as the model that it was made of.

    Args:
        path: of model.onnx. config: of that model.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, path: Path, config: ViTCifarConfig):
        import onnxruntime  # of the extra `export`

        super().__init__()
        self.config = config
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # left alone, it takes every core of the machine
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> ImageClassifierOutput:
        found = self.session.run(["logits", "attentions"], {"pixel_values": pixel_values.numpy()})
        logits, maps = (torch.from_numpy(array) for array in found)
        return ImageClassifierOutput(logits=logits, attentions=maps.unbind(1))  # one (B, A, N, N) a layer


class _WithMaps(nn.Module):
    """Logits and stacked maps as a plain tuple, which ONNX can name."""

    def __init__(self, model: ViTCifarForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(pixel_values, output_attentions=True)
        return outputs.logits, torch.stack(outputs.attentions, dim=1)  # L × (B, A, N, N) -> (B, L, A, N, N)


def _export_onnx(model: ViTCifarForImageClassification, folder: Path) -> OnnxModel:
    """Writes model.onnx and config.json; returns the file as onnxruntime runs it."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    program = torch.onnx.export(
        _WithMaps(model).eval(),
        (_images(model.config, 2),),
        input_names=["pixel_values"],
        output_names=["logits", "attentions"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    ClearMetadataAndDocStringPass()(program.model)  # stack traces, with the paths of this machine
    program.save(folder / FILES[ONNX], external_data=False)
    # Without auto_map: the folder holds no code that it could name.
    described = {key: value for key, value in model.config.to_diff_dict().items() if key != "auto_map"}
    records.write_json(folder / "config.json", described | {"dtype": "float32"})
    return OnnxModel(folder / FILES[ONNX], model.config)


def _export_vit(model: ViTCifarForImageClassification, folder: Path) -> ViTForImageClassification:
    """Writes model.safetensors and config.json; returns the folder's model as transformers loads it."""
    config, state = model.config, dict(model.state_dict())
    embeddings, width = model.vit.embeddings, config.hidden_size
    state["vit.embeddings.position_embeddings"] = embeddings.positions(config.image_size, config.image_size).detach()
    if config.patch_embedding == "linear":
        key = "vit.embeddings.patch_embeddings.projection.weight"
        by_place = state[key].view(width, config.patch_size, config.patch_size, config.num_channels)
        state[key] = by_place.permute(0, 3, 1, 2).contiguous()  # (D, row, column, C) -> (D, C, row, column)
    if not config.attention_output_projection:
        for layer in range(config.num_hidden_layers):
            state[f"vit.layers.{layer}.attention.o_proj.weight"] = torch.eye(width)
            state[f"vit.layers.{layer}.attention.o_proj.bias"] = torch.zeros(width)
    ranges = {name: float(getattr(config, name)) for name in ("initializer_range", "layer_norm_eps")}
    stock = ViTForImageClassification(ViTConfig(**{name: getattr(config, name) for name in VIT_FIELDS}, **ranges))
    stock.load_state_dict(state)
    stock.save_pretrained(folder)
    # transformers reads this key though it does not write it; its fused default would return no maps.
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    records.write_json(folder / "config.json", settings | {"attn_implementation": "eager"})
    return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)


def _onnx_versions() -> dict[str, str]:
    try:
        return {name: importlib.metadata.version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    except importlib.metadata.PackageNotFoundError as error:
        raise ExportError(f'format: onnx: expected {error.name}, got none: pip install "vit-cifar[export]"') from error


def _images(config: ViTCifarConfig, batch: int) -> torch.Tensor:
    """The same noise each time, spread as normalised images are: (B, C, H, W)."""
    size = (batch, config.num_channels, config.image_size, config.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def _compare(model: nn.Module, exported: nn.Module) -> dict[str, float]:
    """The largest absolute difference of logits and of maps.

    Raises:
        ExportError: one of them is above TOLERANCE.
    """
    far = {"logits": 0.0, "attentions": 0.0}
    for images in (_images(model.config, batch) for batch in CHECKED_BATCHES):
        ours, theirs = (network(images, output_attentions=True) for network in (model, exported))
        for name in far:
            a, b = (torch.stack(tuple(outputs[name])) for outputs in (ours, theirs))  # rows of logits, or layers
            difference = (a - b).abs().max().item()
            if not difference <= TOLERANCE:  # so written that a NaN is refused
                raise ExportError(f"{name}: expected those of the model to {TOLERANCE:g}, got {difference:.1e} off")
            far[name] = max(far[name], difference)
    return far
