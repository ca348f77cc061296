"""Folders: what can be written, who is alone in it, and where a run is."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mlfs import MLFSError
from mlfs.supernet.folders import locked_folder, make_folder, run_around, run_within

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, held: Any, forks: bool) -> None:
    with locked_folder(folder):
        if forks and os.fork() == 0:  # as the workers of a data loader, which outlive a killed parent for a while
            time.sleep(600)
            os._exit(0)
        held.set()
        time.sleep(600)


@contextlib.contextmanager
def holder(folder: Path, forks: bool = False) -> Any:
    """Another process that holds the lock, as a leader of a group of its own."""
    held = FORK.Event()

    def run() -> None:
        os.setsid()
        hold(folder, held, forks)

    process = FORK.Process(target=run)
    process.start()
    try:
        assert held.wait(60)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join(60)


def test_a_second_process_is_refused_in_one_line_and_the_first_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holder(folder) as process:
        for name in (folder, tmp_path / "other" / ".." / "run", Path(os.path.relpath(folder))):
            (tmp_path / "other").mkdir(exist_ok=True)
            with pytest.raises(MLFSError, match="another process writes to") as raised, locked_folder(name):
                pass
            assert "\n" not in str(raised.value)
        (tmp_path / "link").symlink_to(folder)
        with pytest.raises(MLFSError, match="another process"), locked_folder(tmp_path / "link"):
            pass
        assert process.is_alive()


@pytest.mark.parametrize("forks", [False, True])
def test_a_lock_that_a_killed_process_left_does_not_block(tmp_path: Path, forks: bool) -> None:
    with holder(tmp_path, forks) as process:
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with locked_folder(tmp_path):
            pass


def test_a_file_with_the_locks_name_does_not_block(tmp_path: Path) -> None:
    (tmp_path / ".mlfs.lock").write_text("of a process that is gone")
    with locked_folder(tmp_path):
        pass


def test_blocks_of_one_thread_nest_and_another_thread_is_refused(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with locked_folder(tmp_path):
                pass
        except MLFSError as error:
            refused.append(str(error))

    with locked_folder(tmp_path):
        with locked_folder(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(refused) == 1
    with locked_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    places = {
        "is a file": [tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"],
        "cannot be written": [
            tmp_path / ("long" * 100),
            Path("/", *["long"] * 2000),
            Path("/proc/mlfs/run"),
            tmp_path / "null\0byte",
        ],
    }
    for message, folders in places.items():
        for folder in folders:
            for make in (make_folder, lambda place: locked_folder(place).__enter__()):
                with pytest.raises(MLFSError, match=message) as raised:
                    make(folder)
                assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert os.listdir(tmp_path) == ["file"]


def test_runs_around_and_within_a_folder_are_found(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    (run / "stage-0" / "checkpoint-3").mkdir(parents=True)
    for folder in (run, run / "stage-0"):
        (folder / "mlfs.json").write_text("{}")
    (tmp_path / "link").symlink_to(run / "stage-0")
    for inside in (run, run / "stage-0", run / "stage-0" / "new" / "folder", tmp_path / "link", run / "x" / ".."):
        assert run_around(inside) == run.resolve()
    for outside in (tmp_path, tmp_path / "a", tmp_path / "new", run / ".." / "other"):
        assert run_around(outside) is None
    assert run_within(tmp_path) in (run.resolve(), run.resolve() / "stage-0")
    assert run_within(tmp_path / "new") is None
