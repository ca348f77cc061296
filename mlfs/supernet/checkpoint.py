"""Saves a super-transformer and reads it again: tensors in one safetensors file, everything else in `mlfs.json`.

`mlfs.json` names the tensors file and its hash. A save writes the tensors under a new name, then replaces the JSON in
one step, then removes the old tensors: whenever it is cut off, the folder holds the old state or the new one.

Format 4 may have a rotation of the residual stream, give depths by number, and rank the layers. Format 3 says what the
base computes with beside its parameters, and how many tokens it has if the model has others; and it may own single
parameters, not only modules. Formats 3 and 2, without these, and format 1, which had the permutation in the JSON
instead of int32 tensors, are still read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.files import checksum, hash_file, move_into_place, read_json, temporary_file, write_json
from mlfs.supernet.base import config_of_base, token_ids
from mlfs.supernet.fingerprint import Fingerprint
from mlfs.supernet.permutation import Permutation

CONFIG_NAME = "mlfs.json"
FORMAT = 4
_ROTATION = "rotation"  # the name of its tensor
_PERMUTATION = "permutation."  # begins the names of the permutation's tensors, which end in an axis (and a layer)
_FIELDS = {
    "format",
    "base",
    "architecture",
    "space",
    "rank",
    "stages",
    "alpha",
    "trained_stages",
    "owned",
    "config",
    "tensors",
    "checksum",
}


@dataclass(frozen=True)
class SavedState:
    """Holds a super-transformer as plain values: all of it but its base.

    Attributes:
        base_name, revision, fingerprint: where the base comes from, and the hashes of its weights.
        hub_name: of a base in a folder, where it is known.
        architecture: the class of the model, such as "BertForMaskedLM".
        config: the model's configuration.
        space: the search space, as `SearchSpace.to_dict` gives it.
        rank, stages, alpha: of the low-rank stages.
        trained_stages: how many stages have ever trained.
        owned: names of what belongs to the run, not to the base: modules (task heads, trained norms), and parameters
            that the base's checkpoint did not have.
        permutation: the order of the units, against the base.
        rotation: (hidden, hidden) float32, what the base's residual stream was rotated by; None if it was not.
        parameters: what belongs to the run (the stages, and the weights of `owned`), by the model's names.
        constants: what the base computes with beside its parameters; see `mlfs.supernet.base`.
        vocabulary: how many tokens the base has; None if it is as many as the model.
    """

    base_name: str | None
    hub_name: str | None
    revision: str | None
    fingerprint: Fingerprint
    architecture: str
    config: dict[str, Any]
    space: dict[str, Any]
    rank: int
    stages: int
    alpha: float
    trained_stages: int
    owned: list[str]
    permutation: Permutation
    parameters: Mapping[str, Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    vocabulary: int | None = None
    rotation: Tensor | None = None

    @property
    def config_of_base(self) -> dict[str, Any]:
        """The configuration that the base's own checkpoint loads under."""
        return config_of_base(self.config, self.vocabulary)

    @property
    def token_ids(self) -> dict[str, int]:
        """The tokens that the configuration names, such as the one for padding."""
        return token_ids(self.config)


def write_state(state: SavedState, path: Path) -> None:
    """Writes `state` to the folder `path`; see the module for what an interruption leaves.

    Raises:
        MLFSError: `path` is a file, or cannot be written.
    """
    if path.is_file():
        raise MLFSError(f"{path} is a file: give a folder to save to")
    tensors = {name: p.detach().contiguous().cpu() for name, p in state.parameters.items()}
    values: dict[str, Any] = {
        "format": FORMAT,
        "base": {
            "name": state.base_name,
            "hub_name": state.hub_name,
            "revision": state.revision,
            "fingerprint": state.fingerprint,
            "constants": state.constants,
            "vocabulary": state.vocabulary,
        },
        "architecture": state.architecture,
        "space": state.space,
        "rank": state.rank,
        "stages": state.stages,
        "alpha": state.alpha,
        "trained_stages": state.trained_stages,
        "owned": state.owned,
        "config": state.config,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        with temporary_file(path, ".safetensors") as temporary:
            order = _permutation_tensors(state.permutation)
            if state.rotation is not None:
                order[_ROTATION] = state.rotation.contiguous()
            save_file(tensors | order, temporary, metadata={"format": "pt"})
            digest = hash_file(temporary)
            name = f"stages-{digest[:8]}.safetensors"
            move_into_place(temporary, path / name)
        values["tensors"] = {"file": name, "sha256": digest}
        values["checksum"] = checksum(values)
        write_json(path / CONFIG_NAME, values)
    except (OSError, SafetensorError) as error:
        raise MLFSError(
            f"could not save to {path}: {error}; what was saved there before is whole. "
            "Free some disk space, or save elsewhere"
        ) from error
    # The state before this one, and what saves that were cut off left behind.
    for pattern in ("stages-????????.safetensors", ".tmp-*.safetensors"):
        for stale in path.glob(pattern):
            if stale.name != name:
                stale.unlink(missing_ok=True)


def read_state(path: Path) -> SavedState:
    """Reads and checks what `write_state` wrote.

    Raises:
        MLFSError: the folder holds no whole run: it is missing, half-written, damaged, or of a later format.
    """
    values = read_values(path)
    tensors = _read_tensors(path, values)
    if values["format"] == 1:
        permutation = _permutation_of_json(values["permutation"])
    else:
        names = [name for name in tensors if name.startswith(_PERMUTATION)]
        permutation = _permutation_of_tensors({name: tensors.pop(name) for name in names})
    rotation = tensors.pop(_ROTATION, None)
    base = values["base"]
    copied = {name: values[name] for name in ("architecture", "config", "space", "rank", "stages", "alpha", "owned")}
    return SavedState(
        base_name=base["name"],
        hub_name=base.get("hub_name"),  # earlier versions did not record it
        revision=base["revision"],
        fingerprint=base["fingerprint"],
        trained_stages=values["trained_stages"],
        permutation=permutation,
        parameters=tensors,
        constants=base.get("constants", {}),
        vocabulary=base.get("vocabulary"),
        rotation=rotation,
        **copied,
    )


def read_values(path: Path) -> dict[str, Any]:
    """Reads and checks `mlfs.json`, without the tensors it names.

    Returns:
        Its fields without the checksum; "trained_stages" by this name whatever the format.

    Raises:
        MLFSError: the folder is missing, or the file is missing, damaged, or of a later format.
    """
    if not path.is_dir():
        raise MLFSError(f"run folder {path} does not exist: give the folder that training or save_pretrained wrote")
    if not (path / CONFIG_NAME).exists():
        raise MLFSError(
            f"{path} has no {CONFIG_NAME}: it is no run folder, or its run was cut off before its first save"
        )
    values = _read_json(path)
    form = values.get("format")
    needed = _FIELDS
    if form == 1:
        needed = _FIELDS - {"trained_stages"} | {"live_stages", "permutation"}
    if form is not None and form not in range(1, FORMAT + 1):  # which may have other fields
        raise MLFSError(f"{path} has format {form}, this version reads 1 to {FORMAT}: use the version that wrote it")
    if missing := needed - set(values):
        raise MLFSError(f"{path / CONFIG_NAME} lacks {sorted(missing)}: it is damaged; restore it or train anew")
    if values.pop("checksum") != checksum(values):
        raise MLFSError(f"{path / CONFIG_NAME} is not what was saved: it is damaged or was changed by hand; restore it")
    if form == 1:
        values["trained_stages"] = values.pop("live_stages")
    return values


def _read_json(path: Path) -> dict[str, Any]:
    """Reads `mlfs.json`; MLFSError if it holds no JSON object."""
    try:
        values = read_json(path / CONFIG_NAME)
    except (OSError, ValueError) as error:
        raise MLFSError(
            f"{path / CONFIG_NAME} cannot be read ({error}): it is damaged; restore it or train anew"
        ) from None
    if not isinstance(values, dict):
        raise MLFSError(f"{path / CONFIG_NAME} holds no JSON object: it is damaged; restore it or train anew")
    return values


def _read_tensors(path: Path, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads the tensors file that `mlfs.json` names; MLFSError if it is missing or its hash differs."""
    name = values["tensors"]["file"]
    if Path(name).name != name or not (path / name).is_file():
        raise MLFSError(f"{path} lacks its tensors {name!r}: the folder is half-copied; copy it anew")
    if hash_file(path / name) != values["tensors"]["sha256"]:
        raise MLFSError(
            f"{path / name} is not what was saved (its SHA-256 differs): it is damaged or was tampered with"
        )
    try:
        return load_file(path / name)
    except SafetensorError as error:
        raise MLFSError(f"{path / name} cannot be read: {error}") from None


def _permutation_tensors(permutation: Permutation) -> dict[str, Tensor]:
    """Names each order `permutation.hidden`, `permutation.heads.3`, ...: (units,) int32."""
    return {
        _PERMUTATION + (axis if layer is None else f"{axis}.{layer}"): torch.tensor(order, dtype=torch.int32)
        for (axis, layer), order in permutation.items()
    }


def _permutation_of_tensors(tensors: Mapping[str, Tensor]) -> Permutation:
    """Reads the permutation off the tensors that `_permutation_tensors` named."""
    found: Permutation = {}
    for name, order in tensors.items():
        axis, _, layer = name.removeprefix(_PERMUTATION).partition(".")
        found[axis, int(layer) if layer else None] = order.tolist()
    return found


def _permutation_of_json(value: Mapping[str, Any]) -> Permutation:
    """Reads the permutation of format 1: {"hidden": [...], "heads": {"0": [...], ...}, ...}."""
    found: Permutation = {}
    for axis, orders in value.items():
        if isinstance(orders, dict):
            found |= {(axis, int(layer)): list(order) for layer, order in orders.items()}
        else:
            found[axis, None] = list(orders)
    return found
