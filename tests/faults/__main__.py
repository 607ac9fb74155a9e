"""Tries what a user, a crash or a stranger can do, at full size; docs/faults.json and SECURITY.md say what came out.

python -m tests.faults           # every row, about an hour; nothing else should run meanwhile
python -m tests.faults images    # one of them

CIFAR10_DATASET names a local folder with the real dataset, which `cache` decodes.
"""

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.faults import environment, images, page, training
from vit_cifar.evaluation import records

ROOT = Path(__file__).parents[2]
RECORD, SECURITY = ROOT / "docs" / "faults.json", ROOT / "SECURITY.md"
fill_security = runpy.run_path(str(ROOT / "docs" / "results.py"))["fill_security"]
# Each raises AssertionError if anything is not as SECURITY.md promises, and returns its figures.
ROWS: dict[str, Callable[[], dict]] = {
    "images": images.decode,
    "http": page.http,
    "load": page.load,
    "users": page.users,
    "network": page.network,
    "kill": training.kill,
    "full_disk": training.full_disk,
    "cache": lambda: training.cache(os.environ["CIFAR10_DATASET"]),
    "offline": environment.offline,
    "dependencies": environment.dependencies,
}


def main(names: list[str]) -> None:
    if unknown := set(names) - set(ROWS):
        sys.exit(f"expected rows of {', '.join(ROWS)}, got {', '.join(sorted(unknown))}")
    commit = records.git_commit(__file__)  # before the record itself is a change
    for name in names or ROWS:
        figures = ROWS[name]()
        record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        record[name] = {
            "command": f"python -m tests.faults {name}",
            "git_commit": commit,
            "versions": records.versions(),
            "hardware": records.hardware(torch.device("cpu")),
            "figures": figures,
        }
        records.write_json(RECORD, record)
        SECURITY.write_text(fill_security(SECURITY.read_text()))  # a test holds them together
        print(name, json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
