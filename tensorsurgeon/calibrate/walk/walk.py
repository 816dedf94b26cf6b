"""The layer walk: transformers' own forward, one decoder layer at a time.

The model's forward runs once per batch with stubs in place of its layers: that gives the first layer's input and what
every layer is called with (masks, rotary embeddings). Then each layer is loaded, called as it would have been, and let
go. The results are those of the full forward, bit for bit, for the same batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.model import ReadWeight, StreamedModel
from tensorsurgeon.calibrate.walk.workers import Turns, run_parallel
from tensorsurgeon.errors import NumericError, PlanError

# Tokens per forward call on a CPU, never a tuning knob.
BATCH_TOKENS: Final = 2048

# Called with the batch number, its first token and the forward, which it runs.
Observer = Callable[[int, int, Callable[[], Tensor]], Tensor]


class Call(NamedTuple):
    """What a layer is called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorded(Exception):  # noqa: N818  # no error: it ends a forward early
    pass


class _Recorder(nn.Module):
    """Stands for one decoder layer: notes its arguments and hands its input on."""

    def __init__(self, layer: nn.Module, note: Callable[[Tensor, Call], Tensor]) -> None:
        super().__init__()
        # In a tuple, so that the layer's parameters do not become the recorder's.
        object.__setattr__(self, "_layer", (layer,))
        object.__setattr__(self, "_note", note)

    def __getattr__(self, name: str) -> Any:
        # Models ask their layers what kind they are (``layer.attention_type``).
        return getattr(object.__getattribute__(self, "_layer")[0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        note: Callable[[Tensor, Call], Tensor] = object.__getattribute__(self, "_note")
        return note(hidden_states, Call(args, kwargs))


class Walk:
    """Calibration tokens on their way through a model; ``batches`` are (first, last) samples.

    ``batch_tokens`` per forward call are part of the result's bits (kernels differ with the shape), and of what is fast on
    a device.
    """

    def __init__(self, model: StreamedModel, read: ReadWeight, tokens: np.ndarray, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model = model
        self.read = read
        self.tokens = torch.from_numpy(np.ascontiguousarray(tokens))
        samples, length = tokens.shape
        size = max(1, batch_tokens // length)
        self.batches = [(start, min(start + size, samples)) for start in range(0, samples, size)]
        # Calls by batch size, one per layer: equal for all batches of a size, which is checked.
        self._calls: dict[int, list[Call]] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples, tokens per sample, hidden size."""
        samples, length = self.tokens.shape
        return samples, length, self.model.hidden_size

    def embed(self, write: Callable[[int, Tensor], None] | None) -> None:
        """Run what comes before the layers; ``write`` takes the first sample's number and the first layer's inputs.

        None: only learn the layers' arguments, for which one batch of each size is enough.
        """
        with self.model.surroundings(self.read) as whole, torch.no_grad():
            for start, stop in self.batches:
                if write is None and stop - start in self._calls:
                    continue
                hidden, calls = self._record(whole, self.tokens[start:stop])
                known = self._calls.setdefault(stop - start, calls)
                if not _same(known, calls):
                    raise PlanError(
                        f"{type(whole).__name__}: what its layers are called with depends on the text; this model cannot be "
                        "walked layer by layer"
                    )
                if write is not None:
                    check_finite(hidden, "the embeddings", start)
                    write(start, hidden)

    def _record(self, whole: Any, ids: Tensor) -> tuple[Tensor, list[Call]]:
        calls: list[Call] = []
        states: list[Tensor] = []
        count = len(self.model.layers)

        def note(hidden: Tensor, call: Call) -> Tensor:
            if states and hidden is not states[-1]:
                raise PlanError(
                    f"{type(whole).__name__}: changes the hidden states between layers {len(states) - 1} and {len(states)}; "
                    "this model cannot be walked layer by layer"
                )
            states.append(hidden)
            calls.append(call)
            if len(calls) == count:
                raise _Recorded
            return hidden

        with _stubs(self.model, note):
            try:
                whole(input_ids=ids.to(self.model.device), use_cache=False)
            except _Recorded:
                return states[0], calls
        raise PlanError(f"{type(whole).__name__}: its forward used {len(calls)} of {count} layers; it cannot be walked")

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
        NumericError names the first sample whose states are not finite.
        """

        def work(batch: int) -> None:
            start, stop_at = self.batches[batch]
            hidden = inputs.read(start, stop_at).to(self.model.device)
            call = self._calls[stop_at - start][number]

            def forward() -> Tensor:
                made = layer(hidden, *call.args, **call.kwargs)
                states: Tensor = made[0] if isinstance(made, tuple) else made
                return states

            result = forward() if observer is None else observer(batch, start * self.tokens.shape[1], forward)
            check_finite(result, self.model.layer_names[number], start)
            if outputs is not None:
                outputs.write(start, result)

        run_parallel(len(self.batches), work, workers=workers, stop=stop, turns=turns)


def check_finite(hidden: Tensor, where: str, first_sample: int) -> None:
    """Raise NumericError for NaN or infinity among hidden states [samples, ...]."""
    finite = torch.isfinite(hidden).flatten(1).all(1)
    if not bool(finite.all()):
        sample = first_sample + int((~finite).nonzero()[0])
        raise NumericError(
            f"{where}: hidden states of calibration sample {sample} are not finite; the checkpoint's weights or its dtype "
            "cannot carry this text, so no statistics can be had from it"
        )


@contextmanager
def _stubs(model: StreamedModel, note: Callable[[Tensor, Call], Tensor]) -> Any:
    """Every decoder layer replaced by a recorder, for the length of the block."""
    holder = model.model.get_submodule(model.layer_names[0].rpartition(".")[0])
    try:
        for number, layer in enumerate(model.layers):
            holder[number] = _Recorder(layer, note)
        yield
    finally:
        for number, layer in enumerate(model.layers):
            holder[number] = layer


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or torch.equal(first, second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return type(first) is type(second) and bool(first == second)
