"""Files are whole or not there, and JSON stays readable."""

import hashlib
import json
import os
import stat

import pytest

from mlfs.files import hash_file, temporary_file, write_json


def test_json_comes_back_and_lists_of_numbers_take_one_line(tmp_path):
    value = {"name": "a", "numbers": [1, 2.5, -3], "rows": [[1, 2], [3, 4]], "nested": {"list": ["x", "y"]}}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and text.endswith("}\n")
    assert '"numbers": [ 1, 2.5, -3 ]' in text and "[ 3, 4 ]" in text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_temporary_file_goes_with_the_block_unless_it_was_renamed(tmp_path):
    with temporary_file(tmp_path, ".x") as name:
        assert os.path.dirname(name) == str(tmp_path) and name.endswith(".x")
    assert os.listdir(tmp_path) == []
    with temporary_file(tmp_path, ".x") as name:
        os.replace(name, tmp_path / "kept")
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_written_file_has_the_permissions_of_an_ordinary_one(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a.json", 1)
        (tmp_path / "ordinary").touch()
        assert os.umask(mask) == mask  # reading it did not change it
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}


def test_the_hash_is_that_of_all_bytes(tmp_path):
    data = bytes(range(256)) * 5000  # more than one block of a megabyte
    (tmp_path / "a").write_bytes(data)
    assert hash_file(tmp_path / "a") == hash_file(str(tmp_path / "a")) == hashlib.sha256(data).hexdigest()
