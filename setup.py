"""What pyproject.toml cannot say: the folder kernels/ is installed as the package mlfs.kernels, and csrc/ is compiled.

A top-level package named `kernels` would hide the Hugging Face library of that name. An editable install follows the
same mapping: setuptools registers an import finder that sends `mlfs.kernels` to kernels/, also when `mlfs` itself is
found in the working directory. No link or copy is needed in the tree.

The extension `mlfs._cpu` needs a C++ compiler (GCC or Clang) and the PyTorch it will run with: install with
`--no-build-isolation`. Without either the package still installs, and runs on plain PyTorch.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import find_packages, setup

kernels = ["mlfs.kernels", *(f"mlfs.kernels.{name}" for name in find_packages("kernels"))]


def extension() -> dict:
    """The arguments of `setup` that build the extension, or none where it cannot be built."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}

    class OptionalBuild(BuildExtension):
        """Goes on without the extension if it does not compile."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                print(f"mlfs: no C++ extension, operators run on plain PyTorch: {error}", file=sys.stderr)

        def copy_extensions_to_source(self) -> None:
            built = Path(self.build_lib)
            self.extensions = [e for e in self.extensions if (built / self.get_ext_filename(e.name)).exists()]
            super().copy_extensions_to_source()

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", f"-DMLFS_X86={int(x86)}"]
    # OpenMP is compiled for and not linked: the symbols come from PyTorch's own runtime, so that there is one.
    flags += ["-fopenmp"] if sys.platform == "linux" else []
    links = []
    if os.environ.get("MLFS_SANITIZE"):  # for `make sanitize`
        links = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags += [*links, "-O1", "-g", "-fno-omit-frame-pointer"]
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    module = CppExtension("mlfs._cpu", sources, extra_compile_args=flags, extra_link_args=links)
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild.with_options(use_ninja=False)}}


setup(
    packages=find_packages(include=["mlfs", "mlfs.*"]) + kernels,
    package_dir={"mlfs.kernels": "kernels"},
    package_data={"mlfs": ["py.typed"]},  # tells type checkers that the package has types
    **extension(),
)
