"""transformers' model without its weights: built on the meta device, filled one module at a time from the shards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.walk.buffers import Buffers
from tensorsurgeon.calibrate.walk.building import model_builder
from tensorsurgeon.calibrate.walk.layer_list import decoder_layers
from tensorsurgeon.calibrate.walk.lines import Traced
from tensorsurgeon.calibrate.walk.naming import Loading, NameMap, map_names, trace_lines
from tensorsurgeon.calibrate.walk.weights import FloatWeights, WeightReader
from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.quant.rtn.plain_torch import tensor_of
from tensorsurgeon.tensors.spec import TensorSpec

logger = logging.getLogger(__name__)

# A checkpoint tensor by name, in its own dtype, on any device.
ReadWeight = Callable[[str], Tensor]

_CPU = torch.device("cpu")


class StreamedModel:
    """The module tree of a checkpoint; parameters are on the meta device unless ``load`` has filled them.

    ``weights`` are what it is filled from, floats also where the checkpoint is quantized. ``layers`` are the decoder layers,
    ``layer_names`` their names in the tree; ``outside`` the checkpoint tensors that transformers has no place for (MTP
    heads). ``experts_implementation`` is transformers' own choice by default only where it is None; ``eager`` is the fastest
    on a CPU.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, experts_implementation: str | None = "eager", device: torch.device = _CPU
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.weights = FloatWeights(checkpoint)
        build = model_builder(checkpoint, experts_implementation)
        self.model = _on_meta(build)
        self._buffers = Buffers(self.model, build, device)
        self.dtype: torch.dtype = self.model.dtype
        self.layer_names, self.layers = decoder_layers(self.model)
        self.names: NameMap = map_names(self.model, list(self.weights.specs))
        state = self.model.state_dict()
        self._shapes = {name: value.shape for name, value in state.items()}
        self._dtypes = {name: value.dtype for name, value in state.items()}
        self._by_layer: list[list[Loading]] = [[] for _ in self.layers]
        self._rest: list[Loading] = []
        for loading in self.names.loadings:
            number = self.layer_of(loading.target)
            (self._rest if number is None else self._by_layer[number]).append(loading)
        self._tied = self._tied_blocks()
        self._replaced: dict[str, Tensor] = {}

    @property
    def outside(self) -> list[str]:
        """Checkpoint tensors that are no part of the model."""
        return self.names.outside

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the embedding: token ids lie below."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """Features of the states between layers."""
        return int(self.model.config.get_text_config().hidden_size)

    def layer_of(self, parameter: str) -> int | None:
        """The decoder layer that a name in the tree lies in; None for embeddings, heads, vision towers."""
        for number, name in enumerate(self.layer_names):
            if parameter.startswith(name + "."):
                return number
        return None

    def source_names(self, number: int) -> list[str]:
        """The float weights that make a layer, but for those that it shares with an earlier one."""
        return [name for loading in self._by_layer[number] for name in loading.names]

    def stored_names(self, number: int) -> set[str]:
        """The checkpoint's tensors that a layer is read from."""
        loadings = (*self._by_layer[number], *(loading for _, loading in self._tied[number]))
        return {stored for loading in loadings for name in loading.names for stored in self.weights.stored(name)}

    def _tied_blocks(self) -> list[list[tuple[str, Loading]]]:
        """By layer: parameters that the checkpoint does not hold, for they are those of another layer, and what loads these."""
        held = {loading.target: loading for loading in self.names.loadings}
        tied: list[list[tuple[str, Loading]]] = [[] for _ in self.layers]
        for target, origin in getattr(self.model, "all_tied_weights_keys", {}).items():
            number = self.layer_of(target)
            if number is not None and target not in held and origin in held:
                tied[number].append((target, held[origin]))
        return tied

    @property
    def shares_blocks(self) -> bool:
        """Whether layers have weights in common (Zamba 2)."""
        return any(self._tied)

    def keep_shared(self, number: int) -> None:
        """What lies in a layer now is what later layers that share it are filled with: its quantized weights."""
        shared = {loading.target for layer in self._tied[number + 1 :] for _, loading in layer}
        for target in shared:
            if self.layer_of(target) == number:
                self._replaced[target] = self.model.get_parameter(target).detach().clone()

    def layer_bytes(self, number: int) -> int:
        """What the weights of a layer take in memory: those that are unpacked in the model's dtype, others as they are stored."""
        specs, unpacked = self.weights.specs, self.weights.unpacked
        width = self.dtype.itemsize
        return sum(specs[n].numel * width if n in unpacked else specs[n].nbytes for n in self.source_names(number))

    def traced(self, number: int) -> Traced:
        """For each checkpoint tensor of a layer, which lines of which parameters its rows and columns become."""
        return trace_lines(self.names, self._by_layer[number], self.weights.specs, self._shapes)

    @contextmanager
    def layer(self, number: int, read: ReadWeight) -> Iterator[nn.Module]:
        """One decoder layer with its weights; they are let go afterwards."""
        module = self.layers[number]
        try:
            self._fill(self.layer_names[number], module, self._by_layer[number], read, self._tied[number])
            yield module
        finally:
            module.to("meta")

    @contextmanager
    def zero_layer(self, number: int) -> Iterator[nn.Module]:
        """One decoder layer whose weights are all zero, which shows what it returns without reading it."""
        module = self.layers[number]
        try:
            self._buffers.make(self.layer_names[number], module)
            for part in module.modules():
                for name, value in (*part._parameters.items(), *part._buffers.items()):
                    if value is not None and value.is_meta:
                        zeros = torch.zeros(value.shape, dtype=value.dtype, device=self.device)
                        if name in part._parameters:
                            part._parameters[name] = nn.Parameter(zeros, requires_grad=False)
                        else:
                            part._buffers[name] = zeros
            yield module
        finally:
            module.to("meta")

    @property
    def _decoder_name(self) -> str:
        return self.layer_names[0].rpartition(".")[0].rpartition(".")[0]

    def _surrounding(self) -> list[Loading]:
        prefix = f"{self._decoder_name}." if self._decoder_name else ""
        loadings = [loading for loading in self._rest if loading.target.startswith(prefix)]
        return [loading for loading in loadings if not _is_head(self.model, loading.target)]

    def surrounding_names(self) -> list[str]:
        """The checkpoint's tensors that ``surroundings`` reads."""
        return sorted(
            {stored for loading in self._surrounding() for name in loading.names for stored in self.weights.stored(name)}
        )

    @contextmanager
    def surroundings(self, read: ReadWeight, *, embeds: bool = True) -> Iterator[Any]:
        """What runs around the layers: embeddings (unless ``embeds`` is false), and whatever else of the decoder is small."""
        module = self.model.get_submodule(self._decoder_name)
        embedding = self.model.get_input_embeddings()
        needed = self._surrounding()
        if not embeds:
            needed = [loading for loading in needed if self._owner(loading.target) is not embedding]
        try:
            self._fill(self._decoder_name, module, needed, read, None)
            if embeds and embedding.weight.is_meta:
                raise CheckpointError("no tensor of the checkpoint is the model's embedding", where=str(self.checkpoint))
            yield self.model
        finally:
            for child in module.modules():
                if not any(child is part for layer in self.layers for part in layer.modules()):
                    for name, parameter in child._parameters.items():
                        if parameter is not None:
                            child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _fill(
        self,
        prefix: str,
        module: nn.Module,
        loadings: Sequence[Loading],
        read: ReadWeight,
        tied: Sequence[tuple[str, Loading]] | None,
    ) -> None:
        """Weights and buffers of a layer with those it shares, or of what is around the layers (``tied`` None)."""
        # First, while parameters are on the meta device: transformers initialises a module's weights along with its buffers.
        self._buffers.make(prefix, module, self.layers if tied is None else ())
        for loading in loadings:
            for target, value in self._made(loading, read).items():
                self._set(target, value)
        for target, loading in tied or ():
            known = self._replaced.get(loading.target)
            self._set(target, self._made(loading, read)[loading.target] if known is None else known)
        if tied is not None:
            missing = [name for name, value in _tensors_of(module) if value.is_meta]
            if missing:
                raise CheckpointError(
                    f"{prefix}: no tensor of the checkpoint makes {', '.join(missing[:4])}"
                    + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
                    where=str(self.checkpoint),
                )

    def _made(self, loading: Loading, read: ReadWeight) -> dict[str, Tensor]:
        # What was unpacked is twice as wide as the model's weights: no layer is held like that.
        width = self._dtypes[loading.target]
        tensors = {name: read(name).to(width) if name in self.weights.unpacked else read(name) for name in loading.names}
        return self.names.convert(loading, tensors)

    def parameter(self, number: int, target: str, read: ReadWeight) -> Tensor | None:
        """One parameter of a layer, by its name in the tree, without the others; None if no tensor of the checkpoint makes it."""
        loading = next((loading for loading in self._by_layer[number] if loading.target == target), None)
        return None if loading is None else self._made(loading, read)[target].to(self._dtypes[target])

    def _owner(self, target: str) -> nn.Module:
        module: nn.Module = self.model.get_submodule(target.rpartition(".")[0])
        return module

    def loading_of(self, target: str) -> Loading | None:
        """How a parameter outside the layers is made; None if no tensor of the checkpoint makes it."""
        return next((loading for loading in self._rest if loading.target == target), None)

    def _set(self, target: str, value: Tensor) -> None:
        owner, leaf = self._owner(target), target.rpartition(".")[2]
        known = getattr(owner, leaf)
        if value.shape != known.shape:
            raise CheckpointError(
                f"{target}: the checkpoint has {list(value.shape)}, the config says {list(known.shape)}",
                where=str(self.checkpoint),
            )
        # The meta parameter has the dtype that transformers gives it, F32 where it keeps F32.
        value = value.to(device=self.device, dtype=known.dtype)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value


def check_weight(reader: WeightReader, name: str) -> TensorSpec:
    """The spec of a tensor that the walk computes with; CheckpointError for one that is no plain float."""
    spec = reader.specs[name]
    if not spec.dtype.is_float or spec.dtype.bits < 16:
        raise CheckpointError(
            f"{spec}: the walk needs weights in BF16, F16 or F32; dequantize the checkpoint first",
            where=str(reader.checkpoint),
        )
    return spec


def read_weights(reader: WeightReader) -> ReadWeight:
    """Whole tensors by name, from the shards into ordinary memory."""

    def read(name: str) -> Tensor:
        check_weight(reader, name)
        return tensor_of(reader.array(name))

    return read


def _on_meta(build: Callable[[], Any]) -> Any:
    with torch.device("meta"), torch.no_grad():
        model = build()
    plan = model._get_dtype_plan(model.dtype)
    for name, parameter in list(model.named_parameters()):
        if any(part in name for part in plan):
            owner = model.get_submodule(name.rpartition(".")[0])
            owner._parameters[name.rpartition(".")[2]] = nn.Parameter(parameter.float(), requires_grad=False)
    return model.requires_grad_(False)


def _is_head(model: Any, target: str) -> bool:
    head = model.get_output_embeddings()
    owner = model.get_submodule(target.rpartition(".")[0])
    return head is not None and owner is head and owner is not model.get_input_embeddings()


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
