"""Runs the small steps that the recipes were found by and fills recipes.md from them.

python docs/recipes.py DATASET [OUTPUT_FOLDER]   # runs what recipes.json lacks, two at a time, one core each
python docs/recipes.py                           # only fills recipes.md
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from vit_cifar.evaluation.records import read_record

ROOT = Path(__file__).parents[1]
LOG, PAGE = ROOT / "docs" / "recipes.json", ROOT / "docs" / "recipes.md"
MARKS = ("<!-- steps: made by docs/recipes.py -->\n", "<!-- end of steps -->")
BASE = ["--recipe", "speedrun", "--num_train_epochs", "2"]
# One change each; validation decides, never the test split.
STEPS = {
    "speedrun's recipe, 2 passes": [],
    "the same, seed 1": ["--seed", "1"],
    "the same, seed 2": ["--seed", "2"],
    "AdamW for everything": ["--optimizer", "trainer"],
    "one 4×4 convolution in place of the stem": [
        *("--config_overrides", "patch_embedding=conv", "--whiten_first_convolution", "false")
    ],
    "first filters random": ["--whiten_first_convolution", "false"],
    "3 layers with an MLP of 288, as nano": ["--config_overrides", "num_hidden_layers=3,intermediate_size=288"],
    "width 128, 5 layers, an MLP of 256": [
        *("--config_overrides", "hidden_size=128,num_hidden_layers=5,num_attention_heads=4,intermediate_size=256")
    ],
    "flips drawn": ["--flip", "random"],
    "no cutout": ["--cutout_size", "0"],
    "CutMix for half of the images": ["--cutmix_probability", "0.5"],
    "no label smoothing": ["--label_smoothing_factor", "0"],
    "warm-up over 30% of the steps": ["--warmup_steps", "0.3"],
    "drop path 0.1": ["--config_overrides", "drop_path_rate=0.1"],
    "half of the patches dropped": ["--config_overrides", "patch_drop_rate=0.5"],
    "Muon's learning rate 0.03": ["--muon_learning_rate", "0.03"],
}


def train(name: str, dataset_name: str, folder: Path) -> dict:
    output = folder / re.sub(r"\W+", "_", name)
    words = [*BASE, *STEPS[name], "--dataset_name", dataset_name, "--dataset_title", "cifar10-jpeg-q75"]
    subprocess.run(
        [sys.executable, "train.py", *words, "--output_dir", str(output), "--disable_tqdm", "true"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return read_record(output)


def table(log: dict[str, dict]) -> str:
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


def fill(page: str, log: dict[str, dict]) -> str:
    start, end = map(re.escape, MARKS)
    return re.sub(f"{start}.*{end}", lambda _: f"{MARKS[0]}{table(log)}\n{MARKS[1]}", page, flags=re.DOTALL)


def main(dataset_name: str | None = None, output_folder: str = "runs/steps") -> None:
    log = json.loads(LOG.read_text()) if LOG.exists() else {}
    if dataset_name is not None:
        missing = [name for name in STEPS if name not in log]
        with ThreadPoolExecutor(2) as pool:
            runs = {pool.submit(train, name, dataset_name, Path(output_folder)): name for name in missing}
            for run in as_completed(runs):
                log[runs[run]] = run.result()
                LOG.write_text(json.dumps(log, indent=2, ensure_ascii=False) + "\n")
                print(f"{run.result()['validation_accuracy']:.2%}  {runs[run]}", flush=True)
    PAGE.write_text(fill(PAGE.read_text(), log))


if __name__ == "__main__":
    main(*sys.argv[1:])
