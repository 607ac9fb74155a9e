"""Runs the small steps that the recipes were found by and fills recipes.md from them.

python docs/recipes.py DATASET [OUTPUT_FOLDER]   # runs what recipes.json lacks, two at a time, one core each; DATASET
                                                 # is cifar10-jpeg-q75, which the records name
python docs/recipes.py                           # only fills recipes.md
"""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from vit_cifar import ViTCifarForImageClassification, ViTCifarModel
from vit_cifar.evaluation.examination import EXAMINATION_NAME
from vit_cifar.evaluation.records import RECORD_NAME, epochs_trained, fill_tables, read_record, write_json
from vit_cifar.modeling_vit_cifar import ViTCifarAttention, ViTCifarConvStem
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL
from vit_cifar.training.augmentation import CUTMIX, Augmentation
from vit_cifar.training.trainer import ViTCifarTrainer

ROOT = Path(__file__).parents[1]
LOG, PAGE = ROOT / "docs" / "recipes.json", ROOT / "docs" / "recipes.md"
# Whole trainings that were not shipped: what was changed, and the record.
TRIED_SPEEDRUN = {
    "1.1 epochs": "speedrun/longer.json",
    "[steps.yaml](steps.yaml): 64 patches, batches of 128, shifts of 4, cutout": "speedrun/earlier.json",
}
TRIED_NANO = {
    "a stem of 24, 64, 64, 192, 192, 192, 2 layers with an MLP of 384, batches of 64, no cutout": "nano/wide_stem.json",
    "TrivialAugment for 70% of the images, drop path 0.05, first filters whitened": "nano/trivial_augment.json",
    "16 patches: 7 convolutions (24, 64, 64, 192, …), 1 layer, first filters whitened": "nano/sixteen_patches.json",
}
BASE = ["--recipe", "docs/steps.yaml", "--num_train_epochs", "2"]
NANO = "patch_size=8,stem_widths=[24,64,64,192,192,192,192],num_hidden_layers=1"
FINER = "stem_widths=[24,64,64,192,192,192]"
# One change each; validation decides, never the test split.
STEPS = {
    "docs/steps.yaml, 2 epochs": [],
    "the same, seed 1": ["--seed", "1"],
    "the same, seed 2": ["--seed", "2"],
    "AdamW for everything": ["--optimizer", "trainer"],
    "one 4×4 convolution in place of the stem": [
        *("--config_overrides", "patch_embedding=conv,stem_widths=null", "--whiten_first_convolution", "false")
    ],
    "first filters random": ["--whiten_first_convolution", "false"],
    "3 layers with an MLP of 288, as nano": ["--config_overrides", "num_hidden_layers=3,intermediate_size=288"],
    "width 128, 5 layers, an MLP of 256": [
        *("--config_overrides", "hidden_size=128,num_hidden_layers=5,num_attention_heads=4,intermediate_size=256")
    ],
    "flips drawn": ["--flip", "random"],
    "no cutout": ["--cutout_size", "0"],
    "CutMix for half of the images": ["--cutmix_probability", "0.5"],
    "mixup for half of the images": ["--cutmix_probability", "0.5"],
    "TrivialAugment for half of the images": ["--trivial_augment_probability", "0.5"],
    "no label smoothing": ["--label_smoothing_factor", "0"],
    "warm-up over 30% of the steps": ["--warmup_steps", "0.3"],
    "drop path 0.1": ["--config_overrides", "drop_path_rate=0.1"],
    "half of the patches dropped": ["--config_overrides", "patch_drop_rate=0.5"],
    "Muon's learning rate 0.03": ["--muon_learning_rate", "0.03"],
    "weight decay 0.2": ["--weight_decay", "0.2"],
    "7 convolutions to a 4×4 grid, 1 layer": ["--config_overrides", NANO],
    "6 convolutions to an 8×8 grid, 2 layers": ["--config_overrides", FINER],
    "weights averaged, EMA of 0.99": [],
    "query and key start mimetic": [],
    "filters start as the identity": [],
    "one 3×3 convolution per scale, 18 px a token": [],
    "the mean of the patches in place of the class token": [],
}


def mix_up() -> None:
    """Zhang et al. 2018, arXiv:1710.09412, the share uniform, in CutMix's place."""

    def mix(self: Augmentation, images: torch.Tensor, others: torch.Tensor, sample_index: torch.Tensor, epoch: int):
        mixed, _, share, *_ = self.draws(epoch)[sample_index, CUTMIX].unbind(1)
        share = torch.where(mixed < self.cutmix_probability, share, 0)
        return images.float().lerp(others.float(), share[:, None, None, None]).to(images.dtype), 1 - share

    Augmentation.cutmix = mix


def average_weights() -> None:
    class Average(TrainerCallback):
        def on_train_begin(self, *args: object, model: nn.Module, **kwargs: object) -> None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))

        def on_step_end(self, *args: object, model: nn.Module, **kwargs: object) -> None:
            self.average.update_parameters(model)

        def on_train_end(self, *args: object, model: nn.Module, **kwargs: object) -> None:
            model.load_state_dict(self.average.module.state_dict())

    after(ViTCifarTrainer, lambda trainer: trainer.add_callback(Average()))


def start_mimetic() -> None:
    """Query·key of each head near 0.7 times the identity plus 0.7 times noise (Trockman and Kolter 2023,
    arXiv:2305.09828, section 4)."""

    @torch.no_grad()
    def change(model: ViTCifarForImageClassification) -> None:
        for attention in (module for module in model.modules() if isinstance(module, ViTCifarAttention)):
            width, head = attention.q_proj.weight.shape[1], attention.head_dim
            for rows in (slice(start, start + head) for start in range(0, width, head)):
                product = 0.7 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width)
                left, values, right = torch.linalg.svd(product)
                attention.q_proj.weight[rows] = (left * values.sqrt()).T[:head]
                attention.k_proj.weight[rows] = (right * values.sqrt()[:, None])[:head]

    after(ViTCifarForImageClassification, change)


def start_as_identity() -> None:
    """The first filters of each convolution pass on what comes in; the rest stay random (airbench,
    arXiv:2404.00498, section 3.3)."""

    def change(model: ViTCifarForImageClassification) -> None:
        for stem in (module for module in model.modules() if isinstance(module, ViTCifarConvStem)):
            for convolution in (module for module in stem if isinstance(module, nn.Conv2d)):
                nn.init.dirac_(convolution.weight.data[: convolution.in_channels])

    after(ViTCifarForImageClassification, change)


def halve_stem() -> None:
    def change(stem: ViTCifarConvStem) -> None:
        for index in reversed(range(len(stem))):
            if index % 7 in (3, 4, 5):  # a scale is twice convolution, norm, activation, and then the pooling
                del stem[index]

    after(ViTCifarConvStem, change)


def pool_patches() -> None:
    forward = ViTCifarModel.forward

    def pooled(self: ViTCifarModel, *args: object, **kwargs: object):
        outputs = forward(self, *args, **kwargs)
        outputs.pooler_output = outputs.last_hidden_state[:, 1:].mean(dim=1)
        return outputs

    ViTCifarModel.forward = pooled


# What no argument of train.py changes, because no shipped recipe needs it.
CHANGES = {
    "mixup for half of the images": mix_up,
    "weights averaged, EMA of 0.99": average_weights,
    "query and key start mimetic": start_mimetic,
    "filters start as the identity": start_as_identity,
    "one 3×3 convolution per scale, 18 px a token": halve_stem,
    "the mean of the patches in place of the class token": pool_patches,
}


def after(kind: type, change: Callable) -> None:
    """Whatever is made of this kind is changed when it has been made."""
    make = kind.__init__

    def make_and_change(self: object, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)
        change(self)

    kind.__init__ = make_and_change


def run_step(name: str, *words: str) -> None:
    """One training, in a process of its own."""
    if name in CHANGES:
        CHANGES[name]()
    runpy.run_path(str(ROOT / "train.py"))["main"](list(words))


def train(name: str, dataset_name: str, folder: Path) -> dict:
    output = folder / re.sub(r"\W+", "_", name)
    words = [*BASE, *STEPS[name], "--dataset_name", dataset_name, "--dataset_title", "cifar10-jpeg-q75"]
    subprocess.run(
        [sys.executable, __file__, "step", name, *words, "--output_dir", str(output), "--disable_tqdm", "true"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return read_record(output)


def steps(log: dict[str, dict]) -> str:
    """The table of the small steps as Markdown."""
    if not log:
        return "The steps have not been run yet."
    rows = ["| step | parameters | validation accuracy | minutes on one core |", "|---|---|---|---|"]
    for name in STEPS:
        if name in log:
            run = log[name]
            rows.append(
                f"| {name} | {run['parameters']:,} | {run['validation_accuracy']:.2%} "
                f"| {run['wall_time_seconds'] / 60:.1f} |"
            )
    return "\n".join(rows)


def trainings(recipe: str, shipped: Path, tried: dict[str, str]) -> str:
    """The table of a recipe's whole trainings as Markdown."""
    rows = [f"| {recipe} | epochs | validation accuracy | test accuracy | minutes |", "|---|---|---|---|---|"]
    for name, path in {"as shipped": shipped, **{name: PAGE.parent / path for name, path in tried.items()}}.items():
        run = json.loads(path.read_text())
        link = os.path.relpath(path, PAGE.parent)
        rows.append(
            f"| {name} ([record]({link})) | {epochs_trained(run):g} "
            f"| {run['validation_accuracy']:.2%} | {run['test_accuracy']:.2%} "
            f"| {run['wall_time_seconds'] / 60:.1f} in {run['number_format']} |"
        )
    return "\n".join(rows)


def maps(tried: str) -> str:
    """How much the maps of the shipped nano and of one that was tried say, as Markdown."""
    rows = []
    for name, path in {
        "as shipped": BUNDLED_MODELS / DEFAULT_MODEL / EXAMINATION_NAME,
        f"the wider stem ([examination]({tried}))": PAGE.parent / tried,
    }.items():
        found = json.loads(path.read_text())["maps"]
        scores = {method: f"{numbers['score']:.3f}" for method, numbers in found["methods"].items()}
        if not rows:
            rows = [f"| nano, {found['images']} images | {' | '.join(scores)} |", "|---|" + "---|" * len(scores)]
        rows.append(f"| {name} | {' | '.join(scores.values())} |")
    return "\n".join(rows)


def fill(page: str, log: dict[str, dict]) -> str:
    speedrun = trainings("speedrun, seed 0", PAGE.parent / "speedrun" / "seed_0.json", TRIED_SPEEDRUN)
    nano = trainings("nano", BUNDLED_MODELS / DEFAULT_MODEL / RECORD_NAME, TRIED_NANO)
    return fill_tables(
        page,
        "docs/recipes.py",
        {"steps": steps(log), "speedrun": speedrun, "trainings": nano, "maps": maps("nano/wide_stem_examination.json")},
    )


def main(dataset_name: str | None = None, output_folder: str = "runs/steps") -> None:
    log = json.loads(LOG.read_text()) if LOG.exists() else {}
    if dataset_name is not None:
        missing, failed = [name for name in STEPS if name not in log], []
        if Path(dataset_name).exists():
            dataset_name = str(Path(dataset_name).resolve())  # trainings run in ROOT
        with ThreadPoolExecutor(2) as pool:
            runs = {pool.submit(train, name, dataset_name, Path(output_folder).resolve()): name for name in missing}
            for run in as_completed(runs):
                if run.exception():  # the others go on, and are in the log
                    failed.append(f"{runs[run]}: {run.exception()}")
                    continue
                log[runs[run]] = run.result()
                write_json(LOG, log)
                print(f"{run.result()['validation_accuracy']:.2%}  {runs[run]}", flush=True)
        if failed:
            sys.exit("\n".join(failed))
    PAGE.write_text(fill(PAGE.read_text(), log))


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        run_step(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
