"""A run is killed at each operation on its files, and resumed: it ends as a run that was left alone, bit for bit.

`make test` takes some of the operations, `make soak` all of them.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mlfs.supernet.checkpoint import read_state, read_values
from mlfs.training.file_list import what_is_wrong
from tests.helpers.small_base import train_words, write_base, write_data

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="needs Linux and a C compiler"
)
NO_LIST = "it has no files.json, which is written last"
SOME = 12  # operations that `make test` takes


class Runs:
    """Trains one run again and again, in one place, since its files name it."""

    def __init__(self, place: Path) -> None:
        self.run, self.output = place / "run", place / "output.txt"
        self.words = train_words(write_base(place / "base"), write_data(place / "data"), self.run)
        self.words += ["--stage_steps", "2", "--save_steps", "1", "--save_total_limit", "2", "--eval_strategy", "no"]
        library = place / "stop.so"
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, HERE / "stop.c", "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                       "HF_DATASETS_CACHE": str(place / "cache"), "PYTHONWARNINGS": "ignore"}  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, HERE / "server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip
        self.count = self("train")["count"]  # operations of a run that is left alone
        self.expected = described(self.run)

    def __call__(
        self, verb: str, stop: int = 0, words: list[str] | None = None, folder: Path | None = None
    ) -> dict[str, Any]:
        """Runs a command up to operation `stop` below `folder`; returns its status and the number of operations."""
        if verb == "train":
            shutil.rmtree(self.run, ignore_errors=True)
        given = [*self.words, *(["--resume_from_checkpoint", "true"] if verb == "resume" else [])]
        asked = {"words": words or given, "stop": stop, "folder": str(folder or self.run), "output": str(self.output)}
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(asked), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def check(self, stop: int) -> None:
        """Fails unless a run that ended at operation `stop` can be resumed, and is then as one that was left alone."""
        before = saved_stage(self.run)
        if before is not None:  # what is there can be evaluated and exported
            read_state(self.run)
            assert what_is_wrong(self.run, ("*token*.json",)) in (None, NO_LIST)
        answer = self("resume")
        assert answer["status"] == 0, f"operation {stop}: {self.output.read_text()[-2000:]}"
        found = described(self.run)
        assert found.keys() == self.expected.keys(), (stop, found.keys() ^ self.expected.keys())
        odd = [name for name in found if found[name] != self.expected[name]]
        assert not odd, f"operation {stop} (run folder held {before}): {odd} differ"


def saved_stage(run: Path) -> Any:
    """How many stages have trained in what the run folder holds; it is whole or not there at any time."""
    return read_values(run)["trained_stages"] if (run / "mlfs.json").exists() else None


def described(run: Path) -> dict[str, Any]:
    """Every file of a run by name: its bytes, or what JSON says, without times and the words of the command line."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or name == ".mlfs.lock":
            continue
        if path.name == "files.json":
            found[name] = sorted(json.loads(path.read_text())["files"])
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if isinstance(value, dict):
        # train_loss: the Trainer's mean over the steps of this process alone
        times = ("runtime", "per_second", "latency", "resume_from_checkpoint", "checksum", "train_loss")
        return {key: without_times(item) for key, item in value.items() if not key.endswith(times)}
    return value


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("soak"))
    yield made
    assert made.server.stdin is not None
    made.server.stdin.close()
    made.server.wait(60)


def killed_and_resumed(runs: Runs, stops: Iterator[int]) -> int:
    """Kills the run at each of the operations and resumes it; returns how many there were, or fails with all faults."""
    done, faults = 0, []
    for stop in stops:
        assert runs("train", stop) == {"status": -9, "count": stop}
        try:
            runs.check(stop)
        except AssertionError as error:
            faults.append(str(error).partition("\n")[0])
        done += 1
    assert not faults, "\n".join([f"{len(faults)} of {done}", *faults])
    return done


def test_a_run_killed_at_some_of_its_file_operations_resumes_bit_for_bit(runs: Runs) -> None:
    """Spread over the run, and different ones of each kind of file."""
    assert runs.count > 400
    step = runs.count / SOME
    assert killed_and_resumed(runs, (1 + int(i * step) for i in range(SOME))) == SOME


@pytest.mark.soak
def test_a_run_killed_at_any_of_its_file_operations_resumes_bit_for_bit(runs: Runs) -> None:
    assert killed_and_resumed(runs, iter(range(1, runs.count + 1))) == runs.count


@pytest.mark.soak
def test_a_run_killed_again_while_it_resumes_still_ends_the_same(runs: Runs) -> None:
    """Killed, resumed and killed again, five times over, at operations spread over what is left to do."""
    for first in range(7, runs.count, runs.count // 20):
        assert runs("train", first)["status"] == -9
        for again in itertools.islice(itertools.cycle((3, 40, 11, 150, 77)), 5):
            answer = runs("resume", again)
            assert answer["status"] in (-9, 0)
        runs.check(first)


@pytest.mark.soak
def test_an_export_killed_at_any_of_its_file_operations_leaves_the_one_before_or_the_new_one(runs: Runs) -> None:
    """Between two renames the one before is beside its place, under a temporary name."""
    runs("train")
    place = runs.run.parent / "exports"
    old, new = (["export", str(runs.run), "--output_dir", str(place / "small"), "--subnet", name, "--overwrite"]
                for name in ("min", "max"))  # fmt: skip
    assert runs("export", 0, old, place)["status"] == 0
    total, widths, aside = runs("export", 0, new, place)["count"], set(), 0
    for stop in range(1, total + 1):
        shutil.rmtree(place)
        assert runs("export", 0, old, place)["status"] == 0
        assert runs("export", stop, new, place)["status"] == -9
        found = place / "small"
        if not found.exists():
            (found,) = place.glob(".tmp-*/replaced")
            aside += 1
        widths.add(AutoModelForSequenceClassification.from_pretrained(found).config.hidden_size)
        AutoTokenizer.from_pretrained(found)
        assert runs("export", 0, new, place)["status"] == 0
    assert widths == {8, 16} and aside <= 1
