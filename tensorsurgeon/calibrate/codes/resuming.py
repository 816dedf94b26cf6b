"""The stage that a stopped run left, if every piece of it is what was written there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tensorsurgeon.calibrate.codes.originals import reopened
from tensorsurgeon.calibrate.codes.stage import Stage
from tensorsurgeon.calibrate.state import CalibrationState
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.errors import JournalError


def resumed(
    layer: int, digest: str | None, state: CalibrationState, walk: Walk, open_states: Callable[[Path], HiddenStates]
) -> Stage:
    """The stage before ``layer``, and in ``walk`` what layers handed on beside states; JournalError where it is not whole."""
    if digest is None:
        return Stage(layer, None)
    states, _, handed = digest.partition("#")
    walk.restore(layer)
    stage = reopened(layer, states, state, open_states)
    walk.embed(None)
    why = None if layer == 0 else _not_whole(walk, layer, handed)
    if why is not None:
        stage.close()
        raise JournalError(why, where=str(state.folder))
    return Stage(layer, stage.states, stage.original, handed or None)


def _not_whole(walk: Walk, layer: int, handed: str) -> str | None:
    if walk.model.shares_blocks:
        # The quantized weights of a block that a later layer has too are in the walk's memory alone.
        return "layers of this model share blocks, whose new weights are not kept"
    same = (walk.handed(layer) or "") == handed
    return None if same else "what layers handed on beside hidden states is not what was written there"
