"""Triton kernels and their launchers, installed as `mlfs.kernels`. `mlfs.ops` decides when they run.

Nothing here is imported before a kernel is wanted: `import mlfs` needs no Triton.
"""

# Python started in the repository's root finds this folder under the name of a Hugging Face library.
if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    __version__ = "0"  # older than any transformers accepts
    root = Path(__file__).resolve().parents[1]
    spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() != root])
    if spec and spec.loader:  # the library is installed: give way, or transformers would not import
        sys.modules[__name__] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[__name__])
