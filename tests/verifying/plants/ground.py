"""A copy of a good checkpoint to plant in: tensors are changed in place, so that nothing but the plant differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.described import Described, check_described
from tensorsurgeon.verifying.dialects import read_claims
from tensorsurgeon.verifying.findings import Findings
from tests.checkpoints import INDEX, read_all
from tests.verifying.subjects import write_shard


class NotHereError(Exception):
    """A kind that this checkpoint has no place for."""


class Ground:
    """A checkpoint and what is quantized in it; ``folder`` is a copy that may be spoilt."""

    def __init__(self, origin: Path, folder: Path, described: Described) -> None:
        shutil.copytree(origin, folder)
        self.folder = folder
        self._described = described
        self._modules = list(described.modules)

    @property
    def module(self) -> str:
        """A quantized module that is like its neighbours: the q_proj of the last layer, or what comes near."""
        return self.one_of(lambda name: name.endswith("q_proj")) or self._modules[len(self._modules) // 2]

    @property
    def sibling(self) -> str:
        """Another module of the same form."""
        shape = self.shape
        found = self.one_of(lambda name: name != self.module and self._described.modules[name].shape == shape)
        return found or not_here()

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the module."""
        return self._described.modules[self.module].shape

    @property
    def claim(self) -> Any:
        """What the config says of it."""
        return self._described.modules[self.module].claim

    @property
    def main(self) -> str:
        """Its tensor of codes."""
        return next(f"{self.module}.{n}" for n in ("weight_packed", "qweight", "weight") if self.has(f"{self.module}.{n}"))

    @property
    def scale(self) -> str:
        """Its tensor of scales."""
        return f"{self.module}.{self.claim.scale_name}"

    @property
    def zeros(self) -> str:
        """Its tensor of zero points."""
        names = (f"{self.module}.{n}" for n in ("weight_zero_point", "qzeros"))
        return next((n for n in names if self.has(n)), "") or not_here()

    @property
    def is_transposed(self) -> bool:
        """Whether outputs run along the last axis of codes and scales."""
        return self.claim.layout in ("gptq", "awq") or self.claim.transposed

    def one_of(self, fits: Callable[[str], bool]) -> str:
        """The last module that fits; empty where none does."""
        return next((name for name in reversed(self._modules) if fits(name)), "")

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.specs

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor."""
        return open_checkpoint(self.folder, tolerant=True).specs

    def float_named(self, *endings: str) -> str:
        """A float tensor whose name ends so."""
        found = [n for n, s in self.specs.items() if n.endswith(endings) and s.dtype.is_float and s.dtype.bits >= 16]
        return found[-1] if found else not_here()

    @contextmanager
    def changed(self, name: str) -> Iterator[np.ndarray]:
        """A tensor's elements, to be changed in place; NotHereError if nothing changed."""
        checkpoint = open_checkpoint(self.folder, tolerant=True)
        spec = checkpoint.specs.get(name) or not_here()
        shard, offset = checkpoint.location(name)
        with open(checkpoint.shards[shard].path, "r+b") as file:
            file.seek(offset)
            before = file.read(spec.nbytes)
            array = np.frombuffer(before, spec.dtype.numpy).reshape(spec.shape).copy()
            yield array
            if array.tobytes() == before:
                raise NotHereError
            file.seek(offset)
            file.write(array.tobytes())

    def rewritten(self, change: Callable[[dict[str, np.ndarray]], object]) -> None:
        """The first shard written anew with other tensors, the index with it."""
        shard = self.shards[0]
        tensors = {n: a.copy() for n, a in read_all(self.folder).items() if self._lies_in(n, shard)}
        change(tensors)
        write_shard(shard, tensors)
        if (self.folder / INDEX).exists():
            document = json.loads((self.folder / INDEX).read_text())
            kept = {n: f for n, f in document["weight_map"].items() if f != shard.name}
            document["weight_map"] = kept | dict.fromkeys(tensors, shard.name)
            with suppress(SurgeonError):
                # Names that lie in two shards now can no longer be opened.
                specs = open_checkpoint(self.folder, tolerant=True).specs
                document["metadata"]["total_size"] = sum(spec.nbytes for spec in specs.values())
            (self.folder / INDEX).write_text(json.dumps(document))

    @property
    def shards(self) -> list[Path]:
        """Files of weights."""
        return sorted(self.folder.glob("*.safetensors"))

    def _lies_in(self, name: str, shard: Path) -> bool:
        checkpoint = open_checkpoint(self.folder, tolerant=True)
        return checkpoint.shards[checkpoint.location(name).shard].path == shard

    @contextmanager
    def json(self, file: str = "config.json") -> Iterator[dict[str, Any]]:
        """A JSON file, to be changed; NotHereError if it is not here or nothing changed."""
        path = self.folder / file
        if not path.exists():
            raise NotHereError
        content = json.loads(path.read_text())
        before = json.dumps(content)
        yield content
        if json.dumps(content) == before:
            raise NotHereError
        path.write_text(json.dumps(content, indent=2))

    @contextmanager
    def quantization(self) -> Iterator[dict[str, Any]]:
        """The quantization_config and its copies, to be changed alike."""
        with self.json() as config:
            yield config.get("quantization_config") or not_here()
        for name in ("quantize_config.json", "quantization_config.json"):
            if (self.folder / name).exists():
                (self.folder / name).write_text(json.dumps(config["quantization_config"]))

    @contextmanager
    def model(self) -> Iterator[dict[str, Any]]:
        """The text model's config, to be changed."""
        with self.json() as config:
            yield config.get("text_config", config)


def not_here() -> Any:
    """For use in expressions."""
    raise NotHereError


def described_in(folder: Path) -> Described:
    """What is quantized in a good checkpoint."""
    checkpoint = open_checkpoint(folder)
    findings = Findings()
    with TensorReader(checkpoint) as reader:
        return check_described(reader, read_claims(checkpoint.specs, findings), findings, known_method=True)


Plant = Callable[[Ground], object]


class Kind(NamedTuple):
    """One kind of fault; ``group`` is what it is a fault of."""

    name: str
    group: str
    plant: Plant


KINDS: Final[list[Kind]] = []


def kind(plant: Plant) -> Plant:
    """Register a kind under its function's name."""
    KINDS.append(Kind(plant.__name__, plant.__module__.rpartition(".")[2], plant))
    return plant
