"""One of the models that are walked: its weights as a reader computes them, its states, its head."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.calibrate.card.budget import BATCH_TOKENS as CARD_BATCH_TOKENS
from tensorsurgeon.calibrate.device import works_on_card
from tensorsurgeon.calibrate.walk.head import Head, OnInputs
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.model import StreamedModel, check_weight, read_weights
from tensorsurgeon.calibrate.walk.walk import BATCH_TOKENS, Walk
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.source import open_source
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import RecipeError
from tensorsurgeon.evaluating.inputs import LayerInputs, static_scale
from tensorsurgeon.formats.inputs import InputRule, input_rules
from tensorsurgeon.quant.inputs import quantized_inputs
from tensorsurgeon.quant.rtn.plain_torch import tensor_of


class Side:
    """A checkpoint on its way through the text. ``states`` go into the next layer; ``rules`` say whose inputs are quantized."""

    def __init__(self, path: str, device: torch.device, held: ExitStack, *, float_inputs: bool) -> None:
        self.path = path
        self.opened = open_checkpoint(path)
        source = held.enter_context(open_source(self.opened))
        self._stored = TensorReader(self.opened, source)
        self.model = StreamedModel(self.opened, device=device)
        self._read = read_weights(self.model.weights.reader(source))
        quantized = [name.rpartition(".")[0] for name in self.model.weights.specs if name in self.model.weights.unpacked]
        self.rules: dict[str, InputRule] = {} if float_inputs else input_rules(self.opened.specs, quantized)
        self._device = device
        self.walk: Walk | None = None
        self.states: HiddenStates | None = None

    @property
    def name(self) -> str:
        """What the folder is called."""
        return Path(self.path).resolve().name

    def inputs_text(self) -> str:
        """How inputs are quantized, for people."""
        return " and ".join(sorted({str(rule.scheme) for rule in self.rules.values()})) or "as they are"

    def check_same_shape(self, other: Side) -> None:
        """Raise RecipeError unless both predict the same tokens from states of one size."""
        for what, own, theirs in (
            ("decoder layers", len(self.model.layers), len(other.model.layers)),
            ("features between layers", self.model.hidden_size, other.model.hidden_size),
            ("tokens in its vocabulary", self.model.vocabulary_rows, other.model.vocabulary_rows),
        ):
            if own != theirs:
                raise RecipeError(f"{self.path}: has {own} {what}, {other.path} has {theirs}; they are not the same model")

    def begin(self, tokens: np.ndarray, folder: Path) -> Walk:
        """The walk through these tokens; ``folder`` is for what layers hand on beside states."""
        size = CARD_BATCH_TOKENS if works_on_card(self._device) else BATCH_TOKENS
        self.walk = Walk(self.model, self._read, tokens, size, folder)
        return self.walk

    def run_layer(self, number: int, after: HiddenStates, *, workers: int, stop: threading.Event) -> None:
        """Walk one layer, from ``states`` into ``after``."""
        assert self.walk is not None
        assert self.states is not None
        with self.model.layer(number, self._read) as module:
            mine = {module_name: self.rules[module_name] for module_name in self._modules_of(number)}
            observer = None
            inputs: LayerInputs | None = None
            if mine and self.walk.reaches(number):
                name = self.model.layer_names[number]
                inputs = LayerInputs(name, module, mine, self._rows_of(mine), self.model.traced(number), self._number)
                observer = _observing(inputs)
            self.walk.run_layer(number, module, self.states, after, workers=workers, stop=stop, observer=observer)
            if inputs is not None:
                inputs.check_seen()

    def _weight_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix; of a quantized one all are unpacked for them."""
        if name in self.model.weights.unpacked:
            return self._read(name)[start:stop]
        check_weight(self._stored, name)
        return tensor_of(self._stored.rows(name, start, stop))

    def _number(self, name: str) -> float:
        """The one value of a stored scale."""
        return float(self._stored.array(name).astype(np.float32).reshape(-1)[0])

    def _modules_of(self, number: int) -> list[str]:
        names = (name.rpartition(".")[0] for name in self.model.source_names(number) if name.endswith(".weight"))
        return [name for name in names if name in self.rules]

    def _rows_of(self, modules: Iterable[str]) -> dict[str, int]:
        return {module: self.model.weights.specs[f"{module}.weight"].shape[0] for module in modules}

    def head(self) -> Head:
        """The model's head; known once the walk has embedded."""
        assert self.walk is not None
        return Head(self.walk, self._weight_rows, self._head_inputs())

    def _head_inputs(self) -> OnInputs | None:
        own = self.model.model.get_output_embeddings()
        name = next((name for name, module in self.model.model.named_modules() if module is own), "")
        rule = self.rules.get(name)
        if rule is None:
            return None
        scale = None if rule.scale is None else static_scale(rule, self._number)
        return lambda states: quantized_inputs(states, rule.scheme, scale).to(states.dtype)


def _observing(inputs: LayerInputs) -> Callable[[int, int, Callable[[], Tensor]], Tensor]:
    def observe(batch: int, first_token: int, forward: Callable[[], Tensor]) -> Tensor:
        with inputs.quantizing():
            return forward()

    return observe
