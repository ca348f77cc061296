"""Compiles the kernels a launcher launches for a GPU that is not there, and reads their machine code.

with offline("sm90") as launches:
    mlfs.kernels.product.forward(...)   # CPU tensors of any content; nothing runs
launches[0].resources
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mlfs.kernels import configs

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
_LABEL = re.compile(r"^\.?([\w.$]+):")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What multiplies matrices, by architecture.
MATRIX = {
    "sm80": r"\bHMMA",
    "sm90": r"\bHG?MMA",
    "sm100": r"\b(?:UTC\w*MMA|HMMA)",
    "gfx942": r"\bv_mfma",
    "gfx1100": r"\bv_wmma",
}


@dataclass
class Launch:
    """One kernel launch: what was compiled, for which architecture, and with which grid and arguments."""

    name: str
    arch: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: list[Any]

    @cached_property
    def assembly(self) -> list[str]:
        """The instructions, a line each (SASS, or AMD's assembly without directives)."""
        if self.arch.startswith("gfx"):
            lines = (line.partition(";")[0].strip() for line in self.kernel.asm["amdgcn"].splitlines())
            return [line for line in lines if line and (line.endswith(":") or not line.startswith("."))]
        text = self._read_cubin("nvdisasm", "-c")
        found = (re.sub(r"/\*.*?\*/", "", line).strip() for line in text.splitlines())
        return [line for line in found if line and not line.startswith((".section", "//", ".align", ".size"))]

    @cached_property
    def resources(self) -> dict[str, int]:
        """Registers a thread, bytes of spilled registers a thread, bytes of shared memory a block."""
        if self.arch.startswith("gfx"):
            text = self.kernel.asm["amdgcn"]
            found = {key: int(n) for key, n in re.findall(r"\.([sv]gpr_(?:spill_)?count):\s+(\d+)", text)}
            spills = 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
            return {"registers": found["vgpr_count"], "spills": spills, "shared": self.kernel.metadata.shared}
        text = self._read_cubin("cuobjdump", "-res-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", text)
        assert found is not None, text
        return {"registers": int(found[1]), "spills": int(found[2]), "shared": self.kernel.metadata.shared}

    @property
    def matrix_instructions(self) -> int:
        """How many instructions of the matrix units the whole kernel has."""
        return self._count(self.assembly)

    @property
    def matrix_kinds(self) -> list[str]:
        """Which ones, by mnemonic."""
        return sorted({found[0] for line in self.assembly if (found := re.search(MATRIX[self.arch], line))})

    @cached_property
    def main_loops(self) -> list[list[str]]:
        """Of the innermost loops with matrix instructions those with most, from a branch's target to the branch: one,
        or one for each span or layer that a product goes over in turn."""
        loops = [(a, b) for a, b in self._loops() if self._count(self.assembly[a:b])]
        inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
        bodies = [[line for line in self.assembly[a:b] if not _LABEL.match(line)] for a, b in inner]
        most = max(map(self._count, bodies), default=0)
        return [body for body in bodies if self._count(body) == most]

    @property
    def loop_length(self) -> int:
        """Instructions of a step: the mean of the main loops, rounded up."""
        return -(-sum(map(len, self.main_loops)) // max(len(self.main_loops), 1))

    @property
    def global_load_bits(self) -> int:
        """The widest load from global memory, in bits; cp.async and TMA count as what they move."""
        widths = [0]
        for line in self.assembly:
            if self.arch.startswith("gfx"):
                if found := re.match(r"(?:global_load|buffer_load)_(?:b|dwordx?)(\d*)", line):
                    number = int(found[1] or 1)
                    widths.append(number if "_b" in found[0] else 32 * number)
            elif found := re.search(r"\b(LDG|LDGSTS)\S*", line):
                bits = re.search(r"\.(64|128)\b", found[0])
                widths.append(int(bits[1]) if bits else 32)
        return max(widths)

    def _read_cubin(self, tool: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            command = [str(_TOOLS / tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def _count(self, lines: list[str]) -> int:
        return sum(bool(re.search(MATRIX[self.arch], line)) for line in lines)

    def _loops(self) -> Iterator[tuple[int, int]]:
        """(first line, end) of each branch back and what it goes back to."""
        places = {m[1]: i for i, line in enumerate(self.assembly) if (m := _LABEL.match(line))}
        for i, line in enumerate(self.assembly):
            if found := re.search(r"\b(?:BRA\S*|s_c?branch\w*)\s.*?\(?`?\(?\.?([\w$.]*L\w+)", line):
                start = places.get(found[1], i)
                # what comes after the end is a wait that was moved there, not a loop around all between
                if start < i and not any(re.match(r"EXIT|s_endpgm", line) for line in self.assembly[start:i]):
                    yield start, i + 1


class _Driver:
    """Says which GPU to compile for; there is none to launch on."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 1000 + list(TARGETS.values()).index(self.target)  # compiled kernels are remembered by it

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def offline(arch: str, run: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Compiles each launch inside the block for `arch`; `run` is called with it, e.g. to emulate it."""
    launches: list[Launch] = []
    compile_only = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        bound = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        launch = Launch(name, arch, kernel, tuple(grid), [bound[name] for name in self.arg_names])
        launches.append(launch)
        if run is not None:
            run(launch)
        return kernel

    previous = driver._active
    driver.set_active(_Driver(TARGETS[arch]))
    try:
        with mock.patch.object(JITFunction, "run", record), configs.assume(arch):
            yield launches
    finally:
        driver._active = previous
