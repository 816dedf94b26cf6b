"""From the last layer's states to logits, a piece of the vocabulary at a time.

The model's own forward runs with the states in the place of its last layer and some rows in the place of its head: the
norm before the head, and whatever the model does to logits after it, are the model's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.calibrate.walk.recording import Recorder
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.errors import PlanError

# Rows [start, stop) of a matrix of the checkpoint.
ReadRows = Callable[[str, int, int], Tensor]
# States [samples, tokens, hidden] after the last layer -> logits [samples, tokens, rows of the piece], in F32.
Logits = Callable[[Tensor, Tensor], Tensor]
# What is done to the head's inputs, where those are quantized.
OnInputs = Callable[[Tensor], Tensor]

PIECE_ROWS: Final = 8192


class Head:
    """The output head of a model, whose rows are read when they are needed; tied to the embedding where it has no own."""

    def __init__(self, walk: Walk, rows: ReadRows, on_inputs: OnInputs | None = None) -> None:
        self.model = model = walk.model
        read = walk.read
        self._axis = walk.sample_axis
        self._read = read
        self._rows = rows
        self._on_inputs = on_inputs
        head = model.model.get_output_embeddings()
        if head is None:
            raise PlanError(f"{type(model.model).__name__}: has no output head, so it predicts no token")
        self._head_name = next(name for name, module in model.model.named_modules() if module is head)
        self._head = head
        own, tied = model.loading_of(f"{self._head_name}.weight"), _embedding_loading(model)
        loading = own or tied
        if loading is None or loading.converter is not None:
            raise PlanError(f"{self._head_name}.weight: no one tensor of the checkpoint makes it; the model cannot be evaluated")
        self.weight_name = loading.names[0]
        bias = model.loading_of(f"{self._head_name}.bias")
        self._bias = None if bias is None else read(bias.names[0]).to(model.device)

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.model.weights.specs[self.weight_name].shape[0])

    @contextmanager
    def open(self) -> Iterator[Callable[[int, int], Logits]]:
        """``rows(start, stop)`` reads these rows and gives what computes their logits, from any thread, until the next call."""
        whole = self.model.model
        embedding = whole.get_input_embeddings()
        with self.model.surroundings(self._read, embeds=False):
            zeros = _Zeros(embedding, self.model)
            piece = _Piece(self._head, self._on_inputs)
            holder = whole.get_submodule(self.model.layer_names[0].rpartition(".")[0])
            mine = threading.local()
            recorder = Recorder(self.model)
            stubs = [_Stub(layer, mine, recorder, number) for number, layer in enumerate(self.model.layers)]
            try:
                whole.set_input_embeddings(zeros)
                recorder.record(torch.zeros(1, 2, dtype=torch.int64))
                whole.set_output_embeddings(piece)
                for number, stub in enumerate(stubs):
                    holder[number] = stub

                def rows(start: int, stop: int) -> Logits:
                    weight = self._rows(self.weight_name, start, stop).to(device=self.model.device, dtype=self.model.dtype)
                    object.__setattr__(piece, "rows", (weight, None if self._bias is None else self._bias[start:stop]))

                    def logits(states: Tensor, ids: Tensor) -> Tensor:
                        mine.states = states.to(self.model.device).movedim(0, self._axis)
                        with torch.no_grad():
                            made = whole(input_ids=ids.to(self.model.device), use_cache=False)
                        result: Tensor = made.logits.float()
                        return result

                    return logits

                yield rows
            finally:
                for number, layer in enumerate(self.model.layers):
                    holder[number] = layer
                whole.set_output_embeddings(self._head)
                whole.set_input_embeddings(embedding)


def _embedding_loading(model: StreamedModel) -> Any:
    embedding = model.model.get_input_embeddings()
    name = next(name for name, module in model.model.named_modules() if module is embedding)
    return model.loading_of(f"{name}.weight")


class _Stand(nn.Module):
    """In the place of a module; asked for anything that it has not, it answers as that module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that the module's parameters do not become the stand-in's.
        object.__setattr__(self, "_stands_for", (module,))

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_stands_for")[0], name)


class _Stub(_Stand):
    """A layer that gives the states that its thread was handed, whatever goes in."""

    def __init__(self, layer: nn.Module, mine: threading.local, recorder: Recorder, number: int) -> None:
        super().__init__(layer)
        object.__setattr__(self, "_answer", lambda: recorder.returned(number, mine.states))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "_answer")()


class _Zeros(_Stand):
    """An embedding whose rows nobody needs."""

    def __init__(self, embedding: nn.Module, model: StreamedModel) -> None:
        super().__init__(embedding)
        object.__setattr__(self, "_made", (model.hidden_size, model.dtype, model.device))

    def forward(self, ids: Tensor) -> Tensor:
        features, dtype, device = object.__getattribute__(self, "_made")
        return torch.zeros(*ids.shape, features, dtype=dtype, device=device)


class _Piece(_Stand):
    """A head of some rows."""

    rows: tuple[Tensor, Tensor | None]

    def __init__(self, head: nn.Module, on_inputs: OnInputs | None) -> None:
        super().__init__(head)
        object.__setattr__(self, "_on_inputs", on_inputs)

    def forward(self, states: Tensor) -> Tensor:
        weight, bias = self.rows
        on_inputs: OnInputs | None = object.__getattribute__(self, "_on_inputs")
        return nn.functional.linear(states if on_inputs is None else on_inputs(states), weight, bias)
