"""Every error the package raises on purpose, in one tree.

SurgeonError
├─ RecipeError        the transform or its parameters are wrong; nothing was read
├─ CheckpointError    the source is wrong; nothing was written
│  ├─ HeaderError, IndexMismatchError, MissingTensorError, ConfigError
├─ PlanError          the two do not fit; nothing was written
│  ├─ NoMatchError, NameCollisionError, SpecError, BudgetError, TargetError, EngineError
├─ ExecutionError     the run stopped; what is on disk can be resumed
│  ├─ PlanViolationError, NumericError, SinkError, SourceError, PublishError, Interrupted
├─ JournalError       the journal of a stopped run cannot be continued
└─ VerifyError        a finished checkpoint is not what it says it is

``exit_code`` is what the command line returns; each class has its own, so that scripts can tell them apart.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class SurgeonError(Exception):
    """Base of all deliberate errors: a message for a stranger, where it happened, and what would help.

    ``remedy`` ends the message. It names options of a run in braces (``; continue it with {resume}``): whoever called by
    function reads their names there, and the command line puts its flags in.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def told(self, options: Mapping[str, str]) -> str:
        """The whole message, with options spelled as the caller knows them."""
        text = self.message + self.remedy.format_map(options)
        return f"{self.where}: {text}" if self.where else text

    def __str__(self) -> str:
        return self.told(_InPython())


class _InPython(dict[str, str]):
    def __missing__(self, option: str) -> str:
        return f"{option}=True" if option in ("resume", "overwrite", "public", "anyway") else option


class RecipeError(SurgeonError):
    """The transform, its parameters or a pattern in it is wrong; nothing was read."""

    exit_code = 10


class CheckpointError(SurgeonError):
    """The source cannot be used as it is; nothing was written."""

    exit_code = 20


class HeaderError(CheckpointError):
    """A shard is no sound safetensors file."""

    exit_code = 21


class IndexMismatchError(CheckpointError):
    """The index and the shards contradict each other."""

    exit_code = 22


class MissingTensorError(CheckpointError):
    """A shard, or a tensor that belongs with others, is not there."""

    exit_code = 23


class ConfigError(CheckpointError):
    """config.json cannot be read, or says what no format here can mean."""

    exit_code = 24


class PlanError(SurgeonError):
    """Transform and checkpoint do not fit; nothing was written."""

    exit_code = 30


class NoMatchError(PlanError):
    """A pattern selects nothing."""

    exit_code = 31


class NameCollisionError(PlanError):
    """Two tensors would have the same name."""

    exit_code = 32


class SpecError(PlanError):
    """A dtype or shape that a rule cannot take."""

    exit_code = 33


class BudgetError(PlanError):
    """One piece of work needs more memory than it may have."""

    exit_code = 34


class TargetError(PlanError):
    """The target folder may not be written, or has too little room."""

    exit_code = 35


class EngineError(PlanError):
    """An engine that was asked for would not load the result."""

    exit_code = 37


class ExecutionError(SurgeonError):
    """The run stopped; what is done is kept and can be resumed, unless ``can_resume`` says otherwise."""

    exit_code = 40

    def __init__(self, message: str, *, where: str | None = None, remedy: str = "", can_resume: bool = True) -> None:
        super().__init__(message, where=where, remedy=remedy)
        self.can_resume = can_resume


class PlanViolationError(ExecutionError):
    """A step made something else than it planned: a bug of this package or of a step that somebody added."""

    exit_code = 41

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(message, where=where, remedy="; " + our_fault().replace("{", "{{").replace("}", "}}"), can_resume=False)


class NumericError(ExecutionError):
    """A value that cannot be stored or computed with: NaN, infinity, overflow."""

    exit_code = 42


class SinkError(ExecutionError):
    """Writing failed."""

    exit_code = 43


class SourceError(ExecutionError):
    """Reading failed, or the source changed while it was read."""

    exit_code = 44


class PublishError(ExecutionError):
    """The Hub does not take a checkpoint; what was uploaded stays there, and the same call goes on with it."""

    exit_code = 45


class Interrupted(ExecutionError):  # noqa: N818  # no fault of the run, so no Error
    """Somebody asked the run to stop."""

    exit_code = 130


class JournalError(SurgeonError):
    """The journal of a stopped run does not belong to this run, or is damaged."""

    exit_code = 50


class VerifyError(SurgeonError):
    """A finished checkpoint is not what it says it is."""

    exit_code = 60


def our_fault() -> str:
    """What to do about a fault that is nobody's but this package's; with the address, where the package was given one."""
    # Half as long to import as all else here, for the rarest of messages.
    from importlib import metadata

    try:
        urls = metadata.metadata("tensorsurgeon").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        urls = []
    places = [place for name, _, place in (url.partition(", ") for url in urls) if name == "Issues"]
    return "this is a fault of surgeon's own, please report it" + (f" at {places[0]}" if places else "")


def near_matches(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words closest to a misspelt one, best first; empty if none is close."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.6)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A clause for the end of a message: the near matches, or all choices where they are few."""
    near = near_matches(word, known)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    if len(known) <= 40:
        return f"; known: {', '.join(sorted(known))}"
    return ""
