"""What pyproject.toml cannot say: the folder kernels/ is installed as the package mlfs.kernels, and csrc/ is compiled.

A top-level package named `kernels` would hide the Hugging Face library of that name. An editable install follows the
same mapping: setuptools registers an import finder that sends `mlfs.kernels` to kernels/, also when `mlfs` itself is
found in the working directory. No link or copy is needed in the tree.

The extension `mlfs._cpu` needs a C++ compiler (GCC or Clang) and the PyTorch it will run with (build_backend.py). Where
it cannot be built the package installs without it, as a wheel for any platform, and runs on plain PyTorch. What was
built, or why nothing was, is written beside it, to `mlfs/_cpu.json`: `mlfs env` and the first warning quote it.
"""

import json
import os
import platform
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from build_backend import compiler, wants_extension

kernels = ["mlfs.kernels", *(f"mlfs.kernels.{name}" for name in find_packages("kernels"))]


def record(folder: str | Path, **facts: str | None) -> None:
    """Writes what was built, beside where the extension is: `torch`, its version, or `why_not`."""
    Path(folder, "_cpu.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


class WithRecord(build_py):
    """Compiles first, for only then it is known what was built; without an extension it writes why there is none."""

    why_not = ""

    def run(self) -> None:
        if self.distribution.ext_modules:
            self.run_command("build_ext")
        super().run()
        if not self.distribution.ext_modules and self.why_not:
            record("mlfs" if self.editable_mode else Path(self.build_lib, "mlfs"), why_not=self.why_not)


class PureWithoutExtension(bdist_wheel):
    """Names the wheel after what is in it: one platform if the extension was built, else any."""

    def run(self) -> None:
        self.run_command("build")
        if not self.distribution.ext_modules:
            self.root_is_pure = True
        super().run()


def why_no_extension() -> str | None:
    """Says why the extension cannot be built; None where it can be tried."""
    if os.environ.get("MLFS_NO_EXTENSION"):
        return "MLFS_NO_EXTENSION was set when mlfs was installed"
    if not wants_extension():
        return "there was no C++ compiler when mlfs was installed"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"PyTorch could not be imported when mlfs was installed ({error})"
    return None


def extension() -> dict:
    """The arguments of `setup` that build the extension, or none where it cannot be built."""
    WithRecord.why_not = why_no_extension() or ""
    commands = {"build_py": WithRecord, "bdist_wheel": PureWithoutExtension}
    if WithRecord.why_not:
        return {"cmdclass": commands}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        """Goes on without the extension if it does not compile."""

        def run(self) -> None:
            folder = Path("mlfs") if self.inplace else Path(self.build_lib, "mlfs")
            folder.mkdir(parents=True, exist_ok=True)
            try:
                super().run()
                record(folder, torch=torch.__version__)
            except Exception as error:
                print(f"mlfs: no C++ extension, operators run on plain PyTorch: {error}", file=sys.stderr)
                WithRecord.why_not = f"{compiler()} did not compile it when mlfs was installed"
                record(folder, why_not=WithRecord.why_not)
                self.distribution.ext_modules = []

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
    included = [str(path) for path in Path("csrc").glob("*.[hi]*")]
    module = CppExtension("mlfs._cpu", sources, depends=included, extra_compile_args=flags, extra_link_args=links)
    commands["build_ext"] = OptionalBuild.with_options(use_ninja=False)
    return {"ext_modules": [module], "cmdclass": commands}


setup(
    packages=find_packages(include=["mlfs", "mlfs.*"]) + kernels,
    package_dir={"mlfs.kernels": "kernels"},
    package_data={"mlfs": ["py.typed"]},  # tells type checkers that the package has types
    **extension(),
)
