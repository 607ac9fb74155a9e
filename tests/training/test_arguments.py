import re
import sys

import pytest
import torch
from transformers import TrainingArguments

from vit_cifar import ViTCifarConfig
from vit_cifar.training.arguments import machine_supports_bf16, parse_arguments, recipe_names


def parse(*argv):
    return parse_arguments([str(word) for word in argv])[:2]


def refusal(capsys, *argv) -> str:
    """The one line that a wrong command ends with, usage apart."""
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage: ")
    return error.removeprefix("train.py: error: ")


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "finetune"])
def test_every_shipped_recipe_parses_to_a_model(name, tmp_path):
    recipe, args = parse("--recipe", name, "--output_dir", tmp_path)
    assert ViTCifarConfig(**recipe.model).hidden_size == recipe.model["hidden_size"]
    assert args.num_train_epochs >= 1
    assert args.save_total_limit != 1  # or Trainer deletes the last checkpoint before the model is saved


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_defaults(tmp_path):
    recipe, args = parse("--recipe", "nano", "--output_dir", tmp_path)
    assert (recipe.optimizer, args.per_device_train_batch_size, args.weight_decay) == ("muon", 128, 0.05)
    recipe, args = parse(
        *("--recipe", "nano", "--output_dir", tmp_path, "--weight_decay", "0.5", "--optimizer", "trainer"),
        *("--config_overrides", "hidden_size=64,stem_widths=[8, 16,64],drop_path_rate=0.1,qkv_bias=false"),
    )
    assert (recipe.optimizer, args.per_device_train_batch_size, args.weight_decay) == ("trainer", 128, 0.5)
    assert (recipe.model["hidden_size"], recipe.model["drop_path_rate"], recipe.model["qkv_bias"]) == (64, 0.1, False)
    assert (recipe.model["patch_embedding"], recipe.model["stem_widths"]) == ("conv_stem", [8, 16, 64])


def test_fine_tuning_takes_the_model_from_the_folder_and_the_rest_from_its_recipe(tmp_path):
    recipe, args = parse("--model_name_or_path", "m", "--output_dir", tmp_path, "--config_overrides", "image_size=48")
    assert (recipe.recipe, recipe.model, args.per_device_train_batch_size) == ("finetune", {"image_size": 48}, 32)
    recipe, args = parse("--model_name_or_path", "m", "--recipe", "nano", "--output_dir", tmp_path)
    assert (recipe.model, recipe.optimizer) == ({}, "muon")


def test_a_recipe_can_be_a_file_and_numbers_may_be_written_as_1e_3(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rate: 1e-3\nmodel:\n  hidden_size: 48\n")
    recipe, args = parse("--recipe", tmp_path / "mine.yaml", "--output_dir", tmp_path)
    assert args.learning_rate == 1e-3
    assert recipe.model == {"hidden_size": 48}


@pytest.mark.parametrize("units", ["avx512_bf16", "amx_bf16"])
def test_number_format_is_the_machines_and_can_be_overridden(tmp_path, monkeypatch, units):
    nano = ("--recipe", "nano", "--output_dir", tmp_path)
    assert parse(*nano)[1].bf16 == machine_supports_bf16()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {units: True})
    assert parse(*nano)[1].bf16
    assert parse(*nano, "--fp16", "false")[1].bf16
    assert not parse(*nano, "--bf16", "false")[1].bf16
    assert not parse("--recipe", "tutorial_pe", "--output_dir", tmp_path)[1].bf16  # float32, as the tutorial
    (tmp_path / "half.yaml").write_text("fp16: true\n")
    for words in (("--recipe", tmp_path / "half.yaml"), ("--recipe", "tutorial_pe", "--fp16")):
        with monkeypatch.context() as a_gpu:
            a_gpu.setattr(TrainingArguments, "device", torch.device("cuda"))
            args = parse(*words, "--output_dir", tmp_path)[1]
        assert args.fp16 and not args.bf16 and args.mixed_precision == "fp16"


@pytest.mark.parametrize(("flag", "format"), [("true", "bf16"), ("false", "no")])
def test_the_number_format_is_not_that_of_accelerates_configuration(tmp_path, monkeypatch, flag, format):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as `accelerate launch` sets it
    args = parse("--recipe", "nano", "--bf16", flag, "--output_dir", tmp_path)[1]
    assert args.mixed_precision == format


@pytest.mark.parametrize(
    ("recipe", "metric", "greater"),
    [("nano", "accuracy", True), ("nano", "loss", False), ("tutorial_pe", "accuracy", True)],
)
def test_the_best_epoch_is_the_best_by_its_metric(tmp_path, recipe, metric, greater):
    args = parse("--recipe", recipe, "--metric_for_best_model", metric, "--output_dir", tmp_path)[1]
    assert args.greater_is_better == greater


def test_with_use_cpu_the_processor_chooses_the_number_format_not_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_tile": True, "amx_bf16": False})
    assert machine_supports_bf16() and not machine_supports_bf16(use_cpu=True)


def test_a_schedule_is_checked_with_its_learning_rate(tmp_path):
    words = ("--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 0.002}')
    assert parse("--recipe", "nano", "--learning_rate", "0.01", *words, "--output_dir", tmp_path)
    with pytest.raises(SystemExit):
        parse("--recipe", "nano", "--learning_rate", "0.001", *words, "--output_dir", tmp_path)


def test_a_machine_without_bf16_units_trains_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_tile": True, "amx_bf16": False})
    assert not parse("--recipe", "nano", "--output_dir", tmp_path)[1].bf16


def test_tutorial_recipes_are_the_tutorials(tmp_path):
    for name, embedding, position in (
        ("basic", "linear", "learned"),
        ("pe", "linear", "sinusoidal"),
        ("pe_conv", "conv", "sinusoidal"),
    ):
        recipe, args = parse("--recipe", f"tutorial_{name}", "--output_dir", tmp_path)
        config = ViTCifarConfig(**recipe.model)
        assert (config.patch_embedding, config.position_embedding) == (embedding, position)
        assert not config.attention_output_projection
        assert (recipe.optimizer, args.learning_rate, args.weight_decay, args.max_grad_norm) == ("adam", 1e-3, 5e-5, 0)
        assert (args.lr_scheduler_type, args.per_device_train_batch_size, args.num_train_epochs) == (
            "constant",
            256,
            50,
        )
        assert (recipe.flip, recipe.max_shift, recipe.shift_fill, recipe.cutout_size) == ("random", 4, "zeros", 0)
        assert (recipe.validation_size, recipe.first_eligible_epoch, args.metric_for_best_model) == (0, 12, "loss")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output_dir", "x"], r"the following arguments are required: --recipe \(or --model_name_or_path\)$"),
        (["--recipe", "finetune", "--output_dir", "x"], "model_name_or_path: expected a model folder or a Hub id"),
        (["--recipe", "smoke", "--output_dir", "x", "--freeze_body"], "freeze_body: expected --model_name_or_path"),
        (
            ["--model_name_or_path", "m", "--output_dir", "x", "--freeze_body", "--optimizer", "muon"],
            "freeze_body: expected optimizer trainer or adam for the head, got muon",
        ),
        (
            ["--model_name_or_path", "m", "--output_dir", "x", "--whiten_first_convolution"],
            "whiten_first_convolution: expected a model with random weights",
        ),
        (["--recipe", "nano"], "the following arguments are required: --output_dir"),
        (["--recipe", "nanu", "--output_dir", "x"], "recipe: expected one of finetune, nano, .* got 'nanu'"),
        (["--recipe", "nano", "--output_dir", "x", "--push_to_hub"], "push_to_hub: .*`vit-cifar publish`"),
        (["--recipe", "nano", "--output_dir", "x", "--hub_token", "secret"], "hub_token: expected none, .* got one$"),
        (
            ["--recipe", "nano", "--output_dir", "x", "--config_overrides", "64"],
            "config_overrides: expected field=value",
        ),
        (
            ["--recipe", "nano", "--output_dir", "x", "--config_overrides", "stem_widths=[24,48"],
            r"config_overrides: expected field=value,field=value, got 'stem_widths=\[24",
        ),
        (["--recipe", "nano", "--output_dir", "x", "--dataset_na", "folder"], ".*--dataset_na"),
        (["--recipe", "nano", "--output_dir", "x", "--flip", "up"], "argument --flip: invalid choice: 'up'"),
        (
            ["--recipe", "smoke", "--output_dir", "x", "--early_stopping_patience", "1"],
            "early_stopping_patience: expected .*, got False and",
        ),
        (
            [
                "--recipe",
                "speedrun",
                "--output_dir",
                "x",
                "--early_stopping_patience",
                "1",
                "--load_best_model_at_end",
                "true",
            ],
            "early_stopping_patience: expected .*, got True and no",
        ),
        (["--recipe", "nano", "--output_dir", "x", "--fp16"], "optimizer: expected bf16 or float32 for muon"),
        (
            ["--recipe", "nano", "--output_dir", "x", "--bf16", "0", "--fp16"],
            "optimizer: expected bf16 or float32 for muon",
        ),
        (
            ["--recipe", "tutorial_pe", "--output_dir", "x", "--fp16", "--use_cpu"],
            "fp16: expected a GPU with it, got a CPU",
        ),
        (["--recipe", "nano", "--output_dir", "x", "--nonsense", "1"], ".*--nonsense"),
        (
            ["--recipe", "nano", "--output_dir", "x", "--metric_for_best_model", "acc"],
            "metric_for_best_model: expected loss or accuracy, got acc",
        ),
        (
            ["--recipe", "nano", "--output_dir", "x", "--eval_do_concat_batches", "false"],
            "eval_do_concat_batches: expected True, .*, got False",
        ),
        (
            ["--recipe", "nano", "--output_dir", "x", "--train_sampling_strategy", "sequential"],
            "train_sampling_strategy: expected random, .*, got sequential",
        ),
        (
            ["--recipe", "nano", "--output_dir", "x", "--label_names", "y"],
            r"label_names: expected None, .*, got \['y'\]",
        ),
        (
            ["--recipe", "nano", "--output_dir", "x", "--gradient_accumulation_steps", "0"],
            "gradient_accumulation_steps: expected at least 1, got 0",
        ),
        (
            ["--recipe", "nano", "--output_dir", "x", "--label_smoothing_factor", "-0.5"],
            "label_smoothing_factor: expected a number from 0 to 1, got -0.5",
        ),
        (
            ["--recipe", "nano", "--output_dir", "x", "--learning_rate", "-1"],
            "learning_rate: expected a number of at least 0, got -1.0",
        ),
        (
            ["--recipe", "nano", "--output_dir", "x", "--muon_learning_rate", "nan"],
            "muon_learning_rate: expected a number of at least 0, got nan",
        ),
        (
            ["--recipe", "nano", "--output_dir", "x", "--lr_scheduler_type", "warmup_stable_decay"],
            "lr_scheduler_type, lr_scheduler_kwargs: expected what go together, got",
        ),
        (
            ["--recipe", "nano", "--output_dir", "x", "--num_train_epochs", "0"],
            "num_train_epochs or max_steps: expected",
        ),
        (["--recipe", "nano", "--output_dir", "x", "--max_steps", "0"], "num_train_epochs or max_steps: expected"),
        (
            ["--recipe", "nano", "--output_dir", "x", "--early_stopping_patience", "0"],
            "early_stopping_patience: expected a whole number of at least 1, got 0",
        ),
    ],
)
def test_wrong_commands_end_with_one_line(capsys, argv, message):
    assert re.match(message, refusal(capsys, *argv))


def test_a_file_beside_the_program_adds_no_arguments(monkeypatch, tmp_path):
    (tmp_path / "train.args").write_text("--seed 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    assert parse_arguments(["--recipe", "smoke", "--output_dir", "x"])[1].seed != 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnign_rate: 1", "recipe: expected names of arguments .* got learnign_rate"),
        ("optimizer: muon\noptim: adafactor", "optim: expected --optimizer trainer with it, got muon"),
        ("- a list", "recipe: expected arguments as `name: value` in .* got list"),
        ("a: [", "recipe: expected a YAML file"),
        ("cutmix_probability:", ".*NoneType"),
        ("model: nano", "recipe: expected config fields under model in .* got 'nano'"),
        ("flip: diagonal", "flip: expected one of none, random, alternating, got 'diagonal'"),
        ("optimizer: mun", "optimizer: expected one of muon, adam, trainer, got 'mun'"),
        ("cutmix_probability: 2", "cutmix_probability: expected a number from 0 to 1, got 2"),
        ("max_shift: -1", "max_shift: expected a whole number of at least 0, got -1"),
    ],
)
def test_wrong_recipe_files_end_with_one_line(capsys, tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    error = refusal(capsys, "--recipe", tmp_path / "wrong.yaml", "--output_dir", tmp_path)
    assert re.match(message, error)


def test_help_puts_our_arguments_first(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.index("--dataset_name") < text.index("--per_device_train_batch_size")
    assert "recipes: finetune, nano, small, small_long, smoke, speedrun, tutorial_basic" in " ".join(text.split())


def test_one_process_for_several_gpus_is_refused(monkeypatch, capsys):
    """Trainer would multiply the batch, and the record would not say so."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    assert "torchrun --nproc_per_node 2 train.py" in refusal(capsys, "--recipe", "small", "--output_dir", "x")


def test_numbers_with_an_exponent_are_numbers():
    recipe, _ = parse("--recipe", "nano", "--output_dir", "x", "--config_overrides", "layer_norm_eps=1e-6,head=1e")
    assert recipe.model["layer_norm_eps"] == 1e-6 and recipe.model["head"] == "1e"
