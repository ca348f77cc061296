"""What gets installed where, and that the folder kernels/ never passes for the Hugging Face library `kernels`."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
import setuptools
import torch
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).resolve().parents[1]
FILES = ("build_backend.py", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")  # to build with


def python(code: str, cwd: Path, path: Path | None = None) -> list[str]:
    """Run `code` in a new interpreter whose sys.path starts with `cwd`, then `path`; return the lines it prints."""
    env = {**os.environ, "PYTHONPATH": str(path or "")}
    env.pop("PYTHONSAFEPATH", None)  # it would keep `cwd` off sys.path
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def copy_sources(tree: Path) -> None:
    for name in (*FILES, "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"):
        shutil.copy(ROOT / name, tree)
    for name in ("mlfs", "kernels", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_cpu.json")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)


def build_wheel(tree: Path, **variables: str) -> Path:
    """Builds a wheel from a clean copy of the sources, under these variables of the environment."""
    copy_sources(tree)
    (tree / "tests").mkdir()
    (tree / "tests" / "test_it.py").write_text("")  # is not to be installed
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    env = {**os.environ, **variables}
    done = subprocess.run([*pip, "-w", "dist", "."], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (tree / "dist").glob("*.whl")
    return built


def record_of(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("mlfs/_cpu.json"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built where no compiler is found."""
    return build_wheel(tmp_path_factory.mktemp("tree"), CC="/nowhere/cc", CXX="/nowhere/c++")


@pytest.fixture(scope="module")
def compiled_wheel(tmp_path_factory) -> Path:
    """A wheel built with a compiler that writes empty files."""
    stand_in = tmp_path_factory.mktemp("bin") / "c++"
    stand_in.write_text('#!/bin/sh\nwhile [ "$#" -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n')
    stand_in.chmod(0o755)
    return build_wheel(tmp_path_factory.mktemp("tree"), CC=str(stand_in), CXX=str(stand_in))


def test_wheel_without_an_extension_is_for_any_platform_and_says_why(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert record_of(wheel) == {"why_not": "there was no C++ compiler when mlfs was installed"}


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CC": "false", "CXX": "false"}, "false did not compile it when mlfs was installed"),
        ({"MLFS_NO_EXTENSION": "1"}, "MLFS_NO_EXTENSION was set when mlfs was installed"),
    ],
)
def test_wheel_is_for_any_platform_whatever_kept_the_extension_out(variables, reason, tmp_path):
    built = build_wheel(tmp_path, **variables)
    assert built.name.endswith("-py3-none-any.whl") and record_of(built) == {"why_not": reason}


def test_wheel_with_the_extension_is_for_one_platform_and_names_its_pytorch(compiled_wheel):
    assert "-none-any" not in compiled_wheel.name
    assert record_of(compiled_wheel) == {"torch": torch.__version__}
    assert any(
        name.startswith("mlfs/_cpu.") and name.endswith(".so") for name in zipfile.ZipFile(compiled_wheel).namelist()
    )


WHY_NOT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # finds the tree's extension
from mlfs.ops.backend import why_no_cpp
print(why_no_cpp())
"""


def test_installed_package_says_why_it_has_no_extension(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (reason,) = python(WHY_NOT, tmp_path, path=tmp_path / "site")
    assert "there was no C++ compiler when mlfs was installed" in reason and "install g++ or clang++" in reason


def test_extension_for_another_pytorch_is_named_before_it_is_loaded(compiled_wheel, tmp_path):
    zipfile.ZipFile(compiled_wheel).extractall(tmp_path / "site")
    (broken,) = python(WHY_NOT, tmp_path, path=tmp_path / "site")
    assert "cannot be loaded" in broken and "install mlfs again" in broken  # it is an empty file
    (tmp_path / "site" / "mlfs" / "_cpu.json").write_text('{"torch": "1.99.0+cu999"}')
    (other,) = python(WHY_NOT, tmp_path, path=tmp_path / "site")
    assert f"compiled for PyTorch 1.99.0+cu999, and this is {torch.__version__}; install mlfs again" in other


ASK_BACKEND = """
import os, sys
sys.path[:] = [folder for folder in sys.path if "site-packages" not in folder and "dist-packages" not in folder]
os.environ["CXX"], os.environ["MLFS_NO_EXTENSION"] = sys.argv[1:]
import build_backend
print(build_backend.get_requires_for_build_wheel())
print(build_backend.get_requires_for_build_editable())
import importlib.util
print(importlib.util.find_spec("torch") is not None)
"""


def ask_backend(folder: Path, code: str = ASK_BACKEND, compiler: str = sys.executable, off: str = "") -> list[str]:
    """Asks build_backend.py what it requires where, as in pip's isolation, setuptools is all that is importable."""
    tree, packages = folder / "tree", folder / "isolated"
    if not tree.exists():
        tree.mkdir()
        copy_sources(tree)
        installed = Path(setuptools.__file__).parents[1]
        for name in ("setuptools", f"setuptools-{setuptools.__version__}.dist-info"):
            shutil.copytree(installed / name, packages / name)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (packages, tree)))}
    done = subprocess.run(
        [sys.executable, "-c", code, compiler, off], cwd=tree, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line in ("[]", "['torch']", "True", "False")]


def test_isolated_build_takes_the_pytorch_that_is_installed(tmp_path):
    assert importlib.util.find_spec("torch")
    assert ask_backend(tmp_path) == ["[]", "[]", "True"]


def test_isolated_build_requires_pytorch_only_where_none_is_and_a_compiler_would_use_it(tmp_path):
    nowhere = "import site, sysconfig; sysconfig.get_path = lambda name: '/nowhere'; site.ENABLE_USER_SITE = False"
    hidden = f"{nowhere}; site.getsitepackages = lambda: []" + ASK_BACKEND
    assert ask_backend(tmp_path, hidden) == ["['torch']", "['torch']", "False"]
    assert ask_backend(tmp_path, hidden, compiler="/nowhere/c++") == ["[]", "[]", "False"]
    assert ask_backend(tmp_path, hidden, off="1") == ["[]", "[]", "False"]


def test_wheel_holds_mlfs_and_its_kernels_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT) for folder in ("mlfs", "kernels") for path in (ROOT / folder).rglob("*.py")}
    installed = {("mlfs" / path if path.parts[0] == "kernels" else path).as_posix() for path in sources}
    assert installed <= names
    assert "mlfs/kernels/__init__.py" in names
    assert {name.split("/")[0] for name in names} == {"mlfs"}


def test_wheel_brings_its_types_and_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
        assert "mlfs/py.typed" in archive.namelist()


def test_source_distribution_holds_all_that_is_compiled_and_the_licence(tmp_path):
    copy_sources(tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(built) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for name in ("kernels", "csrc") for path in (ROOT / name).iterdir() if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in sources if path.suffix != ".pyc"} <= packed
    assert {*FILES, "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "mlfs/py.typed"} <= packed


def test_installed_package_imports_its_kernels(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (found,) = python("import mlfs.kernels; print(mlfs.kernels.__file__)", tmp_path, path=tmp_path / "site")
    assert Path(found) == tmp_path / "site" / "mlfs" / "kernels" / "__init__.py"


@pytest.mark.parametrize("in_root", [True, False])
def test_checkout_imports_its_kernels(in_root, tmp_path):
    (found,) = python("import mlfs.kernels; print(mlfs.kernels.__file__)", ROOT if in_root else tmp_path)
    assert Path(found) == ROOT / "kernels" / "__init__.py"


ASK_TRANSFORMERS = """
from importlib.util import find_spec
spec = find_spec("kernels")
print(spec and spec.origin)
from transformers.utils import is_kernels_available
print(is_kernels_available())
import transformers.integrations.hub_kernels  # imports from `kernels` if it is taken to be there
import mlfs.kernels
print(is_kernels_available())
"""


def test_transformers_does_not_take_the_folder_for_the_library(tmp_path):
    origin, *in_root = python(ASK_TRANSFORMERS, ROOT)
    assert Path(origin) == ROOT / "kernels" / "__init__.py"  # Python does find the folder; transformers looks closer
    _, *elsewhere = python(ASK_TRANSFORMERS, tmp_path)
    assert in_root == elsewhere
    if "kernels" not in {dist.metadata["Name"] for dist in distributions()}:
        assert in_root == ["False", "False"]


STAND_IN = """
from unittest.mock import MagicMock
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


def test_the_folder_gives_way_to_the_library_where_that_is_installed(tmp_path):
    site = tmp_path / "site"
    package, info = site / "kernels", site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (package / "__init__.py").write_text(STAND_IN)
    _, before, after, found = python(ASK_TRANSFORMERS + "import kernels; print(kernels.__file__)", ROOT, path=site)
    assert (before, after) == ("True", "True")
    assert Path(found) == package / "__init__.py"
