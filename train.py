"""A recipe and Trainer arguments -> a trained model folder with its record.

python train.py --recipe nano --output_dir runs/nano
python train.py --help
"""

import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import set_seed

from vit_cifar import ViTCifarForImageClassification
from vit_cifar.errors import UserError, one_line
from vit_cifar.evaluation import records
from vit_cifar.evaluation.metrics import evaluate
from vit_cifar.integrity import write_checksums
from vit_cifar.models import local_folder
from vit_cifar.training.arguments import fastest_attention, parse_arguments
from vit_cifar.training.data import duplicates, is_local, load_data
from vit_cifar.training.initialization import initial_model, load_start
from vit_cifar.training.trainer import ViTCifarTrainer, describe_parameters, find_checkpoint


def main(argv: list[str]) -> None:
    recipe, args, parser = parse_arguments(argv)
    commit = records.git_commit(records.__file__)  # before training: a checkout may move on meanwhile
    try:
        checkpoint, resumed_from_step = find_checkpoint(args)
        start_folder = local_folder(recipe.model_name_or_path) if recipe.model_name_or_path else None
        if start_folder:  # before training, which may take the folder's place
            is_own = start_folder == Path(recipe.model_name_or_path)
            start_revision = records.weights_sha256(start_folder) if is_own else start_folder.name
        pretrained, processor = load_start(recipe, start_folder)
        image_size = processor.size["height"]
        with args.main_process_first(desc="the dataset"):  # the others find it decoded
            train_set, validation_set, test_set = load_data(recipe, image_size)
        twice = duplicates(test_set, train_set)
        set_seed(args.seed)
        attention = recipe.attn_implementation or fastest_attention(args.bf16, args.device)
        model, start = initial_model(recipe, pretrained, processor, train_set, attention)
        mean, std = processor.image_mean, processor.image_std
        trainer = ViTCifarTrainer(model, args, recipe, train_set, validation_set, mean, std)
        if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:  # which wrap the model first
            trainer.create_optimizer()  # now, as it may lack its package
    except (ValueError, ImportError, RuntimeError, StrictDataclassError) as error:
        parser.error(one_line(error))

    number_format = "float32" if args.mixed_precision == "no" else f"{args.mixed_precision} autocast"
    if trainer.is_world_process_zero():
        print(start)
        print(describe_parameters(model, recipe))
        print(f"{len(train_set):,} training and {len(validation_set):,} validation images on {args.device}")
        if twice:
            print(f"{len(twice):,} of {len(test_set):,} test images are training images too, such as row {twice[0]}")
        print(f"{number_format}, {attention} attention")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.end_training()  # otherwise one that ends early may abort, and torchrun ends them all
    if not trainer.is_world_process_zero():
        return
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    wall_time = trainer.clock.seconds()

    # From here on only the folder counts: loaded again, as a user will, it gives the numbers of the record.
    model = ViTCifarForImageClassification.from_pretrained(args.output_dir).to(args.device)
    # The one time that the model sees the test split.
    validation, test = (evaluate(model, processor, dataset) for dataset in (validation_set, test_set))

    state = trainer.state
    epochs = state.epoch * (1 - (resumed_from_step or 0) / state.global_step)  # of this process
    selected = args.load_best_model_at_end and state.best_model_checkpoint  # None if a resume did not find it
    # The best step that was saved: there may have been evaluations between two saves.
    kept_step = int(selected.rpartition("-")[2]) if selected else state.global_step
    arguments = vars(recipe) | args.to_dict()
    arguments["per_device_train_batch_size"] = trainer._train_batch_size  # --auto_find_batch_size finds its own
    dataset_name = recipe.dataset_title or records.public_name(recipe.dataset_name)
    public = {"dataset_name": dataset_name}
    for name in ("recipe", "output_dir", "resume_from_checkpoint"):
        if arguments[name] not in (None, "last"):  # the second is --resume_from_checkpoint without a value
            public[name] = records.public_name(arguments[name])
    if recipe.model_name_or_path:
        public["model_name_or_path"] = records.public_name(recipe.model_name_or_path)
        public["model_revision"] = start_revision
    launcher = ["python"] if args.world_size == 1 else ["torchrun", "--nproc_per_node", str(args.world_size)]
    record = {
        "recipe": public["recipe"],
        "command": records.public_command([*launcher, "train.py", *argv], public),
        "arguments": arguments | public,
        "parameters": model.num_parameters(),
        "git_commit": commit,
        "versions": records.versions(),
        "hardware": records.hardware(args.device),
        "number_format": number_format,
        "attn_implementation": attention,
        "seed": args.seed,
        "dataset": {
            "name": dataset_name,
            "hub_id": None if is_local(recipe.dataset_name) else recipe.dataset_name,
            "note": recipe.dataset_note,
            "fingerprints": {"train": train_set.fingerprint, "test": test_set.fingerprint},
            "validation_from": "train" if recipe.validation_size else "test",
            "images": {"train": len(train_set), "validation": len(validation_set), "test": len(test_set)},
            "test_images_in_train": len(twice),
        },
        "epochs": records.epoch_log(state.log_history),
        "kept_epoch": round(kept_step / state.global_step * state.epoch, 2),
        "epoch_selected_on": ("validation" if recipe.validation_size else "test") if selected else None,
        "resumed_from_step": resumed_from_step,  # the training loss of a resumed epoch is that of its second part
        "wall_time_seconds": round(wall_time, 1),
        # Evaluation and saving are in the time; None if every step had been made before.
        "images_per_second": round(epochs * len(train_set) / result.metrics["train_runtime"], 1) or None,
        "validation_accuracy": validation.accuracy,
        "validation_loss": validation.loss,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_accuracy_per_class": test.per_class,
        "weights_sha256": records.weights_sha256(args.output_dir),
    }
    records.write_json(Path(args.output_dir) / records.RECORD_NAME, record)
    records.plot_losses(record, Path(args.output_dir) / "loss_curve.png")
    write_checksums(args.output_dir)
    print(f"validation accuracy {validation.accuracy:.2%}, test accuracy {test.accuracy:.2%}: {args.output_dir}")


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name need not be in the terminal's encoding
    try:
        main(sys.argv[1:])
    except (UserError, OSError, SafetensorError) as error:  # the last two: a full disk, as a rule
        print(f"train.py: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped; --resume_from_checkpoint goes on from the newest checkpoint, if any", file=sys.stderr)
        sys.exit(130)  # as a shell says it
