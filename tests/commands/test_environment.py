"""`mlfs env`: what is active here and why, and the one warning that quotes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from mlfs.cli import main
from mlfs.ops.backends import built, cpp, table

ROOT = Path(__file__).parents[2]


def env(capsys, *flags: str) -> str:
    assert main(["env", *flags]) == 0
    return capsys.readouterr().out


def test_it_names_versions_backends_and_what_runs_each_kind_of_tensor(capsys, monkeypatch):
    monkeypatch.setenv("MLFS_TUNE", "0")
    found = json.loads(env(capsys, "--json"))
    assert found["versions"]["torch"] == torch.__version__ and found["processor"]
    assert found["variables"]["MLFS_TUNE"] == "0"
    assert found["backends"].keys() == {"reference", "autograd", "triton", "cpp"}
    compiled = cpp.why_no_cpp() is None
    assert found["backends"]["cpp"].startswith("active: " if compiled else "not active: ")
    assert found["runs"]["float32 on cpu"] == ("cpp" if compiled else "reference")
    text = env(capsys)
    for title in found:
        assert f"\n{title}" in f"\n{text}"
    assert torch.__version__ in text and found["backends"]["cpp"] in text


def test_it_says_why_the_extension_is_not_active(capsys, monkeypatch):
    reason = "the extension was compiled for PyTorch 1.2"
    backend = table.Backend("cpp", lambda: reason, lambda x, others: False, lambda x, others: reason)
    monkeypatch.setitem(table.BACKENDS, "cpp", backend)
    assert f"not active: {reason}" in env(capsys)


def test_reasons_are_of_one_line_with_the_way_out(monkeypatch, tmp_path):
    """Of each state that an installation can be in; those that need a build are in tests/test_packaging.py."""
    monkeypatch.setattr(built, "RECORD", tmp_path / "_cpu.json")
    for text in ("", "not JSON", '{"why_not": "there was no C++ compiler when mlfs was installed"}'):
        (tmp_path / "_cpu.json").write_text(text)
        monkeypatch.setitem(sys.modules, "mlfs._cpu", None)
        reason = built.why_no_extension.__wrapped__()
        assert reason and "\n" not in reason and "install" in reason


WARN = """
import json, sys
sys.modules["mlfs._cpu"] = None  # as where it was not built
import torch, warnings
from torch import nn
from mlfs import ElasticLinear
layer = ElasticLinear.from_linear(nn.Linear(8, 8))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        layer(torch.ones(2, 8))
print(json.dumps([str(w.message) for w in caught]))
"""


def test_the_first_operator_without_the_extension_warns_once(tmp_path):
    def warnings(**variables: str) -> list[str]:
        env = {key: value for key, value in os.environ.items() if key != "MLFS_BACKEND"} | variables
        done = subprocess.run([sys.executable, "-c", WARN], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    (message,) = warnings()
    assert "plain PyTorch on this CPU" in message and "`mlfs env`" in message
    assert warnings(MLFS_BACKEND="reference") == []
