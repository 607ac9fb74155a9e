import random
import shutil

import pytest

from vit_cifar.integrity import SUMS_NAME, DamageError, check_checksums, newest_whole_checkpoint, write_checksums
from vit_cifar.models import ModelError, load_model

DAMAGES = 12


def damage(content: bytes, chance: random.Random) -> bytes:
    """Cut somewhere, or one bit flipped."""
    place = chance.randrange(len(content))
    if chance.random() < 0.5:
        return content[:place]
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


@pytest.mark.parametrize("part", ["", "checkpoint-100"])
def test_any_damage_to_any_file_that_programs_read_is_found_and_named(smoke_folder, tmp_path, part):
    folder, chance = shutil.copytree(smoke_folder / part, tmp_path / "copy"), random.Random(0)
    check_checksums(folder)
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".png"]
    assert len(files) >= 7
    for path in files:
        content = path.read_bytes()
        for _ in range(DAMAGES):
            path.write_bytes(damage(content, chance))
            # A damaged list may name the file of the line that was hit.
            with pytest.raises(DamageError, match=".*" if path.name == SUMS_NAME else f"got others: {path.name}"):
                check_checksums(folder)
        path.unlink()
        with pytest.raises(DamageError, match=path.name):
            check_checksums(folder)
        path.write_bytes(content)
    check_checksums(folder)
    listed = (folder / SUMS_NAME).read_bytes()
    for damaged in (listed[:-1], listed.replace(b"\n", b"\x0b", 1), listed + b"\n", b""):
        (folder / SUMS_NAME).write_bytes(damaged)
        with pytest.raises(DamageError, match=SUMS_NAME):
            check_checksums(folder)


def test_a_damaged_model_is_refused_and_the_newest_whole_checkpoint_offered(smoke_folder, tmp_path):
    folder = shutil.copytree(smoke_folder, tmp_path / "run")
    load_model(str(folder))
    for name in ("model.safetensors", "checkpoint-100/optimizer.pt"):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match="got others: model.safetensors .*checkpoint-95 is whole") as refused:
        load_model(str(folder))
    assert len(str(refused.value).splitlines()) == 1


def test_what_people_edit_and_what_is_hidden_is_not_listed(tmp_path):
    for name in ("config.json", "README.md", "picture.png", ".gitattributes", "._config.json"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    (tmp_path / "README.md").write_text("edited on the Hub")
    (tmp_path / "notes.txt").write_text("added")
    check_checksums(tmp_path)
    assert [line.split()[-1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()] == ["config.json", "end"]


def test_the_newest_checkpoint_is_the_one_of_the_largest_step_that_is_whole(tmp_path):
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_text(str(step))
        write_checksums(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100-backup").mkdir()
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-100", [])
    (tmp_path / "checkpoint-100" / "SHA256SUMS").unlink()
    (tmp_path / "checkpoint-10" / "model.safetensors").write_text("else")
    newest, problems = newest_whole_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-5"
    assert "which is written last" in str(problems[0]) and "model.safetensors" in str(problems[1])
    assert newest_whole_checkpoint(tmp_path / "nowhere") == (None, [])
