"""The layer walk: transformers' own forward, one decoder layer at a time.

The model's forward runs once per batch with stubs in place of its layers: that gives the first layer's input and what
every layer is called with (masks, rotary embeddings). Then each layer is loaded, called as it would have been, and let
go. The results are those of the full forward, bit for bit, for the same batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.walk.calls import Call, Slot, leaves, made_key, of_text, slots_of, with_slots
from tensorsurgeon.calibrate.walk.carried import Carried
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.model import ReadWeight, StreamedModel
from tensorsurgeon.calibrate.walk.recording import Recorder, own_forward
from tensorsurgeon.calibrate.walk.workers import Turns, run_parallel
from tensorsurgeon.errors import NumericError, PlanError

# Tokens per forward call on a CPU, never a tuning knob.
BATCH_TOKENS: Final = 2048

# Called with the batch number, its first token and the forward, which it runs.
Observer = Callable[[int, int, Callable[[], Tensor]], Tensor]


class Walk:
    """Calibration tokens on their way through a model; ``batches`` are (first, last) samples.

    ``batch_tokens`` per forward call are part of the result's bits (kernels differ with the shape), and of what is fast on
    a device. What layers are called with beside states and differs between texts lies in files in ``folder``.
    """

    def __init__(
        self,
        model: StreamedModel,
        read: ReadWeight,
        tokens: np.ndarray,
        batch_tokens: int = BATCH_TOKENS,
        folder: Path | None = None,
    ) -> None:
        self.model = model
        self.read = read
        self.tokens = torch.from_numpy(np.ascontiguousarray(tokens))
        samples, length = tokens.shape
        size = max(1, batch_tokens // length)
        self.batches = [(start, min(start + size, samples)) for start in range(0, samples, size)]
        # Calls by batch size and layer: equal for all batches of a size but for their slots, which is checked.
        self._calls: dict[int, dict[int, Call]] = {}
        self._slots: dict[str, Slot] = {}
        self._axis = 0
        self._carried = Carried(folder, model.device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples, tokens per sample, hidden size."""
        samples, length = self.tokens.shape
        return samples, length, self.model.hidden_size

    @property
    def sample_axis(self) -> int:
        """Which axis of the model's hidden states counts samples; known once embedded. In files it is the first."""
        return self._axis

    def reaches(self, number: int) -> bool:
        """Whether the forward of a text calls this layer; known once embedded."""
        return all(number in calls for calls in self._calls.values())

    @property
    def passes_on(self) -> bool:
        """Whether layers hand more than hidden states to later ones; known once embedded.

        Blocks that layers share are among it: what is quantized in one layer is what the next has.
        """
        if self.model.shares_blocks:
            return True
        slots = self._slots.items()
        if any(slot.empty is None and not key.startswith("text") for key, slot in slots):
            return True
        return any(slot.empty is not None and self._carried.holds(key) for key, slot in slots)

    def handed(self, layer: int) -> str | None:
        """A digest of what goes into a layer beside hidden states; None where layers hand on nothing."""
        return self._carried.digest(layer) if self.passes_on else None

    def restore(self, layer: int) -> None:
        """Take up what layers before ``layer`` of a stopped run handed on, before ``embed``."""
        self._carried.restore(layer)

    @property
    def may_pass_on(self) -> bool:
        """Whether layers could hand on more than hidden states: containers are among it before anything is put into them."""
        return self.model.shares_blocks or any(not key.startswith("text") for key in self._slots)

    def embed(self, write: Callable[[int, Tensor], None] | None) -> None:
        """Run what comes before the layers; ``write`` takes the first sample's number and the first layer's inputs.

        None: only learn what layers are called with, for which one batch of each size is mostly enough.
        """
        if write is not None:
            self._carried.clear()
        with self.model.surroundings(self.read) as whole, torch.no_grad():
            recorder = Recorder(self.model)
            for number, (start, stop) in enumerate(self.batches):
                ids = self.tokens[start:stop]
                if stop - start not in self._calls:
                    self._learn(recorder, ids)
                elif write is None and not any(key.startswith("text") for key in self._slots):
                    continue
                found = recorder.record(ids)
                for key, value in of_text(self._calls[stop - start], found.calls, type(whole).__name__).items():
                    self._carried.put(key, number, value, 0)
                if write is not None:
                    hidden = self.by_sample(found.hidden)
                    check_finite(hidden, "the embeddings", start)
                    write(start, hidden)

    def _learn(self, recorder: Recorder, ids: Tensor) -> None:
        """What layers are called with in a batch of this size, from this text and one that has the same tokens elsewhere."""
        first, second = recorder.record(ids), recorder.record(ids.roll(1, dims=1))
        replies = {id(value): layer for layer, value in first.replies.items()}
        calls = with_slots(first.calls, second.calls, replies, recorder.name)
        slots = slots_of(calls)
        self._axis = _sample_axis(recorder, first.hidden, ids)
        if self._calls and slots.keys() != self._slots.keys():
            raise PlanError(f"{recorder.name}: calls its layers otherwise for another number of samples; it cannot be walked")
        self._slots = slots
        self._calls[len(ids)] = calls

    def by_sample(self, hidden: Tensor) -> Tensor:
        """Hidden states of the model with samples on the first axis, as files have them."""
        return hidden.movedim(self._axis, 0) if self._axis else hidden

    def run_layer(
        self,
        number: int,
        layer: nn.Module,
        inputs: HiddenStates,
        outputs: HiddenStates | None,
        *,
        workers: int,
        stop: threading.Event,
        observer: Observer | None = None,
        turns: Turns | None = None,
    ) -> None:
        """Call one loaded layer on every batch; outputs are written unless ``outputs`` is None.

        ``observer(batch, first token, forward)`` runs the forward it is given and returns its result.
        NumericError names the first sample whose states are not finite. A layer that texts do not reach hands states on.
        """
        run_parallel(
            len(self.batches),
            lambda batch: self.run_batch(number, layer, inputs, outputs, batch, observer),
            workers=workers,
            stop=stop,
            turns=turns,
        )

    def run_batch(
        self,
        number: int,
        layer: nn.Module,
        inputs: HiddenStates,
        outputs: HiddenStates | None,
        batch: int,
        observer: Observer | None = None,
    ) -> None:
        """One batch of ``run_layer``, in this thread."""
        name = self.model.layer_names[number]
        start, stop_at = self.batches[batch]
        if not self.reaches(number):
            if outputs is not None:
                outputs.write(start, inputs.read(start, stop_at))
            return
        hidden = self._read(inputs, batch)
        call, boxes = self._bound(self._calls[stop_at - start][number], batch)
        returned: list[Any] = []

        def forward() -> Tensor:
            with own_forward(type(self.model.model).__name__, f"in {name}"):
                returned.append(layer(hidden, *call.args, **call.kwargs))
            states: Tensor = next(leaves(returned[-1]))[1]
            return states

        result = forward() if observer is None else observer(batch, start * self.tokens.shape[1], forward)
        result = self.by_sample(result)
        check_finite(result, name, start)
        if outputs is not None:
            outputs.write(start, result)
            self._pass_on(number, batch, returned[-1], boxes)

    def call(self, number: int, layer: nn.Module, inputs: HiddenStates, batch: int) -> Tensor:
        """What the loaded layer makes of one batch of other states; nothing is kept of what it hands on beside them."""
        start, stop_at = self.batches[batch]
        call, _ = self._bound(self._calls[stop_at - start][number], batch)
        with own_forward(type(self.model.model).__name__, f"in {self.model.layer_names[number]}"):
            returned = layer(self._read(inputs, batch), *call.args, **call.kwargs)
        result = self.by_sample(next(leaves(returned))[1])
        check_finite(result, self.model.layer_names[number], start)
        return result

    def _read(self, inputs: HiddenStates, batch: int) -> Tensor:
        hidden = inputs.read(*self.batches[batch]).to(self.model.device)
        return hidden.movedim(0, self._axis).contiguous() if self._axis else hidden

    def _bound(self, call: Call, batch: int) -> tuple[Call, dict[str, Any]]:
        """The call of one batch, and the containers in it that the layer may fill."""
        boxes: dict[str, Any] = {}

        def value(place: str, leaf: Any) -> Any:
            if not isinstance(leaf, Slot):
                return leaf
            if leaf.empty is None:
                return self._carried.get(leaf.key, batch)
            if leaf.key not in boxes:
                boxes[leaf.key] = copy(leaf.empty)
                if self._carried.has(leaf.key, batch):
                    boxes[leaf.key].update(self._carried.get(leaf.key, batch))
            return boxes[leaf.key]

        return call.changed(value), boxes

    def _pass_on(self, number: int, batch: int, returned: Any, boxes: dict[str, Any]) -> None:
        """Keep what later layers are called with: what this one returned, and what it put into containers."""
        states = next(leaves(returned))[0]
        for place, value in leaves(returned):
            key = made_key(number, "" if place == states else place)
            if key in self._slots:
                self._carried.put(key, batch, value, number + 1)
        for key, box in boxes.items():
            if box:
                self._carried.put(key, batch, dict(box), number + 1)


def _sample_axis(recorder: Recorder, hidden: Tensor, ids: Tensor) -> int:
    """Which axis of hidden states counts samples: the first in [samples, tokens, features], else the one that grows."""
    if hidden.ndim == 3 and hidden.shape[:2] == ids.shape:
        return 0
    more = recorder.record(torch.cat([ids, ids[:1]])).hidden.shape
    grown = [axis for axis, (few, many) in enumerate(zip(hidden.shape, more, strict=True)) if many == few + 1]
    if len(grown) != 1:
        raise PlanError(f"{recorder.name}: its hidden states {list(hidden.shape)} have no axis for samples; it cannot be walked")
    return grown[0]


def check_finite(hidden: Tensor, where: str, first_sample: int) -> None:
    """Raise NumericError for NaN or infinity among hidden states [samples, ...]."""
    finite = torch.isfinite(hidden).flatten(1).all(1)
    if not bool(finite.all()):
        sample = first_sample + int((~finite).nonzero()[0])
        raise NumericError(
            f"{where}: hidden states of calibration sample {sample} are not finite; the checkpoint's weights or its dtype "
            "cannot carry this text, so no statistics can be had from it"
        )
