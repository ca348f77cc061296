"""Loss of a language model's head, from what goes into the head: its logits and their gradient never exist at once.

    z_t = x_t · W[:, :n]ᵀ + b,   u_t = teacher_t · Wᵀ + b
    task       = Σ_t (1 − ε) (−log q_t[label_t]) + ε · mean_v(−log q_tv),        q_t = softmax(z_t)
    divergence = T² · Σ_t Σ_v p_tv (log p_tv − log r_tv),   p_t = softmax(u_t / T), r_t = softmax(z_t / T)
    loss       = (1 − α) · task + α · divergence

summed over the rows t whose label is not ignored (label smoothing ε: Szegedy et al., arXiv 1512.00567; distillation:
Hinton et al., arXiv 1503.02531).

Shapes: x (..., n), teacher (..., N), W (V, N) of any strides, b (V,), labels (...); n ≤ N. W and b are frozen, and the
teacher is constant. Rows go through the head in chunks whose logits take some MiB. The gradient is made where the
logits are, in the forward pass:

    dz_t = (1 − α) (q_t − (1 − ε) onehot(label_t) − ε / V) + α · T · (r_t − p_t),   dx_t = dz_t · W[:, :n]

and turned into dx at once, so that nothing is computed again in the backward pass. This is why α is an argument and
only `loss` has a gradient: two losses to weigh afterwards would take two dz and two products. dz is not scaled by the
number of rows, or it would be lost in half precision; the scale, one number, is that of the gradient coming in.

In code z is `logits` and u `of_teacher`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from mlfs.errors import MLFSError
from mlfs.ops.autograd import differentiable, flat_rows
from mlfs.ops.backend import backend_of, in_autocast_type, run, runs_as_operators
from mlfs.ops.backends.table import implements
from mlfs.ops.distill import divergence

IGNORED = -100  # the label of rows that do not count
# Of the logits of one chunk. A GPU's library product wants some hundred rows; the reference takes a few such tensors.
CHUNK_BYTES = {"triton": 64 << 20, "reference": 16 << 20, "cpp": 32 << 20}

__all__ = ["IGNORED", "as_head_input", "head_loss", "head_loss_reference"]


class Shares(NamedTuple):
    """What the loss is made of: α, the share of the divergence; T; and ε, the label smoothing."""

    alpha: float
    temperature: float
    smoothing: float


class Head(NamedTuple):
    """The head: W (V, N) and b (V,) or None."""

    weight: Tensor
    bias: Tensor | None

    def cast(self, dtype: torch.dtype) -> "Head":
        """The head in a type; itself where it has that."""
        bias = self.bias
        if bias is not None:
            bias = bias.to(dtype)
        return Head(self.weight.to(dtype), bias)


def head_loss_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: Tensor | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (loss, task, divergence) of the formula in plain PyTorch, all logits at once, differentiable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    head = Head(weight, bias).cast(x.dtype)
    kept = labels.ne(IGNORED)

    def logits_of(rows: Tensor) -> Tensor:
        columns = rows.shape[-1]
        return linear(rows.to(x.dtype), head.weight[:, :columns], head.bias)[kept].to(wide)  # (rows that count, V)

    logits = logits_of(x)
    # -log q of the label; with smoothing a share of it, and of the mean over the vocabulary.
    log_q = torch.log_softmax(logits, dim=-1)
    task = -log_q.gather(1, labels[kept].unsqueeze(1)).sum()
    if smoothing != 0:
        task = (1 - smoothing) * task - smoothing * log_q.mean(-1).sum()
    if teacher is None:
        return task, task, torch.zeros_like(task)
    distance = divergence(logits, logits_of(teacher.detach()), None, temperature) * logits.shape[0]
    return (1 - alpha) * task + alpha * distance, task, distance


def as_head_input(x: Tensor) -> Tensor:
    """Casts x as autocast would for the head's product; for callers that take the loss where autocast is off again."""
    return in_autocast_type(x)


def head_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: Tensor | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (loss, task, divergence) of the formula above: float32 (or float64) scalars; loss has a gradient, in x.

    Args:
        x: (..., n), floating point; logits are made in its type. Under autocast it is cast to the autocast type.
        weight: (V, N), any strides; read in place when it has x's type.
        bias: (V,) or None.
        labels: (...) int64, 0 to V − 1, or −100 for rows that do not count. On a GPU any other makes the loss NaN.
        teacher: (..., N), what goes into the teacher's head, which is the same head; or None: loss is task then.
        alpha: share of the divergence. temperature: T. smoothing: ε.

    Raises:
        MLFSError: shapes that do not fit together.
    """
    leading, columns = x.shape[:-1], weight.shape[1]
    teacher_fits = teacher is None or teacher.shape == (*leading, columns)
    if labels.shape != leading or x.shape[-1] > columns or not teacher_fits:
        shapes = [tuple(t.shape) for t in (x, weight, labels)]
        of_teacher = None if teacher is None else tuple(teacher.shape)
        raise MLFSError(
            f"x, weight and labels of {shapes[0]}, {shapes[1]}, {shapes[2]}, teacher of {of_teacher}: expected "
            "(..., n), (V, N), (...) and (..., N), n ≤ N"
        )
    x = in_autocast_type(x)
    if not runs_as_operators():
        return head_loss_reference(x, weight, bias, labels, teacher, alpha, temperature, smoothing)
    keep = torch.is_grad_enabled() and x.requires_grad
    return _head_loss(x, weight, bias, labels, teacher, alpha, temperature, smoothing, keep)[:3]


# ---- what backends implement -----------------------------------------------------------------------------------------


@implements("reference", "rows_that_count")
def _rows_that_count(labels: Tensor) -> Tensor | None:
    """Finds the places of the rows whose label is not ignored; None where `head_rows` skips the others."""
    return labels.ne(IGNORED).nonzero().squeeze(1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Writes x · Wᵀ + b to out, which has the type of W and b, by the backend for out."""
    return run("product", (out,), x, weight, bias, out)


@implements("reference", "product")
def _product_in_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    x, weight = x.to(out.dtype), weight.t()
    if bias is None:
        return torch.mm(x, weight, out=out)
    return torch.addmm(bias, x, weight, out=out)


@implements("reference", "head_rows")
def _head_rows(
    logits: Tensor, of_teacher: Tensor | None, labels: Tensor, sums: Tensor, shares: Shares, keep: bool
) -> None:
    """Writes task and divergence of each row of logits (rows, V) to sums (2, rows), and with `keep` dz over them; no
    label is to be ignored. of_teacher: the teacher's logits (rows, V)."""
    alpha, temperature, smoothing = shares
    log_q, labels = torch.log_softmax(logits.to(sums.dtype), dim=-1), labels.unsqueeze(1)  # (rows, V), (rows, 1)
    sums[0] = (smoothing - 1) * log_q.gather(1, labels).squeeze(1) - smoothing * log_q.mean(-1)
    slope = None
    if keep:  # q − (1 − ε) onehot(label) − ε / V
        slope = log_q.exp().sub_(smoothing / logits.shape[1])
        slope.scatter_add_(1, labels, slope.new_full(labels.shape, smoothing - 1))
    if of_teacher is not None:
        log_r = log_q
        if temperature != 1:
            log_r = torch.log_softmax(logits.to(sums.dtype) / temperature, dim=-1)
        log_p = torch.log_softmax(of_teacher.to(sums.dtype) / temperature, dim=-1)
        p = log_p.exp()  # before log_p is overwritten
        sums[1] = temperature**2 * log_p.sub_(log_r).mul_(p).sum(-1)
        if slope is not None:
            slope.mul_(1 - alpha).add_(log_r.exp().sub_(p), alpha=alpha * temperature)
    if slope is not None:
        logits.copy_(slope)


# ---- the operator ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("mlfs::head_loss", mutates_args=())
def _head_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: Tensor | None,
    alpha: float,
    temperature: float,
    smoothing: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, task, divergence, dx): dx (..., n) is the gradient of loss, empty without `keep`."""
    shares, head = Shares(alpha, temperature, smoothing), Head(weight, bias)
    rows, labels, teacher = flat_rows(x), labels.reshape(-1), flat_rows(teacher)  # (T, n), (T,), (T, N)
    counting = run("rows_that_count", (x,), labels)
    if counting is not None:
        rows, labels = rows[counting], labels[counting]
        if teacher is not None:
            teacher = teacher[counting]
    sums, dx = _in_chunks(rows, head, labels, teacher, shares, keep)
    task, distance = sums[0].sum(), sums[1].sum()
    loss = task.clone()
    if teacher is not None:
        loss = (1 - alpha) * task + alpha * distance
    if keep and counting is not None:  # rows that do not count have no gradient
        whole = torch.zeros_like(x, memory_format=torch.contiguous_format)
        dx = flat_rows(whole).index_copy_(0, counting, dx)
    if keep:
        dx = dx.view(x.shape)
    return loss, task, distance, dx


@_head_loss.register_fake
def _(x, weight, bias, labels, teacher, alpha, temperature, smoothing, keep):
    dtype = torch.promote_types(x.dtype, torch.float32)
    scalars = (x.new_empty((), dtype=dtype) for _ in range(3))
    return *scalars, x.new_empty(x.shape if keep else 0)


def _in_chunks(
    x: Tensor, head: Head, labels: Tensor, teacher: Tensor | None, shares: Shares, keep: bool
) -> tuple[Tensor, Tensor]:
    """((2, T): task and divergence of each row, dx (T, n) or empty) of x (T, n) and teacher (T, N)."""
    tokens, columns = x.shape
    vocabulary = head.weight.shape[0]
    sums = x.new_zeros((2, tokens), dtype=torch.promote_types(x.dtype, torch.float32))
    dx = x.new_empty((tokens, columns) if keep else 0)
    if tokens == 0:
        return sums, dx
    if teacher is None:  # which alone reads all columns
        head = Head(head.weight[:, :columns], head.bias)
    head = head.cast(x.dtype)
    of_student = Head(head.weight[:, :columns], head.bias)  # W[:, :n]
    stride = -(-vocabulary // 64) * 64  # an odd vocabulary's rows, too, start and end at whole cache lines
    chunk_bytes = CHUNK_BYTES.get(backend_of(x), CHUNK_BYTES["reference"])
    size = _rows_of_chunk(tokens, stride * x.dtype.itemsize, chunk_bytes)
    space = x.new_empty((size, stride))  # for the logits of one chunk after the other
    teacher_space = x.new_empty((0 if teacher is None else size, stride))
    for padded in (space, teacher_space):
        # oneDNN's bf16 products read on behind a row and multiply by zero: what is NaN there would be NaN in dx
        padded[:, vocabulary:].zero_()
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        count = rows.stop - start
        logits = _product(x[rows], *of_student, space[:count, :vocabulary])
        of_teacher = None
        if teacher is not None:
            of_teacher = _product(teacher[rows], *head, teacher_space[:count, :vocabulary])
        run("head_rows", (x,), logits, of_teacher, labels[rows], sums[:, rows], shares, keep)
        if keep:  # logits are their own gradient now
            _product(logits, of_student.weight.t(), None, dx[rows])
    return sums, dx


def _rows_of_chunk(tokens: int, row_bytes: int, limit: int) -> int:
    """Finds how many rows a chunk has: chunks are alike, and as large as the limit allows."""
    most = max(limit // row_bytes, 1)
    if most > 64:
        most -= most % 64
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3])


def _gradients(ctx: Any, of_outputs: Sequence[Tensor | None], of_input: None) -> tuple[Any, ...]:
    (dx,) = ctx.saved_tensors
    d_loss = of_outputs[0]
    if d_loss is None or not ctx.needs_input_grad[0]:
        return (None,) * 9
    return dx * d_loss, *[None] * 8


differentiable(_head_loss, _keep, _gradients, results=lambda inputs: 1)
