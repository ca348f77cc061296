"""What a super-transformer leaves on disk: its stages in safetensors, everything else about it in one JSON file.

`mlfs.json` names the tensors file and its hash. A save writes the tensors under a new name, then replaces the JSON in
one step, then removes the old tensors: whenever it is cut off, the folder holds the old state or the new one.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from mlfs.errors import MLFSError
from mlfs.ordering import Permutation
from mlfs.pretrained import find_model
from mlfs.subnet import SearchSpace
from mlfs.supernet import SuperTransformer

CONFIG_NAME = "mlfs.json"
FORMAT = 1
_KINDS = (torch.float32, torch.bfloat16, torch.float16)


def save(supernet: SuperTransformer, path: Path) -> None:
    """Writes `supernet` to the folder `path`; see the module for what an interruption leaves."""
    if path.is_file():
        raise MLFSError(f"{path} is a file: give a folder to save to")
    tensors = {name: p.detach().contiguous().cpu() for name, p in supernet.own_parameters().items()}
    config = supernet.model.config
    state: dict[str, Any] = {
        "format": FORMAT,
        "base": {
            "name": supernet.base_name,
            "revision": getattr(config, "_commit_hash", None),
            "fingerprint": supernet.fingerprint(),
        },
        "architecture": type(supernet.model).__name__,
        "space": supernet.space.to_dict(),
        "rank": supernet.rank,
        "stages": supernet.stages,
        "alpha": supernet.alpha,
        "live_stages": live_stages(supernet),
        "owned": sorted(n for n, m in supernet.model.named_modules() if getattr(m, "owned", False)),
        "permutation": _permutation_to_json(supernet.permutation),
        "config": config.to_dict(),
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _temporary(path, ".safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
            digest = _hash_file(temporary)
            name = f"stages-{digest[:8]}.safetensors"
            os.replace(temporary, path / name)
        state["tensors"] = {"file": name, "sha256": digest}
        state["checksum"] = _checksum(state)
        write_json(path / CONFIG_NAME, state)
    except (OSError, SafetensorError) as error:
        raise MLFSError(
            f"could not save to {path}: {error}; what was saved there before is whole. "
            "Free some disk space, or save elsewhere"
        ) from error
    # The state before this one, and what saves that were cut off left behind.
    for stale in (p for kind in ("stages-????????", ".tmp-*") for p in path.glob(f"{kind}.safetensors")):
        if stale.name != name:
            stale.unlink(missing_ok=True)


def load(path: Path, model: PreTrainedModel | None = None, **model_kwargs: Any) -> SuperTransformer:
    """Restores the super-transformer saved in the folder `path`; see `SuperTransformer.from_pretrained`."""
    state = read_state(path)
    tensors = _read_tensors(path, state)
    if model is None:
        model = _load_base(state, model_kwargs)
    # before the conversion: a base that is refused stays as it was
    if type(model).__name__ != state["architecture"]:
        raise MLFSError(f"{path} was trained on a {state['architecture']}, the base given is a {type(model).__name__}")
    expected, owned = state["base"]["fingerprint"], state["owned"]  # heads are the run's own
    base = {n: p for n, p in model.named_parameters() if n in expected or n.rpartition(".")[0] not in owned}
    found = fingerprint(base)
    _check_base(found, model.dtype, state, path)
    supernet = SuperTransformer(
        model,
        SearchSpace.from_dict(state["space"]),
        rank=state["rank"],
        stages=state["stages"],
        alpha=state["alpha"],
        base_name=state["base"]["name"],
    )
    supernet._fingerprint = found
    if permutation := _permutation_from_json(state["permutation"]):
        supernet.apply_permutation(permutation)
    load_tensors(supernet, state, tensors, path)
    return supernet


def restore(supernet: SuperTransformer, path: Path) -> None:
    """Loads the state saved in `path` into a super-transformer of the same base and shape, in place."""
    state = read_state(path)
    tensors = _read_tensors(path, state)
    shape = ("space", "rank", "stages", "alpha")
    mine = {"space": supernet.space.to_dict(), **{key: getattr(supernet, key) for key in shape[1:]}}
    if odd := [key for key in shape if state[key] != mine[key]]:
        raise MLFSError(f"{path} was saved with another {', '.join(odd)}: resume with the options of that run")
    _check_base(supernet.fingerprint(), supernet.model.dtype, state, path)
    permutation = _permutation_from_json(state["permutation"])
    if permutation != supernet.permutation:
        supernet.apply_permutation(_difference(supernet.permutation, permutation))
        supernet.permutation = permutation
    load_tensors(supernet, state, tensors, path)


def read_state(path: Path) -> dict[str, Any]:
    """The checked contents of `mlfs.json`; MLFSError where the folder holds no whole run."""
    if not path.is_dir():
        raise MLFSError(f"run folder {path} does not exist: give the folder that training or save_pretrained wrote")
    if not (path / CONFIG_NAME).exists():
        raise MLFSError(
            f"{path} has no {CONFIG_NAME}: it is no run folder, or its run was cut off before its first save"
        )
    state = _read_json(path)
    needed = {"format", "base", "architecture", "space", "rank", "stages", "alpha", "live_stages", "owned",
              "permutation", "config", "tensors", "checksum"}  # fmt: skip
    if missing := needed - set(state):
        raise MLFSError(f"{path / CONFIG_NAME} lacks {sorted(missing)}: it is damaged; restore it or train anew")
    if state["format"] != FORMAT:
        raise MLFSError(
            f"{path} has format {state['format']}, this version reads {FORMAT}: use the version that wrote it"
        )
    if state.pop("checksum") != _checksum(state):
        raise MLFSError(f"{path / CONFIG_NAME} is not what was saved: it is damaged or was changed by hand; restore it")
    return state


def load_tensors(supernet: SuperTransformer, state: Mapping[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    """Copies saved tensors into the super-transformer's own parameters."""
    from mlfs.elastic import Elastic, ElasticLinear

    for name, module in supernet.model.named_modules():
        if isinstance(module, Elastic):
            module.owned = name in state["owned"]
            if isinstance(module, ElasticLinear):
                module.live = min(module.stages, state["live_stages"])
    own = supernet.own_parameters()
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise MLFSError(f"{path} does not fit the model: {len(odd)} tensors are missing or left over, e.g. {odd[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                found, expected = tuple(tensors[name].shape), tuple(parameter.shape)
                raise MLFSError(f"{path}: tensor {name} has shape {found}, the model has {expected}")
            parameter.copy_(tensors[name])
    supernet.fold(supernet.folded_stages)  # anew, of what was loaded


def live_stages(supernet: SuperTransformer) -> int:
    """How many stages have ever trained."""
    from mlfs.elastic import ElasticLinear

    return max((m.live for m in supernet.elastic() if isinstance(m, ElasticLinear)), default=0)


def fingerprint(parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each tensor 16 hex digits of SHA-256 over shape and values, in fp32, bf16 and fp16.

    Three types, so that a base loaded in a smaller one is still recognised.
    """

    def digest(item: tuple[str, Tensor]) -> tuple[str, list[str]]:
        name, tensor = item
        values = tensor.detach().cpu()
        hashes = []
        for kind in _KINDS:
            cast = values.to(kind).contiguous().reshape(-1).view(torch.uint8)
            sha = hashlib.sha256(repr(tuple(values.shape)).encode())
            sha.update(cast.numpy().data)
            hashes.append(sha.hexdigest()[:16])
        return name, hashes

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        return dict(pool.map(digest, parameters.items()))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step: under a temporary name, then renamed."""
    with _temporary(path.parent, ".json") as temporary:
        text = json.dumps(value, indent=1, separators=(",", ": "))
        Path(temporary).write_text(_short_lists(text) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MLFSError(
            f"{path / CONFIG_NAME} cannot be read ({error}): it is damaged; restore it or train anew"
        ) from None
    if not isinstance(state, dict):
        raise MLFSError(f"{path / CONFIG_NAME} holds no JSON object: it is damaged; restore it or train anew")
    return state


def _read_tensors(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    name = state["tensors"]["file"]
    if Path(name).name != name or not (path / name).is_file():
        raise MLFSError(f"{path} lacks its tensors {name!r}: the folder is half-copied; copy it anew")
    if _hash_file(path / name) != state["tensors"]["sha256"]:
        raise MLFSError(
            f"{path / name} is not what was saved (its SHA-256 differs): it is damaged or was tampered with"
        )
    try:
        return load_file(path / name)
    except SafetensorError as error:
        raise MLFSError(f"{path / name} cannot be read: {error}") from None


def _load_base(state: Mapping[str, Any], model_kwargs: dict[str, Any]) -> PreTrainedModel:
    name = state["base"]["name"]
    if not name:
        raise MLFSError("the run does not say where its base came from: pass it, from_pretrained(path, model=...)")
    model_class = getattr(transformers, state["architecture"], None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise MLFSError(f"transformers has no model class {state['architecture']!r}")
    values = dict(state["config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    options: dict[str, Any] = {"revision": state["base"]["revision"], "dtype": config.dtype} | model_kwargs
    place = find_model(name)
    if Path(place).is_dir() or options["revision"] is None:
        options.pop("revision")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a new head is no news: the run brings it
    try:
        return model_class.from_pretrained(place, config=config, **options)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise MLFSError(
            f"the base {name!r} cannot be loaded ({first}): pass it, from_pretrained(path, model=...)"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _check_base(known: Mapping[str, list[str]], dtype: torch.dtype, state: Mapping[str, Any], path: Path) -> None:
    expected = state["base"]["fingerprint"]
    kind = _KINDS.index(dtype) if dtype in _KINDS else 0
    odd = sorted(expected.keys() ^ known.keys())
    odd += sorted(n for n in expected.keys() & known.keys() if expected[n][kind] != known[n][kind])
    if odd:
        raise MLFSError(
            f"the base is not the one {path} was trained on ({state['base']['name'] or 'unnamed'}): "
            f"{len(odd)} of {len(expected)} tensors differ, e.g. {odd[0]}; load that base"
        )


def _difference(have: Permutation, want: Permutation) -> Permutation:
    """What turns units ordered by `have` into units ordered by `want`."""
    result: Permutation = {}
    for key in have.keys() | want.keys():
        length = len(have.get(key) or want[key])
        old = have.get(key, list(range(length)))
        place = {unit: i for i, unit in enumerate(old)}
        result[key] = [place[unit] for unit in want.get(key, list(range(length)))]
    return result


def _permutation_to_json(permutation: Permutation) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for (axis, layer), order in sorted(permutation.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        if layer is None:
            out[axis] = order
        else:
            out.setdefault(axis, {})[str(layer)] = order
    return out


def _permutation_from_json(value: Mapping[str, Any]) -> Permutation:
    out: Permutation = {}
    for axis, orders in value.items():
        for layer, order in orders.items() if isinstance(orders, dict) else [(None, orders)]:
            out[(axis, None if layer is None else int(layer))] = list(order)
    return out


def _checksum(state: Mapping[str, Any]) -> str:
    """SHA-256 of what the JSON file says, however it is laid out."""
    plain = json.loads(json.dumps(state))  # whose keys are all strings
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _hash_file(path: str | Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


@contextlib.contextmanager
def _temporary(folder: Path, suffix: str) -> Any:
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=suffix, dir=folder)
    os.close(handle)
    os.umask(mask := os.umask(0))
    os.chmod(name, 0o666 & ~mask)  # as an ordinary file; mkstemp's are the owner's alone
    try:
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _short_lists(text: str) -> str:
    """Puts lists of numbers on one line each, so that the file stays readable."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\s+", " ", match.group()), text)
