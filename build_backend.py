"""The build backend: setuptools, which compiles the extension with the PyTorch that mlfs will run with.

pip builds a package in an environment of its own that has only what the build requires. An extension for PyTorch must
be compiled with the very PyTorch it is loaded into, which is most often installed already, and is a download of several
GB. So the installed one is put at the end of `sys.path`, where nothing it brings replaces a requirement. Only where
none is installed, and a compiler is there to use it, PyTorch is required of the build: pip is about to install the same
version as a dependency and takes it from its cache.
"""

import importlib.util
import os
import shutil
import site
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

Settings = Mapping[str, str | list[str] | None] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Lists what building a wheel needs beyond pyproject.toml: PyTorch, where none is installed."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_pytorch()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Lists what an editable install needs beyond pyproject.toml: PyTorch, where none is installed."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_pytorch()]


def build_wheel(directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Builds a wheel in `directory`, with the extension where a compiler and PyTorch are there; returns its name."""
    _find_pytorch()
    return build_meta.build_wheel(directory, config_settings, metadata_directory)


def build_editable(directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Builds an editable wheel in `directory`, and the extension within the sources; returns the wheel's name."""
    _find_pytorch()
    return build_meta.build_editable(directory, config_settings, metadata_directory)


def compiler() -> str | None:
    """Finds the C++ compiler: CXX, else the usual names; None where there is none."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    return next((name for name in names if shutil.which(name)), None)


def wants_extension() -> bool:
    """Tells whether the extension is to be built: unless MLFS_NO_EXTENSION is set, and where there is a compiler."""
    return not os.environ.get("MLFS_NO_EXTENSION") and compiler() is not None


def _pytorch() -> list[str]:
    return [] if not wants_extension() or _find_pytorch() else ["torch"]


def _find_pytorch() -> bool:
    """Says whether PyTorch can be imported, after looking where the interpreter that installs has its packages."""
    if importlib.util.find_spec("torch"):
        return True
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    found = next((folder for folder in folders if (Path(folder) / "torch" / "version.py").exists()), None)
    if found is None:
        return False
    sys.path.append(found)
    importlib.invalidate_caches()
    return True
