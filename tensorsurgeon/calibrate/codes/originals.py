"""The states of the original layers beside those of the quantized ones, for targets that lean towards them (``--asymmetric``).

Both begin alike. The first layer with something to quantize puts out two kinds of states: its original outputs come from the pass
that gathers statistics, for then its weights are still original. From there on each layer's original outputs are made of the
original inputs in that same pass, and every linear is seen with both inputs of a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from tensorsurgeon.calibrate.codes.linears import Linear, Part
from tensorsurgeon.calibrate.codes.rules import TUNED, share_for
from tensorsurgeon.calibrate.codes.stage import Stage
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.state import CalibrationState
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.statistics import LayerObserver
from tensorsurgeon.calibrate.walk.walk import Observer, Walk
from tensorsurgeon.errors import JournalError, PlanError

logger = logging.getLogger(__name__)


def is_asymmetric(linears: Sequence[Linear], options: CalibrationOptions) -> bool:
    """Whether a run carries what original layers put out: any linear has a target that leans, or a layer is tuned towards it."""
    leans = any(share_for(linear.scheme, linear.method, options) for linear in linears)
    return leans or (options.sequential and any(linear.method == TUNED for linear in linears))


def carries_original(walk: Walk, options: CalibrationOptions, stage: Stage, parts: Sequence[Part]) -> bool:
    """Whether the layer of ``stage`` has original outputs that differ; PlanError where they are asked for and cannot be had."""
    if not (parts or stage.original is not None):
        return False
    if not walk.passes_on:
        return True
    if options.asymmetric:
        raise PlanError(
            "layers of this model hand on more than hidden states, and original ones are carried for hidden states alone",
            remedy="; give {asymmetric} 0",
        )
    if stage.layer == 0:
        logger.info("layers of this model hand on more than hidden states: targets do not lean towards original outputs")
    return False


def reopened(layer: int, digest: str, state: CalibrationState, open_states: Callable[[Path], HiddenStates]) -> Stage:
    """The stage that an earlier run left before ``layer``; JournalError where its states are not those of ``digest``."""
    made = []
    for path, wanted in zip((state.states_path(layer), state.original_path(layer)), digest.split("|"), strict=False):
        try:
            made.append(open_states(path))
        except OSError as error:
            raise JournalError(f"cannot be read: {error.strerror}", where=str(path)) from error
        made[-1].check(wanted)
    return Stage(layer, made[0], made[1] if len(made) > 1 else None)


def passing(stage: Stage, following: Stage, options: CalibrationOptions) -> HiddenStates | None:
    """Where the outputs go of the pass that gathers statistics, made of the quantized stream's inputs by original weights."""
    if not options.sequential:
        return following.states
    return following.original if stage.original is None else None


def observing(
    walk: Walk,
    stage: Stage,
    module: nn.Module,
    outputs: HiddenStates | None,
    observer: LayerObserver,
    targets: HiddenStates | None = None,
) -> Observer:
    """What watches a batch: with original states, the layer's original forward goes first, into ``outputs``.

    ``targets`` take what the original layer puts out where nothing else does: of original states, else of those that it has.
    """
    inputs = stage.original
    if inputs is None:
        return observer.observe if targets is None else _keeping(walk, observer, targets)
    outputs = outputs if targets is None else targets

    def observe(batch: int, first_token: int, forward: Callable[[], Tensor]) -> Tensor:
        def original() -> None:
            made = walk.call(stage.layer, module, inputs, batch)
            if outputs is not None:
                outputs.write(walk.batches[batch][0], made)

        return observer.observe(batch, first_token, forward, original)

    return observe


def _keeping(walk: Walk, observer: LayerObserver, targets: HiddenStates) -> Observer:
    def observe(batch: int, first_token: int, forward: Callable[[], Tensor]) -> Tensor:
        made = observer.observe(batch, first_token, forward)
        targets.write(walk.batches[batch][0], walk.by_sample(made))
        return made

    return observe
