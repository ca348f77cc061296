"""What gets installed, and that the folder kernels/ never passes for the Hugging Face library `kernels`."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, cwd: Path, path: Path | None = None) -> list[str]:
    """Run `code` in a new interpreter whose sys.path starts with `cwd`, then `path`; return the lines it prints."""
    env = {**os.environ, "PYTHONPATH": str(path or "")}
    env.pop("PYTHONSAFEPATH", None)  # it would keep `cwd` off sys.path
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a clean copy of the sources, where any call of a compiler fails."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in ("mlfs", "kernels", "csrc", "tests"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    no_compiler = {name: shutil.which("false") or "false" for name in ("CC", "CXX", "CUDACXX")}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", "dist", "."], cwd=tree, env={**os.environ, **no_compiler}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (built,) = (tree / "dist").glob("*.whl")
    return built


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
    names = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CONTRIBUTING.md")
    for name in (*names, "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("mlfs", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(built) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for name in ("kernels", "csrc") for path in (ROOT / name).iterdir() if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in sources if path.suffix != ".pyc"} <= packed
    assert {*names, "mlfs/py.typed"} <= packed


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
