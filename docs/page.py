"""Times the page: from the start of `python app.py` to the first prediction, and one visitor's predictions after that.

python docs/page.py   # writes page.json; nothing else should run meanwhile
"""

import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, sleep

import httpx
from gradio_client import Client, handle_file

from vit_cifar.evaluation import records
from vit_cifar.models import DEFAULT_MODEL, load_model

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "page.json"
EXAMPLES = sorted((ROOT / "vit_cifar" / "demo" / "assets" / "examples").glob("*.png"))
PREDICTIONS = 200


def predict(client: Client, number: int) -> float:
    """Seconds of one prediction, all maps but occlusion, from the upload to the addresses of its pictures."""
    start = perf_counter()
    client.predict(handle_file(EXAMPLES[number % len(EXAMPLES)]), "", 1, "mean", api_name="/predict")
    return perf_counter() - start


@contextmanager
def page() -> Iterator[Client]:
    """A visitor to the page, which runs in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    app = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = perf_counter() + 120
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/config", timeout=10)
                break
            except httpx.TransportError:
                if app.poll() is not None or perf_counter() > deadline:
                    raise
                sleep(0.05)
        yield Client(f"http://127.0.0.1:{port}", verbose=False, download_files=False)
    finally:
        app.terminate()  # which lets it delete its cache
        try:
            app.wait(60)
        finally:
            app.kill()


def measure() -> dict:
    starts = []
    for _ in range(3):
        start = perf_counter()
        with page() as client:
            predict(client, 0)
            starts.append(perf_counter() - start)
            if len(starts) == 3:
                seconds = [predict(client, number) for number in range(PREDICTIONS)]
    model = load_model()[0]
    return {
        "command": "python docs/page.py",
        "git_commit": records.git_commit(__file__),
        "versions": records.versions() | {name: version(name) for name in ("gradio", "captum")},
        "hardware": records.hardware(model.device),
        "model": DEFAULT_MODEL,
        "parameters": model.num_parameters(),
        "seconds_to_first_prediction": starts,
        "predictions": PREDICTIONS,
        "seconds_of_a_prediction": {
            "median": statistics.median(seconds),
            "p95": statistics.quantiles(seconds, n=20)[-1],
            "maximum": max(seconds),
        },
    }


def words(record: dict) -> str:
    """The record as Markdown."""
    starts, one = record["seconds_to_first_prediction"], record["seconds_of_a_prediction"]
    return (
        f"On {record['hardware']['cores']} CPU cores the page gives its first prediction "
        f"{statistics.median(starts):.1f} s after `python app.py` (median of {len(starts)} starts, "
        f"{min(starts):.1f}–{max(starts):.1f}); after that a prediction with every map but occlusion takes "
        f"{1000 * one['median']:.0f} ms from the upload to the answer and the addresses of its pictures, and 95% of "
        f"{record['predictions']} took at most {1000 * one['p95']:.0f} ms ([`{record['command']}`](docs/page.json))."
    )


def main() -> None:
    record = measure()
    records.write_json(RECORD, record)
    print(words(record))


if __name__ == "__main__":
    main()
