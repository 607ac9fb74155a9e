"""What docs/ shows is what the records and the code give."""

import json
import re
import runpy
import statistics
import sys

import nbclient
import nbformat
import pytest
from helpers import ROOT, run

from vit_cifar.evaluation.examination import read_examination
from vit_cifar.evaluation.records import time_and_machine
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL
from vit_cifar.training.arguments import RECIPES

CURVES = runpy.run_path(str(ROOT / "docs" / "tutorial" / "curves.py"))
FAITHFULNESS = runpy.run_path(str(ROOT / "docs" / "faithfulness.py"))
RECIPE_STEPS = runpy.run_path(str(ROOT / "docs" / "recipes.py"))
RESULTS = runpy.run_path(str(ROOT / "docs" / "results.py"))


def test_readmes_results_are_the_records():
    readme = (ROOT / "README.md").read_text()
    assert RESULTS["fill"](readme) == readme, "python docs/results.py fills README again"
    security = (ROOT / "SECURITY.md").read_text()
    assert RESULTS["fill_security"](security) == security, "python docs/results.py fills SECURITY.md again"
    rows = RESULTS["runs"]()
    assert len(rows) >= 8
    for found in rows.values():
        assert found[0][1]["command"] in readme
        for path, record in found:
            assert f"]({path})" in readme and f" {record['parameters']:,} |" in readme
            assert len(found) > 1 or f"{record['test_accuracy']:.2%}" in readme


def test_readmes_example_prints_what_it_says():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]
    (said,) = re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE)
    finished = run(sys.executable, "-c", code + "print(where_it_looks.shape)")
    assert finished.stdout.splitlines() == [said, "torch.Size([8, 8])"], finished.stderr


def test_a_row_of_several_seeds_is_their_mean_and_deviation():
    path, record = RESULTS["runs"]()["vit-cifar10-nano"][0]
    found = [(f"{path}{seed}", record | {"seed": seed, "test_accuracy": 0.80 + seed / 100}) for seed in (0, 1, 2)]
    row = RESULTS["results_row"]("three", found)
    assert f"81.00% ± 1.00% (n = 3, seeds [0]({path}0), [1]({path}1), [2]({path}2))" in row


def test_speedruns_header_has_the_mean_of_its_records():
    runs = [record for _, record in RESULTS["runs"]()["speedrun"]]
    assert [record["seed"] for record in runs] == [0, 1, 2]
    accuracies, times = ([record[key] for record in runs] for key in ("test_accuracy", "wall_time_seconds"))
    mean = runs[0] | {"wall_time_seconds": statistics.mean(times)}
    numbers = f"{statistics.mean(accuracies):.2%} ± {statistics.stdev(accuracies):.2%} (seeds 0, 1, 2)"
    header = (RECIPES / "speedrun.yaml").read_text()
    assert f"{numbers} on {mean['dataset']['name']}, {time_and_machine(mean)}" in header


def test_the_recipes_page_is_that_of_its_log():
    log = json.loads(RECIPE_STEPS["LOG"].read_text()) if RECIPE_STEPS["LOG"].exists() else {}
    page = RECIPE_STEPS["PAGE"].read_text()
    assert RECIPE_STEPS["fill"](page, log) == page, "python docs/recipes.py fills it again"


def test_the_tutorials_page_is_that_of_the_records():
    assert (ROOT / "docs" / "tutorial" / "README.md").read_text() == CURVES["page"]()


def test_the_tutorials_plot_shows_the_records_and_the_tutorials_losses():
    axes = CURVES["plot"]().axes
    assert [axis.get_title() for axis in axes] == ["basic", "pe", "pe_conv"]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes[0].lines}
    epochs = json.loads((ROOT / "docs" / "tutorial" / "tutorial_basic.json").read_text())["epochs"]
    assert lines["ours, training"] == [row["training_loss"] for row in epochs]
    assert lines["ours, test"] == [row["validation_loss"] for row in epochs]
    assert lines["tutorial, training"][:3] == [1.9366, 1.6208, 1.4843]
    assert lines["tutorial, test"][:3] == [1.6467, 1.485, 1.4131]


def test_the_plot_of_the_maps_shows_the_examination():
    maps = read_examination(BUNDLED_MODELS / DEFAULT_MODEL).record["maps"]
    for axes, kind in zip(FAITHFULNESS["plot"](maps).axes, ("deletion", "insertion"), strict=True):
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert lines == {name: found[kind] for name, found in maps["methods"].items()}


@pytest.mark.parametrize("variant", ["basic", "pe", "pe_conv"])
def test_the_tutorials_records_say_which_protocol_was_theirs(variant):
    tutorials, own = (CURVES["record"](f"tutorial_{variant}{ending}") for ending in ("", CURVES["OWN"]))
    assert tutorials["dataset"]["validation_from"] == "test"
    assert tutorials["dataset"]["images"] == {"train": 50_000, "validation": 10_000, "test": 10_000}
    assert own["dataset"]["validation_from"] == "train"
    assert own["epoch_selected_on"] == "validation"
    assert own["dataset"]["images"] == {"train": 45_000, "validation": 5_000, "test": 10_000}
    header = (RECIPES / f"tutorial_{variant}.yaml").read_text()
    assert (
        f"{tutorials['test_accuracy']:.2%} on {tutorials['dataset']['name']}, {time_and_machine(tutorials)}" in header
    )


def test_the_lesson_runs_and_prints_what_it_shows():
    shown = nbformat.read(ROOT / "docs" / "lesson.ipynb", as_version=4)
    again = nbformat.read(ROOT / "docs" / "lesson.ipynb", as_version=4)
    nbclient.NotebookClient(again, timeout=300, resources={"metadata": {"path": ROOT / "docs"}}).execute()

    def text(cell):
        return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")

    pictures = 0
    for before, after in zip(shown.cells, again.cells, strict=True):
        if before.cell_type == "code":
            assert text(after) == text(before), before.source
            found = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in (before, after)]
            assert found[0] == found[1], before.source
            pictures += found[0]
    assert pictures >= 5
