"""Quantize linears: numbers by a backend, names and packing by a format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from tensorsurgeon.errors import NumericError, RecipeError, SpecError, did_you_mean
from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.layouts import layout_named
from tensorsurgeon.ops.siblings import sibling_groups
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.scheme import RULES, Quantized, Rule, Scheme
from tensorsurgeon.tensors.dtypes import DTYPES, WEIGHT_DTYPES, DType, dtype_named
from tensorsurgeon.tensors.names import Pattern, Selector
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


class CodesProvider(Protocol):
    """Hands over codes that calibration chose; None for a module that is to be rounded to nearest instead."""

    def quantized(self, module: str, start: int, stop: int) -> Quantized | None:
        """The codes of rows ``start`` to ``stop`` of a module, by the name it has when it is quantized."""
        ...


# A large weight goes piece by piece where the format allows it; fixed, so that no machine changes a unit.
_CHUNK_BYTES = 16 << 20
_CHUNK_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize every weight that ``where`` selects and ``exclude`` does not, and write it in ``format``.

    Whatever is not given (``num_bits``, ``group_size``, ``symmetric``, ``rule``) is the format's default. ``rule``
    names the tool whose scales and rounding are matched to the bit. ``activations`` is what the config tells the
    engine to do with inputs. Methods other than ``rtn`` need calibration.
    """

    where: tuple[str, ...]
    format: str
    exclude: tuple[str, ...] = ()
    method: Literal["rtn", "imatrix", "gptq"] = "rtn"
    num_bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    rule: Rule | None = None
    scale_dtype: str | None = None
    block: tuple[int, ...] | None = None
    clip_search: bool = False
    activations: str | None = None
    # Which backend makes the numbers changes no bit of them, so it is no part of the recipe's identity.
    backend: str = field(default="auto", repr=False)
    provider: CodesProvider | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_bits is not None and not 2 <= self.num_bits <= 8:
            raise RecipeError(f"quantize: num_bits must be 2 to 8, found {self.num_bits}")
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise RecipeError(f"quantize: group_size must be positive, or -1 for one group per row, found {self.group_size}")
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise RecipeError(f"quantize: block must be two positive sizes, rows and columns, found {list(self.block)}")
        if self.scale_dtype is not None and self.scale_dtype not in DTYPES:
            raise RecipeError(f"quantize: unknown scale_dtype {self.scale_dtype!r}{did_you_mean(self.scale_dtype, list(DTYPES))}")
        if self.rule is not None and self.rule not in RULES:
            raise RecipeError(f"quantize: unknown rule {self.rule!r}; known: {', '.join(RULES)}")

    @cached_property
    def layout(self) -> Format:
        return layout_named(self.format)

    @cached_property
    def scheme(self) -> Scheme:
        """The format's default scheme with what this step says on top; how scales are stored depends on the weight."""
        given: dict[str, Any] = {
            "num_bits": self.num_bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "rule": self.rule,
            "scale_dtype": None if self.scale_dtype is None else dtype_named(self.scale_dtype),
            "block": self.block,
            "clip_search": self.clip_search or None,
        }
        return replace(self.layout.default_scheme(), **{k: v for k, v in given.items() if v is not None})

    def scheme_for(self, dtype: DType) -> Scheme:
        """The scheme for weights of this dtype, one object per dtype."""
        schemes = self._schemes
        if dtype not in schemes:
            schemes[dtype] = self.layout.resolve_scheme(self.scheme, dtype)
        return schemes[dtype]

    @cached_property
    def _schemes(self) -> dict[DType, Scheme]:
        return {}

    def scheme_of(self, rewrite: Rewrite) -> Scheme:
        """Under which scheme a rewrite's outputs were made."""
        return self.scheme_for(rewrite.inputs[0].spec.dtype)

    @property
    def waits_for_codes(self) -> bool:
        """Whether the method chooses codes by calibration and nobody is there to hand them over."""
        return self.method != "rtn" and self.provider is None

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        chosen = Selector(self.where, self.exclude).names(specs)
        self._refuse_fused_experts(specs)
        if self.scheme.type == "nvfp4":
            return tuple(self._together([specs[name] for name in group]) for group in sibling_groups(chosen))
        # A model has few forms of weights and many weights.
        local: dict[tuple[DType, tuple[int, ...]], tuple[TensorSpec, ...]] = {}
        in_chunks: dict[tuple[DType, tuple[int, ...]], bool] = {}
        rewrites: list[Rewrite] = []
        for name in chosen:
            weight = specs[name]
            form = weight[1:]
            if form not in local:
                local[form] = self._local_tensors(weight)
                in_chunks[form] = weight.nbytes > _CHUNK_BYTES and self.layout.can_chunk_rows(self.scheme_for(weight.dtype))
            if in_chunks[form]:
                rewrites.extend(_chunks(weight, _outputs(weight, local[form])))
            else:
                rewrites.append(Rewrite((Region(weight),), tuple([Region(spec) for spec in _outputs(weight, local[form])])))
        return tuple(rewrites)

    def _together(self, weights: Sequence[TensorSpec]) -> Rewrite:
        """One rewrite for the parts of a module that engines fuse, which share one global scale."""
        outputs = tuple(Region(spec) for weight in weights for spec in _outputs(weight, self._local_tensors(weight)))
        return Rewrite(tuple(map(Region, weights)), outputs)

    def why_not(self, name: str) -> str:
        """Why a tensor that this step has left alone was left alone, by the name it has here."""
        for text in self.exclude:
            if Pattern.parse(text).match(name) is not None:
                return f"excluded by {text.removeprefix('maybe:')}"
        return "outside " + " and ".join(text.removeprefix("maybe:") for text in self.where)

    def _local_tensors(self, weight: TensorSpec) -> tuple[TensorSpec, ...]:
        """What is written for weights of this dtype and shape, by local name; SpecError if they cannot be quantized."""
        if weight.dtype not in WEIGHT_DTYPES:
            hint = "; dequantize it first" if not weight.dtype.is_float or weight.dtype.bits < 16 else ""
            raise SpecError(f"{weight.name}: cannot quantize {weight.dtype.name}; BF16, F16 or F32 is needed{hint}")
        if len(weight.shape) != 2:
            raise SpecError(
                f"{weight.name}: cannot quantize a tensor of shape {list(weight.shape)}; a linear weight [out, in] is "
                "needed. Exclude it, or split stacked experts first"
            )
        scheme = self.scheme_for(weight.dtype)
        self.layout.check(weight, scheme)
        # A rule that no backend knows is told now, not after an hour.
        choose_backend(self.backend, replace(scheme, clip_search=False), weight.dtype)
        return self.layout.tensors(weight, self.scheme_for(weight.dtype))

    def _refuse_fused_experts(self, specs: SpecMap) -> None:
        """Stacked experts have no ``.weight`` that a pattern would match, and would silently stay unquantized."""
        where = [Pattern.parse(text) for text in self.where]
        exclude = [Pattern.parse(text) for text in self.exclude]
        for name, spec in specs.items():
            if len(spec.shape) != 3:
                continue
            module, _, last = name.rpartition(".")
            if not module.endswith(".experts"):
                continue
            # An expert's weight as it would be called after splitting: is that in the scope?
            split = f"{module}.0.{last.removesuffix('_up_proj').removesuffix('_proj')}_proj.weight"
            left = any(p.match(split) is not None or p.match(name) is not None for p in exclude)
            if not left and any(p.match(split) is not None for p in where):
                raise SpecError(
                    f"{name}: {list(spec.shape)} are stacked experts, which no engine reads quantized; put "
                    "split-experts before quantize, or exclude this tensor to leave it as it is"
                )

    def warm_up(self) -> None:
        """Load the compiled code that the planned weights need, by quantizing a small one of each dtype."""
        if self.provider is not None or self.clip_search:
            return
        for dtype, scheme in self._schemes.items():
            if dtype.numpy is not None:
                columns = 256 if scheme.group_size == -1 else scheme.group_size * 32
                quantized = choose_backend(self.backend, scheme, dtype).quantize(np.zeros((64, columns), dtype.numpy), scheme)
                self.layout.pack(quantized, scheme)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        scheme = self.scheme_of(rewrite)
        amax = largest_magnitude(inputs) if scheme.type == "nvfp4" else None
        results: list[Array] = []
        for region, weight in zip(rewrite.inputs, inputs, strict=True):
            try:
                results += self.layout.pack(self._quantized(region, weight, scheme, amax), scheme)
            except NumericError as error:
                raise NumericError(f"{region}: {error.message}") from error
        return results

    def _quantized(self, region: Region, weight: Array, scheme: Scheme, global_amax: float | None) -> Quantized:
        if self.provider is not None:
            start, stop = (0, region.spec.rows) if region.start is None or region.stop is None else (region.start, region.stop)
            found = self.provider.quantized(region.spec.module, start, stop)
            if found is not None:
                return found
        if scheme.clip_search:
            # The search runs in torch, which nothing else here needs.
            from tensorsurgeon.quant.rtn.clipping import quantize_searched

            plain = replace(scheme, clip_search=False)
            return quantize_searched(weight, scheme, choose_backend(self.backend, plain, region.spec.dtype))
        return choose_backend(self.backend, scheme, region.spec.dtype).quantize(weight, scheme, global_amax=global_amax)


def _outputs(weight: TensorSpec, local: Iterable[TensorSpec]) -> list[TensorSpec]:
    prefix = weight.name.removesuffix("weight")
    return [TensorSpec(prefix + name, dtype, shape) for name, dtype, shape in local]


def _chunks(weight: TensorSpec, outputs: Sequence[TensorSpec]) -> Iterator[Rewrite]:
    """A large weight row block by row block, where rows of the weight are rows of every output."""
    rows = weight.shape[0]
    step = max(_CHUNK_ROWS, _CHUNK_BYTES // weight.row_bytes // _CHUNK_ROWS * _CHUNK_ROWS)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        parts = tuple(Region(o, start * o.rows // rows, stop * o.rows // rows) for o in outputs)
        yield Rewrite((Region(weight, start, stop),), parts)


def largest_magnitude(weights: Sequence[Array]) -> float:
    """The largest absolute value over several weights: what a shared global scale is made from."""
    return max((float(np.abs(weight.astype(np.float32)).max(initial=0.0)) for weight in weights), default=0.0)
