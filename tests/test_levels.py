"""The rooms of the package lie on levels: a file imports from its own room, and from rooms of lower levels."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (
    ("errors", "files"),
    ("parsing",),
    ("space", "ops", "data"),
    ("elastic",),
    ("models",),
    ("supernet",),
    ("deploy", "report"),
    ("training",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ASKS_THE_DEVICE = "mlfs.ops.backend"  # which backend runs is decided within ops, and nowhere above
FILES = sorted((ROOT / "mlfs").rglob("*.py"))
FILES = [path for path in FILES if path.relative_to(ROOT).parts[1] not in ("kernels", "__init__.py")]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(text: str) -> Iterator[str]:
    """Every module of the package that a file imports, at the top or within a function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("mlfs."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mlfs":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(module: str, text: str) -> list[str]:
    """What a file imports against the rule; `mlfs.kernels` and the extension are for `ops` alone."""
    room, found = module.split(".")[1], []
    for imported in imports_of(text):
        other = imported.split(".")[1]
        if other in ("kernels", "_cpu"):
            allowed = room == "ops"
        elif other in LEVEL:
            allowed = other == room or LEVEL[other] < LEVEL[room]
        else:  # of the package itself, such as its version
            allowed = room == "cli"
        if not allowed:
            found.append(f"{module} imports {imported}")
    return found


def test_every_room_has_a_level():
    assert {module_of(path).split(".")[1] for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path):
    assert faults(module_of(path), path.read_text(encoding="utf-8")) == []


def asks_the_device(module: str, text: str) -> bool:
    room = module.split(".")[1]
    return room != "ops" and any(f"{name}.".startswith(f"{ASKS_THE_DEVICE}.") for name in imports_of(text))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_the_device_is_asked_in_ops_and_nowhere_above(path):
    assert not asks_the_device(module_of(path), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "from mlfs.ops.backend import backend_of",
        "from mlfs.ops import backend",
        "def f():\n    import mlfs.ops.backend as b",
    ],
)
def test_a_question_to_the_device_is_found(text):
    assert asks_the_device("mlfs.models.fused.layer", text)
    assert not asks_the_device("mlfs.ops.norm", text)


def test_no_circle_among_files():
    modules = {module_of(path) for path in FILES}
    edges: dict[str, set[str]] = {}
    for path in FILES:
        found = set(imports_of(path.read_text(encoding="utf-8")))
        # `from mlfs.room import file` imports the file, `from mlfs.room.file import name` too
        edges[module_of(path)] = {m for name in found for m in (name, name.rpartition(".")[0]) if m in modules}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in edges[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("mlfs.elastic.linear", "from mlfs.models.convert import make_elastic"),
        ("mlfs.space.subnet", "def f():\n    import mlfs.ops.norm"),
        ("mlfs.supernet.model", "from mlfs.training import trainer"),
        ("mlfs.elastic.linear", "from mlfs.kernels import decode"),
        ("mlfs.report.cost", "from mlfs.deploy.hf import write_checkpoint"),
    ],
)
def test_an_import_that_goes_up_or_aside_is_found(module, text):
    assert len(faults(module, text)) == 1
