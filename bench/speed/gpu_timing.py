"""Times what runs on a GPU: contenders by turns, each by its own pair of events, and what the device can do at most."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
FLUSHED = 256 << 20  # bytes written between two runs: more than any GPU's second-level cache holds


@dataclass
class Contender:
    """Pairs what is timed, `run`, with `look`, which gives the numbers that contenders must agree on (or is None)."""

    run: Run
    look: Callable[[], Tensor] | None = None


@dataclass
class Case:
    """Describes one line of the table: the contenders, ours first, and the work that none can do without.

    Attributes:
        build: makes the contenders.
        graph: whether a run is recorded once and replayed: the device's time, without Python's.
        flops, bytes: operations, and bytes read or written, of one run.
    """

    section: str
    name: str
    dtype: torch.dtype
    build: Callable[[], dict[str, Contender]]
    graph: bool = True
    flops: float | Callable[[dict[str, Contender]], float] | None = None
    bytes: float | None = None


class Clock:
    """Measures times on one device.

    Args:
        rounds: how often each contender runs.
        warm_up: how often it runs before, untimed.
        scratch: bytes to write before each run, so that none finds its operands in the cache.
    """

    def __init__(self, device: str, rounds: int, warm_up: int = 3, scratch: int = FLUSHED) -> None:
        self.device, self.rounds, self.warm_up = device, rounds, warm_up
        self._scratch = torch.empty(scratch, dtype=torch.int8, device=device)

    def compare(self, runs: Mapping[str, Run], flush: bool = True) -> dict[str, list[float]]:
        """Returns the seconds of each run of each contender. All are warm; who goes first changes with every round."""
        names = list(runs)
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
        for turn in range(self.rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if flush:
                    self._scratch.zero_()
                start = self._mark()
                runs[name]()
                marks[name].append((start, self._mark()))
        self.wait()
        return {name: [self._seconds(*pair) for pair in pairs] for name, pairs in marks.items()}

    def record(self, run: Run) -> Run:
        """Records `run` as a CUDA graph and returns its replay; on a CPU returns `run`."""
        if self.device == "cpu":
            return run
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.warm(run)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def ceilings(self, dtypes: list[torch.dtype], size: int, copied: int) -> dict[str, float]:
        """Measures FLOP/s of a large matrix product of each dtype, and bytes/s (read and written) of a large copy."""
        found = {}
        for dtype in dtypes:
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            found[name_of(dtype)] = 2 * size**3 / self._alone(partial(torch.mm, a, b, out=out))
        source = torch.zeros(copied, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        found["bytes"] = 2 * copied / self._alone(lambda: target.copy_(source))
        return found

    def warm(self, run: Run) -> None:
        """Runs a contender untimed: kernels are compiled and tuned, memory is allocated."""
        for _ in range(self.warm_up):
            run()

    def wait(self) -> None:
        """Waits until all that was started is done."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Gives memory back between cases."""
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _alone(self, run: Run) -> float:
        self.warm(run)
        return spread(self.compare({"alone": run})["alone"])["median"]

    def _mark(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return end - start if self.device == "cpu" else start.elapsed_time(end) / 1e3


def measure(case: Case, clock: Clock, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Measures one case: each contender's median and quartiles in seconds, and how many times as long as ours it takes.

    A contender that raises, or whose numbers are not ours, is not timed; the reason is under "errors".
    """
    row: dict[str, Any] = {"section": case.section, "case": case.name, "type": name_of(case.dtype)}
    row |= {"mode": "graph" if case.graph else "eager", "rounds": clock.rounds, "errors": {}}
    try:
        contenders = case.build()
        ours = next(iter(contenders))
    except Exception as error:
        return row | {"errors": {"build": _said(error)}}
    runs: dict[str, Run] = {}
    for name, contender in contenders.items():  # before any of them trains
        try:
            if contender.look is not None and name != ours:
                _agree(contender.look(), contenders[ours].look, case.dtype)
        except Exception as error:
            row["errors"][name] = _said(error)
    for name in [name for name in contenders if name not in row["errors"]]:
        try:
            run = contenders[name].run
            clock.warm(run)
            if case.graph:
                run = clock.record(run)
                run()
            runs[name] = run
        except Exception as error:
            row["errors"][name] = _said(error)
    if ours not in runs:
        return row
    try:
        row["times"] = {name: spread(times) for name, times in clock.compare(runs, flush=case.graph).items()}
        seconds = row["times"][ours]["median"]
        row["ratios"] = {name: times["median"] / seconds for name, times in row["times"].items() if name != ours}
        flops = case.flops(contenders) if callable(case.flops) else case.flops
        if flops is not None:
            row["of FLOP/s"] = flops / seconds / ceilings[name_of(case.dtype)]
        if case.bytes is not None:
            row["of bytes/s"] = case.bytes / seconds / ceilings["bytes"]
    except Exception as error:
        row["errors"]["timing"] = _said(error)
    return row


def spread(seconds: list[float]) -> dict[str, float]:
    """Computes median and quartiles."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}


def name_of(dtype: torch.dtype) -> str:
    """Names a dtype as the results do, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _agree(found: Tensor, ours: Callable[[], Tensor] | None, dtype: torch.dtype) -> None:
    assert ours is not None
    expected, actual = ours().double(), found.double()
    error = ((actual - expected).norm() / expected.norm()).item()
    if not error <= (2e-3 if dtype == torch.float32 else 5e-2):  # NaN is not
        raise ArithmeticError(f"its numbers are not ours: relative distance {error:.2g}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
