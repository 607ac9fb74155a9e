"""What `import vit_cifar` does, and what the two files that travel with the weights may need."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vit_cifar

PACKAGE = Path(vit_cifar.__file__).parent


def test_public_names():
    assert set(vit_cifar.__all__) == {
        *("CIFAR10_CLASSES", "ViTCifarConfig", "ViTCifarForImageClassification", "ViTCifarModel")
    }
    assert all(hasattr(vit_cifar, name) for name in vit_cifar.__all__)


def test_the_import_is_light_and_reaches_for_no_network(tmp_path):
    script = """
import sys
sys.addaudithook(lambda event, args: sys.exit(f"{event} {args}") if event.startswith("socket.") else None)
import vit_cifar
print(sorted({"gradio", "datasets", "matplotlib", "captum", "onnx", "typer"} & set(sys.modules)))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "0"},  # otherwise a call of the Hub would not get as far as a socket
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["configuration_vit_cifar", "modeling_vit_cifar"])
def test_a_file_that_travels_with_the_weights_needs_torch_and_transformers_only(name):
    """And imports its sibling in the one form that transformers' remote-code scanner handles."""
    needed, siblings = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            needed |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            siblings.add((node.level, node.module))
        elif isinstance(node, ast.ImportFrom):
            needed.add(node.module.split(".")[0])
    assert needed - set(sys.stdlib_module_names) <= {"torch", "transformers", "huggingface_hub"}
    assert siblings <= {(1, "configuration_vit_cifar")}


def test_the_model_is_one_file_that_can_be_read_at_one_sitting():
    assert len((PACKAGE / "modeling_vit_cifar.py").read_text().splitlines()) <= 350
