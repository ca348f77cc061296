"""`Record`: what a state dict must say beside weights and stages.

Whoever carries a model by its state (torch.save, safetensors, accelerate, FSDP, distributed checkpoints, an average of
weights) carries tensors, and these are some: persistent buffers of one size for one model, whatever has trained.

What is in them lives in the super-transformer as plain values, which is what runs read. `write` brings the buffers up
to date, `read` the values; `refresh` and `look` read when somebody else has changed the buffers, in place too.
"""

import ctypes
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlfs.elastic.base import Elastic
from mlfs.elastic.staged import Staged
from mlfs.errors import MLFSError
from mlfs.supernet.fingerprint import FINGERPRINT_DTYPES, Fingerprint
from mlfs.supernet.permutation import LAYERS, Permutation
from mlfs.supernet.rotation import tied_heads, untie_heads

NAME = "mlfs_record"  # of the record among the model's modules
_SETTINGS = ("space", "rank", "stages", "alpha")
_BASE, _OWNED, _NEW = range(3)  # whose a parameter is: the base's, a module's that the run owns, new with the run
_AXES = ("hidden", "heads", "ffn", "layers")
_REFRESHED = ("trained_stages", "layers")  # what a forward pass and `activate` ask for
_UNRANKED = -1  # of each layer, before the layers have an order
_NO_ORDER = (
    "the state's order of the units is none: it is damaged, or an average of states with different orders; average "
    "only states that were ordered alike"
)
_TOLERANCE = 0.01  # of a bit that was averaged with its like; an average that differs by less is of one order's weights
# Above it an average of two numbers of stages counts as the larger one: of its weights that stage is a part.
_ROUNDING = 1e-3


class Record(nn.Module):
    """Holds as tensors which stages of a super-transformer have trained, the order of its units, and what is its own.

    Attributes:
        ties: for each tied parameter's further names, the first.
        untied: the names of those that got a matrix of their own since, with the first they were tied to.
        settings: (4, 8) uint8, the beginnings of the hashes of space, rank, stages and alpha, which must be the same
            where the state is loaded.
        trained_stages: () float32. A float, as averages of weights change it little by little and cut integers off.
        ownership: (parameters,) float32, for each parameter but the stages' whose it is.
        fingerprint: (parameters, 3, 8) uint8, the hashes of the base's; zeros where it is as it was loaded.
        vocabulary: () int32, how many tokens the base has; 0 where it is as many as the model.
        hidden, heads, ffn: (units,), (layers, groups of heads) and (layers, units) int32, the order of the units.
        layers: (layers,) int32, the layers that matter most first; -1 while they are not ranked.
        rotation: (hidden, hidden, 4) uint8, the bytes of the fp32 matrix that the residual stream was rotated by, which
            no change of type rounds; empty where it was not.
        order_bits: (64,) float32, bits of the hash of that order. Of an average over several orders they are no bits,
            even if it averaged only what floats, as most do, and took the last order as it is.
    """

    settings: Tensor
    trained_stages: Tensor
    ownership: Tensor
    fingerprint: Tensor
    vocabulary: Tensor
    hidden: Tensor
    heads: Tensor
    ffn: Tensor
    layers: Tensor
    rotation: Tensor
    order_bits: Tensor
    _supernet: Any
    _names: list[str]
    ties: dict[str, str]
    untied: dict[str, str]
    _seen: dict[str, tuple[Tensor, int | None, bytes | None]]  # of each: the buffer, its version and its numbers
    _seen_values: bytes
    _is_busy: bool

    def __init__(self, supernet: Any) -> None:
        super().__init__()
        self.__dict__["_is_busy"] = False
        self.__dict__["_supernet"] = supernet  # in the dictionary: the super-transformer is no part of its record
        self.__dict__["_names"], self.__dict__["ties"] = _names(supernet.model)
        self.__dict__["untied"] = {}
        dims, count = supernet.dimensions, len(self._names)
        shapes = {
            "hidden": (dims.hidden,),
            "heads": (dims.layers, dims.heads // dims.group),
            "ffn": (dims.layers, dims.ffn),
            "layers": (dims.layers,),
        }
        values = {
            "settings": torch.zeros(len(_SETTINGS), 8, dtype=torch.uint8),
            "trained_stages": torch.zeros(()),
            "ownership": torch.zeros(count),
            "fingerprint": torch.zeros(count, len(FINGERPRINT_DTYPES), 8, dtype=torch.uint8),
            "vocabulary": torch.zeros((), dtype=torch.int32),
            "rotation": torch.empty(0, dtype=torch.uint8),
            "order_bits": torch.zeros(64),
        }
        for axis, shape in shapes.items():
            values[axis] = torch.tensor(_orders({}, axis, shape), dtype=torch.int32)
        for name, value in values.items():
            self.register_buffer(name, value.to(supernet.model.device))
        self.write()

    # ---- values and tensors ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self) -> None:
        """Brings the buffers up to date with the super-transformer."""
        with self._alone():
            self._write()

    def _write(self) -> None:
        supernet = self._supernet
        owned = {f"{name}.{key}" for name in supernet.owned_modules() for key in ("weight", "bias")}
        # Of a base that is as it was loaded they can be computed: equal models then have equal states.
        permutation = supernet.permutation
        moved = any(order != sorted(order) for axis, order in permutation.items() if axis != LAYERS)
        moved = moved or supernet.rotation is not None
        hashes = supernet._fingerprint or {}
        if not moved and hashes.keys().isdisjoint(owned | supernet.new_parameters):
            hashes = {}
        unknown = ["0" * 16] * len(FINGERPRINT_DTYPES)
        ownership, rows = [], []
        for name in self._names:
            code = _NEW if name in supernet.new_parameters else _OWNED if name in owned else _BASE
            ownership.append(float(code))
            rows.append([list(bytes.fromhex(digest)) for digest in hashes.get(name, unknown)])
        self._put("settings", [list(_digest(value)) for value in _settings(supernet)])
        self._put("trained_stages", float(_trained_stages(supernet)))
        self._put("ownership", ownership)
        self._put("fingerprint", rows)
        self._put("vocabulary", supernet.base_vocabulary or 0)
        orders = {axis: _orders(permutation, axis, self.get_buffer(axis).shape) for axis in _AXES}
        for axis, values in orders.items():
            self._put(axis, values)
        self._put_rotation(supernet.rotation)
        self._put("order_bits", _bits_of(orders, supernet.rotation))
        self._note()

    def refresh(self) -> None:
        """Reads the buffers if what trained, or the order of the layers, is not as it was last written or read: before
        each forward pass, and each time that a size is activated.

        Which ask for nothing else. On GPUs, where to compare numbers is to wait, the version alone tells, and it does
        not tell of writes through `.data`.
        """
        for name, (seen, version, memory) in self._seen.items():
            buffer: Any = self._buffers[name]
            if (
                buffer is not seen
                or (not buffer.is_inference() and buffer._version != version)
                or (memory is not None and _memory_of(buffer) != memory)
            ):
                self.look()
                return

    def look(self) -> None:
        """Reads the buffers if any number in them is not as it was last written or read."""
        if self._is_busy or self.trained_stages.is_meta:
            return
        if self._values() == self._seen_values:
            self._note()
        else:
            self.read()

    def count_effects(self) -> None:
        """Counts the stages that have an effect as trained: parameters alone, which say no more, may have been copied.

        Shards are passed over: all processes would have to look together.
        """
        if self._is_busy:
            return
        layers = [m for m in self._supernet.model.modules() if isinstance(m, Staged) and m.stages]
        found = _trained_stages(self._supernet)
        for stage in range(self._supernet.stages, found, -1):
            if any(_has_effect(layer.lora_B[stage - 1]) for layer in layers if stage <= layer.stages):
                for layer in layers:
                    layer.trained_stages = max(layer.trained_stages, min(stage, layer.stages))
                self.write()
                return

    def read(self) -> None:
        """Brings the super-transformer up to date with the buffers.

        Raises:
            MLFSError: they are no record, as an average over different orders of the units is none.
        """
        if self.trained_stages.is_meta:
            return
        with self._alone():
            self._read()

    def _read(self) -> None:
        supernet = self._supernet
        rotation = self._rotation()
        permutation = self._permutation(rotation)
        trained = math.ceil(self.trained_stages.item() - _ROUNDING)
        if not 0 <= trained <= supernet.stages:
            raise MLFSError(
                f"the state says that {trained} of {supernet.stages} stages have trained: it is damaged, or is an "
                "average of several with weights that do not add up to 1"
            )
        codes = [math.ceil(code - _ROUNDING) for code in self.ownership.tolist()]
        whose = dict(zip(self._names, codes, strict=True))
        supernet.permutation, supernet.rotation = permutation, rotation
        supernet.base_vocabulary = int(self.vocabulary.item()) or None
        new = {name for name, code in whose.items() if code == _NEW}
        supernet.new_parameters = self.with_untied(new)
        supernet._fingerprint = self._hashes(whose)
        for name, module in supernet.model.named_modules():
            if isinstance(module, Elastic):
                module.owned = _OWNED in (whose.get(f"{name}.weight"), whose.get(f"{name}.bias"))
            if isinstance(module, Staged) and module.stages:
                module.trained_stages = max(trained, module.stages_begun())
        self._note()

    # ---- in and out of state dicts --------------------------------------------------------------------------------

    def check(self, state: Mapping[str, Any], prefix: str) -> None:
        """Raises MLFSError unless `state` can be loaded: it holds a record, of the same space, rank, stages and alpha.

        Args:
            state: a state dict that is about to be loaded.
            prefix: how names of the model's tensors begin in it.
        """
        own, supernet = f"{prefix}{NAME}.", self._supernet
        needed = self._buffers.keys() - {"rotation"}  # which earlier versions did not have
        missing = [own + name for name in self._buffers if name in needed and own + name not in state]
        if missing:
            ours = supernet.own_parameters().keys() - supernet.head_parameters()
            ours |= supernet.base_parameters().keys()
            if odd := next((key for key in state if key.removeprefix(prefix) in ours), None):
                raise MLFSError(
                    f"the state dict has {odd} but not {missing[0]}, which says what trained and in what order the "
                    "units are: it is of a plain model or an older version, or a part; keep all keys, load saved runs "
                    "with SuperTransformer.from_pretrained, and a plain model's weights before it is made elastic"
                )
            return
        if self.rotation.numel() and not self._holds_rotation(state, prefix):
            raise MLFSError(
                "the state dict is of a super-transformer whose residual stream is not rotated, and this one's is: "
                "load it into one of the base loaded anew"
            )
        found = _whole(state[own + "settings"], torch.uint8).cpu()
        names = zip(_SETTINGS, found, _settings(supernet), strict=True)
        if others := [name for name, row, value in names if bytes(row.tolist()) != _digest(value)]:
            raise MLFSError(
                f"the state dict is of a super-transformer with another {', '.join(others)}: make this one alike"
            )

    def expect(self, state: Mapping[str, Any], prefix: str) -> None:
        """Makes room for what `state` has of a rotated super-transformer: the matrix, and heads that are not tied."""
        if self._holds_rotation(state, prefix) and not self.rotation.numel():
            self.untie()
            shape = state[f"{prefix}{NAME}.rotation"].shape
            self._buffers["rotation"] = torch.zeros(shape, dtype=torch.uint8, device=self.trained_stages.device)

    def untie(self) -> None:
        """Gives each head that is tied to the embedding a matrix of its own, as before a rotation."""
        for name in untie_heads(self._supernet):
            self.untied[name] = self.ties.pop(name)

    def with_untied(self, names: set[str]) -> set[str]:
        """Adds to names of parameters those that were tied to one of them before the rotation."""
        return names | {name for name, first in self.untied.items() if first in names}

    def _holds_rotation(self, state: Mapping[str, Any], prefix: str) -> bool:
        stored = state.get(f"{prefix}{NAME}.rotation")
        return stored is not None and stored.numel() > 0

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.look()
        self.write()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if f"{prefix}settings" in state_dict:
            state_dict.setdefault(f"{prefix}rotation", torch.empty(0, dtype=torch.uint8))
        for name, buffer in self._buffers.items():
            if prefix + name in state_dict and buffer is not None:
                # of an average a whole number is off by rounding, and copying it would cut that off
                state_dict[prefix + name] = _whole(state_dict[prefix + name], buffer.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if args[0].get("assign_to_params_buffers"):  # the local metadata
            self._tie()
        self.read()

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _tie(self) -> None:
        """Ties again what assign=True has given a parameter each: reordered, tensors they share would move twice."""
        model = self._supernet.model
        for name, first in self.ties.items():
            module, _, key = name.rpartition(".")
            model.get_submodule(module)._parameters[key] = model.get_parameter(first)

    def _put(self, name: str, value: Any) -> None:
        """Copies numbers into a buffer, unless they are there already."""
        buffer = self.get_buffer(name)
        if buffer.is_meta or buffer.tolist() != value:
            buffer.copy_(torch.tensor(value, dtype=buffer.dtype))

    def _put_rotation(self, rotation: Tensor | None) -> None:
        """Copies the matrix into its buffer, which gets its size first."""
        old, stored = self.rotation, _matrix_bytes(rotation)
        if old.shape != stored.shape:
            self._buffers["rotation"] = stored.to(old.device, copy=True)
        elif not old.is_meta and not torch.equal(old.cpu(), stored):
            old.copy_(stored)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps what is asked of the super-transformer inside the block from reading buffers that are half written."""
        self.__dict__["_is_busy"], outer = True, self._is_busy
        try:
            yield
        finally:
            self.__dict__["_is_busy"] = outer

    def _note(self) -> None:
        """Notes what the buffers are, for `refresh` and `look`."""
        seen = self.__dict__["_seen"] = {}
        for name in _REFRESHED:
            buffer = self.get_buffer(name)
            version = None if buffer.is_inference() else buffer._version
            seen[name] = buffer, version, _memory_of(buffer) if _is_plain(buffer) else None
        self.__dict__["_seen_values"] = self._values()

    def _values(self) -> bytes:
        """Gives the numbers in all buffers; of the rotation, which is large, the bits of its hash tell."""
        return _bytes_of(buffer for name, buffer in self._buffers.items() if name != "rotation")

    def _rotation(self) -> Tensor | None:
        """Reads what the residual stream was rotated by, (hidden, hidden) float32."""
        stored, hidden = self.rotation.detach().cpu(), self._supernet.dimensions.hidden
        if tied_heads(self._supernet) if stored.numel() else self.untied:
            raise MLFSError(
                "a rotated state was written over a super-transformer that is not rotated, or the other way round, and "
                "one's head is tied: load it with load_state_dict into one of the base loaded anew"
            )
        if not stored.numel():
            return None
        if stored.shape != (hidden, hidden, 4):
            raise MLFSError(_NO_ORDER)
        return stored.contiguous().view(torch.float32).squeeze(-1).clone()

    def _permutation(self, rotation: Tensor | None) -> Permutation:
        """Reads the order of the units; axes in their first order are left out."""
        orders = {axis: self.get_buffer(axis).tolist() for axis in _AXES}
        pairs = zip(self.order_bits.tolist(), _bits_of(orders, rotation), strict=True)
        if any(abs(found - right) > _TOLERANCE for found, right in pairs):
            raise MLFSError(_NO_ORDER)
        permutation: Permutation = {}
        for axis, values in orders.items():
            if axis == "layers" and all(layer == _UNRANKED for layer in values):
                continue
            rows = {None: values} if axis in ("hidden", "layers") else dict(enumerate(values))
            for layer, order in rows.items():
                if sorted(order) != list(range(len(order))):
                    raise MLFSError(_NO_ORDER)
                if order != sorted(order) or axis == "layers":
                    permutation[axis, layer] = order
        return permutation

    def _hashes(self, whose: Mapping[str, int]) -> Fingerprint | None:
        """Reads the fingerprint; None if it has not been computed."""
        rows = self.fingerprint.tolist()
        hashes = {name: [bytes(digest).hex() for digest in row] for name, row in zip(whose, rows, strict=True)}
        known = {name: digests for name, digests in hashes.items() if any(int(digest, 16) for digest in digests)}
        return known or None


def _names(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Lists the model's parameters but those of the stages, and tells for each tied name the first it is tied to."""
    stages = set()
    for name, module in model.named_modules():
        if isinstance(module, Staged):
            stages |= {f"{name}.{key}" for key, _ in module.adapter_parameters()}
    firsts: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if firsts.setdefault(id(parameter), name) != name:
            ties[name] = firsts[id(parameter)]
    return [name for name in firsts.values() if name not in stages], ties


def _settings(supernet: Any) -> tuple[Any, ...]:
    return supernet.space.to_dict(), supernet.rank, supernet.stages, float(supernet.alpha)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the numbers lie in this process's memory one after the other."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()


def _memory_of(tensor: Tensor) -> bytes:
    """Copies the memory of a plain tensor: past torch, whose modes for tracing and counting would see an operator."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def _bytes_of(tensors: Iterable[Tensor | None]) -> bytes:
    """Gives the numbers in all tensors; those of a GPU come in one copy."""
    present = [tensor.detach() for tensor in tensors if tensor is not None and not tensor.is_meta]
    if not all(_is_plain(tensor) for tensor in present):
        flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in present]
        present = [torch.cat(flat).cpu()]
    return b"".join(_memory_of(tensor) for tensor in present)


def _has_effect(lora_b: Tensor) -> bool:
    return type(lora_b) is nn.Parameter and not lora_b.is_meta and bool(lora_b.detach().any())


def _digest(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()[:8]


def _trained_stages(supernet: Any) -> int:
    modules = supernet.model.modules()
    return max((module.trained_stages for module in modules if isinstance(module, Staged)), default=0)


def _orders(permutation: Permutation, axis: str, shape: Sequence[int]) -> list[Any]:
    """Spells the order of every unit of an axis out: (units,) or (layers, units)."""
    whole = list(range(shape[-1]))
    if axis == "layers":
        return permutation.get(LAYERS, [_UNRANKED] * shape[-1])
    if axis == "hidden":
        return permutation.get((axis, None), whole)
    return [permutation.get((axis, layer), whole) for layer in range(shape[0])]


def _bits_of(orders: Mapping[str, list[Any]], rotation: Tensor | None) -> list[float]:
    """Spells the hash of all orders, and of the rotation, out as 64 zeros and ones."""
    hashed: dict[str, Any] = dict(orders)
    if rotation is not None:
        hashed["rotation"] = hashlib.sha256(_memory_of(rotation.contiguous())).hexdigest()
    return [float(byte >> place & 1) for byte in _digest(hashed) for place in range(8)]


def _matrix_bytes(matrix: Tensor | None) -> Tensor:
    """Spells an fp32 matrix out as its bytes, (hidden, hidden, 4) uint8; empty for none."""
    if matrix is None:
        return torch.empty(0, dtype=torch.uint8)
    return matrix.contiguous().unsqueeze(-1).view(torch.uint8)


def _whole(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds numbers that stand for integers of a type."""
    if value.is_floating_point() and not dtype.is_floating_point:
        return value.round().to(dtype)
    return value
