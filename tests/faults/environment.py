"""Where the package runs: without any network, with the oldest and the newest libraries, without known holes."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

from tests.helpers import ROOT, new_environment, run, skip_or_fail

# A command after these words sees no interface but loopback.
ALONE = ("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
SHIP = ROOT / "vit_cifar" / "demo" / "assets" / "examples" / "ship.png"
ASK_THE_PAGE = f"""
import pathlib, socket, sys
from tests.faults.page import Visitor
from tests.helpers import served
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    assert "unreachable" in str(error), error
with served(pathlib.Path(sys.argv[1]), sys.executable, "{ROOT}/app.py") as (_, url):
    print(Visitor(url).ask(pathlib.Path("{SHIP}").read_bytes())[1]["label"])
"""
AS_INSTALLED = ("torch", "torchvision")


def offline(*tests: str) -> dict:
    """Smoke training, page, command and `tests` (all fast ones if none are named) on a machine without network."""
    try:
        subprocess.run([*ALONE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        skip_or_fail("no network namespaces: they need unshare, ip and the right to use them")
    with TemporaryDirectory() as folder:
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/empty", "PYTHONPATH": str(ROOT)}
        trained = run(
            *(*ALONE, sys.executable, "train.py", "--recipe", "smoke", "--output_dir", f"{folder}/smoke"),
            **environment,
        )
        assert trained.returncode == 0, trained.stderr
        page = run(*ALONE, sys.executable, "-c", ASK_THE_PAGE, folder, **environment)
        assert page.returncode == 0, page.stderr
        command = run(*ALONE, sys.executable, "-m", "vit_cifar", "predict", SHIP, "--json", **environment)
        assert command.returncode == 0, command.stderr
        (answer,) = json.loads(command.stdout)
        figures = {
            "smoke_test_accuracy": json.loads(Path(folder, "smoke", "training_record.json").read_text())[
                "test_accuracy"
            ],
            "page": page.stdout.strip(),
            "command": answer["predictions"][0]["label"],
            "tests": _tests([*ALONE, sys.executable], *tests, **environment),
        }
    assert figures["page"] == figures["command"] == "ship", figures
    return figures


def dependencies() -> dict:
    """The fast tests with the lowest version of each range (.ci/run installs the newest), and what `audit` finds."""
    installed = run(sys.executable, "-m", "pip", "freeze").stdout.splitlines()
    constraints = [line for line in installed if line.split("==")[0] in AS_INSTALLED]
    constraints += [f"{name}=={version}" for name, version in lower_bounds() if name not in AS_INSTALLED]
    with TemporaryDirectory() as folder:
        file = Path(folder, "constraints.txt")
        file.write_text("\n".join(constraints))
        python = new_environment(Path(folder, "environment"), "-c", str(file), "-e", f"{ROOT}[dev]") / "python"
        lowest = _tests([python], HF_HUB_OFFLINE="1")
    return {"versions": constraints, "lowest": lowest, "audit": audit()}


def lower_bounds() -> Iterator[tuple[str, str]]:
    """(name, lowest version) of each range in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(line)
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                yield requirement.name, specifier.version


def audit() -> dict:
    """What pip-audit says of this environment; a package that it skips was not audited."""
    finished = run(sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off")
    if not finished.stdout:
        return {"audited": 0, "not_run": finished.stderr.strip().splitlines()[-1:]}
    found = json.loads(finished.stdout)["dependencies"]
    holes = {package["name"]: package["vulns"] for package in found if package.get("vulns")}
    assert not holes, holes
    skipped = [package["name"] for package in found if "skip_reason" in package]
    return {"audited": len(found) - len(skipped), "not_run": skipped}


def _tests(python: list, *tests: str, **environment: str) -> dict:
    finished = subprocess.run(
        [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert finished.returncode == 0, finished.stdout[-5000:]
    return {f"tests_{word}": int(count) for count, word in re.findall(r"(\d+) (passed|skipped)", finished.stdout)}
