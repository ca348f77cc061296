"""The order of a super-transformer's units and layers: what matters most comes first, so that slices keep it."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.space.subnet import Subnet
from mlfs.supernet.depth import LayerMethod, check_layer_method, method_of, rank_layers
from mlfs.supernet.importance import Method, Scores, importance
from mlfs.supernet.moments import Order, principal_axes, rotate_by_batches
from mlfs.supernet.permutation import (
    LAYERS,
    Permutation,
    check_permutation,
    compose,
    permutation_of,
    permute,
)
from mlfs.supernet.recorded import Recorded, reads_record_first
from mlfs.supernet.rotation import apply_rotation


@reads_record_first
class Ordered(Recorded):
    """Ranks and reorders what a super-transformer is made of."""

    def order(
        self,
        method: Order = "magnitude",
        batches: Iterable[Mapping[str, Any]] | None = None,
        layers: LayerMethod = "auto",
    ) -> None:
        """Permutes heads, feed-forward units and the residual stream, most important first, and ranks the layers.

        By "rotation" the stream is rotated to its principal axes (`apply_rotation`), and the rest ordered by gradient.
        The full model's function stays; what each smaller subnet keeps changes. Done in place, and recorded. Layers are
        ranked where the space says how many are kept, not which, and there are batches to measure on.

        Args:
            method: "rotation", or as of `mlfs.supernet.importance.importance`.
            batches: keyword arguments of the model; they need no labels.
            layers: how layers are ranked, see `mlfs.supernet.depth`; "even" keeps evenly spaced ones, "auto" is "loss"
                for models that generate text and "even" for others.

        Raises:
            MLFSError: as `mlfs.supernet.importance.importance`, and for "rotation" as `apply_rotation`; or `layers` is
                no way to rank them.
        """
        check_layer_method(layers)
        used = None if batches is None else list(batches)
        if method == "rotation":
            permutation = rotate_by_batches(self, lambda: self._importance_beside_rotation(used), principal_axes)
        else:
            permutation = permutation_of(self.importance(method, used))
        layers = method_of(cast(Any, self).model, layers)
        if used is not None and layers != "even" and cast(Any, self).space.counts_layers:
            permutation[LAYERS] = self.rank_layers(layers, used)
        self.apply_permutation(permutation)

    def importance(self, method: Method, batches: Iterable[Mapping[str, Any]] | None = None) -> Scores:
        """Scores every unit of the whole model, whatever is active; see `mlfs.supernet.importance`."""
        supernet = cast(Any, self)
        with supernet.activate(supernet.space.max):
            return importance(supernet.model, supernet.dimensions, method, batches)

    def _importance_beside_rotation(self, batches: list[Mapping[str, Any]] | None) -> Scores:
        if batches is None:
            raise MLFSError("method='rotation' needs batches to measure on; give some, or use method='magnitude'")
        return self.importance("gradient", batches)

    def rank_layers(self, method: LayerMethod, batches: Iterable[Mapping[str, Any]]) -> list[int]:
        """Lists all layers, those that matter most first, and changes nothing; see `mlfs.supernet.depth`."""
        return rank_layers(self, method, batches)

    def kept_layers(self, subnet: Subnet) -> tuple[int, ...]:
        """Lists the layers that `subnet` keeps, ascending.

        Of one that says how many, those that matter most once they are ranked; before, evenly spaced ones.

        Raises:
            MLFSError: `subnet` is not in the space.
        """
        return cast(Any, self).layer_sizes(subnet).layers  # type: ignore[no-any-return]

    def apply_permutation(self, permutation: Permutation) -> None:
        """Reorders the units in place, and records the order.

        Args:
            permutation: for each axis that is reordered, the old index of each unit at its new place; for ("layers",
                None), all layers, those that matter most first.

        Raises:
            MLFSError: an entry is no permutation of an axis of this model; nothing has moved then.
        """
        supernet = cast(Any, self)
        check_permutation(permutation, supernet.dimensions)
        self.fingerprint()  # of the base as it was loaded
        merged = supernet.merged_stages
        supernet.merge_stages(0)
        permute(supernet.model, permutation, supernet.dimensions)
        supernet.merge_stages(merged)
        self.permutation = compose(self.permutation, permutation)
        if self.rotation is not None and (order := self.permutation.pop(("hidden", None), None)):
            self.rotation = self.rotation[:, order]
        self.record.write()

    def apply_rotation(self, matrix: Tensor) -> None:
        """Rotates the residual stream in place, and records it; a head that is tied to the embedding is untied.

        The weights of the RMSNorms are folded into the projections that they feed, and are 1 then. The full model's
        function stays, up to rounding.

        Args:
            matrix: (hidden, hidden) orthogonal, floating-point; new numbers are x · matrix. Recorded in fp32.

        Raises:
            MLFSError: the model is of a family that cannot be rotated, is rotated already, or has norms that train; or
                the matrix is not orthogonal. Nothing has changed then.
        """
        apply_rotation(self, matrix)
