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
"""

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.backend import backend_of, cpp, in_autocast_type
from mlfs.ops.distill import divergence

IGNORED = -100  # the label of rows that do not count
# Of the logits of one chunk. A GPU's library product wants some hundred rows; the reference takes a few such tensors.
CHUNK_BYTES = {"triton": 64 << 20, "reference": 16 << 20, "cpp": 32 << 20}

__all__ = ["IGNORED", "head_loss", "head_loss_reference"]


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
    """(loss, task, divergence) of the formula in plain PyTorch, all logits at once, differentiable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = labels.ne(IGNORED)

    def logits(h: Tensor) -> Tensor:
        b = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(h.to(x.dtype), weight[:, : h.shape[-1]].to(x.dtype), b)[kept].to(wide)

    z = logits(x)
    log_q = torch.log_softmax(z, dim=-1)
    hard = -log_q.gather(1, labels[kept].unsqueeze(1)).sum()
    task = hard if smoothing == 0 else (1 - smoothing) * hard - smoothing * log_q.mean(-1).sum()
    if teacher is None:
        return task, task, torch.zeros_like(task)
    distance = divergence(z, logits(teacher.detach()), None, temperature) * z.shape[0]
    return (1 - alpha) * task + alpha * distance, task, distance


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
    """(loss, task, divergence) of the formula above: float32 (or float64) scalars; loss has a gradient, in x.

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
    rows, columns = x.shape[:-1], weight.shape[1]
    fits = labels.shape == rows and x.shape[-1] <= columns and (teacher is None or teacher.shape == (*rows, columns))
    if not fits:
        shapes = [tuple(t.shape) for t in (x, weight, labels)]
        raise MLFSError(
            f"x, weight and labels of {shapes[0]}, {shapes[1]}, {shapes[2]}, teacher of "
            f"{None if teacher is None else tuple(teacher.shape)}: expected (..., n), (V, N), (...) and (..., N), n ≤ N"
        )
    x = in_autocast_type(x)
    keep = torch.is_grad_enabled() and x.requires_grad
    return _head_loss(x, weight, bias, labels, teacher, alpha, temperature, smoothing, keep)[:3]


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
    n, backend = x.shape[-1], backend_of(x)
    h, labels = x.reshape(-1, n), labels.reshape(-1)
    goal = None if teacher is None else teacher.reshape(-1, weight.shape[1])
    kept = None
    if backend != "triton":  # only rows that count; how many these are would keep a GPU's host waiting
        kept = labels.ne(IGNORED).nonzero().squeeze(1)
        h, goal, labels = h[kept], None if goal is None else goal[kept], labels[kept]
    sums, dx = _in_chunks(h, weight, bias, labels, goal, alpha, temperature, smoothing, keep, backend)
    task, distance = sums[0].sum(), sums[1].sum()
    loss = task.clone() if teacher is None else (1 - alpha) * task + alpha * distance
    if keep and kept is not None:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format).view(-1, n).index_copy_(0, kept, dx)
    return loss, task, distance, dx.view(x.shape) if keep else dx


@_head_loss.register_fake
def _(x, weight, bias, labels, teacher, alpha, temperature, smoothing, keep):
    kind = torch.promote_types(x.dtype, torch.float32)
    scalars = (x.new_empty((), dtype=kind) for _ in range(3))
    return *scalars, x.new_empty(x.shape if keep else 0)


def _in_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: Tensor | None,
    alpha: float,
    temperature: float,
    smoothing: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """((2, T): task and divergence of each row, dx (T, n) or empty) of 2-d x and teacher."""
    tokens, n, vocabulary = *x.shape, weight.shape[0]
    sums = x.new_zeros((2, tokens), dtype=torch.promote_types(x.dtype, torch.float32))
    dx = x.new_empty((tokens, n) if keep else 0)
    if tokens == 0:
        return sums, dx
    whole = (weight if teacher is not None else weight[:, :n]).to(x.dtype)
    w, b = whole[:, :n], None if bias is None else bias.to(x.dtype)
    stride = -(-vocabulary // 64) * 64  # an odd vocabulary's rows, too, start and end at whole cache lines
    size = _rows_of_chunk(tokens, stride * x.dtype.itemsize, CHUNK_BYTES[backend])
    mine, other = (x.new_empty((size if used else 0, stride)) for used in (True, teacher is not None))
    if backend == "triton":
        from mlfs.kernels.distill import head_rows
    else:
        head_rows = cpp().head_rows if backend == "cpp" else _head_rows
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        count = rows.stop - start
        z = _product(x[rows], w, b, mine[:count, :vocabulary], backend)
        u = None if teacher is None else _product(teacher[rows], whole, b, other[:count, :vocabulary], backend)
        head_rows(z, u, labels[rows], sums[:, rows], alpha, temperature, smoothing, keep)
        if keep:
            _product(z, w.t(), None, dx[rows], backend)
    return sums, dx


def _rows_of_chunk(tokens: int, row_bytes: int, limit: int) -> int:
    """Rows of one chunk: chunks are alike, and as large as the limit allows."""
    most = max(limit // row_bytes, 1)
    most -= most % 64 if most > 64 else 0
    return -(-tokens // -(-tokens // most))


def _product(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor, backend: str) -> Tensor:
    """x · wᵀ + b, written to out, which has their type."""
    if backend == "cpp":
        return cpp().product(x.to(out.dtype), w, b, out)
    x, w = x.to(out.dtype), w.t()
    return torch.mm(x, w, out=out) if b is None else torch.addmm(b, x, w, out=out)


def _head_rows(
    z: Tensor,
    u: Tensor | None,
    labels: Tensor,
    sums: Tensor,
    alpha: float,
    temperature: float,
    smoothing: float,
    keep: bool,
) -> None:
    """Writes task and divergence of each row of logits to sums (2, rows), and with `keep` dz over z; no label is to be
    ignored. u: the teacher's logits."""
    log_q, labels = torch.log_softmax(z.to(sums.dtype), dim=-1), labels.unsqueeze(1)
    sums[0] = (smoothing - 1) * log_q.gather(1, labels).squeeze(1) - smoothing * log_q.mean(-1)
    dz = None
    if keep:
        dz = log_q.exp().sub_(smoothing / z.shape[1])
        dz.scatter_add_(1, labels, dz.new_full(labels.shape, smoothing - 1))
    if u is not None:
        log_r = log_q if temperature == 1 else torch.log_softmax(z.to(sums.dtype) / temperature, dim=-1)
        log_p = torch.log_softmax(u.to(sums.dtype) / temperature, dim=-1)
        p = log_p.exp()
        sums[1] = temperature**2 * log_p.sub_(log_r).mul_(p).sum(-1)
        if dz is not None:
            dz.mul_(1 - alpha).add_(log_r.exp().sub_(p), alpha=alpha * temperature)
    if dz is not None:
        z.copy_(dz)


def _setup_context(ctx, inputs, output) -> None:
    _, task, distance, dx = output
    ctx.mark_non_differentiable(task, distance, dx)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx)


def _backward(ctx, d_loss, d_task, d_distance, d_dx):
    (dx,) = ctx.saved_tensors
    gradient = None if d_loss is None or not ctx.needs_input_grad[0] else dx * d_loss
    return gradient, None, None, None, None, None, None, None, None


_head_loss.register_autograd(_backward, setup_context=_setup_context)
