"""A recipe and a command line -> arguments. The command line overrides the recipe, the recipe the defaults."""

import re
from argparse import ArgumentParser
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, get_scheduler
from transformers.hf_argparser import string_to_bool

from ..errors import one_line
from .data import CIFAR10_NAME

RECIPES = Path(__file__).parent / "recipes"
# Arguments of Trainer of which one value works here: a batch has no columns, and the metrics need all logits at once.
FIXED = {
    "remove_unused_columns": False,
    "eval_do_concat_batches": True,
    "eval_use_gather_object": False,
    "batch_eval_metrics": False,
    "prediction_loss_only": False,
    "label_names": None,
    "train_sampling_strategy": "random",  # the others go by lengths of text, or train in the order of the files
    "enable_jit_checkpoint": False,  # on SIGTERM it ends as if training had finished, and a half-trained model is saved
}


@dataclass
class RecipeArguments:
    """What this package adds to transformers' TrainingArguments."""

    _argument_group_name = "recipe, data, augmentation, optimizer"

    recipe: str = field(
        default="finetune",
        metadata={
            "help": "a shipped recipe, or a YAML file with any of these arguments but output_dir, and with config "
            "fields under model; with model_name_or_path it can be omitted"
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "fine-tune this trained model, a folder or Hub id: other classes get a new head, another "
            "image_size interpolated positions"
        },
    )
    freeze_body: bool = field(default=False, metadata={"help": "fine-tune the head alone"})
    whiten_first_convolution: bool = field(
        default=False,
        metadata={"help": "start a conv_stem's first filters from the principal components of training patches"},
    )
    model: dict = field(init=False, default_factory=dict)
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "config fields over the model's own, as in image_size=48,stem_widths=[24,48,96,192]"},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa …; if omitted, the faster one on this machine (eager for bf16 on a CPU)"},
    )
    dataset_name: str = field(
        default=CIFAR10_NAME, metadata={"help": "Hub id, local folder, or `sample` for the images in the package"}
    )
    dataset_title: str | None = field(
        default=None,
        metadata={"help": "what the record calls the dataset; if omitted, the Hub id or the folder's own name"},
    )
    dataset_note: str | None = field(
        default=None, metadata={"help": "what a reader of the record must know of the data"}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "column with the images; if omitted, the only one of type Image"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "column with the labels; if omitted, the only one of type ClassLabel"}
    )
    validation_size: int = field(
        default=5000,
        metadata={"help": "images held out of train, the same share of every class; 0 validates on the test split"},
    )
    validation_seed: int = field(default=0, metadata={"help": "which images are held out"})
    flip: Literal["none", "random", "alternating"] = field(
        default="random", metadata={"help": "horizontal flips; alternating: every second epoch, not by chance"}
    )
    max_shift: int = field(default=4, metadata={"help": "largest shift in pixels along each axis"})
    shift_fill: Literal["zeros", "reflect"] = field(default="reflect", metadata={"help": "what moves in at the border"})
    cutout_size: int = field(default=0, metadata={"help": "side in pixels of a square painted over; 0 for none"})
    cutmix_probability: float = field(
        default=0.0, metadata={"help": "share of the images that get a window from another one; 0 for none"}
    )
    trivial_augment_probability: float = field(
        default=0.0, metadata={"help": "share of the images that get one operation of TrivialAugment; 0 for none"}
    )
    optimizer: Literal["muon", "adam", "trainer"] = field(
        default="trainer",
        metadata={
            "help": "muon: Muon for the layers' matrices and a conv_stem's filters, AdamW for the rest; adam: torch's "
            "Adam with coupled L2; trainer: what --optim says"
        },
    )
    muon_learning_rate: float = field(default=0.02, metadata={"help": "for Muon; --learning_rate is for the rest"})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after this many evaluations in a row without improvement"}
    )
    first_eligible_epoch: int = field(default=0, metadata={"help": "the first epoch that can be kept as the best"})

    def __post_init__(self) -> None:
        # argparse checks what the command line says, not what a recipe does.
        for name in ("flip", "shift_fill", "optimizer"):
            words = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: expected one of {', '.join(words)}, got {getattr(self, name)!r}")
        least = dict.fromkeys(("validation_size", "max_shift", "cutout_size", "first_eligible_epoch"), 0)
        if self.early_stopping_patience is not None:
            least["early_stopping_patience"] = 1
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"{name}: expected a whole number of at least {bound}, got {value!r}")
        for name in ("cutmix_probability", "trivial_augment_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)!r}")


@dataclass
class ViTCifarTrainingArguments(TrainingArguments):
    """TrainingArguments under a heading of their own in --help."""

    _argument_group_name = "transformers.TrainingArguments"


def machine_supports_bf16(use_cpu: bool = False) -> bool:
    """Whether bfloat16 is fast here: a GPU that has it, or a CPU with AVX-512 BF16 or AMX."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def fastest_attention(bf16: bool, device: torch.device) -> str:
    """attn_implementation: the fused kernel, but for bf16 on a CPU, where writing attention out is faster."""
    return "eager" if bf16 and device.type == "cpu" else "sdpa"


def parse_arguments(argv: list[str]) -> tuple[RecipeArguments, TrainingArguments, ArgumentParser]:
    """Resolves recipe and command line; a user's error ends the process with one line and exit code 2."""
    parser = HfArgumentParser(
        [RecipeArguments, ViTCifarTrainingArguments],
        prog="train.py",
        allow_abbrev=False,  # a record hides local folders by their options' full names
        usage="python train.py (--recipe NAME | --model_name_or_path MODEL) --output_dir FOLDER [any argument below]",
        description="Train a ViT-CIFAR model folder that from_pretrained loads, with its record. The defaults "
        "below are those of this machine; a recipe overrides them, the command line overrides both. Shipped "
        f"recipes, in vit_cifar/training/recipes: {', '.join(recipe_names())}.",
    )
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "last"
            action.help = "a checkpoint folder; without a value, the newest whole one in output_dir"
    parser.set_defaults(remove_unused_columns=False, restore_callback_states_from_checkpoint=True)
    parser.set_defaults(logging_strategy="epoch")  # what a record's rows are made of
    parser.set_defaults(ddp_find_unused_parameters=False)  # there are none; looking for them costs time, and a warning

    parser.set_defaults(**_of_this_machine(use_cpu=not torch.accelerator.is_available(), fp16=False))
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])  # and ends: no recipe is needed for it
    first = ArgumentParser(add_help=False, allow_abbrev=False, prog=parser.prog, usage=parser.usage)
    first.add_argument("--recipe")
    first.add_argument("--model_name_or_path", "--model-name-or-path")
    first.add_argument("--output_dir", "--output-dir", required=True)
    for name, kind in {"use_cpu": string_to_bool, "fp16": string_to_bool, "optim": str, "optim_args": str}.items():
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const=True, type=kind)
    given = first.parse_known_args(argv)[0]
    if given.recipe is None and given.model_name_or_path is None:
        parser.error("the following arguments are required: --recipe (or --model_name_or_path)")
    recipe = _read_recipe(given.recipe or "finetune", parser)
    model = recipe.pop("model", {})
    if given.model_name_or_path:
        model = {}  # the trained one's
        recipe.pop("whiten_first_convolution", None)  # it is for new ones
    known = {name: parser.get_default(name) for name in ("use_cpu", "fp16")} | recipe
    known |= {name: value for name, value in vars(given).items() if value is not None}
    # Before the recipe, so that this or the command line can say otherwise.
    parser.set_defaults(**_of_this_machine(known["use_cpu"], known["fp16"]))
    parser.set_defaults(**recipe)
    try:
        recipe_args, training_args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        recipe_args.model = model | _parse_overrides(recipe_args.config_overrides)
    except (ValueError, TypeError, ImportError) as error:
        parser.error(one_line(error))
    _check(recipe_args, training_args, known.keys(), parser)
    # Otherwise `accelerate launch` decides by its own configuration, and the record names another number format.
    training_args.mixed_precision = "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "no"
    return recipe_args, training_args, parser


def _of_this_machine(use_cpu: bool, fp16: bool) -> dict[str, bool]:
    """The defaults that depend on it. use_cpu without a GPU too, or Trainer refuses bf16."""
    return {
        "use_cpu": use_cpu,
        "bf16": machine_supports_bf16(use_cpu) and not fp16,
        "dataloader_pin_memory": torch.cuda.is_available() and not use_cpu,
    }


def _check(
    recipe_args: RecipeArguments, training_args: TrainingArguments, given: Set[str], parser: ArgumentParser
) -> None:
    """Arguments that do not go together end the process; `given` are those that recipe or command line name."""
    compares = training_args.load_best_model_at_end and training_args.eval_strategy != "no"
    if recipe_args.early_stopping_patience is not None and not compares:
        parser.error(
            "early_stopping_patience: expected --load_best_model_at_end true and an --eval_strategy other than no, got "
            f"{training_args.load_best_model_at_end} and {training_args.eval_strategy.value}"
        )
    metric = training_args.metric_for_best_model or "loss"
    if metric.removeprefix("eval_") not in ("loss", "accuracy"):
        parser.error(f"metric_for_best_model: expected loss or accuracy, got {metric}")
    if training_args.max_steps == 0 or (training_args.max_steps < 0 and training_args.num_train_epochs <= 0):
        parser.error(
            f"num_train_epochs or max_steps: expected more than 0, got {training_args.num_train_epochs:g} and "
            f"{training_args.max_steps}"
        )
    for name, value in FIXED.items():
        if (found := getattr(training_args, name, value)) != value:  # not every version has each
            parser.error(f"{name}: expected {value}, as nothing else fits this training, got {found}")
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(training_args, name) < 1:
            parser.error(f"{name}: expected at least 1, got {getattr(training_args, name)}")
    if not 0 <= training_args.label_smoothing_factor <= 1:
        parser.error(
            f"label_smoothing_factor: expected a number from 0 to 1, got {training_args.label_smoothing_factor}"
        )
    for settings, name in ((training_args, "learning_rate"), (recipe_args, "muon_learning_rate")):
        if not getattr(settings, name) >= 0:
            parser.error(f"{name}: expected a number of at least 0, got {getattr(settings, name)}")
    try:
        throwaway = torch.optim.SGD([torch.zeros(1)], lr=training_args.learning_rate)
        kwargs = training_args.lr_scheduler_kwargs
        get_scheduler(training_args.lr_scheduler_type, throwaway, 1, 10, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        parser.error(f"lr_scheduler_type, lr_scheduler_kwargs: expected what go together, got {one_line(error)}")
    if training_args.n_gpu > 1:  # Trainer would multiply the batch, and batch norm would see a part of it
        parser.error(
            f"expected one process for each of {training_args.n_gpu} GPUs (torchrun --nproc_per_node "
            f"{training_args.n_gpu} train.py ...) or CUDA_VISIBLE_DEVICES=0, got one process for all of them"
        )
    if recipe_args.optimizer != "trainer" and {"optim", "optim_args"} & given:
        parser.error(f"optim: expected --optimizer trainer with it, got {recipe_args.optimizer}")
    if recipe_args.optimizer == "muon" and training_args.fp16:
        parser.error("optimizer: expected bf16 or float32 for muon, got fp16")  # its loss scaler is untried with it
    if training_args.fp16 and training_args.device.type == "cpu":  # accelerate would train in float32 without a word
        parser.error("fp16: expected a GPU with it, got a CPU, which has bf16 or float32")
    if recipe_args.recipe == "finetune" and recipe_args.model_name_or_path is None:
        parser.error("model_name_or_path: expected a model folder or a Hub id with the recipe finetune, got none")
    if recipe_args.freeze_body and recipe_args.model_name_or_path is None:
        parser.error("freeze_body: expected --model_name_or_path with it, got none")
    if recipe_args.freeze_body and recipe_args.optimizer == "muon":
        parser.error("freeze_body: expected optimizer trainer or adam for the head, got muon, which is for the body")
    if recipe_args.whiten_first_convolution and recipe_args.model_name_or_path:
        parser.error("whiten_first_convolution: expected a model with random weights, got --model_name_or_path")
    if training_args.push_to_hub:
        parser.error("push_to_hub: training never publishes; publish a trained folder with `vit-cifar publish`")
    if training_args.hub_token:  # the record, which is published, says the command
        parser.error(
            "hub_token: expected none, because training never publishes and the record holds the command, got one"
        )


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_model(name: str) -> dict:
    """The config fields of a shipped recipe's model."""
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))["model"]


def _read_recipe(name: str, parser: ArgumentParser) -> dict:
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        parser.error(f"recipe: expected one of {', '.join(recipe_names())} or a YAML file, got {name!r}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"recipe: expected a YAML file, got {name!r}: {one_line(error)}")
    if not isinstance(recipe, dict):
        parser.error(f"recipe: expected arguments as `name: value` in {name!r}, got {type(recipe).__name__}")
    if not isinstance(recipe.get("model", {}), dict):
        parser.error(f"recipe: expected config fields under model in {name!r}, got {recipe['model']!r}")
    unknown = set(recipe) - {action.dest for action in parser._actions} - {"model"}
    if unknown:
        parser.error(f"recipe: expected names of arguments (see --help) in {name!r}, got {', '.join(sorted(unknown))}")
    return recipe


def _parse_overrides(text: str | None) -> dict:
    overrides = {}
    for item in re.split(r",(?![^\[]*\])", text) if text else []:  # not at the commas of a [list]
        try:
            name, value = item.split("=", 1)
            exponent = re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.IGNORECASE)  # 1e-6: to YAML a string
            overrides[name.strip()] = float(value) if exponent else yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"config_overrides: expected field=value,field=value, got {item!r}") from error
    return overrides
