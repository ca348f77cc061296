"""Measures along which directions the residual stream moves: its second moment, and the principal axes of that."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.models.residual import norms_of_readers
from mlfs.supernet.importance import Method, Scores
from mlfs.supernet.permutation import Permutation, permutation_of
from mlfs.supernet.rotation import check_rotatable

Order = Method | Literal["rotation"]


def rotate_by_batches(supernet: Any, score: Callable[[], Scores], axes_of: Callable[[Tensor], Tensor]) -> Permutation:
    """Rotates the residual stream of a super-transformer to its principal axes.

    Args:
        score: runs the whole model on the batches and returns the scores of its units.
        axes_of: makes the rotation of the second moment: `principal_axes`, of one process.

    Returns:
        The order of heads and feed-forward units by their scores; that of the residual stream is the rotation's.

    Raises:
        MLFSError: it cannot be rotated.
    """
    check_rotatable(supernet)
    with collecting_moment(supernet) as moment:
        scores = score()
    supernet.apply_rotation(axes_of(moment))
    return permutation_of({axis: values for axis, values in scores.items() if axis[0] != "hidden"})


@contextmanager
def collecting_moment(supernet: Any) -> Iterator[Tensor]:
    """Adds up, over all that the model runs inside the block, the second moment of what comes out of its norms.

    Of x / rms(x), the weights of the norms being 1, over the norms of all layers and the last one; tokens that a mask
    leaves out do not count.

    Yields:
        Σ yᵀy, (hidden, hidden) float64, on the model's device; complete when the block ends.
    """
    model, dims = supernet.model, supernet.dimensions
    moment = torch.zeros(dims.hidden, dims.hidden, dtype=torch.float64, device=model.device)
    masks: list[Tensor | None] = [None]

    def keep_mask(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        mask = options.get("attention_mask", args[1] if len(args) > 1 else None)
        masks[0] = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def add(norm: Any, args: tuple[Any, ...]) -> None:
        x, mask = args[0].detach().double(), masks[0]  # (batch, tokens, hidden)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
        rows = y.flatten(0, -2) if mask is None else y[mask[:, -y.shape[1] :].bool().to(y.device)]  # (tokens, hidden)
        moment.add_((rows.t() @ rows).to(moment.device))

    norms = sorted(set(norms_of_readers(model, supernet.family, dims).values()))
    handles = [model.base_model.register_forward_pre_hook(keep_mask, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_pre_hook(add) for name in norms]
    try:
        yield moment
    finally:
        for handle in handles:
            handle.remove()


def principal_axes(moment: Tensor) -> Tensor:
    """Computes the eigenvectors of a second moment (hidden, hidden): one in each column, largest eigenvalue first.

    Raises:
        MLFSError: it is not finite, or nothing was measured.
    """
    if not torch.isfinite(moment).all() or not moment.any():
        raise MLFSError("the residual stream cannot be measured: no token counts in the batches, or it is not finite")
    _, vectors = torch.linalg.eigh(moment.double().cpu())  # ascending
    return vectors.flip(1)
