"""Rotates the residual stream: leading slices of it then keep leading principal components, not single numbers.

One orthogonal matrix Q (hidden, hidden) for the whole model (after SliceGPT, arXiv 2401.15024, which has one for each
layer, and products between them). With the weights g of the RMSNorms folded into what they feed,

    what reads the stream    W <- W · diag(g) · Q,    A <- A · diag(g) · Q,    g <- 1
    what writes to it        W <- Qᵀ · W,    b <- Qᵀ · b,    B <- Qᵀ · B,    embeddings E <- E · Q

leaves the full model's function as it is, as ‖x · Q‖ = ‖x‖. A head that is tied to the embedding gets a matrix of its
own first: only the head's is multiplied by g.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from mlfs.elastic.embedding import ElasticEmbedding
from mlfs.elastic.linear import ElasticLinear
from mlfs.elastic.norm import ElasticNorm
from mlfs.errors import MLFSError
from mlfs.models.residual import norms_of_readers, why_not_rotatable
from mlfs.space.dimensions import Dimensions
from mlfs.supernet.permutation import difference, permute

logger = logging.get_logger("transformers.mlfs")
_ROWS = 8192  # that are in float64 at a time: 0.3 GB of them at a hidden size of 4096
_TOLERANCE = 1e-3  # of the Frobenius norm of QᵀQ - I; of a matrix of 8,192 that was rounded to fp32 it is 1e-5


def apply_rotation(supernet: Any, matrix: Tensor) -> None:
    """Rotates a super-transformer in place, and records it.

    The units go back into the base's order first, so that whoever loads the run, and rotates the base as it was loaded,
    computes the same numbers. The permutation of heads and feed-forward units comes after.

    Args:
        matrix: for the numbers of the stream as they are ordered now; see `SuperTransformer.apply_rotation`.

    Raises:
        MLFSError: as `check_rotatable` and `check_rotation`; nothing has changed then.
    """
    dims: Dimensions = supernet.dimensions
    check_rotatable(supernet)
    check_rotation(matrix, dims)
    supernet.fingerprint()  # of the base as it was loaded
    merged = supernet.merged_stages
    supernet.merge_stages(0)
    norm_of = norms_of_readers(supernet.model, supernet.family, dims)
    order = supernet.permutation.get(("hidden", None), list(range(dims.hidden)))
    rotation = torch.empty(dims.hidden, dims.hidden)
    rotation[order] = matrix.detach().to("cpu", torch.float32)
    if supernet.permutation:
        permute(supernet.model, difference(supernet.permutation, {}), dims)
    new = _with_folded(supernet, norm_of)
    supernet.record.untie()
    supernet.new_parameters = supernet.record.with_untied(new)
    rotate(supernet.model, norm_of, rotation)
    if supernet.permutation:
        supernet.permutation = {key: value for key, value in supernet.permutation.items() if key[0] != "hidden"}
        permute(supernet.model, supernet.permutation, dims)
    supernet.rotation = rotation
    supernet.merge_stages(merged)
    supernet.record.write()


def check_rotatable(supernet: Any) -> None:
    """Raises MLFSError, with the way out, if a super-transformer cannot be rotated now."""
    if reason := why_not_rotatable(supernet.model, supernet.family):
        raise MLFSError(reason)
    if supernet.rotation is not None:
        raise MLFSError("the residual stream is rotated already: to rotate it by another matrix, load the base anew")
    if not supernet.base_parameters():
        return  # all weights are the run's: folded norms are saved with what they were folded into
    norms = {name for name, module in supernet.model.named_modules() if isinstance(module, ElasticNorm)}
    if trained := [name for name in supernet.owned_modules() if name in norms]:
        raise MLFSError(
            f"{trained[0]} trains, or has trained, and to rotate the residual stream folds the weights of norms away: "
            "rotate before norms train, or leave them frozen (train_norms)"
        )
    tied = {id(head.own_weight) for head in tied_heads(supernet).values()}
    modules = dict(supernet.model.named_modules())
    if trained := [name for name in supernet.owned_modules() if id(modules[name].own_weight) in tied]:
        raise MLFSError(
            f"{trained[0]} trains, or has trained, and to rotate the residual stream unties a head from it: rotate "
            "before embeddings train, or leave them frozen (train_embeddings)"
        )


def check_rotation(matrix: Tensor, dims: Dimensions) -> None:
    """Raises MLFSError unless `matrix` is an orthogonal one over hidden."""
    shape = (dims.hidden, dims.hidden)
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point() or matrix.shape != shape:
        raise MLFSError(f"expected a rotation of shape {shape}, of floating-point numbers")
    values = matrix.detach().to("cpu", torch.float64)
    error = values.t() @ values - torch.eye(dims.hidden, dtype=torch.float64)
    if not torch.linalg.matrix_norm(error) < _TOLERANCE:  # so written that nan is refused
        raise MLFSError("the rotation is not orthogonal: its columns are not of length 1 and at right angles")


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Computes, in float64, the orthogonal matrix nearest to one that is so but for rounding.

    By Newton and Schulz, Q <- Q · (3 I - QᵀQ) / 2, which squares the error: three steps from `_TOLERANCE` suffice. A
    rotation is recorded in fp32, whose own product with its transpose is off by 1e-7.
    """
    nearest = matrix.double()
    for _ in range(3):
        nearest = 1.5 * nearest - 0.5 * nearest @ (nearest.t() @ nearest)
    return nearest


@torch.no_grad()
def rotate(model: nn.Module, norm_of: dict[str, str], rotation: Tensor) -> None:
    """Folds the weights of norms, and rotates what reads the residual stream and what writes to it, in place.

    Computed in float64, one parameter after the other, and rounded to its type.

    Args:
        model: an elastic model whose units are in the base's order, and whose head is not tied.
        norm_of: the norm that feeds each projection, by name (`norms_of_readers`).
        rotation: (hidden, hidden); the orthogonal matrix nearest to it is taken.
    """
    nearest = nearest_orthogonal(rotation)
    on_device: dict[torch.device, Tensor] = {}

    def turn(rows: Tensor | None, gains: Tensor | None = None) -> None:
        """Multiplies rows (count, hidden) by the gains and the rotation."""
        if rows is None:
            return
        matrix = on_device.setdefault(rows.device, nearest.to(rows.device))
        for chunk in rows.split(_ROWS):
            values = chunk.double()
            if gains is not None:
                values = values * gains.to(rows.device)
            chunk.copy_(values @ matrix)

    gains = {name: _norm(model, name).own_weight.detach().double() for name in norm_of.values()}
    for name, module in model.named_modules():
        if isinstance(module, ElasticEmbedding):
            turn(module.own_weight)
        if not isinstance(module, ElasticLinear):
            continue
        axes = module.axes()
        weight = module.own_weight.t() if module.transposed else module.own_weight  # (out, in)
        if axes.input is not None and axes.input.axis == "hidden":
            for matrix in (weight, *module.lora_A):
                turn(matrix, gains[norm_of[name]])
        for size, start, stop in axes.outputs:
            if size.axis == "hidden":
                for matrix in (weight, *module.lora_B):
                    turn(matrix[start:stop].t())  # (in or rank, hidden)
                turn(None if module.own_bias is None else module.own_bias[None, start:stop])
    for name in gains:
        _norm(model, name).own_weight.fill_(1.0)


@torch.no_grad()
def untie_heads(supernet: Any) -> set[str]:
    """Gives each head whose matrix is the embedding's one of its own, with the same numbers.

    The configuration says so from now on, so that nothing ties them again.

    Returns:
        The names of the new parameters.
    """
    model, untied = supernet.model, {}
    for name, head in tied_heads(supernet).items():
        old = head.own_weight
        own = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        head._parameters["weight"] = untied[f"{name}.weight"] = own
    if getattr(model.config, "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False
    for name, own in untied.items():
        getattr(model, "all_tied_weights_keys", {}).pop(name, None)
        logger.warning_once(
            f"{name} was tied to the embeddings: in a rotated residual stream it is a matrix of its own, of "
            f"{own.nbytes:,} bytes, in this model and in what is exported."
        )
    return set(untied)


def tied_heads(supernet: Any) -> dict[str, ElasticLinear]:
    """Finds the projections whose matrix is that of an embedding, by name."""
    modules = dict(supernet.model.named_modules())
    held = {id(module.own_weight) for module in modules.values() if isinstance(module, ElasticEmbedding)}
    linears = {name: module for name, module in modules.items() if isinstance(module, ElasticLinear)}
    return {name: module for name, module in linears.items() if id(module.own_weight) in held}


# ---- helpers --------------------------------------------------------------------------------------------------------


def _with_folded(supernet: Any, norm_of: dict[str, str]) -> set[str]:
    """Adds to the parameters that are new with the run those that the weights of new norms are folded into: a base that
    is loaded again would have others. Of a head that is tied as yet, the embedding stands for both."""
    new, ties = set(supernet.new_parameters), supernet.record.ties
    for reader, norm in norm_of.items():
        if f"{norm}.weight" in new:
            new.add(ties.get(f"{reader}.weight", f"{reader}.weight"))
    return new - supernet.head_parameters()


def _norm(model: nn.Module, name: str) -> ElasticNorm:
    return model.get_submodule(name)  # type: ignore[return-value]
