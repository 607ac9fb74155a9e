"""Fills README's tables and the models' cards from the records.

python docs/results.py
"""

import json
import runpy
import statistics
from pathlib import Path

from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification
from vit_cifar.evaluation.examination import calibration_words, read_examination, trust_table
from vit_cifar.evaluation.records import RECORD_NAME, epochs_trained, fill_tables, read_record, time_and_machine
from vit_cifar.hub.card import PICTURE_NAME, card_picture, model_card
from vit_cifar.hub.publish import CARD_NAME
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL
from vit_cifar.training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
FINETUNING = runpy.run_path(str(ROOT / "docs" / "finetuning.py"))
PAGE = runpy.run_path(str(ROOT / "docs" / "page.py"))
NOT_RUN_YET = ("small", "small_long")  # they need a GPU
FAULTS = {  # what each row of faults.json says, in words
    "images": "{files} files made by hand and {mutations:,} damaged ones: {mutations_decoded:,} of these "
    "decoded, the others refused in one line, each within {slowest_seconds:.2f} s; memory grew by "
    "{memory_growth_mb:.0f} MB",
    "http": "{hand_made} bodies made by hand and {mutations} damaged ones: {refused} of all refused in one "
    "line; memory grew by {megabytes_grown_at_the_end:.0f} MB",
    "load": "{users} visitors with {requests_each} pictures each: 95% answered within {p95_seconds:.1f} s "
    "({median_seconds_alone:.2f} s when alone); {crowd} at once: {busy} told that the page is busy; "
    "after that an answer within {normal_again_after_seconds:.2f} s; {in_a_row:,} in a row: "
    "{bytes_grown_a_request:.0f} bytes more for each; {cache_megabytes_uploaded:.0f} MB uploaded: "
    "{cache_megabytes_kept:.0f} kept",
    "users": "{users} visitors at once, {requests} requests: each got the same answers as when alone",
    "network": "{addresses} paths and addresses that are not the page's, {pages} requests for them and for "
    "gradio's other doors: none got through",
    "kill": "one training killed {kills} times, {left_a_half_checkpoint} times inside a save: it ended the "
    "same to the last bit",
    "full_disk": "no room at {places_of_a_save} places of a checkpoint's save: one line, and the same end once there "
    "is room; nor for the finished model: one line, and its half is not taken for a model",
    "cache": "killed {killed_while_decoding} times while decoding; {trained_at_once} trainings that fill it at "
    "once; one that may not write it: all ended",
    "offline": "smoke training, page, command and {tests[tests_passed]} tests passed without network",
    "dependencies": "{lowest[tests_passed]} tests passed with the lowest versions; pip-audit asked about "
    "{audit[audited]} packages",
}


def runs() -> dict[str, list[tuple[str, dict]]]:
    """{what a row is called: [(where a record is, the record), … one for each seed]}"""
    rows = {
        folder.name: [(f"hub_card/models/{folder.name}/{RECORD_NAME}", read_record(folder))]
        for folder in sorted(BUNDLED_MODELS.iterdir())
    }
    for name, files in (
        ("speedrun", "seed_*.json"),
        ("speedrun, without bf16 units", "float32_seed_*.json"),
    ):
        seeds = sorted((ROOT / "docs" / "speedrun").glob(files))
        rows[name] = [(str(path.relative_to(ROOT)), json.loads(path.read_text())) for path in seeds]
    for variant in ("basic", "pe", "pe_conv"):
        for ending, protocol in (("", ""), ("_validation_out_of_train", ", validation out of train")):
            path = f"docs/tutorial/tutorial_{variant}{ending}.json"
            record = json.loads((ROOT / path).read_text())
            epochs = record["arguments"]["num_train_epochs"]
            rows[f"tutorial_{variant}, first {epochs:g} epochs{protocol}"] = [(path, record)]
    return rows


def results_row(name: str, runs: list[tuple[str, dict]]) -> str:
    """A row of README's results in Markdown: one training, or the mean of several that differ in the seed alone.

    Args:
        runs: (path of the record from the repository's root, the record).
    """
    first = runs[0][1]
    if len(runs) == 1:
        accuracy = f"{first['test_accuracy']:.2%} (n = 1, seed {first['seed']})"
        name = f"[{name}]({runs[0][0]})"
    else:
        found = [record["test_accuracy"] for _, record in runs]
        seeds = ", ".join(f"[{record['seed']}]({path})" for path, record in runs)
        accuracy = f"{statistics.mean(found):.2%} ± {statistics.stdev(found):.2%} (n = {len(runs)}, seeds {seeds})"
    time = {"wall_time_seconds": statistics.mean(record["wall_time_seconds"] for _, record in runs)}
    return (
        f"| {name} | {first['parameters']:,} | {epochs_trained(first):g} | {accuracy} "
        f"| {time_and_machine(first | time)} | {first['dataset']['name']} |"
    )


def not_run_yet(name: str) -> str:
    recipe, args, _ = parse_arguments(["--recipe", name, "--output_dir", "unused"])
    parameters = ViTCifarForImageClassification(ViTCifarConfig(**recipe.model)).num_parameters()
    return f"| {name} | {parameters:,} | {args.num_train_epochs:g} | not run yet | one GPU | |"


def results() -> str:
    """The trainings as Markdown: a row each, and the commands folded away below them."""
    rows = ["| model | parameters | epochs | test accuracy | time | dataset |", "|---|---|---|---|---|---|"]
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
    """The benchmark's ratios on processors with AVX-512 BF16, with AMX and without bf16 units, as Markdown."""
    record, slower, amx, without, preloaded = (
        _benchmark(name) for name in ("", "_slower", "_amx", "_float32", "_tcmalloc")
    )
    other = _rates(preloaded)["vit-cifar, train.py, bf16"]["images_per_second"]
    others = ", ".join(f"{item['median']:.2f}×" for item in preloaded["ratios"][:4])
    notes = [
        f"The commands: {_commands(record, slower)}. The machines have {record['hardware']['cores']} CPU cores with "
        "AVX-512 BF16 and are named here by their measured rate of bf16 matrix products. In bf16 training ours keeps "
        "the tokens between layers in bf16, the others in float32. Batch "
        f"{record['batch_size']['training']} in training and {record['batch_size']['inference']} in inference. "
        f"Each figure is the median over the rounds ({record['rounds']} at {_product_rate(record)}, {slower['rounds']} "
        f"at {_product_rate(slower)}), the smallest and the largest in brackets.",
        "In bf16 on a CPU `train.py` writes attention out (`eager`), because the fused kernel's backward pass is slow "
        "there; transformers' and timm's models keep their default, the fused one. Most of the training ratio to "
        'transformers\' ViT is this choice: `attn_implementation="eager"` gives it to theirs too.',
        f"At {_product_rate(record)} {_shares(record)}",
        f"At {_product_rate(slower)} {_shares(slower)}",
        "glibc's allocator gives freed memory back and fetches it anew in each step; `train.py` keeps it, which the "
        f"others do not. The figures at {_product_rate(record)} and at {_product_rate(without)} are older and "
        "without it.",
        "Another allocator is an option: with tcmalloc's library (Debian's `libtcmalloc-minimal4`) in `LD_PRELOAD` for "
        f"all, and without keeping freed memory, the machine of {_product_rate(record)} gave {other:.0f} images/s for "
        f"our training step at commit {preloaded['git_commit'][:7]}, and {others} in the first four rows.",
    ]
    parts = [
        _ratios(record, slower),
        "\n".join(f"- {note}" for note in notes),
        "A processor with AMX, whose matrix products are so fast that the rest of a step weighs more:",
        _ratios(amx),
        f"{_commands(amx)}. At {_product_rate(amx)} {_shares(amx)}",
        "A processor without bf16 units, where `train.py` and the benchmark choose float32 by themselves:",
        _ratios(without),
        f"{_commands(without)}. At {_product_rate(without)} of float32 matrix products {_shares(without)}",
    ]
    return "\n\n".join(parts)


def _benchmark(name: str) -> dict:
    path = f"docs/benchmark{name}.json"
    return json.loads((ROOT / path).read_text()) | {"path": path}


def _ratios(*records: dict) -> str:
    rows = ["| ours | theirs |", "|---|---|"]
    for found in records:
        rows[0] += f" images/s, ours / theirs | times as fast, {_product_rate(found)} |"
        rows[1] += "---|---|"
    for items in zip(*(found["ratios"] for found in records), strict=True):
        ours, theirs = items[0]["of"], items[0]["to"]
        row = f"| {ours} | {theirs} |"
        for item, found in zip(items, records, strict=True):
            low, high = item["spread"]
            both = " / ".join(f"{_rates(found)[name]['images_per_second']:.0f}" for name in (ours, theirs))
            row += f" {both} | {item['median']:.2f}× ({low:.2f}–{high:.2f}) |"
        rows.append(row)
    return "\n".join(rows)


def _rates(found: dict) -> dict[str, dict]:
    return {f"{row['name']}, {row['number_format']}": row for part in ("training", "inference") for row in found[part]}


def _commands(*records: dict) -> str:
    return " and ".join(
        f"[`{found['command']}`]({found['path']}) at commit {found['git_commit'][:7]}" for found in records
    )


def _product_rate(found: dict) -> str:
    """Of large products, in the first format of the record, the machine's faster one."""
    return f"{next(iter(found['matmul_gflops_per_second'].values()))} GFLOP/s"


def _shares(found: dict) -> str:
    pipeline = found["input_pipeline"]
    large, own_shape = (found["share_of_matmul_rate"][shape] for shape in ("2048 x 2048 x 2048", "the MLP's own"))
    return (
        f"our training step reaches {large:.0%} of that rate, and {own_shape:.0%} of the rate of products in the shape "
        f"of its own MLP's forward pass; the input pipeline is {pipeline['share_of_a_step']:.2%} of a step and "
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
        rows.append(f"| {name.replace('_', ' ')} | {FAULTS[name].format(**row['figures'])} | `{row['command']}` |")
    if not record["dependencies"]["figures"]["audit"]["audited"]:
        rows += ["", "The advisories could not be reached, so pip-audit skipped every package: audit them yourself."]
    return "\n".join(rows)


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
        if examination := read_examination(folder):
            card_picture(folder, examination).savefig(folder / PICTURE_NAME, dpi=110)


if __name__ == "__main__":
    main()
