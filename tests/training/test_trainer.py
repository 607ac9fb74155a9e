import json
import platform
import sys

import pytest
import torch
from helpers import run
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback
from transformers.trainer_pt_utils import LabelSmoother

from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification
from vit_cifar.integrity import newest_whole_checkpoint, write_checksums
from vit_cifar.training.arguments import parse_arguments
from vit_cifar.training.augmentation import Augmentation
from vit_cifar.training.data import CIFAR10_MEAN, CIFAR10_STD, load_split, normalize
from vit_cifar.training.trainer import TrainingError, ViTCifarTrainer, find_checkpoint


@pytest.fixture
def make(tmp_path):
    def trainer(*words: str, images: int = 40) -> ViTCifarTrainer:
        torch.manual_seed(0)
        recipe, args, _ = parse_arguments(
            ["--recipe", "smoke", "--output_dir", str(tmp_path), "--bf16", "false", "--disable_tqdm", "true", *words]
        )
        model = ViTCifarForImageClassification(ViTCifarConfig(**recipe.model))
        train_set = load_split("sample", "train").subset(torch.arange(images))
        return ViTCifarTrainer(model, args, recipe, train_set, train_set, CIFAR10_MEAN, CIFAR10_STD)

    return trainer


def test_images_are_those_of_the_augmentation_with_the_commands_seed_and_the_trainings_epoch(make):
    words = ("--cutmix_probability", "0.5", "--flip", "alternating", "--max_shift", "4", "--shift_fill", "zeros")
    words += ("--cutout_size", "8", "--trivial_augment_probability", "0.5")
    trainer, rows = make("--seed", "3", *words), torch.arange(40)
    trainer.model.train()
    images, labels = trainer.train_dataset.images, trainer.train_dataset.labels
    fill = tuple(round(255 * mean) for mean in CIFAR10_MEAN)
    expected = Augmentation(40, 3, "alternating", 4, "zeros", 8, fill, 0.5, 0.5)
    for epoch in (0, 1, 2):
        trainer.state.epoch = epoch + 0.5
        partners = expected.partners(rows, epoch)
        own, others = expected(images, rows, epoch), expected(images[partners], partners, epoch)
        mixed, share = expected.cutmix(own, others, rows, epoch)
        inputs = trainer._prepare_inputs(batch(trainer, rows))
        assert torch.equal(inputs["pixel_values"], normalize(mixed, CIFAR10_MEAN, CIFAR10_STD))
        first, second = torch.eye(10)[labels], torch.eye(10)[labels[partners]]
        torch.testing.assert_close(inputs["labels"], share[:, None] * first + (1 - share[:, None]) * second)


@pytest.mark.parametrize("optimizer", ["muon", "adam", "trainer"])
def test_each_optimizer_gets_the_commands_settings(make, optimizer):
    words = ("--learning_rate", "0.003", "--weight_decay", "0.07", "--adam_beta1", "0.8", "--adam_epsilon", "1e-6")
    own = ("--muon_learning_rate", "0.04") if optimizer == "muon" else ("--optim", "adamw_torch")
    trainer = make("--optimizer", optimizer, *words, *(own if optimizer != "adam" else ()))
    made = trainer.create_optimizer()
    parts = made.optimizers if optimizer == "muon" else [made]
    groups = [group for part in parts for group in part.param_groups]
    matrices = sum(p.numel() for p in trainer.model.parameters() if p.ndim in (2, 4))
    everything = trainer.model.num_parameters()
    decayed = sum(p.numel() for group in groups if group["weight_decay"] == 0.07 for p in group["params"])
    assert decayed == (everything if optimizer == "adam" else matrices)
    assert {group["weight_decay"] for group in groups} == ({0.07} if optimizer == "adam" else {0.07, 0})
    if optimizer == "muon":
        assert {group["lr"] for group in parts[0].param_groups} == {0.04}
    assert type(parts[-1]) is (torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW)
    for group in parts[-1].param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.003, (0.8, 0.999), 1e-6)


def test_whole_batches_alone_need_a_whole_batch(make):
    with pytest.raises(ValueError, match="dataloader_drop_last: expected 50 training images or more, .* got 40"):
        make("--dataloader_drop_last", "true", "--per_device_train_batch_size", "50")


def batch(trainer, rows):
    return trainer.train_dataset.__getitems__(rows)


def test_cutmix_gives_each_label_the_share_of_the_pixels_that_are_its_images(make):
    trainer = make("--cutmix_probability", "1", "--flip", "none", "--max_shift", "0", "--cutout_size", "0")
    trainer.model.train()
    trainer.state.epoch = 0
    rows = torch.arange(40)
    inputs = trainer._prepare_inputs(batch(trainer, rows))
    partners = trainer.augmentation.partners(rows, 0)
    images, labels = trainer.train_dataset.images, trainer.train_dataset.labels
    own = (inputs["pixel_values"] == normalize(images, CIFAR10_MEAN, CIFAR10_STD)).all(1)
    others = (inputs["pixel_values"] == normalize(images[partners], CIFAR10_MEAN, CIFAR10_STD)).all(1)
    assert (own | others).all()
    checked = 0
    for i in range(40):
        if labels[i] == labels[partners[i]] or (own[i] & others[i]).any():
            continue  # a pixel that both have in common belongs to either
        assert inputs["labels"][i, labels[i]] == pytest.approx(own[i].float().mean().item(), abs=1e-6)
        assert inputs["labels"][i, labels[partners[i]]] == pytest.approx(others[i].float().mean().item(), abs=1e-6)
        assert inputs["labels"][i].sum() == pytest.approx(1)
        checked += 1
    assert checked > 5


def test_a_frozen_body_gives_the_head_the_same_each_time(make):
    trainer = make("--config_overrides", "drop_path_rate=0.5,hidden_dropout_prob=0.3,patch_drop_rate=0.5")
    trainer.recipe.freeze_body = True
    inputs = {"pixel_values": torch.randn(6, 3, 32, 32), "labels": torch.arange(6)}
    first, second = (trainer.compute_loss(trainer.model.train(), dict(inputs)) for _ in range(2))
    assert torch.equal(first, second)


def test_in_evaluation_nothing_is_mixed_or_moved(make):
    trainer = make("--cutmix_probability", "1")
    trainer.model.eval()
    inputs = trainer._prepare_inputs(batch(trainer, torch.arange(4)))
    assert torch.equal(inputs["labels"], trainer.train_dataset.labels[:4])
    assert torch.equal(inputs["pixel_values"], normalize(trainer.train_dataset.images[:4], CIFAR10_MEAN, CIFAR10_STD))


def test_the_training_loss_is_smoothed_as_trainer_does_and_the_validation_loss_is_not(make):
    trainer = make("--label_smoothing_factor", "0.2")
    inputs = {"pixel_values": torch.randn(6, 3, 32, 32), "labels": torch.arange(6)}
    model = trainer.model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # so that two passes give the same
    expected = LabelSmoother(0.2)(model(inputs["pixel_values"]), inputs["labels"])
    torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), expected)
    plain = torch.nn.functional.cross_entropy(model(inputs["pixel_values"]).logits, inputs["labels"])
    torch.testing.assert_close(trainer.compute_loss(model.eval(), dict(inputs)), plain)


@pytest.mark.parametrize("where", ["loss", "gradient", "input"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinity_stops_before_the_step_and_leaves_what_was_saved(make, tmp_path, monkeypatch, where, value):
    trainer = make("--save_steps", "2", "--max_steps", "8")
    prepare, compute_loss = trainer._prepare_inputs, trainer.compute_loss

    def broken(name: str) -> bool:
        return where == name and trainer.model.training and trainer.state.global_step == 4

    def prepare_inputs(inputs):
        inputs = prepare(inputs)
        if broken("input"):
            inputs["pixel_values"][0, 0, 0, 0] = value
        return inputs

    def loss(*args, **kwargs):
        found = compute_loss(*args, **kwargs)
        return found + value if broken("loss") else found

    monkeypatch.setattr(trainer, "_prepare_inputs", prepare_inputs)
    monkeypatch.setattr(trainer, "compute_loss", loss)
    trainer.model.classifier.bias.register_hook(lambda gradient: gradient + (value if broken("gradient") else 0))
    with pytest.raises(TrainingError, match="step 5: expected a finite loss") as stopped:
        trainer.train()
    newest, damaged = newest_whole_checkpoint(tmp_path)
    assert (newest.name, damaged) == ("checkpoint-4", [])
    assert str(newest) in str(stopped.value) and "()" not in str(stopped.value)
    saved = load_file(newest / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in trainer.model.named_parameters())  # no step was made of it


@pytest.mark.parametrize("steps", [4, 6])
def test_a_save_at_the_end_of_an_epoch_or_of_the_training_holds_its_evaluation(make, tmp_path, steps):
    trainer = make("--save_steps", "2", "--max_steps", str(steps), "--per_device_train_batch_size", "10")
    trainer.train()
    state = json.loads((tmp_path / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert "eval_loss" in state["log_history"][-1]
    assert (tmp_path / f"checkpoint-{steps - 2}").exists()


@pytest.mark.parametrize(
    "how",
    [
        ("--max_steps", "6", "--save_steps", "2"),
        (
            *("--num_train_epochs", "50", "--learning_rate", "0", "--muon_learning_rate", "0"),
            *("--early_stopping_patience", "1", "--load_best_model_at_end", "true", "--save_strategy", "epoch"),
        ),
    ],
    ids=["max_steps", "patience"],
)
def test_a_training_that_had_ended_stays_as_it_is_when_it_is_resumed(make, tmp_path, how):
    words = (*how, "--per_device_train_batch_size", "10", "--metric_for_best_model", "accuracy")
    first = make(*words)
    first.train()
    newest, _ = newest_whole_checkpoint(tmp_path)
    saved = newest / "trainer_state.json"
    state = json.loads(saved.read_text())
    state["stateful_callbacks"]["Clock"]["args"]["seconds_before"] = 10_000
    saved.write_text(json.dumps(state))
    write_checksums(newest)
    again = make(*words)
    again.train(resume_from_checkpoint=str(newest))
    assert again.clock.seconds() > 10_000  # those of the first process count
    assert again.state.global_step == first.state.global_step == int(newest.name.removeprefix("checkpoint-"))
    assert again.state.log_history[:-1] == first.state.log_history[:-1]  # the last line is of this call's own time
    assert newest_whole_checkpoint(tmp_path)[0] == newest
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_a_checkpoint_that_does_not_say_what_it_was_trained_on_is_refused(make, tmp_path):
    make("--max_steps", "2", "--save_steps", "2").train()
    checkpoint, _ = newest_whole_checkpoint(tmp_path)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    for spoil, message in (
        (
            lambda callbacks: callbacks["TrainedOn"]["args"]["settings"].pop("flip"),
            "expected the flip of .*, which it does not say, got",
        ),
        (lambda callbacks: callbacks.pop("TrainedOn"), "which does not say what it was trained on"),
    ):
        spoil(state["stateful_callbacks"])
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        with pytest.raises(TrainingError, match=message):
            make("--max_steps", "4").train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_other_images_is_refused(make, tmp_path):
    """What was held out of the training before may be learned now, and the best epoch so far was found on others."""
    make("--max_steps", "2", "--save_steps", "2").train()
    checkpoint, _ = newest_whole_checkpoint(tmp_path)
    with pytest.raises(TrainingError, match="expected the training and validation images, labels and classes of"):
        make("--max_steps", "4", images=41).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--learning_rate", "0.5"), "expected the learning_rate of .*, got 0.5$"),
        (("--optimizer", "trainer"), "expected the optimizer of .*, muon, got trainer$"),
        (("--seed", "3"), "expected the seed of .*, got 3$"),
        (("--flip", "none"), "expected the flip of .*, got none$"),
        (("--lr_scheduler_type", "cosine"), "expected the lr_scheduler_type of .*, linear, got cosine$"),
        (("--gradient_accumulation_steps", "2"), "expected the images per step of .*, 25, got 50$"),
        (("--config_overrides", "num_attention_heads=1"), "expected the num_attention_heads of .*, got 1$"),
    ],
)
def test_a_checkpoint_of_other_settings_or_another_model_is_refused(make, tmp_path, words, expected):
    """The optimizer would go on with the checkpoint's settings while the record says others."""
    make("--max_steps", "2", "--save_steps", "2").train()
    checkpoint, _ = newest_whole_checkpoint(tmp_path)
    with pytest.raises(TrainingError, match=expected):
        make("--max_steps", "4", *words).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_without_its_optimizer_is_refused(make, tmp_path):
    trainer = make("--max_steps", "2", "--save_steps", "2", "--save_only_model", "true")
    trainer.train()
    trainer.args.resume_from_checkpoint = "last"
    with pytest.raises(TrainingError, match="expected a checkpoint with its optimizer, got .*checkpoint-2"):
        find_checkpoint(trainer.args)


def test_each_validation_image_counts_also_where_the_last_training_batch_is_left_out(make):
    words = ("--per_device_eval_batch_size", "30", "--max_steps", "1")
    trainer = make("--dataloader_drop_last", "true", "--per_device_train_batch_size", "25", *words)
    assert len(trainer.get_train_dataloader()) == 1  # of 40 images
    found, whole = (t.evaluate() for t in (trainer, make(*words)))
    assert (found["eval_loss"], found["eval_accuracy"]) == (whole["eval_loss"], whole["eval_accuracy"])


def test_an_evaluation_within_the_epoch_before_the_first_eligible_one_is_not_kept(make):
    trainer = make("--first_eligible_epoch", "2", "--metric_for_best_model", "accuracy", "--greater_is_better", "true")
    for epoch, kept in ((1.75, None), (2.0, 0.5)):
        trainer.state.epoch = epoch
        trainer._determine_best_metric({"eval_loss": 0.5, "eval_accuracy": 0.5}, None)
        assert trainer.state.best_metric == kept


@pytest.mark.parametrize("before", [(), ("--early_stopping_patience", "7")])
def test_a_resumed_training_has_the_patience_that_it_is_given(make, tmp_path, before):
    words = ("--num_train_epochs", "2", "--save_strategy", "epoch", "--eval_strategy", "epoch")
    words += ("--load_best_model_at_end", "true", "--metric_for_best_model", "accuracy")
    make(*words, *before).train()
    trainer = make(*words, "--early_stopping_patience", "3", "--num_train_epochs", "3")
    trainer.train(resume_from_checkpoint=str(newest_whole_checkpoint(tmp_path)[0]))
    stopping = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    assert [callback.early_stopping_patience for callback in stopping] == [3]


def test_a_best_checkpoint_that_was_damaged_meanwhile_is_not_taken(make, tmp_path):
    trainer = make("--num_train_epochs", "1")
    trainer.train()
    trainer.state.best_model_checkpoint = str(newest_whole_checkpoint(tmp_path)[0])
    trainer._load_best_model()
    with open(f"{trainer.state.best_model_checkpoint}/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(TrainingError, match="best checkpoint so far is damaged: .*model.safetensors"):
        trainer._load_best_model()


def test_a_training_without_a_whole_checkpoint_starts_anew_and_one_with_damaged_ones_does_not(make, tmp_path, capsys):
    (tmp_path / "checkpoint-2").mkdir()  # killed inside the first save
    args = make("--resume_from_checkpoint").args
    assert find_checkpoint(args) == (None, None)
    assert "starts anew" in capsys.readouterr().out
    (tmp_path / "checkpoint-2" / "model.safetensors").write_text("weights")
    write_checksums(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "model.safetensors").write_text("others")
    with pytest.raises(TrainingError, match="expected a whole checkpoint in .*, got none"):
        find_checkpoint(args)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step_and_given_back_in_the_end():
    code = """
import psutil, torch
from vit_cifar.training.trainer import freed_memory_kept

at_start = psutil.Process().memory_info().rss

def kept():  # MiB, of 128
    step = [torch.ones(2**22) for _ in range(8)]
    del step
    return (psutil.Process().memory_info().rss - at_start) // 2**20

print(kept())
with freed_memory_kept():
    print(kept())
print((psutil.Process().memory_info().rss - at_start) // 2**20)
"""
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # always; otherwise it depends on what lies above
    before, during, after = map(int, run(sys.executable, "-c", code, **gives_back).stdout.split())
    assert before < 30 and during > 100 and after < 30


@pytest.mark.parametrize(("bf16", "dtype"), [("true", torch.bfloat16), ("false", torch.float32)])
def test_muon_orthogonalizes_in_the_number_format_of_the_training(make, bf16, dtype):
    muon, _ = make("--bf16", bf16).create_optimizer().optimizers
    assert muon.dtype == dtype
