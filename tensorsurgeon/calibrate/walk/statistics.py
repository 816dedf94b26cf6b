"""Second moments of what each linear of a layer sees: gathered during the walk, kept in files, used later.

One Hessian per distinct input: query, key and value projections are called with the same tensor, and so are the gate and
up projections; which ones are is read off the first batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.walk.crosses import Crosses
from tensorsurgeon.calibrate.walk.experts import ExpertStatistics, InputStatistics
from tensorsurgeon.calibrate.walk.seeing import Hooks, Seen
from tensorsurgeon.calibrate.walk.stacks import ExpertStack
from tensorsurgeon.calibrate.walk.workers import Turns
from tensorsurgeon.errors import PlanError, RecipeError
from tensorsurgeon.machine.files import make_durable, make_folder_durable
from tensorsurgeon.quant.gptq.hessian import HessianAccumulator


def summed(accumulator: Sum, cross: Tensor | None = None) -> InputStatistics:
    """The statistics that an accumulator holds, and the cross products beside it."""
    hessian = accumulator.result()
    return InputStatistics(accumulator.tokens, hessian.diagonal().clone(), hessian, cross)


class LayerStatistics(Protocol):
    """Statistics of one layer by key (``Keys`` names them); None where nothing was observed."""

    def of(self, key: str) -> InputStatistics | None:
        """The statistics of an input."""
        ...

    def shared_key(self, key: str) -> str:
        """The key under which inputs that are one and the same are kept."""
        ...


class Sum(Protocol):
    """Sums ``x x^T`` over tokens."""

    tokens: int

    def add(self, inputs: Tensor) -> None:
        """Take inputs [..., in_features]."""
        ...

    def result(self) -> Tensor:
        """The sum so far, a new tensor."""
        ...


class Inputs(Protocol):
    """Keeps what went into a stack of experts."""

    def prepare(self, top_k: int) -> None:
        """Make room for ``top_k`` choices per token."""
        ...

    def add(self, first_token: int, hidden: Tensor, chosen: Tensor) -> None:
        """Take the inputs and chosen experts of tokens from ``first_token`` on."""
        ...


class LayerObserver:
    """Sums the inputs of a layer's linears, and keeps those of its experts, while the walk runs the layer.

    ``linears`` are the modules wanted, by full name; ``new_sum`` makes what sums so many features. ``originals`` keeps what
    goes into the stacks behind original layers, and ``crosses`` cross products, where that is carried.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        stacks: Sequence[ExpertStack],
        inputs: Mapping[str, Inputs],
        turns: Turns,
        new_sum: Callable[[int], Sum] = HessianAccumulator,
        originals: Mapping[str, Inputs] | None = None,
        crosses: Crosses | None = None,
    ) -> None:
        self._originals = originals or {}
        self._crosses = crosses or Crosses()
        self._hooks = Hooks(linears, stacks)
        self._stacks = self._hooks.stacks
        self._inputs = inputs
        self._turns = turns
        self._leader: dict[str, str] = {}
        self._sums: dict[str, Sum] = {}
        self._new_sum = new_sum

    def watching(self) -> AbstractContextManager[None]:
        """Hooks in place for the length of the block."""
        return self._hooks.watching()

    def observe(
        self, batch: int, first_token: int, forward: Callable[[], Tensor], original: Callable[[], None] | None = None
    ) -> Tensor:
        """Run a batch's forward and add what the linears saw, in the order of batches.

        ``original`` runs the same tokens' forward behind original layers.
        """
        result, seen, now, before, fed = self._hooks.see(forward, original)
        with self._turns.turn("leaders", batch):
            if batch == 0:
                self._choose_leaders(seen)
            for name, (_, chosen) in now.items():
                self._inputs[name].prepare(chosen.shape[1])
                if name in self._originals:
                    self._originals[name].prepare(chosen.shape[1])
        for name, (hidden, chosen) in now.items():
            self._inputs[name].add(first_token * max(1, self._stacks[name].copies), hidden, chosen)
            if original is not None and name in self._originals:
                self._originals[name].add(first_token, *fed[name])
        tokens = result.numel() // result.shape[-1]
        gathered = {stack.first_name for stack in self._stacks.values() if stack.copies}
        for name, leader in self._leader.items():
            mine = seen.get(name, [])
            if leader != name:
                if [s.identity for s in mine] != [s.identity for s in seen.get(leader, [])]:
                    raise PlanError(f"{name} and {leader} shared their input at first, but not later; no statistics")
                continue
            with self._turns.turn(name, batch):
                for tensor, _ in mine:
                    if name not in self._sums:
                        self._sums[name] = self._new_sum(tensor.shape[-1])
                    self._sums[name].add(tensor)
                if original is not None:
                    theirs = [] if name in gathered else before.get(name, [])
                    self._crosses.add(name, [s.tensor for s in mine], [s.tensor for s in theirs], tokens)
        return result

    def _choose_leaders(self, seen: Mapping[str, list[Seen]]) -> None:
        names = self._hooks.names
        by_input: dict[tuple[Any, ...], str] = {}
        for name in names:
            identity = tuple(s.identity for s in seen.get(name, []))
            self._leader[name] = by_input.setdefault(identity, name) if identity else name

    def observed(self) -> tuple[dict[str, InputStatistics], dict[str, str]]:
        """Statistics by key, and under which key a shared input is kept; the sums are let go."""
        made = {}
        for name in list(self._sums):
            made[name] = summed(self._sums.pop(name), self._crosses.pop(name))
        return made, dict(self._leader)

    def result(self, experts: Mapping[str, ExpertStatistics]) -> WalkedStatistics:
        """What was observed; ``experts`` by the name of their stack."""
        return WalkedStatistics(*self.observed(), dict(experts))


class WalkedStatistics:
    """Statistics of one layer, fresh from the walk; those of experts are computed when asked for."""

    def __init__(self, sums: dict[str, InputStatistics], leader: dict[str, str], experts: dict[str, ExpertStatistics]) -> None:
        self._sums = sums
        self._leader = leader
        self._experts = {name: found for found in experts.values() for name in (found.stack.first_name, found.stack.down_name)}

    def shared_key(self, key: str) -> str:
        """The key under which a shared input is kept."""
        return self._leader.get(key, key)

    def of(self, key: str) -> InputStatistics | None:
        """The statistics of an input; None if it was never seen."""
        parameter, _, expert = key.rpartition(".")
        stack = self._experts.get(parameter) if expert.isdecimal() else None
        if stack is None:
            return self._sums.get(self.shared_key(key))
        if parameter == stack.stack.down_name:
            return stack.compute(int(expert), first=False)[1]
        return stack.compute(int(expert), first=True)[0]


class StoredStatistics:
    """Statistics of one layer from a file that ``write_layer`` made."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            raise RecipeError(f"{path}: no such file; the statistics do not cover this layer")
        try:
            open_file: Any = safe_open
            self._file = open_file(str(path), "pt")
            metadata = self._file.metadata() or {}
            self._aliases: dict[str, str] = json.loads(metadata["aliases"])
            self.tokens: dict[str, int] = json.loads(metadata["tokens"])
            self.crossed = metadata.get("crossed") == "true"
        except (SafetensorError, KeyError, ValueError) as error:
            raise RecipeError(f"{path}: is not a file of statistics ({error})") from error

    def shared_key(self, key: str) -> str:
        """The key under which a shared input is kept."""
        return self._aliases.get(key, key)

    def of(self, key: str) -> InputStatistics | None:
        """The statistics of an input; None if it was never seen."""
        key = self.shared_key(key)
        if key not in self.tokens:
            return None
        hessian = self._file.get_tensor(f"{key}.hessian")
        cross = self._file.get_tensor(f"{key}.cross") if f"{key}.cross" in self._file.keys() else None  # noqa: SIM118
        return InputStatistics(self.tokens[key], hessian.diagonal().clone(), hessian, cross)


def layer_path(folder: Path, number: int) -> Path:
    """Where the statistics of a layer lie: one file each, so that they can be written and read layer by layer."""
    return folder / f"layer-{number:05d}.safetensors"


def write_layer(
    folder: Path, number: int, statistics: Mapping[str, InputStatistics], aliases: Mapping[str, str], *, crossed: bool = False
) -> None:
    """Keep a layer's statistics by key, durably; ``aliases`` say under which key a shared input is kept.

    ``crossed``: cross products were summed, wherever original states are other ones.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{key}.hessian": found.hessian for key, found in sorted(statistics.items())}
    tensors |= {f"{key}.cross": found.cross for key, found in sorted(statistics.items()) if found.cross is not None}
    metadata = {
        "aliases": json.dumps({name: key for name, key in sorted(aliases.items()) if name != key}),
        "tokens": json.dumps({key: found.tokens for key, found in sorted(statistics.items())}),
        **({"crossed": "true"} if crossed else {}),
    }
    path = layer_path(folder, number)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=metadata)
    with open(partial, "rb") as file:
        make_durable(file.fileno())
    os.replace(partial, path)
    make_folder_durable(folder)


def is_finite(statistics: InputStatistics) -> bool:
    """Whether sums overflowed or saw a NaN."""
    known = statistics.hessian
    return bool(torch.isfinite(known.abs().max())) if known.numel() else True
