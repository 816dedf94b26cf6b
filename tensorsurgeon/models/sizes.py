"""Sizes of a model by its config, whatever its family calls them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Final

_LAYERS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_HIDDEN: Final = ("hidden_size", "n_embd", "d_model")
_EXPERT_WIDTHS: Final = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_TEXT_CONFIGS: Final = ("text_config", "language_config", "llm_config", "thinker_config", "ffn_config")


class Sizes:
    """What a config says of sizes; 0 where it says nothing. Multimodal configs are asked for the text model's."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    @property
    def has_text_config(self) -> bool:
        """Whether the text model's sizes stand in a part of the config."""
        return any(isinstance(self._config.get(key), Mapping) for key in _TEXT_CONFIGS[:-1])

    @cached_property
    def experts(self) -> frozenset[int]:
        """Experts of a layer, in every way in which they can be counted."""
        counts = self._numbers(_EXPERTS)
        return counts | {count + extra for count in counts for extra in self._numbers(("zero_expert_num",))}

    @cached_property
    def layers(self) -> int:
        """Layers of the text model; 0 also where encoder and decoder have their own numbers."""
        return 0 if self._config.get("is_encoder_decoder") else max(self._numbers(_LAYERS), default=0)

    @cached_property
    def hidden(self) -> int:
        """Features that layers pass on."""
        return max(self._numbers(_HIDDEN), default=0)

    @cached_property
    def vocabulary(self) -> int:
        """Words of the text model."""
        return max(self._numbers(("vocab_size", "padded_vocab_size")), default=0)

    @cached_property
    def expert_width(self) -> int:
        """Features between the stages of an expert."""
        return next((max(found) for key in _EXPERT_WIDTHS if (found := self._numbers((key,)))), 0)

    def _numbers(self, keys: Iterable[str]) -> frozenset[int]:
        config = self._config
        inner = [found for key in _TEXT_CONFIGS if isinstance(found := config.get(key), Mapping)]
        inner += [found for part in inner if isinstance(found := part.get("text_config"), Mapping)]
        parts: list[Mapping[str, Any]] = inner if any(key in part for part in inner for key in keys) else [config]
        return frozenset(value for part in parts for key in keys if type(value := part.get(key)) is int and value > 0)
