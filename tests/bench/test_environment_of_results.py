"""Every script that records results records beside them where they come from."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
RECORDED = {"commit", "command", "mlfs", "torch", "triton", "machine", "cores", "seed"}


def calls_of(path: Path) -> set[str]:
    """The names of the functions that a file calls."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            found.add(node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func))
    return found


FILES = [path for room in ("quality", "speed") for path in sorted((BENCH / room).glob("*.py"))]
WRITERS = [path for path in FILES if calls_of(path) & {"write_json", "write_text"}]


def test_the_scripts_that_write_results_are_found():
    quality = {"cost", "decoder", "palette", "recovery", "slices", "training"}
    assert {path.stem for path in WRITERS} == quality | {"cpu_step", "gpu"}


@pytest.mark.parametrize("path", WRITERS, ids=lambda path: path.stem)
def test_a_script_that_writes_results_asks_where_they_come_from(path):
    assert "environment" in calls_of(path)


def test_each_part_of_the_cpu_bench_has_its_own_record_beside_those_of_earlier_runs(tmp_path, monkeypatch):
    from bench.speed import cpu_step

    output = tmp_path / "cpu.json"
    output.write_text(json.dumps({"memory": "as it was", "environments": {"memory": "as it was"}}))
    monkeypatch.setitem(cpu_step.PARTS, "scaling", lambda repeats: [{"repeats": repeats}])
    monkeypatch.setattr(cpu_step, "show", lambda result: "")
    cpu_step.main(["--only", "scaling", "--repeats", "4", "--seed", "5", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["scaling"] == [{"repeats": 4}] and result["memory"] == "as it was"
    assert result["environments"]["memory"] == "as it was"
    record = result["environments"]["scaling"]
    assert record.keys() >= RECORDED | {"extension"} and record["seed"] == 5


def test_each_side_of_the_palette_has_its_own_record(tmp_path, monkeypatch):
    from bench.quality import palette

    def nothing(*_: Any, **__: Any) -> dict[str, Any]:
        return {"train": None, "validation": None}

    for name in ("load_raw", "load_tokenizer", "tokenize"):
        monkeypatch.setattr(palette, name, nothing)
    monkeypatch.setattr(palette, "train_palette", lambda inputs, seed, options: ({"size": 1}, {"seed": seed}))
    monkeypatch.setattr(palette, "train_twins", lambda inputs, seed: iter([{"first": seed}, {"last": seed}]))
    monkeypatch.setattr(palette, "show", lambda result: "")
    output = tmp_path / "palette.json"
    for side, seed in (("mlfs", 3), ("peft", 4)):
        palette.main(["--data", str(tmp_path), "--only", side, "--seed", str(seed), "--output", str(output)])
    result = json.loads(output.read_text())
    assert (result["parameters"], result["mlfs"], result["peft"]) == ({"size": 1}, {"seed": 3}, {"last": 4})
    records = result["environments"]
    assert all(record.keys() >= RECORDED for record in records.values())
    assert {side: record["seed"] for side, record in records.items()} == {"mlfs": 3, "peft": 4}


@pytest.mark.parametrize("name", ["cpu_step", "cpu_step_avx2", "palette_quality"])
def test_recorded_results_say_which_commit_versions_and_machine(name):
    result = json.loads((BENCH / "results" / f"{name}.json").read_text())
    parts = result.keys() - {"environments", "sentences", "parameters"}
    assert result["environments"].keys() == parts
    for record in result["environments"].values():
        assert record.keys() >= {"mlfs", "torch", "machine", "cores"}
        assert record.keys() & {"commit", "recorded in"}  # before records were kept: the commit that added the result
