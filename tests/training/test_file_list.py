"""The list of a folder's files: what was changed, deleted or put there is found, and the list comes last."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlfs.training.file_list import LIST_NAME, listed, what_is_wrong, write_list


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint-3"
    (made / "shards").mkdir(parents=True)
    for name in ("optimizer.pt", "trainer_state.json", "shards/0.bin"):
        (made / name).write_bytes(name.encode() * 10)
    write_list(made)
    return made


def test_the_list_names_every_file_and_nothing_is_wrong(folder: Path) -> None:
    assert set(listed(folder)) == {"optimizer.pt", "trainer_state.json", "shards/0.bin"}
    assert what_is_wrong(folder) is None


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "shards/0.bin"])
@pytest.mark.parametrize("fault", ["flipped", "cut", "longer", "deleted", "folder"])
def test_any_change_of_a_listed_file_is_found(folder: Path, name: str, fault: str) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if fault == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "cut":
        path.write_bytes(content[:-1])
    elif fault == "longer":
        path.write_bytes(content + b"x")
    elif fault == "folder":
        path.mkdir()
    assert name in str(what_is_wrong(folder))


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"files": {}, "checksum": "x"}', '{"checksum": 1}'])
def test_a_list_that_is_damaged_or_missing_is_found(folder: Path, text: str) -> None:
    (folder / LIST_NAME).write_text(text)
    assert LIST_NAME in str(what_is_wrong(folder))
    (folder / LIST_NAME).unlink()
    assert "written last" in str(what_is_wrong(folder))


def test_an_entry_that_was_changed_is_found(folder: Path) -> None:
    values = json.loads((folder / LIST_NAME).read_text())
    del values["files"]["optimizer.pt"]
    (folder / LIST_NAME).write_text(json.dumps(values))
    assert LIST_NAME in str(what_is_wrong(folder))


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth", "rng_state_1.pth", "optimizer.bin", "scaler.pt"])
def test_what_resuming_would_read_and_was_not_saved_is_found(folder: Path, name: str) -> None:
    (folder / "notes.txt").write_text("a user's")
    assert what_is_wrong(folder) is None
    (folder / name).write_bytes(b"x")
    assert name in str(what_is_wrong(folder))


def test_every_file_is_on_the_disk_before_the_list_has_its_name(folder: Path, monkeypatch: Any) -> None:
    done: list[str] = []
    real_sync, real_replace, real_open = os.fsync, os.replace, os.open
    names: dict[int, str] = {}

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        handle = real_open(path, *args, **kwargs)
        names[handle] = Path(path).name
        return handle

    def synced(handle: int) -> None:
        real_sync(handle)
        done.append(names[handle])

    def replaced(source: Any, target: Any) -> None:
        real_replace(source, target)
        done.append(f"renamed {Path(target).name}")

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_list(folder)
    end = done.index(f"renamed {LIST_NAME}")
    assert {"optimizer.pt", "trainer_state.json", "0.bin", "shards", "checkpoint-3"} <= set(done[:end])
    assert done[end - 1].startswith(".tmp-") and done[end + 1] == "checkpoint-3"  # the list itself, then its name
