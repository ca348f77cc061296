"""What pyproject.toml cannot say: the folder kernels/ is installed as the package mlfs.kernels.

A top-level package named `kernels` would hide the Hugging Face library of that name. An editable install follows the
same mapping: setuptools registers an import finder that sends `mlfs.kernels` to kernels/, also when `mlfs` itself is
found in the working directory. No link or copy is needed in the tree.
"""

from setuptools import find_packages, setup

kernels = ["mlfs.kernels", *(f"mlfs.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=find_packages(include=["mlfs", "mlfs.*"]) + kernels,
    package_dir={"mlfs.kernels": "kernels"},
)
