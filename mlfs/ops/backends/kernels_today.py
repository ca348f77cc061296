# mypy: ignore-errors
"""Calls the launchers of `mlfs.kernels` with layers as values, until these take them so themselves."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mlfs.kernels import decode as _decode
from mlfs.kernels import grouped as _grouped
from mlfs.kernels import joint as _joint
from mlfs.kernels import sliced_linear as _product
from mlfs.ops.layer import NOTHING, Activated, Epilogue, LowRankLinear, Wanted, flatten


class product:
    @staticmethod
    def forward(x: Tensor, layer: LowRankLinear, epilogue: Epilogue = NOTHING, keep_pre: bool = False) -> Any:
        return _product.forward(x, *layer, *epilogue, keep_pre=keep_pre)

    @staticmethod
    def backward(
        dz: Tensor, x: Tensor | None, h: Tensor | None, layer: LowRankLinear, wanted: Wanted,
        residual: Tensor | None = None,
    ) -> Any:  # fmt: skip
        weight, _, *rest = layer
        options = wanted.trains, wanted.dx, wanted.columns
        dx, *gradients = _product.backward(dz, x, h, weight, *rest, *options, residual=residual)
        return dx, gradients

    @staticmethod
    def backward_through_activation(
        dz: Tensor, x: Tensor | None, h: Tensor | None, layer: LowRankLinear, wanted: Wanted, activated: Activated
    ) -> Any:
        weight, _, *rest = layer
        options = wanted.trains, wanted.dx, wanted.columns
        through = {"activation": activated.activation, "pre": activated.pre, "operand": activated.operand}
        d_pre, *found = _product.backward(dz, x, h, weight, *rest, *options, **through)
        d_operand = None if activated.operand is None else found.pop(0)
        return d_pre, d_operand, found

    activation_backward = staticmethod(_product.activation_backward)


class decode:
    MAX_TOKENS = _decode.MAX_TOKENS

    @staticmethod
    def forward(x: Tensor, layer: LowRankLinear, epilogue: Epilogue = NOTHING) -> Tensor:
        return _decode.forward(x, *layer, *epilogue)


class joint:
    @staticmethod
    def forward(x: Tensor, layers: Sequence[LowRankLinear], gated: bool = False, keep: bool = False) -> Any:
        rows = [layer.rows for layer in layers]
        return _joint.forward(x, *flatten(layers)[:5], rows, gated, keep)

    @staticmethod
    def backward(
        dys: Sequence[Tensor], x: Tensor | None, h: Tensor | None, layers: Sequence[LowRankLinear], wanted: Wanted,
        residual: Tensor | None = None,
    ) -> Any:  # fmt: skip
        weights, _, *rest, _ = flatten(layers)
        options = wanted.trains, wanted.dx, wanted.columns, None, residual
        dx, *gradients = _joint.backward(dys, x, h, weights, *rest, *options)
        return dx, gradients


class grouped:
    @staticmethod
    def forward(x: Tensor, layer: LowRankLinear, groups: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        return _grouped.forward(x, *layer[:5], groups)

    @staticmethod
    def backward(
        dy: Tensor, x: Tensor | None, h: Tensor | None, layer: LowRankLinear, groups: tuple[Any, ...], wanted: Wanted
    ) -> Any:
        weight, _, *rest, _ = layer
        dx, *gradients = _grouped.backward(dy, x, h, weight, *rest, groups, wanted.trains, wanted.dx)
        return dx, gradients
