"""Rows of logits, and projected hidden states: what `mlfs.ops.head_loss` and `mlfs.ops.distill` compute, on GPUs.

`_head_rows` takes one row of logits a program, twice: largest numbers and sums, then losses and the gradient, which is
written where the logits were. `_difference` takes the projections of student and teacher and their distance in one
pass over both; `_spread` takes it back to the student. Sums over programs are made in a fixed order. All in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.arguments import divides, optional, precision_of, stride_or_zero, with_rows
from mlfs.kernels.configs import thin
from mlfs.kernels.reductions import launch_reduce
from mlfs.kernels.tiles import accumulate, dot, rows_of

IGNORED = -100  # the label of rows that do not count, as PyTorch's cross-entropy has it
_BLOCK_BYTES, _WARPS = 8192, 8  # 32 bytes a thread; a small vocabulary still takes a number for each thread


@triton.jit
def _head_rows(
    z, u, labels, task, distance, vocabulary, padded, z_t, u_t, alpha, temperature, smoothing,
    HAS_TEACHER: tl.constexpr, TEMPERED: tl.constexpr, GRADIENT: tl.constexpr, IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of student's and teacher's logits z and u: its losses, and with GRADIENT that of their sum, over z."""
    row = tl.program_id(0)
    z += row.to(tl.int64) * z_t
    u += row.to(tl.int64) * u_t
    label = tl.load(labels + row).to(tl.int32)
    counts = label != IGNORED
    # of a row that does not count nothing is read; `padded` lets loads be wide where the vocabulary is odd
    length, loaded = tl.where(counts, vocabulary, 0), tl.where(counts, padded, 0)
    named = (label >= 0) & (label < vocabulary)
    at_label = tl.load(z + tl.where(named, label, 0)).to(tl.float32)
    c = tl.arange(0, BLOCK)

    # of z: the largest, Σ exp(z − largest), and the same of z / T; of u: the largest, Σ exp((u − largest) / T)
    inverse = 1.0 / temperature
    top, total, tempered = row * 0.0 - float("inf"), row * 0.0, row * 0.0
    teacher_top, teacher_total = row * 0.0 - float("inf"), row * 0.0
    for start in range(0, length, BLOCK):
        read, inside = c < loaded - start, c < length - start
        a = tl.load(z + start + c, mask=read, other=0.0).to(tl.float32)
        a = tl.where(inside, a, -float("inf"))
        higher = tl.maximum(top, tl.max(a, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(a - higher), axis=0)
        if TEMPERED:
            tempered = tempered * tl.exp((top - higher) * inverse) + tl.sum(tl.exp((a - higher) * inverse), axis=0)
        top = higher
        if HAS_TEACHER:
            b = tl.load(u + start + c, mask=read, other=0.0).to(tl.float32)
            b = tl.where(inside, b, -float("inf"))
            higher = tl.maximum(teacher_top, tl.max(b, axis=0))
            teacher_total = teacher_total * tl.exp((teacher_top - higher) * inverse)
            teacher_total += tl.sum(tl.exp((b - higher) * inverse), axis=0)
            teacher_top = higher

    top, total = tl.where(counts, top, 0.0), tl.where(counts, total, 1.0)
    log_total = tl.log(total)
    log_tempered = log_total
    if TEMPERED:
        log_tempered = tl.log(tl.where(counts, tempered, 1.0))
    log_teacher = log_total
    if HAS_TEACHER:
        teacher_top = tl.where(counts, teacher_top, 0.0)
        log_teacher = tl.log(tl.where(counts, teacher_total, 1.0))
    others, divergence = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    share = smoothing / vocabulary
    for start in range(0, vocabulary, BLOCK):
        read, inside = c < loaded - start, c < length - start
        a = tl.load(z + start + c, mask=read, other=0.0).to(tl.float32) - top
        log_q = a - log_total
        others += tl.where(inside, -log_q, 0.0)
        g = tl.exp(log_q) - share - tl.where(start + c == label, 1.0 - smoothing, 0.0)
        if HAS_TEACHER:
            b = tl.load(u + start + c, mask=read, other=0.0).to(tl.float32) - teacher_top
            log_r, log_p = log_q, b * inverse - log_teacher
            if TEMPERED:
                log_r = a * inverse - log_tempered
            p = tl.exp(log_p)
            divergence += tl.where(inside, p * (log_p - log_r), 0.0)
            g = (1.0 - alpha) * g + alpha * temperature * (tl.exp(log_r) - p)
        if GRADIENT:
            tl.store(z + start + c, tl.where(inside, g, 0.0).to(z.dtype.element_ty), mask=c < padded - start)

    hard = log_total + top - at_label
    smooth = tl.where(smoothing > 0.0, share * tl.sum(others, axis=0), 0.0)
    loss = (1.0 - smoothing) * hard + smooth
    loss = tl.where(named, loss, float("nan"))  # of a label that is none
    tl.store(task + row, tl.where(counts, loss, 0.0))
    if HAS_TEACHER:
        tl.store(distance + row, temperature * temperature * tl.sum(divergence, axis=0))


@triton.jit
def _difference(
    student, teacher, projection, mask, d, sums, tokens, n, full, size, student_t, teacher_t, projection_p,
    HAS_MASK: tl.constexpr, KEEP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_FULL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d = student · P[:, :n]ᵀ − teacher · Pᵀ, 0 where the mask is; each program's Σ d² and Σ (teacher · Pᵀ)²."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows, in_columns = t < tokens, p < size
    read = in_rows
    if HAS_MASK:
        read = tl.load(mask + t, mask=in_rows, other=0) != 0
    ps = projection + p.to(tl.int64)[None, :] * projection_p + k[:, None]
    target = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    rows = rows_of(teacher, t, tokens, teacher_t, k)
    target = accumulate(target, rows, ps, full, 1, in_columns, True, BLOCK_K, EVEN_FULL, PRECISION)
    own = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    rows = rows_of(student, t, tokens, student_t, k)
    own = accumulate(own, rows, ps, n, 1, in_columns, True, BLOCK_K, EVEN_N, PRECISION)
    target = tl.where(read[:, None], target, 0.0)  # rows that do not count may hold anything
    own = tl.where(read[:, None], own, 0.0) - target
    if KEEP:
        out = d + t.to(tl.int64)[:, None] * size + p[None, :]
        tl.store(out, own, mask=in_rows[:, None] & in_columns[None, :])
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    tl.store(sums + program, tl.sum(tl.sum(own * own, axis=1), axis=0))
    tl.store(sums + programs + program, tl.sum(tl.sum(target * target, axis=1), axis=0))


@triton.jit
def _spread(
    d, projection, scale, dx, tokens, n, size, projection_p,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = scale · d · P[:, :n]."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows, in_columns = t < tokens, c < n
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, size, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        a = tl.load(d + t[:, None] * size + p[None, :], mask=in_rows[:, None] & (p < size)[None, :], other=0.0)
        rows = projection + p.to(tl.int64)[:, None] * projection_p + c[None, :]
        b = tl.load(rows, mask=(p < size)[:, None] & in_columns[None, :], other=0.0)
        if dx.dtype.element_ty == tl.bfloat16:  # whose range is fp32's; in fp16 the difference may not fit
            a = a.to(tl.bfloat16)
        acc = dot(a, b, acc, PRECISION)
    acc *= tl.load(scale).to(tl.float32)
    tl.store(dx + t[:, None] * n + c[None, :], acc.to(dx.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


# ---- launchers ------------------------------------------------------------------------------------------------------


def head_rows(
    z: Tensor,
    u: Tensor | None,
    labels: Tensor,
    sums: Tensor,
    alpha: float,
    temperature: float,
    smoothing: float,
    keep: bool,
) -> None:
    """Writes task loss and divergence of each row of logits to sums (2, rows), and with `keep` their gradient over z.

    z, u: logits of student and teacher (rows, V), contiguous rows; u may be None: the divergence is left as it is.
    Where their rows start at multiples of 16, the columns up to the next such multiple are read, and in z zeroed, too.
    """
    rows, vocabulary = z.shape
    if rows:
        block = min(_BLOCK_BYTES // z.dtype.itemsize, max(triton.next_power_of_2(vocabulary), 64 * _WARPS))
        aligned = all(t.stride(0) % 16 == 0 for t in (z, u) if t is not None)
        padded = -(-vocabulary // 16) * 16 if aligned else vocabulary
        _head_rows[(rows,)](
            z, optional(u, z), labels.contiguous(), sums[0], sums[1], vocabulary=vocabulary, padded=padded,
            z_t=z.stride(0), u_t=stride_or_zero(u), alpha=float(alpha), temperature=float(temperature),
            smoothing=float(smoothing), HAS_TEACHER=u is not None, TEMPERED=temperature != 1, GRADIENT=keep,
            IGNORED=IGNORED, BLOCK=block, num_warps=_WARPS,
        )  # fmt: skip


def difference(
    student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects student (T, n) and teacher (T, N) by P (p, N) and compares them in the rows that mask (T,) keeps.

    Returns Σ d² and Σ (teacher · Pᵀ)², and with `keep` d (T, p), the difference, else an empty tensor.
    """
    (tokens, n), (size, full) = student.shape, projection.shape
    student, teacher, projection = with_rows(student), with_rows(teacher), with_rows(projection)
    d = torch.empty((tokens, size) if keep else 0, dtype=torch.float32, device=student.device)
    block_t = 16 if tokens <= 2048 else 32
    block_p = min(64, max(16, triton.next_power_of_2(size)))
    block_k, stages = thin(student.device, max(t.dtype.itemsize for t in (student, teacher, projection)))
    block_k = min(block_k, 32) if student.dtype.itemsize > 2 else block_k  # or it spills
    grid = triton.cdiv(tokens, block_t), triton.cdiv(size, block_p)
    sums = torch.empty((2, grid[0] * grid[1]), dtype=torch.float32, device=student.device)
    if tokens:
        _difference[grid](
            student, teacher, projection, student if mask is None else mask.contiguous(), d, sums,
            tokens=tokens, n=n, full=full, size=size, student_t=student.stride(0), teacher_t=teacher.stride(0),
            projection_p=projection.stride(0), HAS_MASK=mask is not None, KEEP=keep, EVEN_N=divides(block_k, [n]),
            EVEN_FULL=divides(block_k, [full]), PRECISION=precision_of(student), BLOCK_T=block_t, BLOCK_P=block_p,
            BLOCK_K=block_k, num_warps=4, num_stages=stages,
        )  # fmt: skip
    return sums[0].sum(), sums[1].sum(), d


def spread(d: Tensor, projection: Tensor, scale: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Returns scale · d · P[:, :n] as (T, n) of that type; scale: one number on the device."""
    (tokens, size), projection = d.shape, with_rows(projection)
    dx = d.new_empty((tokens, n), dtype=dtype)
    block_t, block_c = 64, 64
    block_p = 32 if dtype == torch.bfloat16 else 16  # in fp32 the step's operands are in registers, and more spill
    if tokens:
        _spread[(triton.cdiv(tokens, block_t), triton.cdiv(n, block_c))](
            d, projection, scale, dx, tokens=tokens, n=n, size=size, projection_p=projection.stride(0),
            PRECISION=precision_of(d),
            BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=4, num_stages=2,
        )  # fmt: skip
    return dx


def projected_gradient(d: Tensor, x: Tensor) -> Tensor:
    """Returns dᵀ · x, (p, n) in fp32, of d (T, p) and x (T, n)."""
    if not x.numel():
        return d.new_zeros((d.shape[1], x.shape[1]))
    if x.dtype == torch.bfloat16:  # whose range is fp32's; in fp16 the difference may not fit
        return launch_reduce(d.to(x.dtype), with_rows(x)).sum(0)
    return launch_reduce(d, with_rows(x.float())).sum(0)
