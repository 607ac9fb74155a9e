"""Fills README's tables from the records.

python docs/results.py
"""

import json
import re
from pathlib import Path

from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification
from vit_cifar.evaluation.records import RECORD_NAME, read_record, results_row
from vit_cifar.training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
NOT_RUN_YET = ("small", "small_long")  # they need a GPU


def runs() -> dict[str, list[tuple[str, dict]]]:
    """{what a row is called: [(where a record is, the record), … one for each seed]}"""
    rows = {
        folder.name: [(f"hub_card/models/{folder.name}/{RECORD_NAME}", read_record(folder))]
        for folder in sorted((ROOT / "hub_card" / "models").iterdir())
    }
    seeds = sorted((ROOT / "docs" / "speedrun").glob("seed_*.json"))
    rows["speedrun"] = [(str(path.relative_to(ROOT)), json.loads(path.read_text())) for path in seeds]
    for variant in ("basic", "pe", "pe_conv"):
        for ending, protocol in (("", ""), ("_validation_out_of_train", ", validation out of train")):
            path = f"docs/tutorial/tutorial_{variant}{ending}.json"
            record = json.loads((ROOT / path).read_text())
            epochs = record["arguments"]["num_train_epochs"]
            rows[f"tutorial_{variant}, first {epochs:g} epochs{protocol}"] = [(path, record)]
    return rows


def not_run_yet(name: str) -> str:
    recipe, args, _ = parse_arguments(["--recipe", name, "--output_dir", "unused"])
    parameters = ViTCifarForImageClassification(ViTCifarConfig(**recipe.model)).num_parameters()
    return f"| {name} | {parameters:,} | {args.num_train_epochs:g} | not run yet | one GPU | |"


def results() -> str:
    """The trainings as Markdown: a row each, and the commands folded away below them."""
    rows = ["| model | parameters | passes | test accuracy | time | dataset |", "|---|---|---|---|---|---|"]
    rows += [results_row(name, found) for name, found in runs().items()]
    rows += [not_run_yet(name) for name in NOT_RUN_YET]
    commands = [f"- {name}: `{found[0][1]['command']}`" for name, found in runs().items()]
    return "\n".join(
        [*rows, "", "<details><summary>The command of each row</summary>", "", *commands, "", "</details>"]
    )


def fill(readme: str) -> str:
    for name, table in {"results": results()}.items():
        start, end = f"<!-- {name}: made by docs/results.py -->\n", f"<!-- end of {name} -->"
        readme = re.sub(f"{start}.*{end}", lambda _, t=f"{start}{table}\n{end}": t, readme, flags=re.DOTALL)
    return readme


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))


if __name__ == "__main__":
    main()
