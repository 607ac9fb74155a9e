"""Fills README's tables and the models' cards from the records.

python docs/results.py
"""

import json
import runpy
from pathlib import Path

from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification
from vit_cifar.evaluation.examination import calibration_words, read_examination, trust_table
from vit_cifar.evaluation.records import RECORD_NAME, fill_tables, read_record, results_row
from vit_cifar.hub.card import PICTURE_NAME, card_picture, model_card
from vit_cifar.hub.publish import CARD_NAME
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL
from vit_cifar.training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
FINETUNING = runpy.run_path(str(ROOT / "docs" / "finetuning.py"))
PAGE = runpy.run_path(str(ROOT / "docs" / "page.py"))
NOT_RUN_YET = ("small", "small_long")  # they need a GPU


def runs() -> dict[str, list[tuple[str, dict]]]:
    """{what a row is called: [(where a record is, the record), … one for each seed]}"""
    rows = {
        folder.name: [(f"hub_card/models/{folder.name}/{RECORD_NAME}", read_record(folder))]
        for folder in sorted((ROOT / "hub_card" / "models").iterdir())
    }
    seeds = sorted((ROOT / "docs" / "speedrun").glob("seed_*.json"))
    if seeds:
        rows["speedrun"] = [(str(path.relative_to(ROOT)), json.loads(path.read_text())) for path in seeds]
    path = "docs/speedrun/float32.json"
    rows["speedrun, a processor without bf16 units"] = [(path, json.loads((ROOT / path).read_text()))]
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
    trainings = runs()
    rows += [results_row(name, found) for name, found in trainings.items()]
    rows += [not_run_yet(name) for name in NOT_RUN_YET]
    commands = []
    for name, found in trainings.items():
        commit, command = found[0][1]["git_commit"], found[0][1]["command"]
        commands.append(f"- {name}, at commit {commit[:7]}{commit[40:]}: `{command}`")
    return "\n".join(
        [*rows, "", "<details><summary>The command of each row</summary>", "", *commands, "", "</details>"]
    )


def speed() -> str:
    """The benchmark's ratios on two machines that have bf16 units and on one that has none, as Markdown."""
    record, older, without, preloaded = (
        json.loads((ROOT / "docs" / f"benchmark{name}.json").read_text())
        for name in ("", "_older", "_float32", "_tcmalloc")
    )
    own, other = (_rates(found)["vit-cifar, train.py, bf16"]["images_per_second"] for found in (record, preloaded))
    renewed = record["git_commit"] == older["git_commit"]
    earlier = "" if renewed else " That was before the input pipeline became faster."
    notes = [
        f"The commands: {_commands(record, older)}. The machines have {record['hardware']['cores']} CPU cores and are "
        f"named here by their measured rate of bf16 matrix products. Batch {record['batch_size']['training']} in "
        f"training and {record['batch_size']['inference']} in inference; the median of {record['rounds']} and "
        f"{older['rounds']} rounds, their spread.",
        "In bf16 on a CPU `train.py` writes attention out (`eager`), because the fused kernel's backward pass is slow "
        "there; transformers' and timm's models keep their default, the fused one. Most of the training ratio to "
        'transformers\' ViT is this choice: `attn_implementation="eager"` gives it to theirs too.',
        f"At {_product_rate(record)} {_shares(record)}{earlier}",
        f"At {_product_rate(older)} {_shares(older)}",
        f"With `LD_PRELOAD` set to tcmalloc's library (Debian's `libtcmalloc-minimal4`) the first machine gave "
        f"{other:.0f} images/s for our training step, {other / own:.2f} times as many as with glibc's allocator in the "
        "run before, which is within their spread: nothing to gain.",
    ]
    parts = [
        _ratios(record, older),
        "\n".join(f"- {note}" for note in notes),
        "A processor without bf16 units, where `train.py` and the benchmark choose float32 by themselves:",
        _ratios(without),
        f"{_commands(without)}. At {_product_rate(without)} of float32 matrix products {_shares(without)}",
    ]
    return "\n\n".join(parts)


def _ratios(*records: dict) -> str:
    rows = ["| ours | theirs |", "|---|---|"]
    for found in records:
        rows[0] += f" images/s | ours to theirs, {_product_rate(found)} |"
        rows[1] += "---|---|"
    for items in zip(*(found["ratios"] for found in records), strict=True):
        ours, theirs = items[0]["of"], items[0]["to"]
        row = f"| {ours} | {theirs} |"
        for item, found in zip(items, records, strict=True):
            low, high = item["spread"]
            both = " to ".join(f"{_rates(found)[name]['images_per_second']:.0f}" for name in (ours, theirs))
            row += f" {both} | {item['median']:.2f}× ({low:.2f}–{high:.2f}) |"
        rows.append(row)
    return "\n".join(rows)


def _rates(found: dict) -> dict[str, dict]:
    return {f"{row['name']}, {row['number_format']}": row for part in ("training", "inference") for row in found[part]}


def _commands(*records: dict) -> str:
    return " and ".join(f"`{found['command']}` at commit {found['git_commit'][:7]}" for found in records)


def _product_rate(found: dict) -> str:
    """Of large products, in the first format of the record, the machine's faster one."""
    return f"{next(iter(found['matmul_gflops_per_second'].values()))} GFLOP/s"


def _shares(found: dict) -> str:
    pipeline = found["input_pipeline"]
    large, own_shape = (found["share_of_matmul_rate"][shape] for shape in ("2048 x 2048 x 2048", "the MLP's own"))
    return (
        f"our training step reaches {large:.0%} of that rate and {own_shape:.0%} of that of products in its own MLP's "
        f"shape; the input pipeline is {pipeline['share_of_a_step']:.2%} of a step and "
        f"{pipeline['ratio']['median']:.0f} times as fast as per-image PIL transforms."
    )


def finetuning() -> str:
    return FINETUNING["table"](json.loads(FINETUNING["RECORDS"].read_text()))


def faithfulness() -> str:
    """How far each kind of map can be trusted, as Markdown."""
    record = read_examination(BUNDLED_MODELS / DEFAULT_MODEL).record
    return f"{trust_table(record)} {calibration_words(record)}"


def page() -> str:
    return PAGE["words"](json.loads(PAGE["RECORD"].read_text()))


def faults() -> str:
    """What came of each fault that was tried at full size, as Markdown."""
    rows = ["| what | what came out | command |", "|---|---|---|"]
    record = json.loads((ROOT / "docs" / "faults.json").read_text())
    for name, row in record.items():
        rows.append(f"| {name.replace('_', ' ')} | {'; '.join(_said(row['figures']))} | `{row['command']}` |")
    if not record["dependencies"]["figures"]["audit"]["audited"]:
        rows += ["", "The advisories could not be reached, so pip-audit skipped every package: audit them yourself."]
    return "\n".join(rows)


def _said(figures: dict) -> list[str]:
    """Figures before their names; of lists, how long they are."""
    said = []
    for name, value in figures.items():
        name = name.replace("_", " ")
        if name == "versions":
            continue
        if isinstance(value, dict):
            said.append(f"{name}: {', '.join(_said(value))}")
        elif isinstance(value, bool):
            assert value, name
            said.append(name)
        elif isinstance(value, str):
            said.append(f"{name}: {value}")
        else:
            value = len(value) if isinstance(value, list) else value
            said.append(f"{value:.3g} {name}" if isinstance(value, float) else f"{value:,} {name}")
    return said


def fill_security(page: str) -> str:
    return fill_tables(page, "docs/results.py", {"faults": faults()})


def fill(readme: str) -> str:
    tables = {
        "results": results(),
        "speed": speed(),
        "finetuning": finetuning(),
        "faithfulness": faithfulness(),
        "page": page(),
    }
    return fill_tables(readme, "docs/results.py", tables)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))
    security = ROOT / "SECURITY.md"
    security.write_text(fill_security(security.read_text()))
    for folder in BUNDLED_MODELS.iterdir():
        model_card(folder, f"your-name/{folder.name}").save(folder / CARD_NAME)
        card_picture(folder, read_examination(folder)).savefig(folder / PICTURE_NAME, dpi=110)


if __name__ == "__main__":
    main()
