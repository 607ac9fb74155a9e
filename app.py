"""The Space's entry point: `python app.py` is `vit-cifar demo`, on the model that the Space pins if this is one."""

import os
import sys
from pathlib import Path

from vit_cifar.cli import main

PIN = Path(__file__).with_name("model_id.txt")  # `vit-cifar publish-space` writes it

if __name__ == "__main__":
    if PIN.is_file():
        os.environ.setdefault("MODEL_ID", PIN.read_text().strip())
    sys.argv.insert(1, "demo")
    main()
