"""The demo page: `python app.py` opens it on the bundled models, `--model FOLDER_OR_HUB_ID` on another one."""

import argparse
import os
import sys
import warnings
from typing import NoReturn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL_ID") or None,
        help="model folder or Hub id; left out, the environment variable MODEL_ID or every model in the checkout",
    )
    name = parser.parse_args().model

    try:
        from vit_cifar.demo.page import LAUNCH_OPTIONS, build_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        fail('the page needs gradio: pip install "vit-cifar[demo]"')
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from vit_cifar.demo.views import load_subjects
    from vit_cifar.models import ModelError

    disable_progress_bars()  # of reading small files, as is the next
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="PIL")  # of damaged uploads: the page says what the user needs
    try:
        subjects = load_subjects(name)
    except ModelError as error:
        fail(str(error))
    build_page(subjects).launch(**LAUNCH_OPTIONS)


def fail(reason: str) -> NoReturn:
    print(f"app.py: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
