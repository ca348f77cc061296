import ast
import gc
from pathlib import Path

import pytest

import mlfs.data.builtin as demo_data
from mlfs.data.builtin import PACKAGES, docstring_dataset, stdlib_source
from mlfs.errors import MLFSError


@pytest.fixture(scope="module")
def default():
    return docstring_dataset()


def _write_package(folder: Path, modules: dict[str, str]) -> Path:
    for name, source in modules.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def _module(name: str, count: int = 3) -> str:
    return "\n".join(
        f'def f{i}():\n    """The {name} function {"x" * i} does what all functions of this module '
        f'do and then a little more than that, {name}."""\n'
        for i in range(count)
    )


def test_default_task_is_large_balanced_and_has_at_least_four_classes(default):
    train, validation, names, majority = default
    assert len(names) >= 4 and names == sorted(names) and set(names) <= set(PACKAGES)
    assert len(train) >= 4000 and len(validation) >= 400
    for rows in (train, validation):
        assert rows.features["label"].names == names
        counts = [rows["label"][:].count(label) for label in range(len(names))]
        assert len(set(counts)) == 1
    assert majority == pytest.approx(1 / len(names))


def test_no_text_is_in_both_splits_or_twice(default):
    train, validation, *_ = default
    texts = [text.lower() for text in [*train["text"], *validation["text"]]]
    assert len(set(texts)) == len(texts)


def test_no_text_names_a_package(default):
    train, validation, *_ = default
    names = ("pandas", "scipy", "sympy", "torch", "transformers", "hugging face", "huggingface", "stdlib", "cpython")
    for text in [*train["text"], *validation["text"]]:
        assert not [name for name in names if name in text.lower()]


def test_texts_are_single_lines_of_the_stated_length(default):
    for text in default[0]["text"]:
        assert demo_data.MIN_CHARACTERS <= len(text) <= demo_data.MAX_CHARACTERS
        assert text == " ".join(text.split())


def test_same_seed_same_data_and_another_seed_other_data():
    options = {"max_train": 90, "max_validation": 36}
    first, again, other = (docstring_dataset(seed, **options) for seed in (3, 3, 4))
    assert first[0][:] == again[0][:] and first[1][:] == again[1][:]
    assert first[0][:] != other[0][:]
    assert len(first[0]) == 90 and len(first[1]) == 36
    assert gc.isenabled()


def test_a_module_is_in_one_split_only(tmp_path, monkeypatch):
    folders = {}
    for name in ("pandas", "torch", "scipy", "sympy"):
        modules = {f"m{i}/part.py": _module(f"{chr(97 + i) * 3} of {name[::-1]}") for i in range(20)}
        folders[name] = _write_package(tmp_path / name, modules)
    monkeypatch.setattr(demo_data, "_source_folder", folders.get)
    train, validation, names, _ = docstring_dataset(max_train=160, max_validation=80)
    assert names == ["pandas", "scipy", "sympy", "torch"]
    modules = [{text.split("function")[0] for text in rows["text"]} for rows in (train, validation)]
    assert modules[0] and modules[1] and not modules[0] & modules[1]


def test_tests_broken_files_and_texts_of_two_packages_are_left_out(tmp_path, monkeypatch):
    shared = '"""This sentence stands in two packages word for word, so that it tells nothing about either of them."""'
    folders = {}
    for name in ("pandas", "torch", "scipy", "sympy"):
        modules = {f"m{chr(97 + i) * (i + 1)}.py": _module(f"{name[::-1]} {chr(97 + i) * 4}", 2) for i in range(12)}
        modules |= {"tests/a.py": _module("hidden"), "test_b.py": _module("hidden"), "broken.py": "def ("}
        modules |= {"shared.py": shared}
        folders[name] = _write_package(tmp_path / name, modules)
    monkeypatch.setattr(demo_data, "_source_folder", folders.get)
    train, validation, *_ = docstring_dataset(max_train=400, max_validation=100)
    texts = [*train["text"], *validation["text"]]
    assert len(texts) > 40
    assert not [text for text in texts if "hidden" in text or "word for word" in text]


def test_too_few_packages_or_texts_is_a_one_line_error(monkeypatch):
    with pytest.raises(MLFSError, match="a text for each class"):
        docstring_dataset(max_validation=2)
    monkeypatch.setattr(demo_data, "_source_folder", lambda name: None)
    with pytest.raises(MLFSError, match="needs four of"):
        docstring_dataset()
    with pytest.raises(MLFSError, match="without its source"):
        stdlib_source()


def test_standard_library_is_split_by_top_level_module():
    train, validation = stdlib_source()
    top = [{name.split("/")[0].removesuffix(".py") for name in rows["module"]} for rows in (train, validation)]
    assert not top[0] & top[1]
    sizes = [sum(map(len, rows["text"])) for rows in (train, validation)]
    assert sizes[0] > 4_000_000
    assert 0.05 < sizes[1] / sum(sizes) < 0.15
    assert not [name for rows in (train, validation) for name in rows["module"] if name.startswith("test/")]
    ast.parse(train[0]["text"])


def test_standard_library_is_bounded_and_the_same_for_one_seed():
    first, again, other = (stdlib_source(seed, max_documents=5) for seed in (1, 1, 2))
    assert first[0][:] == again[0][:] and first[1][:] == again[1][:] and first[0][:] != other[0][:]
    assert len(first[0]) == len(first[1]) == 5
    with pytest.raises(MLFSError, match="leaves a split empty"):
        stdlib_source(validation_fraction=0.0)
