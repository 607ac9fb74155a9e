"""The Trainer subclass: augmentation on the device, our optimizers, what a record needs to know."""

import ctypes
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..configuration_vit_cifar import ViTCifarConfig
from ..errors import UserError, first_line
from ..integrity import (
    SUMS_NAME,
    WEIGHTS_NAME,
    DamageError,
    check_checksums,
    checkpoints,
    newest_whole_checkpoint,
    write_checksums,
)
from .arguments import RecipeArguments
from .augmentation import Augmentation
from .data import ImageDataset, keep_batch, normalize
from .distributed import synchronize_batch_norm
from .optimizer import MuonWithAdamW, decayed_parameter_names, muon_parameter_names

# What a training that is resumed cannot change, but for its length: one record could not tell of both.
SETTINGS = (
    *("optimizer", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "whiten_first_convolution"),
    *("seed", "data_seed", "freeze_body", "flip", "max_shift", "shift_fill", "cutout_size"),
    *("cutmix_probability", "trivial_augment_probability", "label_smoothing_factor"),
)
OWN_SETTINGS = {"muon": ("muon_learning_rate",), "adam": (), "trainer": ("optim", "optim_args")}


class TrainingError(UserError):
    """A training that cannot go on; the message is one line. What was saved before is as it was."""


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


class TrainedOn(TrainerCallback, ExportableState):
    """Which images a checkpoint was trained and compared on, and with what settings."""

    def __init__(self, digest: str, settings: dict):
        self.digest, self.settings = digest, settings

    def state(self) -> dict:
        return {"args": {"digest": self.digest, "settings": self.settings}, "attributes": {}}


class SaveAfterEvaluation(TrainerCallback):
    """A save at the end of an epoch or of the training waits for its evaluation, which a resumed run would lack."""

    waiting = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if control.should_save and (state.epoch.is_integer() or control.should_training_stop):
            control.should_save, self.waiting = False, True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.waiting:
            control.should_save, self.waiting = True, False


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """What a training step frees stays with the process for the next one, and goes back to the system in the end.

    glibc's allocator would give it back at once and fetch it anew, page by page, in the next step; of tensors above
    32 MiB it still does. In the end its thresholds are those that it would raise itself to. With any other allocator
    nothing changes.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
    most = 32 * 2**20  # bytes, up to which glibc raises its mmap threshold, and the other one to twice as many
    libc.mallopt(mmap_threshold, most)
    libc.mallopt(trim_threshold, -1)  # never
    try:
        yield
    finally:
        libc.mallopt(trim_threshold, 2 * most)
        libc.malloc_trim(0)


class ViTCifarTrainer(Trainer):
    """Trainer over ImageDatasets.

    Args:
        image_mean, image_std: per channel, of pixels scaled to 0..1.

    Raises:
        ValueError: shifts of a whole image, or no whole batch where only whole ones are trained on.
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
        side = train_dataset.images.shape[-1]
        if recipe.max_shift >= side:
            raise ValueError(f"max_shift: expected less than the images' {side} pixels, got {recipe.max_shift}")
        batch_size = args.train_batch_size * args.world_size
        if args.dataloader_drop_last and len(train_dataset) < batch_size:
            raise ValueError(
                f"dataloader_drop_last: expected {batch_size} training images or more, one batch, "
                f"got {len(train_dataset)}"
            )
        arguments = vars(recipe) | args.to_dict()
        settings = {name: arguments[name] for name in SETTINGS + OWN_SETTINGS[recipe.optimizer]}
        settings["images per step"] = batch_size * args.gradient_accumulation_steps
        self.trained_on = TrainedOn(train_dataset.digest() + eval_dataset.digest(), settings)
        callbacks = [Clock(), self.trained_on, SaveAfterEvaluation()]
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
        self.label_smoother = None  # it needs class indices, and CutMix gives probabilities: compute_loss smooths
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
            self.model.vit.eval()  # a fixed extractor: no dropout, no drop path, no dropped patches
        logits = model(inputs["pixel_values"]).logits.float()
        return nn.functional.cross_entropy(logits, inputs["labels"], label_smoothing=self.args.label_smoothing_factor)

    def train(self, *args, **kwargs) -> TrainOutput:
        with freed_memory_kept():
            return super().train(*args, **kwargs)

    @property
    def clock(self) -> Clock:
        return self._callback(Clock)

    def _callback(self, kind: type[TrainerCallback]) -> TrainerCallback | None:
        """Looked up by type, because a resume replaces the callback objects."""
        return next((callback for callback in self.callback_handler.callbacks if isinstance(callback, kind)), None)

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = super()._prepare_inputs(inputs)
        images, sample_index = inputs["pixel_values"], inputs.pop("sample_index")
        if self.model.training:
            sample_index = sample_index.cpu()  # where the draws are; once, because a GPU has to be waited for
            augmentation, epoch = self.augmentation, int(self.state.epoch)
            images = augmentation(images, sample_index, epoch)
            if augmentation.cutmix_probability:
                partners = augmentation.partners(sample_index, epoch)
                others = self.train_dataset.__getitems__(partners)
                others, other_labels = others["pixel_values"].to(images.device), others["labels"].to(images.device)
                others = augmentation(others, partners, epoch)
                images, own_share = augmentation.cutmix(images, others, sample_index, epoch)
                count = self.model.config.num_labels
                own, other = (nn.functional.one_hot(found, count).float() for found in (inputs["labels"], other_labels))
                inputs["labels"] = own.lerp(other, 1 - own_share[:, None])  # (B, classes)
        inputs["pixel_values"] = normalize(images, self.image_mean, self.image_std)
        return inputs

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args, **kwargs) -> None:
        """As in Trainer, but only from a checkpoint of the same images, settings and model.

        Raises:
            TrainingError: they are others, or it does not say which.
        """
        before = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME))).stateful_callbacks
        if TrainedOn.__name__ not in before:
            raise TrainingError(
                "resume_from_checkpoint: expected a checkpoint of this version's train.py, got "
                f"{resume_from_checkpoint}, which does not say what it was trained on"
            )
        before = before[TrainedOn.__name__]["args"]
        if before["digest"] != self.trained_on.digest:
            raise TrainingError(
                "resume_from_checkpoint: expected the training and validation images, labels and classes of "
                f"{resume_from_checkpoint}, got others"
            )
        expected, own = (
            {name: getattr(config, name) for name in ViTCifarConfig.__annotations__}
            for config in (ViTCifarConfig.from_pretrained(resume_from_checkpoint), self.model.config)
        )
        expected |= before["settings"]
        for name, value in (own | self.trained_on.settings).items():
            said = expected.get(name, "which it does not say")
            if said != value:
                raise TrainingError(
                    f"resume_from_checkpoint: expected the {name} of {resume_from_checkpoint}, {said}, got {value}"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_callback_state(self) -> None:
        """As in Trainer, but the patience is that of this command, not the checkpoint's."""
        super()._load_callback_state()
        if stopping := self._callback(EarlyStoppingCallback):
            stopping.early_stopping_patience = self.recipe.early_stopping_patience
            # Of a checkpoint without it: Trainer's next save asks for it.
            self.state.stateful_callbacks.setdefault(type(stopping).__name__, stopping.state())

    def _run_epoch(self, *args, **kwargs) -> None:
        """As in Trainer, but a training that has already ended gets no further step or epoch."""
        stopping = self._callback(EarlyStoppingCallback)
        stopped = stopping and stopping.early_stopping_patience_counter >= stopping.early_stopping_patience
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        """As in Trainer, but `dataloader_drop_last` is of the training images alone: each validation image counts."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

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
                dtype=torch.bfloat16 if args.bf16 else torch.float32,
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

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As in Trainer, but no optimizer step follows a loss or a gradient that is NaN or infinite.

        Raises:
            TrainingError: there is one.
        """
        loss = super().training_step(*args, **kwargs)
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        # With fp16 gradients are infinite now and then: its scaler leaves such a step out by itself.
        norm = nn.utils.get_total_norm(gradients.values()) if self.accelerator.scaler is None else torch.zeros(())
        if not (loss + norm.to(loss.device)).isfinite():
            broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            first = f" ({', '.join(broken[:2])})" if broken else ""
            raise TrainingError(
                f"step {self.state.global_step + 1}: expected a finite loss and finite gradients, got a loss of {loss} "
                f"and {len(broken)} of {len(gradients)} gradients with NaN or infinity{first}: "
                f"stopped before this step; {self._how_to_go_on()}"
            )
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """As in Trainer, but with checksums, which mark the checkpoint as whole; only then are older ones deleted.

        Raises:
            TrainingError: it cannot be written.
        """
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process has its own random state to save
            if self.args.should_save:
                write_checksums(folder)
            self.accelerator.wait_for_everyone()  # from here on each may read it
        except (OSError, RuntimeError, SafetensorError) as error:  # as torch, json and safetensors say "disk full"
            free = shutil.disk_usage(self.args.output_dir).free  # torch's own words are of positions in its file
            if self.args.should_save and not (folder / SUMS_NAME).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"{folder}: cannot be written: {first_line(error)}, {free:,} bytes free; {self._how_to_go_on()}"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_best_model(self) -> None:
        """As in Trainer, after a check of the checkpoint's checksums."""
        check_best(self.state)
        super()._load_best_model()

    def _how_to_go_on(self) -> str:
        newest, _ = newest_whole_checkpoint(self.args.output_dir)
        return f"--resume_from_checkpoint goes on from {newest}" if newest else "no checkpoint was saved before"

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        if self.state.epoch < self.recipe.first_eligible_epoch:
            return False
        return super()._determine_best_metric(metrics, trial)


def describe_parameters(model: nn.Module, recipe: RecipeArguments) -> str:
    """Two lines for the log: what Muon trains, and what is decayed and what is not, of what is trained at all."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    by_muon = muon_parameter_names(model) if recipe.optimizer == "muon" else []
    decayed = list(sizes) if recipe.optimizer == "adam" else [n for n in decayed_parameter_names(model) if n in sizes]
    kept = [name for name in sizes if name not in decayed]
    muon_size, decayed_size, kept_size = (sum(sizes[n] for n in names) for names in (by_muon, decayed, kept))
    what = " (biases, norms, class token, positions)" if kept else ""
    return (
        f"{model.num_parameters():,} parameters, {sum(sizes.values()):,} of them trained, {muon_size:,} by Muon\n"
        f"decayed: {decayed_size:,} in {len(decayed)} tensors; "
        f"not decayed: {kept_size:,} in {len(kept)} tensors{what}"
    )


def find_checkpoint(args: TrainingArguments) -> tuple[str | None, int | None]:
    """(The checkpoint to go on from, how many steps it has behind it); (None, None) to start anew.

    Raises:
        TrainingError: there is no whole one to go on from, or output_dir holds another training or cannot be written.
    """
    output_dir, wanted = Path(args.output_dir), args.resume_from_checkpoint
    goes_on_here = wanted == "last" or (wanted and Path(wanted).resolve().parent == output_dir.resolve())
    # One that goes on from elsewhere and was killed inside its first save may start again.
    counts = f"{PREFIX_CHECKPOINT_DIR}-*" if wanted is None else f"{PREFIX_CHECKPOINT_DIR}-*/{SUMS_NAME}"
    taken = [*output_dir.glob(counts), *output_dir.glob(WEIGHTS_NAME)]
    if taken and not goes_on_here:
        raise TrainingError(
            f"output_dir: expected a folder that holds no other training, got {output_dir} with "
            f"{taken[0].relative_to(output_dir)}: "
            + ("go on with --resume_from_checkpoint or choose another" if checkpoints(output_dir) else "choose another")
        )
    try:  # now, and not when the training is to be saved
        there = next(path for path in (output_dir, *output_dir.resolve().parents) if path.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise TrainingError(f"output_dir: expected a folder that can be written, got {output_dir}: {error}") from error
    if wanted is None:
        return None, None
    if wanted == "last":
        wanted, damaged = newest_whole_checkpoint(output_dir)
        for error in damaged:
            print(f"passed over: {error}")
        begun = checkpoints(output_dir)
        if wanted is None and begun and not any((checkpoint / SUMS_NAME).exists() for checkpoint in begun):
            print("no checkpoint was whole yet: training starts anew")
            return None, None
        if wanted is None:
            raise TrainingError(f"resume_from_checkpoint: expected a whole checkpoint in {output_dir}, got none")
    else:
        try:
            check_checksums(wanted)
        except DamageError as error:
            newest, _ = newest_whole_checkpoint(output_dir)
            offer = f"; {newest} is whole" if newest else ""
            raise TrainingError(f"resume_from_checkpoint: {error}{offer}") from error
    if not args.deepspeed and not any(Path(wanted).glob("optimizer*")):
        raise TrainingError(
            f"resume_from_checkpoint: expected a checkpoint with its optimizer, got {wanted}, of --save_only_model"
        )
    state = TrainerState.load_from_json(str(Path(wanted, TRAINER_STATE_NAME)))
    if args.load_best_model_at_end and state.best_model_checkpoint and Path(state.best_model_checkpoint).is_dir():
        check_best(state)
    return str(wanted), state.global_step


def check_best(state: TrainerState) -> None:
    """Raises TrainingError unless the best checkpoint so far is what it was."""
    try:
        check_checksums(state.best_model_checkpoint)
    except DamageError as error:
        raise TrainingError(
            f"the best checkpoint so far is damaged: {error}; with --resume_from_checkpoint --load_best_model_at_end "
            "false the last weights are kept instead"
        ) from error
