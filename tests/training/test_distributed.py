"""Two processes against one, over gloo on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from helpers import run
from one_of_two import IMAGES, build, one_of_two, results, step

from vit_cifar.evaluation.records import read_record, weights_sha256


def test_gradients_and_running_statistics_are_those_of_one_process(tmp_path):
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    model = build()
    step(model, IMAGES)
    for rank in (0, 1):
        for expected, found in zip(results(model), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(found, expected)


def losses(folder: Path) -> list[float]:
    """The training loss of every step."""
    log = json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.slow
def test_nano_trains_in_two_processes_as_in_one_and_resumes_exactly(tmp_path):
    one_process = [sys.executable]
    two_processes = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]  # its word for several, on a CPU too
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate += ["--main_process_port", "0"]  # any that is free

    def train(launcher: list[str], name: str, batch_size: int, *more: str) -> Path:
        finished = run(
            *(*launcher, "train.py", "--recipe", "nano", "--dataset_name", "sample", "--validation_size", "50"),
            *("--num_train_epochs", "1", "--per_device_train_batch_size", batch_size, "--bf16", "false"),
            *("--logging_strategy", "steps", "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "1"),
            *("--save_total_limit", "9", "--eval_strategy", "no", "--load_best_model_at_end", "false"),
            *("--output_dir", tmp_path / name, *more),
            OMP_NUM_THREADS="1",
        )
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("test accuracy") == 1  # one process writes
        assert "find_unused_parameters" not in finished.stderr  # torch's warning
        return tmp_path / name

    one = train(one_process, "one", 50)
    assert losses(one)[-1] != losses(one)[0]
    for launcher, name in ((two_processes, "two"), (accelerate, "accelerate")):
        folder = train(launcher, name, 25)
        assert losses(folder) == pytest.approx(losses(one), rel=1e-3)
        assert read_record(folder)["hardware"]["processes"] == 2
        assert read_record(folder)["command"].startswith("torchrun --nproc_per_node 2 train.py --recipe nano ")

    resumed = train(two_processes, "two", 25, "--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-3"))
    assert weights_sha256(resumed) == weights_sha256(tmp_path / "accelerate")
