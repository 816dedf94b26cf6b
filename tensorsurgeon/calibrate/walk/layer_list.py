"""Where in a model of transformers the decoder layers are."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensorsurgeon.calibrate.walk.instead import ROUND_INSTEAD
from tensorsurgeon.errors import PlanError


def decoder_layers(model: Any) -> tuple[list[str], list[nn.Module]]:
    """The one list of decoder layers: of the classes that the model calls its layers, else as long as the config says.

    Its length may be another than ``num_hidden_layers``, which counts attentions in LongCat's double layers.
    """
    decoder, count = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    inside = {id(module) for module in decoder.modules()}
    found = [
        (name, module) for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and id(module) in inside
    ]  # fmt: skip
    # A layer may have lists of its own.
    outer = [(name, module) for name, module in found if not any(name.startswith(other + ".") for other, _ in found)]
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    by_class = [pair for pair in outer if all(type(layer).__name__ in kinds for layer in pair[1])]
    chosen = by_class if len(by_class) == 1 else [pair for pair in outer if len(pair[1]) == count]
    if len(chosen) != 1:
        raise PlanError(
            f"{type(model).__name__}: {len(chosen)} lists of {count} layers in its decoder, one is needed; this model cannot "
            "be walked layer by layer",
            remedy=ROUND_INSTEAD,
        )
    name, layers = chosen[0]
    return [f"{name}.{number}" for number in range(len(layers))], list(layers)
