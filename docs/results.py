"""Fills README's results table from the records.

python docs/results.py
"""

import json
import re
from pathlib import Path

from vit_cifar.evaluation.records import RECORD_NAME, read_record, results_table

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- results: made by docs/results.py -->\n", "<!-- end of results -->")


def records() -> dict[str, tuple[str, dict]]:
    """{what a row is called: (where its record is, the record)}"""
    rows = {
        folder.name: (f"hub_card/models/{folder.name}/{RECORD_NAME}", read_record(folder))
        for folder in sorted((ROOT / "hub_card" / "models").iterdir())
    }
    for variant in ("basic", "pe", "pe_conv"):
        for ending, protocol in (("", ""), ("_validation_out_of_train", ", validation out of train")):
            path = f"docs/tutorial/tutorial_{variant}{ending}.json"
            record = json.loads((ROOT / path).read_text())
            epochs = record["arguments"]["num_train_epochs"]
            rows[f"tutorial_{variant}, first {epochs:g} epochs{protocol}"] = (path, record)
    return rows


def fill(readme: str) -> str:
    start, end = map(re.escape, MARKS)
    table = f"{MARKS[0]}{results_table(records())}\n{MARKS[1]}"
    return re.sub(f"{start}.*{end}", lambda _: table, readme, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))


if __name__ == "__main__":
    main()
