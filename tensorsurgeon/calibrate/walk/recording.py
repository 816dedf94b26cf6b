"""One forward of the whole model with stubs in the place of its layers, which note what each is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.walk.calls import Call, Promise, changed, leaves
from tensorsurgeon.calibrate.walk.instead import ROUND_INSTEAD
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.errors import PlanError, SurgeonError

# Tokens that show what a layer returns.
_FEW_TOKENS: Final = 8


class Recording(NamedTuple):
    """``hidden`` goes into the first layer. ``calls`` by layer, in order; layers that the text does not reach are missing.

    ``replies``: the hidden states that each stub returned; while they are held, their identity says which layer's they are.
    """

    hidden: Tensor
    calls: dict[int, Call]
    replies: dict[int, Tensor]


class _Recorded(Exception):  # noqa: N818  # no error: it ends a forward early
    pass


class _Stub(nn.Module):
    """Stands for one decoder layer."""

    def __init__(self, layer: nn.Module, answer: Callable[[Tensor, Call], Any]) -> None:
        super().__init__()
        # In a tuple, so that the layer's parameters do not become the stub's.
        object.__setattr__(self, "_layer", (layer,))
        object.__setattr__(self, "_answer", answer)

    def __getattr__(self, name: str) -> Any:
        # Models ask their layers what kind they are (``layer.attention_type``).
        return getattr(object.__getattribute__(self, "_layer")[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answer: Callable[[Tensor, Call], Any] = object.__getattribute__(self, "_answer")
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        return answer(hidden, Call(tuple(rest), kwargs))


class Recorder:
    """Records forwards of one model; what its layers return is found out where a stub that returns states is not enough."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._shapes: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self._model.model).__name__

    def record(self, ids: Tensor) -> Recording:
        """What the layers are called with for token ids [samples, tokens]; the surroundings have their weights.

        PlanError if something is done to hidden states between layers, or the forward fails.
        """
        if self._shapes:
            return self._record(ids)
        try:
            return self._record(ids)
        except PlanError:
            # Its layers may return more than states; a run of them shows it.
            self._shapes = self._scout(ids[:1, :_FEW_TOKENS])
            return self._record(ids)

    def _record(self, ids: Tensor) -> Recording:
        calls: dict[int, Call] = {}
        replies: dict[int, Tensor] = {}
        first: list[Tensor] = []

        def answer(number: int, hidden: Tensor, call: Call) -> Any:
            last = max(calls, default=None)
            if last is not None and (number <= last or hidden is not replies[last]):
                raise PlanError(
                    f"{self.name}: changes the hidden states between layers {last} and {number}, or calls a layer twice; it "
                    "cannot be walked layer by layer",
                    remedy=ROUND_INSTEAD,
                )
            first.append(hidden)
            calls[number] = call
            if number == len(self._model.layers) - 1:
                raise _Recorded
            # Another object over the same elements, so that it shows whose states somebody is called with.
            reply = replies[number] = hidden.view_as(hidden)
            return self.returned(number, reply)

        self._forward(ids, answer)
        if not calls:
            raise PlanError(f"{self.name}: its forward calls none of its {len(self._model.layers)} layers; it cannot be walked")
        return Recording(first[0], calls, replies)

    def returned(self, number: int, reply: Tensor) -> Any:
        """What the layer returns, with the reply for its states and promises for other tensors; known once recorded."""

        def stand_in(place: str, value: Any) -> Any:
            if place == states_place(self._shapes[number]):
                return reply
            return Promise(number, place) if value is Tensor else value

        return changed(self._shapes[number], stand_in) if number in self._shapes else reply

    def _scout(self, ids: Tensor) -> dict[int, Any]:
        """What each layer returns, with the class in the place of every tensor: run with weights of zero on a few tokens."""
        found: dict[int, Any] = {}

        def answer(number: int, hidden: Tensor, call: Call) -> Any:
            with self._model.zero_layer(number) as layer:
                made = layer(hidden, *call.args, **call.kwargs)
            found[number] = changed(made, lambda _, value: Tensor if isinstance(value, Tensor) else value)
            if number == len(self._model.layers) - 1:
                raise _Recorded
            return made

        self._forward(ids, answer)
        return found

    def _forward(self, ids: Tensor, answer: Callable[[int, Tensor, Call], Any]) -> None:
        head = self._model.model.get_output_embeddings()

        def end(*_: Any) -> None:
            raise _Recorded

        handle = None if head is None else head.register_forward_pre_hook(end)
        try:
            with _stubs(self._model, answer), own_forward(self.name, "before its layers or between them"):
                self._model.model(input_ids=ids.to(self._model.device), use_cache=False)
        except _Recorded:
            pass
        finally:
            if handle is not None:
                handle.remove()


def states_place(made: Any) -> str:
    """Where in what a layer returned its hidden states lie: the first value."""
    return next(leaves(made))[0]


@contextmanager
def own_forward(model: str, where: str) -> Iterator[None]:
    """Errors of transformers' own code as a PlanError that names the class; a device without memory stays what it is."""
    try:
        yield
    except (SurgeonError, _Recorded, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise PlanError(
            f"{model}: transformers' own forward of this checkpoint fails {where} ({type(error).__name__}: {said}), so it cannot "
            "be walked; see that the config fits the weights",
            remedy=ROUND_INSTEAD,
        ) from error


@contextmanager
def _stubs(model: StreamedModel, answer: Callable[[int, Tensor, Call], Any]) -> Iterator[None]:
    """Every decoder layer replaced by a stub, for the length of the block."""
    holder = model.model.get_submodule(model.layer_names[0].rpartition(".")[0])

    def answering(number: int) -> Callable[[Tensor, Call], Any]:
        return lambda hidden, call: answer(number, hidden, call)

    try:
        for number, layer in enumerate(model.layers):
            holder[number] = _Stub(layer, answering(number))
        yield
    finally:
        for number, layer in enumerate(model.layers):
            holder[number] = layer
