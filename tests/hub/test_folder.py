"""A command's folder is there whole or not at all."""

import os

import pytest

from vit_cifar.hub.folder import FolderError, new_folder


def make(output):
    with new_folder(output) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text("whole")


@pytest.mark.parametrize("output", ["new", "new/below", "empty", ".", "link"])
def test_what_was_made_is_where_it_was_asked_for(tmp_path, monkeypatch, output):
    (tmp_path / "here" / "empty").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    if output == ".":
        (tmp_path / "here" / "empty").rmdir()
    if output == "link":
        (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "here")
    make(output)
    assert (tmp_path / "here" / output / "inside" / "file").read_text() == "whole"
    assert os.path.samefile(os.getcwd(), tmp_path / "here")
    assert not [path for path in tmp_path.rglob(".*")]  # no scratch folder is left
    with pytest.raises(FolderError, match="expected a new or an empty folder"):
        make(output)


def test_nothing_is_there_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_from_within(tmp_path):
    """It may be a file system of its own, below a folder that cannot be written."""
    with new_folder(tmp_path) as folder:
        assert tmp_path in folder.parents
