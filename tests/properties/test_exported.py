"""Checkpoints of every family's extracted models load in a process that has no mlfs, with the same logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlfs import MLFSError, Subnet
from tests.helpers.runs import exportable, logits
from tests.supernets import LAYERS, distance, elastic
from tests.tiny_models import CASES, all_models, inputs, logits_of

ROOT = Path(__file__).resolve().parents[2]
every_model = pytest.mark.parametrize(("name", "suffix"), all_models())


every_family = pytest.mark.parametrize(("name", "suffix"), [(name, case.classes[0]) for name, case in CASES.items()])
WITHOUT_MLFS = """
import json, sys
sys.path[:] = [p for p in sys.path if p not in ("", {root!r})]

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mlfs":
            raise ModuleNotFoundError("no mlfs here")

sys.meta_path.insert(0, Blocker())
try:
    import mlfs
except ModuleNotFoundError:
    pass
else:
    sys.exit("mlfs is there")

import torch, transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
batch = {{k: v for k, v in load_file({folder!r} + "/batch.safetensors").items()}}
out = {{}}
for line in json.load(open({folder!r} + "/list.json")):
    model, info = getattr(transformers, line["auto"]).from_pretrained(line["path"], output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (line, info)
    assert type(model).__name__ == line["class"], line
    assert not any("mlfs" in kind.__module__ for m in model.modules() for kind in type(m).__mro__)
    with torch.no_grad():
        result = model.eval()(**batch)
    if "logits" not in result:
        result["logits"] = torch.stack([result.start_logits, result.end_logits], -1)
    out[line["path"]] = result["logits"].contiguous()
save_file(out, {folder!r} + "/logits.safetensors")
assert not any(name.split(".")[0] == "mlfs" for name in sys.modules)
"""


AUTO = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}


@pytest.fixture(scope="module")
def loaded_without_mlfs(tmp_path_factory) -> dict[tuple[str, str, Subnet], tuple[torch.Tensor, torch.Tensor]]:
    """Logits of every family's checkpoints: loaded in a process without mlfs, and of the active subnet here."""
    folder = tmp_path_factory.mktemp("exports")
    here, lines, places = {}, [], {}
    for name, suffix in all_models():
        supernet = elastic(name, suffix)
        for subnet in exportable(name):
            path = folder / f"{name}-{suffix}-{len(places)}"
            supernet.extract(subnet).save_pretrained(path)
            lines.append({"path": str(path), "auto": AUTO[suffix], "class": type(supernet.model).__name__})
            places[name, suffix, subnet] = str(path)
            here[name, suffix, subnet] = logits(supernet, subnet)
    (folder / "list.json").write_text(json.dumps(lines))
    save_file(inputs("left"), folder / "batch.safetensors")
    code = WITHOUT_MLFS.format(root=str(ROOT), folder=str(folder))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    there = load_file(folder / "logits.safetensors")
    return {key: (there[path], here[key]) for key, path in places.items()}


@every_model
def test_checkpoint_loads_without_mlfs_and_gives_the_same_logits(loaded_without_mlfs, name, suffix):
    compared = {key: pair for key, pair in loaded_without_mlfs.items() if key[:2] == (name, suffix)}
    assert len(compared) == len(exportable(name)) >= 3
    for key, (there, here) in compared.items():
        assert distance(there, here) < 1e-5, key


def test_checkpoints_cover_hidden_sizes_that_are_not_heads_times_head_size(loaded_without_mlfs):
    odd = {name for name, _, s in loaded_without_mlfs if s.hidden != s.per_layer("heads")[0] * 8}
    assert odd == {name for name in CASES if name.startswith(("llama", "mistral", "qwen"))}


@every_family
def test_exportable_is_exactly_what_survives_saving_and_loading(name, suffix, tmp_path):
    """Each uniform subnet of the space: either it is said to be unexportable, or its checkpoint gives its logits."""
    supernet = elastic(name, suffix, per_layer=False)
    outcomes = {True: 0, False: 0}
    for subnet in supernet.space.uniform():
        if subnet.layers != LAYERS[-1] or subnet.ffn == 24:
            continue
        able = supernet.is_exportable(subnet)
        outcomes[able] += 1
        small = supernet.extract(subnet)
        path = tmp_path / str(subnet).replace("/", "-")
        if able:
            small.save_pretrained(path)
            twin = type(supernet.model).from_pretrained(path)
            with torch.no_grad():
                assert distance(logits_of(twin(**inputs("left"))), logits(supernet, subnet)) < 1e-5
        else:
            with pytest.raises(MLFSError):
                small.save_pretrained(path)
            assert not path.exists()
    assert outcomes[True] >= 2
    assert bool(outcomes[False]) == (name not in ("mistral", "qwen2", "qwen3"))
