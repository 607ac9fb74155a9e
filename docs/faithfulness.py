"""Draws docs/faithfulness.png from the examination of the shipped model: what its answer does while patches go or come.

python docs/faithfulness.py
"""

from pathlib import Path

from matplotlib.figure import Figure

from vit_cifar.evaluation.examination import read_examination
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL


def plot(maps: dict) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, found in maps["methods"].items():
        style = {"color": "0.4", "linestyle": "--"} if name == "random" else {}
        for axes, kind in ((left, "deletion"), (right, "insertion")):
            shares = [step / (len(found[kind]) - 1) for step in range(len(found[kind]))]
            axes.plot(shares, found[kind], label=name, **style)
    left.set(xlabel="share of the patches taken away", ylabel="probability of the model's answer", title="deletion")
    right.set(xlabel="share of the patches put back", title="insertion")
    right.legend(title="most important first, by")
    return figure


def main() -> None:
    examination = read_examination(BUNDLED_MODELS / DEFAULT_MODEL)
    plot(examination.record["maps"]).savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
