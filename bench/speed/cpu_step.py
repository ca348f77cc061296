"""What training and inference cost on a CPU, against PEFT, plain transformers and the matrix products alone.

    python -m bench.speed.cpu_step                  everything, a quarter of an hour on two cores (or: make bench-cpu)
    python -m bench.speed.cpu_step --only encoder   one part: encoder, decoder, memory, inference, decoding, scaling
    python -m bench.speed.cpu_step --table          prints the results recorded for this instruction set

Training: one step of `MLFSTrainer` over four sizes (maxnet teaches the others) against one step of each size with PEFT
(LoRA of rank 8 on every linear, distilled from the full model, whose forward pass is part of the step); the same batch,
dropout rates, losses and optimizer. The floor is what the linear layers' own matrix products (forward, and the gradient
of their input) take at the rate of torch.mm in the same run, for the tokens that are no padding. All variants take
turns in one process; figures are medians, with quartiles.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from bench.environment import environment
from bench.speed.cpu_inference import decoding, inference
from bench.speed.cpu_table import show
from bench.speed.cpu_training import decoder, encoder, memory, peak_of, scaling
from mlfs.files import write_json
from mlfs.ops.backend import cpp, why_no_cpp

RESULTS = Path(__file__).parents[1] / "results"
PARTS: dict[str, Callable[[int], Any]] = {
    "encoder": encoder,
    "decoder": decoder,
    "memory": memory,
    "inference": inference,
    "decoding": decoding,
    "scaling": scaling,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--repeats", type=int, default=11, help="of each variant (a third of it for the decoder)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="default: a file for the instruction set")
    parser.add_argument("--table", action="store_true", help="print the recorded results and stop")
    parser.add_argument("--one", choices=["mlfs", "peft", "nothing"], help=argparse.SUPPRESS)  # of the memory part
    given = parser.parse_args(arguments)
    if given.one:
        print(peak_of(given.one))
        return
    output: Path = given.output or results()
    result: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    if not given.table:
        for part in given.only or PARTS:
            measure(part, given.repeats, given.seed, result)
            write_json(output, result)
    print(show(result))


def results() -> Path:
    """Names the file of results of the instruction set that the extension uses here: those of others stay."""
    instructions = "none" if why_no_cpp() else cpp().instructions()
    return RESULTS / ("cpu_step.json" if instructions == "avx512" else f"cpu_step_{instructions}.json")


def measure(part: str, repeats: int, seed: int, result: dict[str, Any]) -> None:
    """Runs one part and puts its figures into `result`, and beside them where they come from.

    Results of other parts stay: each part has an entry of its own under "environments".
    """
    set_seed(seed)
    origin = environment(seed) | {"extension": why_no_cpp() or cpp().instructions()}
    result[part] = PARTS[part](repeats)
    result.setdefault("environments", {})[part] = origin


if __name__ == "__main__":
    main()
