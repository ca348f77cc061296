"""Makes data sets of what every installation has: documentation strings and the standard library's source.

`docstring_dataset` is a text classification task: which package is a documentation string from? Both splits are read
with `ast` from source files, none of which is imported. A module is in one split only and no text occurs twice, so that
validation measures what was learned about the packages' language. Names of the packages are masked in every text.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from mlfs.errors import MLFSError

# The classes, and what is masked in all texts: any word that contains one of these ("transformer" alone is a word that
# other packages use too). numpy and scikit-learn are no classes: they say what scipy says, in the same words.
PACKAGES: dict[str, str] = {
    "pandas": r"pandas|(?<![a-z])pd(?![a-z])",
    "scipy": r"scipy",
    "stdlib": r"stdlib|cpython",
    "sympy": r"sympy",
    "torch": r"torch",
    "transformers": r"transformers|hugging[ -]?face",
}
MASK = "it"
MIN_CHARACTERS, MAX_CHARACTERS = 80, 320
SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "_vendor", "vendored", "externals", "site-packages"})
SKIPPED_FOLDERS |= {"dist-packages", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
_NAMES = re.compile(rf"[a-z0-9_]*(?:{'|'.join(PACKAGES.values())})[a-z0-9_]*", re.IGNORECASE)
_BLOCKS = ("body", "orelse", "handlers", "finalbody")
# A heading of numpy's, Google's or reST's docstring styles, or an example: what is the same in many packages.
_SECTION = re.compile(r"[A-Z]\w*( \w+)?:?\n|[A-Z]\w*:\s|\.\. |:\w+|>>>|Example|=====|-----")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_dataset(
    seed: int = 0, max_train: int = 4800, max_validation: int = 800
) -> tuple[Dataset, Dataset, list[str], float]:
    """Collects first paragraphs of documentation strings, to be told apart by package. Takes some ten seconds.

    Args:
        seed: decides which texts are chosen and their order; with the same installed versions it gives the same data.
        max_train, max_validation: the most texts of each data set, all classes together.

    Returns:
        `(train, validation, label_names, majority)`: two data sets of `text` (str, 80 to 320 characters) and `label`
        (`ClassLabel`), with equally many texts of each class, in random order; the names of the classes, which are the
        packages of `PACKAGES` that are installed; and the share of validation texts that belong to the most frequent
        class of training.

    Raises:
        MLFSError: fewer than four of the packages are installed with their source, or there are fewer texts than
            classes.
    """
    names = sorted(name for name in PACKAGES if _source_folder(name) is not None)
    if len(names) < 4:
        raise MLFSError(f"the demo data needs four of {', '.join(PACKAGES)}, but finds {len(names)}; install more")
    if min(max_train, max_validation) < len(names):
        raise MLFSError(f"max_train and max_validation must be {len(names)} or more, a text for each class")
    train_share = max_train / (max_train + max_validation)
    quotas = {"train": max_train // len(names), "validation": max_validation // len(names)}
    with _collector_off():
        found = {name: _paragraphs(name, seed, train_share, quotas) for name in names}
    owners = Counter(key for splits in found.values() for key in {**splits["train"], **splits["validation"]})
    sets = {}
    for split, quota in quotas.items():
        texts: dict[str, list[str]] = {}
        for name in names:
            # A text that two packages have says nothing of either.
            own = [text for key, text in found[name][split].items() if owners[key] == 1]
            texts[name] = own[:quota]
        count = min(map(len, texts.values()))
        rows = [(text, label) for label, name in enumerate(names) for text in texts[name][:count]]
        random.Random(f"{seed} {split}").shuffle(rows)
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        sets[split] = Dataset.from_dict(columns, features)
    train, validation = sets["train"], sets["validation"]
    if not len(train) or not len(validation):
        raise MLFSError("a package of the demo data has too few documentation strings; reinstall it with its source")
    majority = Counter(train["label"]).most_common(1)[0][0]
    return train, validation, names, sum(label == majority for label in validation["label"]) / len(validation)


def stdlib_source(
    seed: int = 0, validation_fraction: float = 0.1, max_documents: int | None = None
) -> tuple[Dataset, Dataset]:
    """Collects the standard library's source files as documents for causal-lm.

    All files of a top-level module are in one split. Tests and the packages that pip installs are left out.

    Args:
        seed: decides the split and the random order of the files.
        validation_fraction: the share of all bytes that validation gets, or a little less.
        max_documents: the most files of each split (default: all).

    Returns:
        `(train, validation)`: data sets of `text` (a whole file) and `module` (its path, such as `json/decoder.py`).

    Raises:
        MLFSError: the standard library is installed without source, or a split would be empty.
    """
    root = _source_folder("stdlib")
    files = _source_files(root) if root is not None else []
    if root is None or len(files) < 2:
        raise MLFSError("the standard library is installed without its source; use a Python that has it")
    order = random.Random(seed)
    order.shuffle(files)
    modules: dict[str, list[Path]] = {}
    for path in files:
        modules.setdefault(path.relative_to(root).parts[0].removesuffix(".py"), []).append(path)
    sizes = {module: sum(path.stat().st_size for path in paths) for module, paths in modules.items()}
    # Modules go to validation in random order, but one that holds more than its share would be most of it.
    wanted = validation_fraction * sum(sizes.values())
    held: set[str] = set()
    for module in order.sample(sorted(modules), len(modules)):
        if sizes[module] <= wanted:
            held.add(module)
            wanted -= sizes[module]
    if not held or len(held) == len(modules):
        raise MLFSError(f"validation_fraction {validation_fraction} leaves a split empty; give a share such as 0.1")
    splits: list[Dataset] = []
    for chosen in (modules.keys() - held, held):
        paths = [path for path in files if path.relative_to(root).parts[0].removesuffix(".py") in chosen]
        paths = paths[:max_documents]
        texts = [_read(path) for path in paths]
        names = [path.relative_to(root).as_posix() for path in paths]
        splits.append(Dataset.from_dict({"text": texts, "module": names}))
    return splits[0], splits[1]


@contextmanager
def _collector_off() -> Iterator[None]:
    """Switches Python's garbage collector off inside the block.

    It searches syntax trees, which have no cycles, again and again: 11.8 s with it, 6.7 s without.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _source_folder(name: str) -> Path | None:
    """Finds a package's folder without importing it; None where it is not installed."""
    if name == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(name)
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None


def _source_files(root: Path) -> list[Path]:
    """Lists the Python files below `root` that are no tests, in a fixed order."""
    files = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts))
    return sorted(path for path in files if not path.name.startswith(("test_", "conftest")))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _paragraphs(name: str, seed: int, train_share: float, quotas: dict[str, int]) -> dict[str, dict[str, str]]:
    """Collects the texts of a package by split, each under the key that decides whether two are the same."""
    root = _source_folder(name)
    files = _source_files(root) if root is not None else []
    order = random.Random(f"{seed} {name}")
    order.shuffle(files)
    splits: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    seen: set[str] = set()
    for path in files:
        split = "train" if order.random() < train_share else "validation"
        # A tenth more than asked for: texts that another package has too are taken away later.
        full = {s for s in splits if len(splits[s]) >= 1.1 * quotas[s] + 10}
        if len(full) == len(splits):
            break
        if split in full:
            continue
        for text in _documentation(path):
            key = re.sub(r"[^a-z]+", " ", text.lower())
            if key not in seen:
                seen.add(key)
                splits[split][key] = text
    return splits


def _documentation(path: Path) -> Iterator[str]:
    """Yields the beginning of every documentation string of a file that is long enough."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(_read(path))
    except (SyntaxError, ValueError, RecursionError):
        return
    # Statements only: walking every expression takes longer than parsing.
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        nodes.extend(child for block in _BLOCKS for child in getattr(node, block, ()))
        if isinstance(node, _DOCUMENTED):
            text = _beginning(ast.get_docstring(node, clean=False) or "")
            if text is not None:
                yield text


def _beginning(docstring: str) -> str | None:
    """Joins first paragraphs to a text: masked, on one line, cut at a word; None if there is too little."""
    text = ""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        if _SECTION.match(paragraph):
            break
        text = f"{text} {' '.join(paragraph.split())}"
        if len(text) > MIN_CHARACTERS:
            break
    text = _NAMES.sub(MASK, text).strip()
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS].rsplit(" ", 1)[0]
    return text if len(text) >= MIN_CHARACTERS else None
