"""`vit-cifar benchmark`: training and inference beside others, in one process, in turns, at the tutorial's size."""

import copy
import ctypes
import importlib.metadata
import importlib.util
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from ..configuration_vit_cifar import ViTCifarConfig
from ..errors import UserError
from ..modeling_vit_cifar import ViTCifarForImageClassification, sinusoidal_positions
from ..models import default_device
from ..training.arguments import fastest_attention, machine_supports_bf16, parse_arguments, recipe_model
from ..training.augmentation import Augmentation
from ..training.data import CIFAR10_MEAN, CIFAR10_STD, SAMPLE_NAME, ImageDataset, load_rows, load_split, normalize
from ..training.trainer import ViTCifarTrainer
from . import records

RECIPE = "tutorial_pe_conv"
WARM_UP_STEPS = 1
INFERENCE_BATCH = 64
PROJECTED = ", with output projection"
STOCK = "transformers' ViT, stock Trainer, per-image transforms"
FORMATS = {"float32": torch.float32, "bf16": torch.bfloat16}


class PlainAttention(nn.Module):
    """(B, N, D) -> (B, N, D), as the tutorial writes it: three Linears, explicit softmax, no output projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        heads = (batch, tokens, self.heads, width // self.heads)
        query, key, value = (part(x).view(heads).transpose(1, 2) for part in (self.query, self.key, self.value))
        attention = (query @ key.transpose(-1, -2) / heads[-1] ** 0.5).softmax(dim=-1)
        return (attention @ value).transpose(1, 2).reshape(batch, tokens, width)


class PlainLayer(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), PlainAttention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(x)
        return x + self.mlp(x)


class PlainViT(nn.Module):
    """The tutorial's convolutional variant in plain PyTorch: (B, 3, 32, 32) -> logits (B, 10)."""

    def __init__(self, config: ViTCifarConfig):
        super().__init__()
        width, size = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(3, width, kernel_size=size, stride=size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.register_buffer("positions", sinusoidal_positions((config.image_size // size) ** 2 + 1, width))
        sizes = (width, config.num_attention_heads, config.intermediate_size)
        self.layers = nn.Sequential(*(PlainLayer(*sizes) for _ in range(config.num_hidden_layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.num_labels))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        return self.head(self.layers(tokens)[:, 0])


@dataclass
class Contender:
    """One row: `run(steps)` returns the seconds of that many steps, each of one batch."""

    name: str
    number_format: str
    run: Callable[[int], float]
    parameters: int | None = None
    is_ours: bool = False
    has_projection: bool = True  # after attention, which mixes the heads; like is compared with like
    rates: list[float] = field(default_factory=list)  # images a second, one for each round
    peak_memory_mib: float | None = None  # on top of what the process held before

    def row(self) -> dict:
        return {
            "name": self.name,
            "number_format": self.number_format,
            "parameters": self.parameters,
            "images_per_second": round(statistics.median(self.rates), 1),
            "spread": [round(min(self.rates), 1), round(max(self.rates), 1)],
            "peak_memory_mib": None if self.peak_memory_mib is None else round(self.peak_memory_mib),
        }


class StepTimes(TrainerCallback):
    """The time at the end of every step."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, *args, **kwargs) -> None:
        synchronize()
        self.times.append(time.perf_counter())


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[], object], steps: int) -> float:
    """Seconds of `steps` calls, after one that is not counted."""
    for _ in range(WARM_UP_STEPS):
        step()
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return time.perf_counter() - start


def timed_trainer(make: Callable[[int], Trainer], steps: int) -> float:
    trainer, times = make(WARM_UP_STEPS + steps), StepTimes()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(times)
    trainer.train()
    return times.times[-1] - times.times[WARM_UP_STEPS - 1]


def take_turns(contenders: list[Contender], rounds: int, steps: int, batch_size: int) -> None:
    """All contenders once a round, each round from another one on: a slow minute of the machine meets all of them."""
    for number in range(rounds):
        start = number % len(contenders)
        for contender in contenders[start:] + contenders[:start]:
            with PeakMemory() as memory:
                contender.rates.append(batch_size * steps / contender.run(steps))
            if memory.mib is not None:
                contender.peak_memory_mib = max(contender.peak_memory_mib or 0, memory.mib)


class PeakMemory:
    """`mib`: the most memory in use meanwhile, on top of what was in use before; None where it cannot be told."""

    mib: float | None = None
    before: int | None = None

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)  # what earlier contenders freed goes back, or this one would seem to need none
            with suppress(OSError):  # a kernel may be built without it
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is in use
                self.before = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *error: object) -> None:
        if torch.cuda.is_available():
            self.mib = (torch.cuda.max_memory_allocated() - self.before) / 2**20
        elif self.before is not None:
            peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
            self.mib = (int(peak[1]) * 1024 - self.before) / 2**20


def ratio(of: Contender, to: Contender) -> dict:
    """Median, smallest and largest ratio of the two rates in the same round."""
    ratios = [a / b for a, b in zip(of.rates, to.rates, strict=True)]
    return {
        "of": f"{of.name}, {of.number_format}",
        "to": f"{to.name}, {to.number_format}",
        "median": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def training_contenders(config: ViTCifarConfig, batch_size: int, formats: list[str], folder: str) -> list[Contender]:
    """Our training step, the plain loop, transformers' ViT under stock Trainer, timm's ViT where it is installed."""
    device = default_device()
    sample = load_split(SAMPLE_NAME, "train")
    many = torch.arange(batch_size * 50) % len(sample)
    train_set = sample.subset(many)
    rows, transform = load_rows(SAMPLE_NAME)["train"].select(many.tolist()), per_image_transform()
    rows.set_transform(
        lambda batch: {"pixel_values": [transform(i.convert("RGB")) for i in batch["img"]], "labels": batch["label"]}
    )
    pixels = normalize(train_set.images[:batch_size], CIFAR10_MEAN, CIFAR10_STD).to(device)
    labels = train_set.labels[:batch_size].to(device)
    contenders = []
    for number_format in formats:
        bf16 = number_format == "bf16"
        for like in (config, projected(config)):
            contenders.append(ours(like, train_set, batch_size, bf16, folder))
        loops = {"plain PyTorch loop, the tutorial's model": PlainViT(config)}
        if timm_model := timm_vit(config):
            loops["plain PyTorch loop, timm's ViT"] = timm_model
        for name, model in loops.items():
            run, has_projection = plain_loop(model.to(device), pixels, labels, bf16), not isinstance(model, PlainViT)
            contenders.append(Contender(name, number_format, run, count(model), has_projection=has_projection))
        stock = ViTForImageClassification(transformers_config(config))
        arguments = {
            "output_dir": folder,
            "per_device_train_batch_size": batch_size,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,  # as the others; its optimizer stays stock, fused AdamW
            "bf16": bf16,
            "use_cpu": device.type == "cpu",
            "dataloader_pin_memory": device.type == "cuda",
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "save_strategy": "no",
        }
        make = partial(stock_trainer, stock, rows, arguments)
        contenders.append(Contender(STOCK, number_format, partial(timed_trainer, make), count(stock)))
    return contenders


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stock_trainer(model: nn.Module, rows: datasets.Dataset, arguments: dict, steps: int) -> Trainer:
    return Trainer(model, TrainingArguments(**arguments, max_steps=steps), train_dataset=rows)


def ours(config: ViTCifarConfig, train_set: ImageDataset, batch_size: int, bf16: bool, folder: str) -> Contender:
    """What train.py does, Trainer and augmentation included."""
    words = ["--recipe", RECIPE, "--output_dir", folder, "--bf16", str(bf16), "--disable_tqdm", "true"]
    words += ["--per_device_train_batch_size", str(batch_size), "--eval_strategy", "no", "--save_strategy", "no"]
    words += ["--logging_strategy", "no", "--load_best_model_at_end", "false"]
    words += ["--use_cpu", str(not torch.cuda.is_available())]
    model = own_model(config, fastest_attention(bf16, default_device()))

    def make(steps: int) -> Trainer:
        recipe, args, _ = parse_arguments([*words, "--max_steps", str(steps)])
        return ViTCifarTrainer(model, args, recipe, train_set, train_set, CIFAR10_MEAN, CIFAR10_STD)

    has_projection = config.attention_output_projection
    name = f"vit-cifar, train.py{PROJECTED if has_projection else ''}"
    number_format = "bf16" if bf16 else "float32"
    return Contender(name, number_format, partial(timed_trainer, make), count(model), True, has_projection)


def projected(config: ViTCifarConfig) -> ViTCifarConfig:
    return ViTCifarConfig.from_dict(config.to_dict() | {"attention_output_projection": True})


def own_model(config: ViTCifarConfig, attention: str) -> ViTCifarForImageClassification:
    # A config of its own: models that share one share its attention implementation.
    return ViTCifarForImageClassification._from_config(copy.deepcopy(config), attn_implementation=attention)


def plain_loop(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, bf16: bool) -> Callable[[int], float]:
    """The loop that everyone writes, on a batch that lies ready."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return partial(timed, step)


def inference_contenders(config: ViTCifarConfig, batch_size: int, formats: list[str]) -> list[Contender]:
    device = default_device()
    pixels = torch.randn(batch_size, 3, config.image_size, config.image_size, device=device)
    contenders = []
    for number_format in formats:
        dtype = FORMATS[number_format]
        attention = fastest_attention(number_format == "bf16", device)
        own = own_model(config, attention)
        like = own_model(projected(config), attention)
        models = {
            "vit-cifar": (own, {}),
            f"vit-cifar{PROJECTED}": (like, {}),
            f"vit-cifar{PROJECTED}, all maps": (like, {"output_attentions": True}),
            "transformers' ViT": (ViTForImageClassification(transformers_config(config)), {}),
        }
        if timm_model := timm_vit(config):
            models["timm's ViT"] = (timm_model, {})
        for name, (model, options) in models.items():
            step = partial(infer, model.to(device, dtype).eval(), pixels.to(dtype), options)
            is_ours, has_projection = model in (own, like), model is not own
            run = partial(timed, step)
            contenders.append(Contender(name, number_format, run, count(model), is_ours, has_projection))
    return contenders


@torch.inference_mode()
def infer(model: nn.Module, pixels: torch.Tensor, options: dict) -> None:
    model(pixels, **options)


def transformers_config(config: ViTCifarConfig) -> ViTConfig:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    return ViTConfig(**{name: getattr(config, name) for name in names}, num_labels=config.num_labels)


def timm_vit(config: ViTCifarConfig) -> nn.Module | None:
    if importlib.util.find_spec("timm") is None:
        return None
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        num_classes=config.num_labels,
    )


def per_image_transform() -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CIFAR10_MEAN, CIFAR10_STD),
        ]
    )


def input_pipeline(batch_size: int) -> dict:
    """Images a second of our batches against one PIL image after another with the same augmentation."""
    sample = load_split(SAMPLE_NAME, "train")
    augmentation = Augmentation(len(sample), 0, "random", 4)
    to_pil, transform = v2.ToPILImage(), per_image_transform()
    pictures = [to_pil(image) for image in sample.images]
    indices = torch.arange(batch_size) % len(sample)

    def batched() -> None:
        batch = sample.__getitems__(indices)
        images = augmentation(batch["pixel_values"].to(default_device()), batch["sample_index"], 0)
        normalize(images, CIFAR10_MEAN, CIFAR10_STD)

    def one_by_one() -> None:
        torch.stack([transform(pictures[index]) for index in indices.tolist()])

    both = [
        Contender("whole batch", "uint8", partial(timed, batched)),
        Contender("image by image, PIL", "uint8", partial(timed, one_by_one)),
    ]
    take_turns(both, rounds=10, steps=20, batch_size=batch_size)  # fewer steps measure the start of a turn
    return {
        "images_per_second": both[0].row()["images_per_second"],
        "per_image_pil_transforms_images_per_second": both[1].row()["images_per_second"],
        "ratio": ratio(*both),
    }


def matmul_rate(number_format: str, rows: int, inner: int, columns: int, repeats: int) -> float:
    """The best rate that was seen of products (rows, inner) × (inner, columns), in FLOP a second."""
    device = default_device()
    a, b = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    a, b = a.to(FORMATS[number_format]), b.to(FORMATS[number_format])
    products = 10
    return products * 2 * rows * inner * columns / min(timed(lambda: a @ b, products) for _ in range(repeats))


def training_flops(config: ViTCifarConfig) -> int:
    """Multiplications and additions of one image's forward and backward pass in matrix products and convolutions."""
    model = own_model(config, "eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, config.image_size, config.image_size), labels=torch.zeros(1).long()).loss.backward()
    return counter.get_total_flops()


def benchmark(batch_size: int = 128, rounds: int = 5, steps: int = 3) -> dict:
    """The benchmark record: rows of images a second, ratios with their spread, shares of a step.

    Raises:
        UserError: several GPUs, which Trainer would share one process's batch among.
    """
    if (gpus := torch.cuda.device_count()) > 1:
        raise UserError(f"benchmark: expected one GPU at most (CUDA_VISIBLE_DEVICES=0), got {gpus}")
    fields = recipe_model(RECIPE)
    config = ViTCifarConfig(**fields)
    formats = ["bf16", "float32"] if machine_supports_bf16() else ["float32"]
    best = formats[0]
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    shapes = {
        "2048 x 2048 x 2048": (2048, 2048, 2048),
        "the MLP's own": (batch_size * tokens, config.hidden_size, config.intermediate_size),
    }
    rates = {(n, name): matmul_rate(n, *shape, rounds) for n in formats for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        training = training_contenders(config, batch_size, formats, folder)
        take_turns(training, rounds, steps, batch_size)
    inference = inference_contenders(config, INFERENCE_BATCH, formats)
    take_turns(inference, rounds, 4 * steps, INFERENCE_BATCH)
    # Before and after: the machine may slow down meanwhile.
    rates = {(n, name): max(rate, matmul_rate(n, *shapes[name], rounds)) for (n, name), rate in rates.items()}
    pipeline = input_pipeline(batch_size)

    own, flops = training[0], training_flops(config)
    own_rate = statistics.median(own.rates)
    pairs = []
    for contenders in (training, inference):
        for a in (c for c in contenders if c.is_ours):
            like = [c for c in contenders if not c.is_ours and c.has_projection == a.has_projection]
            pairs += [(a, c) for c in like if a is own or c.number_format == a.number_format]
    return {
        "command": f"vit-cifar benchmark --batch-size {batch_size} --rounds {rounds} --steps {steps}",
        "git_commit": records.git_commit(__file__),
        "versions": records.versions()
        | {"timm": importlib.metadata.version("timm") if importlib.util.find_spec("timm") else None},
        "hardware": records.hardware(default_device()),
        "environment": {name: os.environ[name] for name in ("LD_PRELOAD", "OMP_NUM_THREADS") if name in os.environ},
        "model": fields,
        "batch_size": {"training": batch_size, "inference": INFERENCE_BATCH},
        "rounds": rounds,
        "training": [c.row() for c in training],
        "inference": [c.row() for c in inference],
        "ratios": [ratio(a, b) for a, b in pairs],
        "matmul_gflops_per_second": {f"{n}, {name}": round(rate / 1e9) for (n, name), rate in rates.items()},
        "training_gflop_per_image": round(flops / 1e9, 3),
        "share_of_matmul_rate": {name: own_rate * flops / rates[best, name] for name in shapes},
        "input_pipeline": pipeline | {"share_of_a_step": own_rate / pipeline["images_per_second"]},
    }


def report(record: dict) -> str:
    """The record for the terminal."""
    lines = []
    for part in ("training", "inference"):
        lines.append(f"{part}, batch {record['batch_size'][part]}")
        lines.append(f"  {'images/s':>9}  {'spread':>15}  {'MiB':>6}  format   what")
        for row in record[part]:
            low, high = row["spread"]
            lines.append(
                f"  {row['images_per_second']:9.1f}  {low:7.1f}–{high:7.1f}  {row['peak_memory_mib'] or '':>6}  "
                f"{row['number_format']:<7}  {row['name']}"
            )
    if record["versions"]["timm"] is None:
        lines.append("timm is not installed: no rows of it")
    lines.append("ratios, median and spread over the rounds")
    for item in record["ratios"]:
        low, high = item["spread"]
        lines.append(f"  {item['median']:5.2f}× ({low:.2f}–{high:.2f})  {item['of']}  to  {item['to']}")
    pipeline, rates = record["input_pipeline"], record["matmul_gflops_per_second"]
    shares = record["share_of_matmul_rate"]
    lines += [
        f"matrix products in GFLOP/s: {'; '.join(f'{name}: {rate}' for name, rate in rates.items())}",
        *(f"our training step reaches {share:.0%} of that ({name})" for name, share in shares.items()),
        f"input pipeline: {pipeline['images_per_second']:,.0f} images/s, {pipeline['share_of_a_step']:.2%} of a step, "
        f"{pipeline['ratio']['median']:.0f} times per-image PIL transforms",
    ]
    return "\n".join(lines)
