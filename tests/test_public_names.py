"""Modules and names that users import stay where they are, also where `datasets` is not installed."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mlfs
import mlfs.data

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "mlfs": (
        "ElasticEmbedding ElasticLayerNorm ElasticLinear ElasticRMSNorm MLFSArguments MLFSError MLFSTrainer "
        "SearchSpace Subnet SuperTransformer train_stage without_padding"
    ),
    "mlfs.elastic": ("Elastic ElasticEmbedding ElasticLayerNorm ElasticLinear ElasticNorm ElasticRMSNorm train_stage"),
    "mlfs.supernet": "SuperTransformer",
    "mlfs.data": "TASKS DataArguments RawData collator load_raw prepare tokenize",
}
EACH_NAME = [(module, name) for module, names in NAMES.items() for name in names.split()]


@pytest.mark.parametrize(("module", "name"), EACH_NAME)
def test_a_public_name_is_importable_from_where_it_was(module, name):
    found = importlib.import_module(module)
    value = getattr(found, name)
    assert not isinstance(value, ModuleType)
    assert name in dir(found) and name in found.__all__


def test_a_name_stays_what_it_is_after_every_file_beside_it_was_imported():
    """An imported submodule becomes an attribute of its package, and would hide a lazy name that is its own."""
    for package in (mlfs, mlfs.data):
        folder = Path(package.__file__).parent
        files = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        assert not files & set(package._PLACES)


@pytest.mark.parametrize("package", [mlfs, mlfs.data])
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = package.nonsense


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process in which `import datasets` fails as where it is not installed."""
    blocked = "import sys; sys.modules['datasets'] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["mlfs", "mlfs.elastic", "mlfs.supernet", "mlfs.data"])
def test_without_datasets_it_is_imported(module):
    done = run(f"import {module}")
    assert done.returncode == 0, done.stderr


def test_without_datasets_a_model_is_made_elastic_and_runs():
    code = """
import torch
from torch import nn
from transformers import BertConfig, BertModel

from mlfs import ElasticLinear, SearchSpace, Subnet, SuperTransformer
from mlfs.data import DataArguments

config = BertConfig(vocab_size=20, hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1)
supernet = SuperTransformer(BertModel(config), SearchSpace((16, 8), (2, 1), (32, 16), ((0,),)), rank=2)
with torch.no_grad(), supernet.activate(supernet.space.min):
    assert supernet(torch.tensor([[1, 2, 3]])).last_hidden_state.shape == (1, 3, 8)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_without_datasets_reading_data_says_what_is_missing():
    done = run("from mlfs.data import load_raw")
    assert done.returncode != 0 and "datasets" in done.stderr.splitlines()[-1]
