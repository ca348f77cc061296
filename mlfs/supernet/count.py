"""Counts the parameters that a subnet uses."""

from collections.abc import Iterator

from torch import Tensor, nn

from mlfs.elastic.base import Elastic
from mlfs.elastic.linear import ElasticLinear
from mlfs.space.dimensions import LayerSizes


def count_parameters(model: nn.Module, layers_name: str, sizes: LayerSizes) -> int:
    """Counts the parameters of the subnet as a model of its own, stages merged; tied ones count once.

    Args:
        model: an elastic model.
        layers_name: the name in `model` of its list of layers; layers that `sizes` leaves out are not counted.
        sizes: the subnet, spelled out per layer.
    """
    total, seen = 0, set()
    for parameter, used in _used_numbers(model, layers_name, sizes):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            total += used
    return total


def count_in_layers(model: nn.Module, layers_name: str, sizes: LayerSizes) -> int:
    """Counts the parameters of the layers that the subnet keeps: what is there beside embeddings and heads.

    Arguments: as `count_parameters`.
    """
    return sum(used for _, used in _used_numbers(model, layers_name, sizes, within=f"{layers_name}."))


def count_trainable(model: nn.Module, layers_name: str, sizes: LayerSizes) -> int:
    """Counts the parameters that train now and that the subnet uses: the n_j of gradient scaling.

    Arguments: as `count_parameters`.
    """
    used_once = {id(p): (p, used) for p, used in _used_numbers(model, layers_name, sizes)}  # tied ones, too
    total = sum(used for parameter, used in used_once.values() if parameter.requires_grad)
    for module in model.modules():
        if isinstance(module, ElasticLinear):
            columns, rows = module.read_sizes(sizes)
            if columns and rows:
                # A is (rank, columns), B is (rows, rank)
                total += sum(a.shape[0] * (columns + rows) for a in module.lora_A if a.requires_grad)
    return total


def _used_numbers(
    model: nn.Module, layers_name: str, sizes: LayerSizes, within: str = ""
) -> Iterator[tuple[Tensor, int]]:
    """Yields each base parameter, a tied one repeatedly, and how many of its numbers `sizes` uses.

    Args:
        within: how the names of the modules begin that count.
    """
    dropped = tuple(f"{layers_name}.{i}." for i in range(sizes.count) if not sizes.keeps(i))
    for name, module in model.named_modules():
        if name.startswith(dropped) or not name.startswith(within):
            continue
        if isinstance(module, ElasticLinear):
            columns, rows = module.read_sizes(sizes)
            yield module.own_weight, rows * columns
            if module.own_bias is not None:
                yield module.own_bias, rows
        elif isinstance(module, Elastic):
            (part,) = module.axes().outputs
            width = part.size(sizes)
            # of a norm (width,), of an embedding (entries, width)
            yield module.own_weight, module.own_weight.numel() // module.own_weight.shape[-1] * width
            if module.own_bias is not None:
                yield module.own_bias, width
        elif not isinstance(module, nn.ParameterList):
            yield from ((p, p.numel()) for p in module._parameters.values() if p is not None)
