"""Runs compiled gfx1100 machine code on a CPU, with the emulator of a tinygrad checkout that TINYGRAD names.

What the interpreter cannot show shows here: a miscompiled mask, a race, a wrong pointer width. AMD's code object is an
ELF file: its segments are laid out in memory, the kernel descriptor gives the entry point and what to allocate, and the
arguments go into the kernarg segment in the order of the signature.
"""

import ctypes
import io
import os
import struct
import sys
from typing import Any

import torch

from bench.static.offline import Launch

ARCH, WAVE = "gfx1100", 32
_S_NOP = struct.pack("<II", 0xBF800000, 0xBF800000)
# buffer_gl0_inv and buffer_gl1_inv: cache invalidations, which the emulator does not decode and does not need
_INVALIDATIONS = [struct.pack("<II", word, 0) for word in (0xE0AC0000, 0xE0B00000)]
_LDS_SHIFT, _LDS_UNIT = 15, 512  # of compute_pgm_rsrc2
# DPP controls by which a lane reads another of its row of 16 (AMD, "RDNA3 Instruction Set Architecture", DPP16)
_ROW_SHARE, _ROW_XMASK, _IDENTITY = 0x150, 0x160, 0xE4


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    place = os.environ.get("TINYGRAD")
    if not place or not os.path.isfile(os.path.join(place, "test", "mockgpu", "amd", "emu.py")):
        return "TINYGRAD names no checkout of tinygrad"
    try:
        import elftools  # noqa: F401
    except ImportError:
        return "pyelftools is not installed"
    return None


def emulate(launch: Launch) -> None:
    """Executes a launch that was compiled for gfx1100, on its CPU tensors, in place."""
    sys.path.insert(0, os.environ["TINYGRAD"])
    try:
        from test.mockgpu.amd import emu
    finally:
        sys.path.pop(0)
    _teach(emu)
    _image, base, size, descriptor = _load(launch.kernel.asm["hsaco"])  # the memory lives as long as its name
    lds, scratch, kernarg, _, entry = struct.unpack_from("<IIIIq", ctypes.string_at(base + descriptor, 64))
    (resources,) = struct.unpack_from("<I", ctypes.string_at(base + descriptor, 64), 52)
    lds = max(lds, launch.kernel.metadata.shared)
    resources &= ~(0x1FF << _LDS_SHIFT)
    resources |= -(-lds // _LDS_UNIT) << _LDS_SHIFT
    grid = (*launch.grid, 1, 1)[:3]
    explicit = _pack(launch)
    # Triton adds pointers to two scratch buffers; then come the hidden arguments, of which tl.num_programs reads these
    explicit += bytes(-len(explicit) % 8) + bytes(16) + struct.pack("<III", *grid)
    arguments = ctypes.create_string_buffer(explicit + bytes(max(kernarg - len(explicit), 0) + 64))
    threads = launch.kernel.metadata.num_warps * WAVE
    code = base + descriptor + entry
    emu.run_asm(code, size, *grid, threads, 1, 1, ctypes.addressof(arguments), resources, scratch, "rdna3")


def _teach(emu: Any) -> None:
    if not hasattr(emu, "taught"):
        emu.taught = True
        _teach_dpp(emu)
        _teach_memory(emu)


def _teach_dpp(emu: Any) -> None:
    """Adds what row sums need and the emulator lacks: two DPP controls (lane n of each row; the lane whose number
    differs in the bits of n), and that a lane reads what another held before the instruction, also where its result
    goes into the register it is read from."""
    known = emu._dpp16_ctrl

    def control(lane: Any, dpp: int, *rest: Any) -> Any:
        kind, n = dpp & ~15, dpp & 15
        if kind not in (_ROW_SHARE, _ROW_XMASK):
            return known(lane, dpp, *rest)
        own, enabled, valid = known(lane, _IDENTITY, *rest)
        return ((own & ~15) + n if kind == _ROW_SHARE else own ^ n), enabled, valid

    def at_once(handler: Any) -> Any:
        def compile_all_lanes(instruction: Any, context: Any) -> Any:
            sink, effects = handler(instruction, context), []
            for effect in sink.src:
                if effect.op is emu.Ops.END:  # a loop over lanes: instead all lanes' reads, then their writes
                    body, lane = effect.src
                    lanes = range(context.wave_size)
                    effects += [body.substitute({lane: emu.UOp.const(i, lane.dtype)}) for i in lanes]
                else:
                    effects.append(effect)
            return emu.UOp.sink(*effects)

        return compile_all_lanes

    emu._dpp16_ctrl = control
    for kind, handler in emu._INST_HANDLERS.items():
        if handler is emu._compile_vop12 and kind.__name__.endswith("DPP16"):
            emu._INST_HANDLERS[kind] = at_once(handler)


def _teach_memory(emu: Any) -> None:
    """Adds that a 16-bit load from shared memory keeps the other half of its register, and that each wave has scratch
    memory of its own. The emulator has one for all waves of a group: those that wait at a barrier would lose what they
    spilled there."""
    buffer = emu.Buffer

    def load_half(instruction: Any, context: Any) -> Any:
        name = emu._op_name(instruction)
        if name.startswith("DS_LOAD") and "_D16" in name:
            shift = 16 if name.endswith("_HI") else 0

            class Half(emu._Ctx):
                __slots__ = ()

                def wvgpr_dyn(self, register: Any, lane: Any, value: Any, *rest: Any) -> Any:
                    kept = self.rvgpr_dyn(register, lane) & (0xFFFF0000 >> shift)
                    loaded = value.cast(emu.dtypes.uint32) << shift
                    return super().wvgpr_dyn(register, lane, kept | loaded, *rest)

            context.__class__ = Half
        return emu._compile_mem_op(instruction, context)

    class Scratch:
        """Stands for the emulator's buffer: it is asked for its address once for each wave."""

        def __init__(self, *shape: Any) -> None:
            self.shape, self.waves = shape, []

        def ensure_allocated(self) -> "Scratch":
            return self

        @property
        def _buf(self) -> Any:
            self.waves.append(buffer(*self.shape).ensure_allocated())
            return self.waves[-1]._buf

    emu.Buffer = lambda *shape, **options: (
        Scratch(*shape) if shape[2] == emu.dtypes.uint8 else buffer(*shape, **options)
    )
    for kind, handler in emu._INST_HANDLERS.items():
        if handler is emu._compile_mem_op and kind.__name__ == "DS":
            emu._INST_HANDLERS[kind] = load_half


def _load(blob: bytes) -> tuple[Any, int, int, int]:
    """(memory, its first page, where the segments begin, their size, offset of the kernel descriptor)."""
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(io.BytesIO(blob))
    segments = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
    size = max(s["p_vaddr"] + s["p_memsz"] for s in segments)
    image = ctypes.create_string_buffer(size + 8192)
    base = ctypes.addressof(image) + (-ctypes.addressof(image)) % 4096
    for segment in segments:
        data = segment.data()
        for word in _INVALIDATIONS:
            data = data.replace(word, _S_NOP)
        ctypes.memmove(base + segment["p_vaddr"], data, segment["p_filesz"])
    table = elf.get_section_by_name(".symtab") or elf.get_section_by_name(".dynsym")
    descriptor = next(s for s in table.iter_symbols() if s.name.endswith(".kd"))["st_value"]
    return image, base, size, descriptor


def _pack(launch: Launch) -> bytes:
    """The arguments as the kernel expects them: what was compiled in as a constant is left out."""
    signature = launch.kernel.src.signature
    out = bytearray()
    for kind, value in zip(signature.values(), launch.arguments, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            code, number, width = "<Q", value.data_ptr(), 8
        elif kind.startswith("fp"):
            code, number, width = "<f", float(value), 4
        else:
            width = 8 if kind.endswith("64") else 4
            code, number = "<q" if width == 8 else "<i", int(value)
        out += bytes(-len(out) % width)
        out += struct.pack(code, number)
    return bytes(out)
