"""What tests of several files of `mlfs.supernet` use."""

from pathlib import Path

import pytest

from mlfs import SuperTransformer
from tests.supernets import elastic


@pytest.fixture
def saved(tmp_path) -> tuple[SuperTransformer, Path]:
    """A small BERT with trained stages, and the folder it is saved in."""
    supernet = elastic("bert", "ForSequenceClassification")
    supernet.order("magnitude")
    supernet.save_pretrained(tmp_path / "run")
    return supernet, tmp_path / "run"
