import json
import subprocess

import pytest
from packaging.version import Version

from tests.faults import environment


@pytest.mark.slow
def test_training_page_command_and_tests_need_no_network():
    assert environment.offline("tests/test_models.py")["tests"]["tests_passed"]


def test_each_range_has_a_lower_bound():
    bounds = dict(environment.lower_bounds())
    assert {"torch", "gradio", "onnx", "pytest"} < set(bounds)
    assert all(Version(version) for version in bounds.values())


def audit_of(monkeypatch, *packages: dict) -> dict:
    answer = subprocess.CompletedProcess([], 0, json.dumps({"dependencies": packages}), "")
    monkeypatch.setattr(environment, "run", lambda *words: answer)
    return environment.audit()


def test_a_skipped_package_was_not_audited(monkeypatch):
    sound, skipped = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}
    assert audit_of(monkeypatch, sound, skipped) == {"audited": 1, "not_run": ["b"]}


def test_a_known_hole_fails(monkeypatch):
    with pytest.raises(AssertionError, match="PYSEC-1"):
        audit_of(monkeypatch, {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1"}]})


@pytest.mark.slow
def test_no_package_of_this_environment_has_a_known_hole():
    figures = environment.audit()  # fails on a known hole
    if not_run := set(figures["not_run"]) - {"vit-cifar"}:  # which is on no index
        pytest.skip(f"pip-audit could not audit {len(not_run)} packages")
    assert figures["audited"] > 100
