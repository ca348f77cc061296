"""Functions of the extension check all they are given: its kernels would read and write beyond the end of it.

Every function has a right call (calls.py). Each fault below alters one argument of it, and is refused. What may be
another size is listed, too, and has to run.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.csrc.calls import CALLS, SIDE_BY_SIDE, WRITTEN, Path, each_tensor, places, put, some
from tests.csrc.helpers import cpu

REFUSED = (RuntimeError, IndexError, TypeError, ValueError)
NAN = float("nan")


def resized(t: Tensor, dim: int, by: int) -> Tensor:
    """One row of zeros more at the end of the dimension, or one row less, in memory without room at its end."""
    if by < 0:
        return t.narrow(dim, 0, t.shape[dim] - 1).clone()
    return torch.cat([t, torch.zeros_like(t.narrow(dim, 0, 1))], dim)


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def tensor_faults(t: Tensor) -> dict[str, Any]:
    """What no function takes in the place of any tensor."""
    faults: dict[str, Any] = {
        "text": "text", "a number": 1.0, "a list": t.tolist(), "of no dimensions": t.new_ones(()),
        "a dimension more": t[None], "a dimension less": t[0], "on no device": t.to("meta"), "sparse": t.to_sparse(),
        "not allocated": freed(t), "fake": FakeTensorMode().from_tensor(t), "complex": t.to(torch.complex64),
        "int32": t.int(), "bool": t.bool(), "too large": t.new_ones(()).expand([2 ** (60 // t.dim())] * t.dim()),
    }  # fmt: skip
    types = [torch.float64, torch.float16, torch.int64] if t.is_floating_point() else [torch.float32]
    faults |= {str(dtype): t.to(dtype) for dtype in types}
    if t.is_floating_point():
        faults["negated"] = torch._neg_view(t)
    return faults


def ranges_faults() -> list[Tensor]:
    """Ranges outside of 2 batch rows of 3 queries and keys, or that follow each other wrongly."""
    lines = [
        [[2, 0, 3, 0, 3, 0]], [[-1, 0, 3, 0, 3, 0]], [[0, -1, 3, 0, 3, 0]], [[0, 0, 4, 0, 3, 0]], [[0, 2, 1, 0, 3, 0]],
        [[0, 0, 3, -1, 3, 0]], [[0, 0, 3, 0, 4, 0]], [[0, 0, 3, 2, 1, 0]], [[0, 0, 3, 0, 3, 2**63 - 1]],
        [[0, 0, 3, 0, 3, -(2**63)]], [[0, 0, 2**62, 0, 3, 0]], [[0, 0, 3, 0, 2**62, 0]], [[2**62, 0, 3, 0, 3, 0]],
        [[0, 0, 2, 0, 1, 0], [0, 1, 3, 1, 3, 0]], [[0, 0, 1, 0, 2, 0], [0, 1, 3, 1, 3, 0]],
        [[1, 0, 3, 0, 3, 0], [0, 0, 3, 0, 3, 0]],
    ]  # fmt: skip
    apart = torch.zeros(6, 2, dtype=torch.int64).t()
    return [*(torch.tensor(each) for each in lines), apart]


SPANS = [
    [-1, 2], [0, -1], [0, 13], [13, 0], [5, 8], [2**62, 2**62], [1, 2**63 - 1], [2**63, 1], [0, 2**62, 0, 2**62],
    [0, 3, 2, 3], [3, 3, 0, 2], [0, 5, 0, 0], [0.0, 5.0], [0], [None, 5], None,
]  # fmt: skip

# What no function takes in the place of any argument, or part of one, of that name
BY_NAME: dict[str, list[Any]] = {
    "spans": SPANS,
    "ranges": ranges_faults(),
    "scales": [[None], ["text"], [], 0.5, [0.5, 0.5]],
    "activation": [-1, 4, 2**31, 2**32 + 3, 2**63, 3.0],
    "p": [-0.1, 1.0, 1.5, NAN, float("inf")],
    "seed": [-1, 2**64, 0.5],
    "labels": [torch.tensor([0, 1, 2, label]) for label in (-1, -100, 9, 2**62)],
    "n": [0, -1, 7, 9, 2**62, 8.0],
    "dim": [0, -1, 3, 16, 2**62, 4.0],
    "rows": [-1, 2**49, 2**63, 0.5],
    "columns": [-1, 2**49, 2**63 - 1, 2**63, 0.5],
    "level": [-1, 3, 2**31, 0.5],
}

# What only this function does not take
ONLY_HERE: dict[str, list[tuple[Path, Any]]] = {
    "product": [(("out",), out) for out in (some(5, 4).t(), some(1, 5).expand(4, 5), None)],
    "linear": [
        *((("activation",), number) for number in (0, 1, 2)),
        *(((name,), some(*shape)) for name in ("operand", "residual") for shape in [(6, 5), (3, 2, 5), (5,)]),
        (("operand",), None),
    ],
    "encoder_layer": [(("activation",), 3), (("norm", 0), some(7)), (("last_norm", 1), some(7))],
    "linear_forward": [*((("activation",), number) for number in (0, 1, 2)), (("operand",), None)],
    "linear_backward": [(("x",), None), (("hs",), [None]), (("trains",), [[]])],
    "activation_backward": [*((("activation",), number) for number in (0, 1, 2)), (("operand",), None)],
    "head_rows": [
        *((("z",), z) for z in (some(9, 4).t(), some(1, 9).expand(4, 9))),
        *((("sums",), sums) for sums in (some(4, 2).t(), some(1, 4).expand(2, 4))),
        (("u",), some(9, 4).t()),
    ],
    "rotary": [((name,), some(3, 3, 8)) for name in ("cos", "sin")],
    "instructions": [(("more",), 1)],
}

# (function, path, dimension) -> by how much it may differ: the rest of the call says nothing about it
FREE: dict[tuple[str, Path, int], set[int]] = {
    **{(name, ("x",), dim): {-1} for name, dim in (("linear", 2), ("linear_forward", 1))},
    **{
        (name, (*path, *inner), 1): {1}
        for name, path in (
            *((name, ("layers", 0)) for name in ("linear", "linear_forward", "linear_backward")),
            *(("encoder_layer", ("projections", i)) for i in range(3)),
            *(("encoder_layer", (part,)) for part in ("out", "up", "down")),
        )
        for inner in (("weight",), ("lora_a", 0))
    },
    **{("encoder_layer", (part, i), 0): {1} for part in ("norm", "last_norm") for i in (0, 1)},
    ("encoder_layer", ("x",), 0): {1},
    ("encoder_layer", ("x",), 1): {1},
    ("encoder_layer", ("ranges",), 0): {-1},
    ("attention", ("q",), 1): {1},
    ("attention", ("ranges",), 0): {-1},
    ("attention_backward", ("ranges",), 0): {-1},
    ("rotary", ("q",), 2): {-1, 1},
    ("rotary", ("k",), 2): {-1, 1},
}

# Faults of what is not read, or of the part that is not
NOT_READ: dict[tuple[str, Path], set[str]] = {
    **{("encoder_layer", (part, i)): {"too large"} for part in ("norm", "last_norm") for i in (0, 1)},
    ("linear_backward", ("layers", 0, "bias")): {"not allocated", "fake"},
}


def tensors_of(name: str) -> list[tuple[Path, Tensor]]:
    return [(path, t) for path, t in places(CALLS[name]()) if isinstance(t, Tensor)]


FUNCTIONS = pytest.mark.parametrize("name", CALLS)


def run(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Calls the function; returns the tensors of its answer and those that it wrote into."""
    answer = getattr(cpu, name)(*arguments.values())
    written = [arguments[key] for function, key in WRITTEN if function == name]
    return [t for _, t in places([answer, *written]) if isinstance(t, Tensor)]


def refuses(name: str, path: Path, fault: Any) -> bool:
    try:
        run(name, put(CALLS[name](), path, fault) if path[0] != "more" else {"more": fault})
    except REFUSED:
        return True
    return False


def test_every_function_of_the_extension_has_a_right_call():
    functions = {name for name in dir(cpu) if callable(getattr(cpu, name)) and not name.startswith("_")}
    assert functions == CALLS.keys()


@FUNCTIONS
def test_the_right_call_runs(name):
    before = run(name, CALLS[name]())
    assert all(t.isfinite().all() for t in before)


@FUNCTIONS
def test_what_is_no_tensor_of_the_right_kind_is_refused(name):
    for path, t in tensors_of(name):
        taken = {what for what, fault in tensor_faults(t).items() if not refuses(name, path, fault)}
        assert taken == NOT_READ.get((name, path), set()), path


@FUNCTIONS
def test_sizes_that_do_not_fit_are_refused_and_those_that_do_are_not(name):
    for path, t in tensors_of(name):
        for dim, by in [(dim, by) for dim in range(t.dim()) for by in (-1, 1)]:
            fits = by in FREE.get((name, path, dim), ())
            assert refuses(name, path, resized(t, dim, by)) != fits, (path, dim, by)


@FUNCTIONS
def test_lists_of_another_length_and_values_of_another_type_are_refused(name):
    faults: list[tuple[Path, Any]] = []
    for path, value in places(CALLS[name]()):
        if isinstance(value, list | tuple):
            faults += [(path, list(value)[:-1]), (path, [*value, value[-1]]), (path, []), (path, None)]
        faults += [(path, "text"), (path, {}), (path, object())]
    assert [(path, fault) for path, fault in faults if not refuses(name, path, fault)] == []


@FUNCTIONS
def test_numbers_out_of_range_and_arguments_that_contradict_each_other_are_refused(name):
    faults = [(path, bad) for path, _ in places(CALLS[name]()) for bad in BY_NAME.get(str(path[-1]), ())]
    faults += ONLY_HERE.get(name, [])
    assert [(path, fault) for path, fault in faults if not refuses(name, path, fault)] == []


@FUNCTIONS
def test_one_argument_less_or_more_is_refused(name):
    arguments = list(CALLS[name]().values())
    for wrong in (arguments[:-1], [*arguments, 1]) if arguments else ([1],):
        with pytest.raises(TypeError):
            getattr(cpu, name)(*wrong)


def test_results_that_share_memory_with_what_they_are_made_of_are_refused():
    both, labels = some(8, 8), torch.arange(4)
    for first, second, out in [(both, some(8, 8), both), (some(8, 8), both, both)]:
        with pytest.raises(RuntimeError, match="memory location"):
            cpu.product(first, second, None, out)
    for teacher, sums in [(both[2:6], some(2, 4)), (None, both[3].view(2, 4)), (both[4:], both[5].view(2, 4))]:
        with pytest.raises(RuntimeError, match="memory location"):
            cpu.head_rows(both[:4], teacher, labels, sums, 0.5, 1.0, 0.0, True)


def test_sums_of_sizes_that_overflow_are_refused():
    """Their sum would be a small number, and the product's result too small for it."""
    for rank, stages in [(2**59, 16), (2**45, 2**15)]:
        lora = [some(1, 1).expand(rank, 8)] * stages, [some(1, 1).expand(6, rank)] * stages, [1.0] * stages
        with pytest.raises(RuntimeError, match="too large"):
            cpu.linear_forward(some(4, 8), [(some(6, 8), None, *lora, [0, 6])], 0, None, None, False)


def test_scores_for_which_there_is_no_memory_are_an_error():
    """From any thread; and its memory is whole afterwards."""
    k, ranges = some(1, 1, 1, 1).expand(1, 2**41, 2, 1), torch.tensor([[0, 0, 1, 0, 2**41, 0]])
    with pytest.raises(RuntimeError, match="no memory for"):
        cpu.attention(some(1, 1, 2, 1), k, k, ranges, False, 1.0, 0.0, 0)
    test_the_right_call_runs("attention")


def test_rows_without_numbers_are_no_work():
    """However many they are: without numbers no memory bounds them."""
    nothing, many = torch.empty(2**40, 0), 2**20
    assert cpu.add_norm(nothing, nothing, None, None, 1e-5, False, 0.0, 0)[0].shape == nothing.shape
    assert cpu.add_norm_backward(nothing, None, nothing, None, 1e-5, False, 0.0, 0, True)[0].shape == nothing.shape
    assert cpu.dropout_mask(2**40, 0, 0.5, 0).shape == nothing.shape
    q, cos = torch.empty(many, many, 0, 0), torch.empty(1, many, 0)
    assert cpu.rotary(q, q, cos, cos, False)[0].shape == q.shape


@pytest.mark.parametrize(("rows", "tokens"), [(0, 3), (2, 0), (0, 0)])
def test_an_encoder_layer_of_no_tokens_gives_none(rows, tokens):
    call = {
        **CALLS["encoder_layer"](),
        "x": torch.empty(rows, tokens, 8),
        "ranges": torch.empty(0, 6, dtype=torch.int64),
    }
    assert cpu.encoder_layer(*call.values()).shape == (rows, tokens, 8)


@FUNCTIONS
@pytest.mark.parametrize("kind", ["apart", "inside", "with gradients"])
def test_numbers_that_lie_apart_are_read_as_the_same_numbers(name, kind):
    def change(t: Tensor) -> Tensor:
        if kind == "apart":
            wide = t.new_zeros((*t.shape, 2))
            wide[..., 1] = t
            return wide[..., 1]
        return bordered(t) if kind == "inside" else t.detach().requires_grad_(t.is_floating_point())

    for path, t in tensors_of(name):
        if kind != "apart" or (name, path[0]) not in SIDE_BY_SIDE:
            found, right = run(name, put(CALLS[name](), path, change(t))), run(name, CALLS[name]())
            for a, b in zip(found, right, strict=True):
                torch.testing.assert_close(a.detach(), b)


def bordered(t: Tensor) -> Tensor:
    """The same numbers amid NaN: what is read beyond the end of them shows, and what is written."""
    if not t.is_floating_point() or not t.dim():
        return t.clone()
    whole = t.new_full([size + 16 for size in t.shape], NAN)
    inner = whole[tuple(slice(8, 8 + size) for size in t.shape)]
    return inner.copy_(t)


def borders_are_whole(t: Tensor) -> bool:
    base = t._base
    return base is None or int(base.isnan().sum()) == base.numel() - t.numel()


@st.composite
def mutations(draw, name: str) -> dict[str, Any]:
    """A right call with one tensor of it permuted, of other sizes, of another type or less of a dimension."""
    path, t = draw(st.sampled_from(tensors_of(name)))
    kind = draw(st.sampled_from(["drop", "permute", "resize", "retype", "repeat"]))
    if kind == "drop":
        t = t.select(draw(st.integers(0, t.dim() - 1)), 0)
    elif kind == "permute":
        t = t.permute(draw(st.permutations(range(t.dim()))))
    elif kind == "resize":
        for dim in range(t.dim()):
            if draw(st.booleans()):
                t = t.narrow(dim, 0, draw(st.integers(0, t.shape[dim])))
    elif kind == "retype":
        t = t.to(draw(st.sampled_from([torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool])))
    else:
        t = t.repeat([draw(st.integers(1, 2)) for _ in range(t.dim())])
    return put(CALLS[name](), path, t)


@pytest.mark.parametrize("name", list(filter(tensors_of, CALLS)))
@settings(max_examples=60)
@given(data=st.data())
def test_a_call_altered_at_random_is_refused_or_touches_nothing_else(name, data):
    """What runs gives the numbers of the same call in float64, and neither reads nor writes beside its tensors."""
    arguments = data.draw(mutations(name))
    kinds = {t.dtype for _, t in places(arguments) if isinstance(t, Tensor) and t.is_floating_point()}
    guarded = each_tensor(arguments, bordered)
    exact = each_tensor(arguments, lambda t: t.double() if t.is_floating_point() else t)
    try:
        found = run(name, guarded)
    except REFUSED:
        return
    assert kinds == {torch.float32}
    for a, b in zip(found, run(name, exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)
    assert all(borders_are_whole(t) for _, t in places(guarded) if isinstance(t, Tensor))
