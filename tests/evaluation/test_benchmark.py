import json

import pytest
import torch
from helpers import run_here

from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification
from vit_cifar.errors import UserError
from vit_cifar.evaluation.benchmark import Contender, PlainViT, benchmark, ratio, take_turns, training_flops
from vit_cifar.training.arguments import machine_supports_bf16, recipe_model


def test_contenders_take_turns_and_ratios_are_within_a_round():
    order, seconds = [], {"slow": [2.0, 4.0, 2.0], "fast": [1.0, 1.0, 0.5]}

    def contender(name):
        def run(steps):
            order.append(name)
            return seconds[name][order.count(name) - 1] * steps

        return Contender(name, "float32", run)

    slow, fast = contender("slow"), contender("fast")
    take_turns([slow, fast], rounds=3, steps=2, batch_size=10)
    assert order == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert fast.row()["images_per_second"] == 10
    assert fast.row()["spread"] == [10, 20]
    assert ratio(fast, slow)["median"] == 4
    assert ratio(fast, slow)["spread"] == [2, 4]


def test_several_gpus_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(UserError, match=r"expected one GPU at most \(CUDA_VISIBLE_DEVICES=0\), got 8"):
        benchmark()


def test_the_plain_loops_model_is_the_tutorials():
    """Ours with the same weights gives the same logits; only the names of the weights differ."""
    torch.manual_seed(0)
    config = ViTCifarConfig(**recipe_model("tutorial_pe_conv"))
    own, plain = ViTCifarForImageClassification(config).eval(), PlainViT(config)
    # Both list their parameters in the order that the data flows, but for the class token.
    theirs = dict(plain.named_parameters())
    theirs["cls_token"].data = own.vit.embeddings.cls_token.data
    theirs.pop("cls_token")
    ours = {name: p for name, p in own.named_parameters() if not name.endswith("cls_token")}
    assert len(ours) == len(theirs)
    for parameter, other in zip(theirs.values(), ours.values(), strict=True):
        assert parameter.shape == other.shape
        parameter.data = other.data
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(images), own(images).logits)


def test_flops_are_those_counted_by_hand():
    config = ViTCifarConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=16, num_labels=3
    )
    tokens, width, patches = 5, 8, 4
    patch_embedding = patches * width * 3 * 16 * 16
    layer = 4 * tokens * width**2 + 2 * tokens * width * 16 + 2 * tokens**2 * width
    head = width * 3
    # Two operations a product; the backward pass costs twice the forward, but the images need no gradient.
    assert training_flops(config) == 2 * (3 * (patch_embedding + layer + head) - patch_embedding)


def test_the_command_prints_rows_and_writes_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_cifar.evaluation.benchmark.INFERENCE_BATCH", 2)  # what takes long at 64
    path = tmp_path / "record.json"
    command = ["vit_cifar", "benchmark", "--batch-size", "2", "--rounds", "1", "--steps", "1"]
    finished = run_here(*command, "--output", path)
    assert finished.returncode == 0, finished.stderr
    record = json.loads(path.read_text())
    names = [row["name"] for row in record["training"]]
    assert "vit-cifar, train.py" in names and "plain PyTorch loop, timm's ViT" in names
    assert "transformers' ViT, stock Trainer, per-image transforms" in names
    assert all(row["images_per_second"] > 0 for part in ("training", "inference") for row in record[part])
    assert record["batch_size"] == {"training": 2, "inference": 2}
    formats = {row["number_format"] for row in record["training"]}
    assert formats == ({"bf16", "float32"} if machine_supports_bf16() else {"float32"})
    assert all(0 < share < 1 for share in record["share_of_matmul_rate"].values())
    for item in record["ratios"]:  # like with like: with an output projection or without
        assert ("with output projection" in item["of"]) != ("the tutorial's model" in item["to"])
    for row in record["training"]:
        assert f"{row['images_per_second']:.1f}" in finished.stdout
    again = run_here(*command, "--output", path)
    assert again.returncode == 2
    assert "expected a new file" in again.stderr
