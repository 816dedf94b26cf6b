"""Calibration of a source that comes shard by shard: which layer reads which, and what else is done while they are here."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from tensorsurgeon.calibrate.codes.linears import Linear
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.planning.pace import KEPT_LAYERS, LayerPace, shards_before_layers, streaming_of
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.work import shards_read

logger = logging.getLogger(__name__)


class LayerShards:
    """Tells a streamed source what the walk reads, layer after layer; for any other it does nothing.

    Units that the walk does not write itself (norms, embeddings, what is copied) are written while a layer's shards are here,
    so that few shards have to come again when the walk is over.
    """

    def __init__(
        self, plan: Plan, source: Source, model: StreamedModel, by_layer: Mapping[int, Sequence[Linear]], ahead: int
    ) -> None:
        self._plan, self._source, self._model, self._by_layer, self._ahead = plan, source, model, by_layer, ahead
        self._first = 0
        self._pace: LayerPace | None = None

    def follow(self, first: int, done: Collection[int]) -> None:
        """The walk begins at layer ``first``, after what comes before the layers; ``done`` are units of an earlier run."""
        if not self._source.is_streamed:
            return
        plan, shard_of = self._plan, dict(zip(self._plan.source.specs, self._plan.source.locations, strict=True))
        origins = [location.shard for location in plan.source.locations]
        # Whoever goes on has the embeddings by ranges of bytes, where their shard was here and went: it does not come again.
        left = (unit for number, unit in enumerate(plan.units) if number not in done)
        wanted = {shard for unit in left for shard in shards_read(unit, plan.source.locations)}
        steps = [shards_before_layers(plan.source, self._model.surrounding_names()) & wanted]
        for layer in range(first, max(self._by_layer, default=-1) + 1):
            read = {shard_of[name].shard for name in self._model.stored_names(layer)}
            pieces = (piece for linear in self._by_layer.get(layer, ()) for _, own in linear.pieces for piece in own)
            steps.append(read | {origins[piece.origin] for piece in pieces if piece.origin >= 0})
        walked = {unit for linears in self._by_layer.values() for linear in linears for unit in linear.units}
        self._first = first
        self._pace = LayerPace(plan, steps, walked)
        said = streaming_of(plan, self._ahead, self._pace)
        if said is not None and said.twice:
            logger.info("%d of %d shards come twice: %s", len(said.twice), said.shards, ", ".join(said.twice))
        self._source.follow(steps, KEPT_LAYERS)

    def before_layers(self, done: Collection[int]) -> set[int]:
        """Units to be written while the embeddings are here."""
        return set() if self._pace is None else self._pace.beside(0).difference(done)

    def begun(self) -> None:
        """What comes before the layers was read, and what is beside it is journalled."""
        self._source.passed(0)

    def beside(self, layer: int, done: Collection[int]) -> set[int]:
        """Units to be written along with those of a layer."""
        return set() if self._pace is None else self._pace.beside(layer - self._first + 1).difference(done)

    def passed(self, layer: int) -> None:
        """All that a layer and what is beside it wrote is journalled."""
        self._source.passed(layer - self._first + 1)
