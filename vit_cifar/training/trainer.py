"""The Trainer subclass: augmentation on the device, our optimizers, what a record needs to know."""

import json
import time
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .arguments import RecipeArguments
from .augmentation import Augmentation
from .data import ImageDataset, keep_batch, normalize
from .distributed import synchronize_batch_norm
from .optimizer import MuonWithAdamW, decayed_parameter_names, muon_parameter_names


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose largest logit is at their label."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Clock(TrainerCallback, ExportableState):
    """Wall time in seconds since the process started, plus that of the processes that a resumed run continues."""

    def __init__(self, seconds_before: float = 0.0):
        self.seconds_before = seconds_before

    def seconds(self) -> float:
        return self.seconds_before + time.time() - psutil.Process().create_time()

    def state(self) -> dict:
        return {"args": {"seconds_before": self.seconds()}, "attributes": {}}


class ViTCifarTrainer(Trainer):
    """Trainer over ImageDatasets.

    Args:
        image_mean, image_std: per channel, of pixels scaled to 0..1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        recipe: RecipeArguments,
        train_dataset: ImageDataset,
        eval_dataset: ImageDataset,
        image_mean: list[float],
        image_std: list[float],
    ):
        callbacks = [Clock()]
        if recipe.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(recipe.early_stopping_patience))
        if args.world_size > 1:
            model = synchronize_batch_norm(model.to(args.device))
        super().__init__(
            model,
            args,
            data_collator=keep_batch,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=accuracy,
            callbacks=callbacks,
        )
        self.label_smoother = None  # it takes no probabilities; compute_loss smooths itself
        self.recipe, self.image_mean, self.image_std = recipe, image_mean, image_std
        self.augmentation = Augmentation(
            num_samples=len(train_dataset),
            seed=args.seed,
            flip=recipe.flip,
            max_shift=recipe.max_shift,
            shift_fill=recipe.shift_fill,
            cutout_size=recipe.cutout_size,
            fill=tuple(round(255 * value) for value in image_mean),
            cutmix_probability=recipe.cutmix_probability,
            trivial_augment_probability=recipe.trivial_augment_probability,
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args, **kwargs) -> torch.Tensor | tuple:
        """In training, labels may be probabilities (B, classes), and are smoothed; the validation loss is the plain
        cross-entropy."""
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if self.recipe.freeze_body:
            self.model.vit.eval()  # the running statistics of its norms are part of what is frozen
        logits = model(inputs["pixel_values"]).logits.float()
        return nn.functional.cross_entropy(logits, inputs["labels"], label_smoothing=self.args.label_smoothing_factor)

    @property
    def clock(self) -> Clock:
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Clock))

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = super()._prepare_inputs(inputs)
        images, sample_index = inputs["pixel_values"], inputs.pop("sample_index")
        if self.model.training:
            augmentation, epoch = self.augmentation, int(self.state.epoch)
            images = augmentation(images, sample_index, epoch)
            if augmentation.cutmix_probability:
                partners = augmentation.partners(sample_index, epoch)
                others = self.train_dataset.__getitems__(partners)
                others, other_labels = others["pixel_values"].to(images.device), others["labels"].to(images.device)
                others = augmentation(others, partners, epoch)
                images, own_share = augmentation.cutmix(images, others, sample_index, epoch)
                one_hot = torch.eye(self.model.config.num_labels, device=images.device)
                own_labels = one_hot[inputs["labels"]]
                inputs["labels"] = own_labels.lerp(one_hot[other_labels], 1 - own_share[:, None])  # (B, classes)
        inputs["pixel_values"] = normalize(images, self.image_mean, self.image_std)
        return inputs

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_parameter_names(model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model, args = self.model if model is None else model, self.args
        if self.optimizer is None and self.recipe.optimizer == "muon":
            self.optimizer = MuonWithAdamW(
                model,
                lr=args.learning_rate,
                muon_lr=self.recipe.muon_learning_rate,
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        elif self.optimizer is None and self.recipe.optimizer == "adam":
            self.optimizer = torch.optim.Adam(
                model.parameters(),
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            )
        return super().create_optimizer(model)

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        if round(self.state.epoch) < self.recipe.first_eligible_epoch:
            return False
        return super()._determine_best_metric(metrics, trial)


def describe_parameters(model: nn.Module, recipe: RecipeArguments) -> str:
    """Two lines for the log: what Muon trains, and what is decayed and what is not, of what is trained at all."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    by_muon = muon_parameter_names(model) if recipe.optimizer == "muon" else []
    decayed = [name for name in sizes if recipe.optimizer == "adam" or name in decayed_parameter_names(model)]
    kept = [name for name in sizes if name not in decayed]
    total = {
        key: sum(sizes[n] for n in names) for key, names in (("muon", by_muon), ("decay", decayed), ("kept", kept))
    }
    what = " (biases, norms, class token, positions)" if kept else ""
    return (
        f"{model.num_parameters():,} parameters, {sum(sizes.values()):,} of them trained, {total['muon']:,} by Muon\n"
        f"decayed: {total['decay']:,} in {len(decayed)} tensors; "
        f"not decayed: {total['kept']:,} in {len(kept)} tensors{what}"
    )


def newest_checkpoint(output_dir: str) -> str | None:
    """The newest whole checkpoint in a training's folder, or None."""
    checkpoints = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    endings = {path: path.name.rpartition("-")[2] for path in checkpoints}
    numbered = {int(ending): path for path, ending in endings.items() if ending.isdigit()}
    for step in sorted(numbered, reverse=True):
        try:
            checkpoint_step(numbered[step])
            return str(numbered[step])
        except ValueError as error:
            print(f"passed over: {error}")
    return None


def checkpoint_step(folder: str | Path) -> int:
    """How many steps a checkpoint has behind it.

    Raises:
        ValueError: it is not whole: its trainer_state.json, which is written last, cannot be read.
    """
    try:
        return json.loads((Path(folder) / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"resume_from_checkpoint: expected a whole checkpoint, got {folder}: {error}") from error
