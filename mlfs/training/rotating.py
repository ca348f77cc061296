"""Rotates the residual stream by the first training batches, and ranks the other units with the loss of training."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mlfs.supernet.moments import principal_axes, rotate_by_batches
from mlfs.supernet.permutation import Permutation
from mlfs.training.distributed import of_first_process, sum_over_processes
from mlfs.training.ranking import rank_units
from mlfs.training.step import SubnetTrainer


def rotate_units(trainer: SubnetTrainer, batches: Iterable[Mapping[str, Any]]) -> Permutation:
    """Rotates the residual stream to its principal axes; returns the order of heads and feed-forward units.

    Across processes the batches of all of them count, and all get the same rotation and order.

    Args:
        trainer: whose `compute_loss` and super-transformer are used.
        batches: on the model's device.

    Raises:
        MLFSError: as `mlfs.supernet.importance.importance` and `SuperTransformer.apply_rotation`.
    """

    def axes_of_all(moment: Tensor) -> Tensor:
        # eigenvectors have no sign, and machines may choose others
        return of_first_process(principal_axes(sum_over_processes(moment)).to(moment.device))

    axes_of = axes_of_all if trainer.accelerator.num_processes > 1 else principal_axes
    return rotate_by_batches(trainer.supernet, lambda: rank_units(trainer, "gradient", batches), axes_of)
