"""Between batches and jobs: which inputs are one and the same, where their sums lie, and what experts are fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorsurgeon.calibrate.codes.layer import Job
from tensorsurgeon.calibrate.spread.items import Choose, FedTo, Shown, SumUp
from tensorsurgeon.calibrate.walk.experts import ExpertInputs, ExpertStatistics, InputStatistics
from tensorsurgeon.errors import PlanError


class SpreadKeys:
    """What batches showed, in their order; statistics are read and computed on nodes, by what ``item`` says."""

    def __init__(
        self,
        shown: Sequence[Shown],
        experts: Mapping[str, ExpertStatistics],
        fed: Mapping[str, ExpertInputs],
        before: Mapping[str, ExpertInputs],
    ) -> None:
        self._shown = shown
        self._experts = {name: found for found in experts.values() for name in (found.stack.first_name, found.stack.down_name)}
        self._rows = {name: inputs.rows for name, inputs in fed.items()}
        self._rows_before = {name: inputs.rows for name, inputs in before.items()}
        self._gathered = {found.stack.first_name for found in experts.values() if found.stack.copies}
        self._paths: dict[str, Path] = {}
        self._leader = self._leaders()

    def _leaders(self) -> dict[str, str]:
        """By name the first that shared its input in the first batch, which it has to do in all others."""
        first = self._shown[0].same
        by_input: dict[int, str] = {}
        leader = {name: by_input.setdefault(number, name) for name, number in first.items()}
        for shown in self._shown[1:]:
            for name, chosen in leader.items():
                if shown.same[name] != shown.same[chosen]:
                    raise PlanError(f"{name} and {chosen} shared their input at first, but not later; no statistics")
        return leader

    def sums(self, folder: Path, layer: int) -> dict[str, SumUp]:
        """The pieces of work that sum each distinct input."""
        found = {}
        for number, name in enumerate(dict.fromkeys(self._leader.values())):
            batches = [(shown.path, shown.kept[name], shown.tokens) for shown in self._shown]
            path = folder / f"spread-{layer}-sum-{number}.pt"
            found[name] = SumUp(batches, self._shown[0].crossed, name in self._gathered, path)
        return found

    def summed(self, name: str, path: Path) -> None:
        """The sum of this input lies there."""
        self._paths[name] = path

    def shared_key(self, key: str) -> str:
        """The key under which a shared input is kept."""
        return self._leader.get(key, key)

    def of(self, key: str) -> InputStatistics | None:
        """Nothing of them is on this machine."""
        raise NotImplementedError(key)

    def item(self, layer: int, jobs: tuple[Job, ...]) -> Choose:
        """The piece of work that chooses codes for jobs of one key."""
        key = jobs[0].key
        parameter, _, expert = key.rpartition(".")
        experts = self._experts.get(parameter) if expert.isdecimal() else None
        fed = None
        if experts is not None:
            tokens = experts.tokens_of(int(expert))
            fed = FedTo(experts.stack.name, int(expert), parameter != experts.stack.down_name, tokens)
        return Choose(layer, jobs, None if fed else self._paths.get(key), fed, self._rows, self._rows_before)
