"""What a recorded result states of its origin."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench import environment as module
from bench.environment import LIBRARIES, environment

ROOT = Path(__file__).resolve().parents[2]


def test_it_states_code_libraries_machine_and_run():
    found = environment()
    assert {"commit", "command", "date", "python", "machine", "cores", "threads", "variables"} <= set(found)
    assert found["torch"] == torch.__version__ and set(LIBRARIES) <= set(found)
    assert json.loads(json.dumps(found)) == found


def test_the_seed_is_stated_where_there_is_one():
    assert environment(seed=3)["seed"] == 3
    assert "seed" not in environment()


def test_no_torch_is_imported_for_it():
    code = "import sys, bench.environment as e; print(e.environment()['command'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_the_command_is_the_module_that_runs(tmp_path, monkeypatch):
    """Under `python -m`, and of a script, whose place on the disk is nobody's business."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "__init__.py").touch()
    for name in ("tools/some.py", "script.py"):
        (tmp_path / name).write_text("from bench.environment import command\nprint(command())\n")
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments, "--size", "a b"]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.strip()

    assert run("-m", "tools.some") == "python -m tools.some --size 'a b'"
    assert run("script.py") == "python script.py --size 'a b'"
    assert run(str(tmp_path / "script.py")) == "python script.py --size 'a b'"


def test_changes_since_the_commit_are_stated_and_no_checkout_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert module.commit() == "unknown"

    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    result = tmp_path / "bench" / "results" / "one.json"
    result.parent.mkdir(parents=True)
    for path in (tmp_path / "file", result):
        path.write_text("one")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    clean = module.commit()
    assert len(clean) == 40
    (tmp_path / "other").touch()  # untracked: no part of what ran
    result.write_text("two")
    assert module.commit() == clean
    (tmp_path / "file").write_text("two")
    assert module.commit() == f"{clean}+changes"
