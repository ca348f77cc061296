"""Fingerprints of a base model, by which a run recognises the weights it was trained on."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mlfs.errors import MLFSError

Fingerprint = dict[str, list[str]]  # for each parameter, by name, one hash for each of FINGERPRINT_DTYPES
FINGERPRINT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fingerprint(parameters: Mapping[str, Tensor]) -> Fingerprint:
    """Hashes each tensor: 16 hex digits of SHA-256 over shape and values, in fp32, bf16 and fp16.

    One hash for each dtype, so that a base that is loaded in a smaller one is still recognised.
    """

    def digest(item: tuple[str, Tensor]) -> tuple[str, list[str]]:
        name, tensor = item
        values = tensor.detach().cpu()
        hashes = []
        for dtype in FINGERPRINT_DTYPES:
            cast = values.to(dtype).contiguous().reshape(-1).view(torch.uint8)
            sha = hashlib.sha256(repr(tuple(values.shape)).encode())
            sha.update(cast.numpy().data)
            hashes.append(sha.hexdigest()[:16])
        return name, hashes

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        return dict(pool.map(digest, parameters.items()))


def check_base(found: Fingerprint, expected: Fingerprint, dtype: torch.dtype, name: str | None, place: object) -> None:
    """Raises MLFSError unless the base at hand is the one that was trained on.

    Args:
        found, expected: fingerprints of the base at hand, and of the one that was trained on.
        dtype: in which the base at hand is loaded; the hashes of this dtype are compared.
        name: what the base that was trained on is called; None or "" if it has no name.
        place: where the run is, for the message.
    """
    column = FINGERPRINT_DTYPES.index(dtype) if dtype in FINGERPRINT_DTYPES else 0
    odd = sorted(expected.keys() ^ found.keys())
    odd += sorted(n for n in expected.keys() & found.keys() if expected[n][column] != found[n][column])
    if odd:
        raise MLFSError(
            f"the base is not the one {place} was trained on ({name or 'unnamed'}): "
            f"{len(odd)} of {len(expected)} tensors differ, e.g. {odd[0]}; load that base"
        )
