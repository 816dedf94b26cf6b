"""What every on-disk format supplies, and what it is told.

A format turns codes and scales into named tensors and back, and writes the ``quantization_config`` that makes an
engine read them. It works with local names (``weight_scale``); the module's path is put in front by the caller.

To write a weight: ``check`` it, ``resolve_scheme`` for its dtype (what the scales will be stored as decides which
codes are chosen), ask for ``tensors``, quantize under the resolved scheme, ``pack``. To read one: ``read_config``
gives its scheme, ``weight_shape`` its size from the headers alone, ``unpack`` its codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np

from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """What a plan knows of the written checkpoint when its config is made.

    ``modules``: every quantized module (``model.layers.0.mlp.up_proj``) and its scheme, in file order.
    ``unquantized``: every module left with a float weight that an engine could take for a linear (2-D, no
    embedding, no norm), in file order.
    ``specs``: all written tensors; ``specs.config`` is the model's config.
    ``options``: what the transform says about the config and nothing in the tensors can tell: ``activations``, one
    of the format's, or a list with one.
    """

    modules: Mapping[str, Scheme]
    unquantized: Sequence[str]
    specs: SpecMap
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConfigFiles:
    """``quantization_config`` for config.json, and whole files that some readers want beside it (name -> content)."""

    quantization_config: dict[str, Any]
    extra_files: dict[str, dict[str, Any]] = field(default_factory=dict)


class Word(NamedTuple):
    """The value in a ``quantization_config`` that tells one layout of a dialect from the others, and where it stands.

    Several ``values`` where a checkpoint has several layouts side by side.
    """

    path: str
    values: tuple[object, ...]


class Format(Protocol):
    """One on-disk layout of quantized linears; classes inherit what most of them share."""

    __slots__ = ()
    name: ClassVar[str]
    """As users write it (``ct-int``); variants of one class (``gptq-v2``) share it."""
    quant_method: ClassVar[str]
    words: ClassVar[tuple[str, ...]]
    """What ``word_in`` finds in the config of a checkpoint that is stored in this layout."""
    activations: ClassVar[tuple[str, ...]]
    """What its config can tell engines to do with inputs (``dynamic``, ``none``), the default first."""
    unsigned_because: ClassVar[str] = ""
    """Why calibrated codes of symmetric integers do not get signed scales unless asked for; empty where they do."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Local names that a stored module may lack."""

    @staticmethod
    def word_in(config: Mapping[str, Any], specs: SpecMap) -> Word:
        """Which layout of its dialect (``quant_method``) a ``quantization_config`` says it is; ConfigError if it says none."""
        ...

    @classmethod
    def from_config(cls, config: Mapping[str, Any], specs: SpecMap) -> Self:
        """The format with the settings that a checkpoint in it was stored with; most have none."""
        return cls()

    def default_scheme(self) -> Scheme:
        """What ``quantize`` uses where the transform says nothing."""
        ...

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """``scheme`` with ``scale_dtype`` filled in; the same object where it is filled in already.

        Call it once per scheme and weight dtype and share the result: schemes are told apart by identity first.
        """
        ...

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Raise SpecError if this layout cannot hold this weight under this scheme, saying what would fit."""
        ...

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """Local specs (``weight``, ``weight_scale``) written for a weight [N, K]."""
        ...

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """The names of ``tensors``, the codes first: they are the same for every weight under one scheme."""
        ...

    def also_reads(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """Other dtypes and shapes in which tools publish the tensors of this layout and which ``unpack`` takes.

        Axes of 1 that are missing or too many need not be named.
        """
        return ()

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """Whether rows of the weight are rows of every tensor written, so that a large weight can go piece by piece."""
        ...

    def rows_together(self, scheme: Scheme) -> int:
        """How many rows of a stored weight have to be read together: those that share a row of scales.

        0 where rows of the weight are no rows of what is stored.
        """
        return 1 if self.can_chunk_rows(scheme) else 0

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Arrays in the order and with the dtypes of ``tensors``, for a resolved scheme.

        Raises NumericError for a scale that the stored dtype cannot hold. Arrays may share memory with
        ``quantized``.
        """
        ...

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """[N, K] of the weight whose tensors these are (by local name), from headers alone.

        ConfigError where they have other axes than this layout's.
        """
        ...

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """The inverse of ``pack``; ``arrays`` by local name."""
        ...

    def config_files(self, model: QuantizedModel) -> ConfigFiles:
        """The config dialect of this format, from what was written."""
        ...

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Which modules a checkpoint's ``quantization_config`` says are quantized, and how; in file order.

        ConfigError where the config has a key or value this layout cannot mean, and where it and the tensors of
        ``specs`` disagree about a module.
        """
        ...
