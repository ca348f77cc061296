"""Runs the command line again and again, each time in a fork of one process that has imported everything.

Started with tests/soak/stop.c preloaded. Each line on standard input is a JSON object: `words` of the command line,
`stop`, the operation on files below `folder` to be killed at (0: none), and `output`, a file for what is printed. Each
answer is a line: `status` of the process (negative: the signal that ended it) and `count`, how many operations there
were.
"""

import ctypes
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import mlfs.commands.train  # noqa: F401
from mlfs.cli import main


def run(library: ctypes.CDLL, words: list[str], stop: int, folder: str, output: str) -> int:
    """Runs one command in this process and ends it."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for standard in (1, 2):
        os.dup2(handle, standard)
    status = 70
    try:
        library.mlfs_stop_at(ctypes.c_long(stop), folder.encode())
        status = main(words)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def serve() -> None:
    """Answers each line of standard input."""
    torch.set_num_threads(1)
    library = ctypes.CDLL(None)
    library.mlfs_count.restype = ctypes.c_long
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            run(library, asked["words"], asked["stop"], asked["folder"], asked["output"])
        _, status = os.waitpid(child, 0)
        answer = {"status": os.waitstatus_to_exitcode(status), "count": library.mlfs_count()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
