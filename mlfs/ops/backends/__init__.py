"""Implementations of operators besides the reference: one file a backend.

Importing one needs neither Triton nor the compiled extension: what an implementation calls is imported when it runs.
"""

from mlfs.ops.backends.cpp import BACKEND as CPP
from mlfs.ops.backends.table import add_backend
from mlfs.ops.backends.triton import BACKEND as TRITON

# The last one is asked first: a product on a CPU is over in the time that some questions take.
for backend in (TRITON, CPP):
    add_backend(backend)
