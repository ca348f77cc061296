"""Rotates the residual stream by the first training batches, and ranks the other units with the loss of training."""

from collections.abc import Iterable, Mapping
from typing import Any

from mlfs.supernet.moments import collecting_moment, principal_axes, without_stream
from mlfs.supernet.permutation import permutation_of
from mlfs.training.distributed import of_first_process, sum_over_processes
from mlfs.training.ranking import rank_units
from mlfs.training.step import SubnetTrainer


def rotate_units(trainer: SubnetTrainer, batches: Iterable[Mapping[str, Any]]) -> None:
    """Rotates the residual stream to its principal axes, and orders heads and feed-forward units.

    Across processes the batches of all of them count, and all get the same rotation and order.

    Args:
        trainer: whose `compute_loss` and super-transformer are used.
        batches: on the model's device.

    Raises:
        MLFSError: as `mlfs.supernet.importance.importance` and `SuperTransformer.apply_rotation`.
    """
    supernet = trainer.supernet
    with collecting_moment(supernet) as moment:
        scores = rank_units(trainer, "gradient", batches)
    if trainer.accelerator.num_processes > 1:
        matrix = principal_axes(sum_over_processes(moment))
        # eigenvectors have no sign, and machines may choose others
        matrix = of_first_process(matrix.to(moment.device))
    else:
        matrix = principal_axes(moment)
    supernet.apply_rotation(matrix)
    supernet.apply_permutation(permutation_of(without_stream(scores)))
