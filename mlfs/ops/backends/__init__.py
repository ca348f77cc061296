"""Implementations of operators besides the reference: one file a backend.

Importing one needs neither Triton nor the compiled extension: what an implementation calls is imported when it runs.
"""

from mlfs.ops.backends import cpp, table, triton

# The last one is asked first: a product on a CPU is over in the time that some questions take.
for backend in (triton.BACKEND, cpp.BACKEND):
    table.add_backend(backend)
