"""What the compiled functions for CPUs are given wrongly raises an error: the kernels would read beyond it.

Each function has a right call here. One argument after the other is then made wrong in every way that its kind can be.
"""

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.csrc.helpers import cpu

ERRORS = (RuntimeError, IndexError, TypeError, ValueError)
ROWS, N, M, RANK, HEADS, KV_HEADS, DIM = 4, 12, 10, 3, 4, 2, 6
NONE, GELU, SILU_MUL = 0, 1, 3


def t(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.1


def layer(m: int, n: int) -> tuple[Any, ...]:
    spans = [0, m // 2, m // 2, m - m // 2]
    return (t(m, n), t(m), [t(RANK, n), t(2, n)], [t(m, RANK), t(m, 2)], [0.5, 2.0], spans)


def norm(n: int) -> tuple[Any, ...]:
    return (t(n), t(n), 1e-5)


RANGES = torch.tensor([[0, 0, 5, 0, 5, 0], [1, 0, 2, 0, 2, 0], [1, 3, 5, 3, 5, 0]])
Q, K = (2, 5, HEADS, DIM), (2, 5, KV_HEADS, DIM)
WIDE = HEADS * DIM

CALLS: dict[str, Callable[[], list[Any]]] = {
    "product": lambda: [t(ROWS, N), t(M, N), t(M), t(ROWS, M)],
    "linear": lambda: [t(2, ROWS, N), [layer(M, N)], SILU_MUL, t(2, ROWS, M), t(2, ROWS, M)],
    "linear_forward": lambda: [t(ROWS, N), [layer(M, N)], SILU_MUL, t(ROWS, M), t(ROWS, M), True],
    "linear_backward": lambda: [
        [t(ROWS, M), t(ROWS, 8)], t(ROWS, N), [t(ROWS, RANK + 2)] * 2, [layer(M, N), layer(8, N)],
        [[True, False]] * 2, True, N,
    ],
    "activation_backward": lambda: [t(ROWS, M), t(ROWS, M), t(ROWS, M), SILU_MUL],
    "add_norm": lambda: [t(ROWS, N), t(ROWS, N), t(N), t(N), 1e-5, False, 0.1, 7],
    "add_norm_backward": lambda: [t(ROWS, N), t(ROWS, N), t(ROWS, N), t(N), 1e-5, False, 0.1, 7, True],
    "attention": lambda: [t(*Q), t(*K), t(*K), RANGES.clone(), True, 0.3, 0.1, 7],
    "attention_backward": lambda: [
        t(*Q), t(*Q), t(*K), t(*K), t(*Q), t(*Q[:3]), RANGES.clone(), True, 0.3, 0.1, 7,
    ],
    "encoder_layer": lambda: [
        t(2, 5, N), [layer(WIDE, N) for _ in range(3)], layer(N, WIDE), norm(N), layer(M, N), GELU, layer(N, M),
        norm(N), RANGES.clone(), DIM, 0.3,
    ],
    "rotary": lambda: [t(*Q), t(*K), t(2, 5, DIM), t(2, 5, DIM), False],
    "head_rows": lambda: [t(ROWS, M), t(ROWS, M), torch.randint(M, (ROWS,)), t(2, ROWS), 0.5, 2.0, 0.1, True],
    "dropout_mask": lambda: [ROWS, N, 0.1, 7],
}  # fmt: skip
TAKES_NOTHING_WRONG = {"instructions", "limit_instructions"}  # no tensors: any number means an instruction set

# What is made wrong below, and is right for all that. (function, place of the argument, what is done to it)
RIGHT = [
    "linear [034] another dimension",  # x, operand and residual have any leading dimensions
    "linear* 1.0.[02]* longer in 1",  # W and A have more columns than a narrow x
    "linear_backward 3.?.[02]* longer in 1",
    "linear 0 shorter in 2",
    "linear_forward 0 shorter in 1",
    "encoder_layer [246].[02]* longer in 1",
    "encoder_layer 1.?.[02]* longer in 1",
    "encoder_layer [37].[01] longer in 0",  # norms of a wider model
    "encoder_layer 0 longer in [01]",  # rows and tokens that no range names
    "attention 0 longer in 1",
    "attention 0 empty in 2",  # no heads
    "attention 3 * in 0",  # ranges of fewer tokens
    "attention_backward 6 * in 0",
    "encoder_layer 8 * in 0",
    "rotary [01] * in 2",  # heads
    "head_rows 2 * dimension*",  # labels have any shape
]


def places(value: Any, at: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yields every value within the arguments and where it stands, lists themselves among them."""
    if at:
        yield at, value
    if isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from places(inner, (*at, i))


def replaced(value: Any, at: tuple[int, ...], new: Any) -> Any:
    if not at:
        return new
    inner = [replaced(old, at[1:], new) if i == at[0] else old for i, old in enumerate(value)]
    return inner if isinstance(value, list) else tuple(inner)


def faults_of_a_tensor(x: Tensor) -> Iterator[tuple[str, Any]]:
    """Yields what is no such tensor, whatever the other arguments are."""
    yield "another type", x.int() if x.dtype == torch.long else x.double()
    yield "half precision", x.to(torch.bfloat16)
    yield "integers" if x.is_floating_point() else "numbers", x.int() if x.is_floating_point() else x.float()
    yield "another dimension", x[None]
    yield "a dimension less", x[0]
    yield "none of its dimensions", x.sum()
    yield "on another device", x.to("meta")
    yield "sparse", x.to_sparse()
    yield "no tensor", 3.5
    if x.is_floating_point():
        yield "lazily negated", torch._neg_view(x)
        yield "without memory", torch._efficientzerotensor(x.shape)

    for dim in range(x.dim()):
        yield f"longer in {dim}", torch.cat([x, x.narrow(dim, 0, 1)], dim)
        yield f"shorter in {dim}", x.narrow(dim, 0, x.shape[dim] - 1)
        yield f"empty in {dim}", x.narrow(dim, 0, 0)


SPANS = [[0], [0, 11], [-1, 3], [3, -1], [11, 0], [5, 6], [2**62, 2**62], [0, 2**63 - 1], [0, 5, 5]]
CODES = [NONE - 1, SILU_MUL + 1, 99, GELU]  # the last has no operand, of which there is one
RATES = [-0.1, 1.0, 2.0, float("nan"), float("inf")]


def ranges(row: int, column: int, value: int) -> Tensor:
    wrong = RANGES.clone()
    wrong[row, column] = value
    return wrong


WRONG_RANGES = [
    *(ranges(0, 0, row) for row in (-1, 2, 2**40)),
    *(ranges(0, column, number) for column in (1, 2, 3, 4) for number in (-1, 6, 2**62, -(2**63))),
    *(ranges(0, 5, number) for number in (2**63 - 1, -(2**63), 2**62)),
    ranges(1, 2, 4), ranges(2, 0, 0), RANGES.flip(0),  # into the next, before the one before, the other way round
]  # fmt: skip
# (function, place, values)
WRONG: list[tuple[str, tuple[int, ...], list[Any]]] = [
    ("linear", (1, 0, 5), SPANS),
    ("linear", (2,), CODES),
    ("linear", (3,), [None]),
    ("linear", (1,), [[layer(M, N)] * 2, [()], [None]]),
    ("linear_forward", (1, 0, 5), SPANS),
    ("linear_forward", (2,), CODES),
    ("linear_forward", (3,), [None]),
    ("linear_forward", (1,), [[layer(M, N)] * 2]),
    *(("linear_forward", (1, 0, list_), [[], [t(RANK, N)], [t(RANK, N)] * 3]) for list_ in (2, 3)),
    ("linear_forward", (1, 0, 4), [[], [1.0], [1.0] * 3]),
    ("linear_backward", (3, 1, 5), [[0], [0, 9], [-1, 3], [9, 0], [2**62, 2**62]]),
    *(("linear_backward", (place,), [[]]) for place in (0, 2, 3, 4)),
    ("linear_backward", (1,), [None]),
    ("linear_backward", (2,), [[None, None]]),
    ("linear_backward", (4,), [[[True]] * 2, [[True] * 3] * 2, [[True, False]]]),
    ("linear_backward", (6,), [0, -1, N + 1, N - 1, 2**62]),
    ("activation_backward", (3,), [*CODES, NONE]),
    ("activation_backward", (2,), [None]),
    ("add_norm", (6,), RATES),
    ("add_norm", (7,), [-1, 2**64]),
    ("add_norm_backward", (6,), RATES),
    ("attention", (3,), WRONG_RANGES),
    ("attention", (6,), RATES),
    ("attention_backward", (6,), WRONG_RANGES),
    ("attention_backward", (9,), RATES),
    ("encoder_layer", (1,), [[], [layer(WIDE, N)] * 2, [layer(WIDE, N)] * 4]),
    ("encoder_layer", (5,), [SILU_MUL, -1, 99]),
    ("encoder_layer", (8,), WRONG_RANGES),
    ("encoder_layer", (9,), [0, -1, 5, WIDE + 1, 2**62]),
    ("head_rows", (2,), [torch.full((ROWS,), M), torch.full((ROWS,), -100), torch.full((ROWS,), 2**62)]),
    ("head_rows", (0,), [t(1, M).expand(ROWS, M), t(M, ROWS).t()]),
    ("head_rows", (3,), [t(1, ROWS).expand(2, ROWS)]),
    ("product", (3,), [t(1, M).expand(ROWS, M), t(M, ROWS).t()]),
    ("rotary", (0,), [t(2, 5, HEADS, DIM + 2)]),
    ("dropout_mask", (0,), [-1, 2**60]),
    ("dropout_mask", (1,), [-1, 2**62, 2**63 - 1]),
    ("dropout_mask", (2,), RATES),
]


def test_every_function_has_a_row() -> None:
    functions = {name for name in dir(cpu) if not name.startswith("_")}
    assert functions == set(CALLS) | TAKES_NOTHING_WRONG


@pytest.mark.parametrize("name", CALLS)
def test_the_right_call_of_which_the_wrong_ones_are_made_is_right(name: str) -> None:
    getattr(cpu, name)(*CALLS[name]())


def refuses(name: str, at: tuple[int, ...], wrong: Any) -> bool:
    try:
        getattr(cpu, name)(*replaced(CALLS[name](), at, wrong))
    except ERRORS:
        return True
    return False


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_that_is_not_as_expected_is_refused(name: str) -> None:
    taken = set()
    for at, value in places(CALLS[name]()):
        if isinstance(value, Tensor):
            for what, wrong in faults_of_a_tensor(value):
                if not refuses(name, at, wrong):
                    taken.add(f"{name} {'.'.join(map(str, at))} {what}")
    assert {fault for fault in taken if not any(fnmatch(fault, pattern) for pattern in RIGHT)} == set()


@pytest.mark.parametrize(("name", "at", "values"), WRONG, ids=[f"{n}-{'.'.join(map(str, a))}" for n, a, _ in WRONG])
def test_a_value_out_of_range_is_refused(name: str, at: tuple[int, ...], values: list[Any]) -> None:
    assert [wrong for wrong in values if not refuses(name, at, wrong)] == []
