"""Walk a source and its targets through the same text, layer by layer, and say how far their predictions are apart."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from tensorsurgeon.calibrate.device import device_named, identity_of, works_on_card
from tensorsurgeon.calibrate.walk.allocator import give_back_memory
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.workers import run_parallel
from tensorsurgeon.errors import RecipeError
from tensorsurgeon.evaluating.options import TextOptions
from tensorsurgeon.evaluating.predicting import predict
from tensorsurgeon.evaluating.progress import Reached, Work
from tensorsurgeon.evaluating.result import Evaluation, evaluation_of
from tensorsurgeon.evaluating.side import Side
from tensorsurgeon.evaluating.step import Step
from tensorsurgeon.evaluating.text import Text, load_text
from tensorsurgeon.machine.limits import usable_cores
from tensorsurgeon.quant.threads import one_torch_thread
from tensorsurgeon.version import __version__

logger = logging.getLogger(__name__)

# Hidden from readers of the checkpoint and from those who upload it.
_WORK: Final = Path(".cache", "surgeon-evaluation")


def evaluate(
    targets: Sequence[str | os.PathLike[str]],
    text: TextOptions,
    *,
    against: str | os.PathLike[str] | None = None,
    float_inputs: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    stop: threading.Event | None = None,
    progress: Callable[[Step], None] = lambda _: None,
) -> Evaluation:
    """Compare each target's predictions with those of ``against``; without it, only say how well each predicts.

    ``float_inputs``: weights alone, where the config asks for quantized inputs too. Started again after it was stopped, it
    goes on. Raises RecipeError for a text or models that do not fit, CheckpointError and PlanError for what cannot be walked.
    """
    if find_spec("transformers") is None:
        raise RecipeError("evaluation runs the model's own forward: pip install 'tensorsurgeon[calibrate]'")
    if not targets:
        raise RecipeError("name a checkpoint to evaluate")
    where, stop = device_named(device), stop or threading.Event()
    threads = 1 if works_on_card(where) else workers or usable_cores()
    paths = [os.fspath(path) for path in ([against] if against is not None else []) + list(targets)]
    with ExitStack() as held, one_torch_thread():
        sides = [Side(path, where, held, float_inputs=float_inputs) for path in paths]
        for side in sides[1:]:
            side.check_same_shape(sides[0])
        loaded = load_text(text, sides[0].opened.root, sides[0].model.vocabulary_rows)
        work = held.enter_context(_work(Path(targets[0]), _identity(sides, loaded, where, float_inputs)))
        walk = _Walk(sides, loaded, work, has_source=against is not None, workers=threads, stop=stop, progress=progress)
        errors = walk.layers()
        held.callback(walk.close)
        scores = predict(sides, loaded, against is not None, workers=threads, stop=stop, progress=walk.told)
        return evaluation_of(sides, loaded, scores, errors, has_source=against is not None, device=identity_of(where))


class _Walk:
    """All models through all layers, and what their states are apart after each."""

    def __init__(
        self,
        sides: Sequence[Side],
        text: Text,
        work: Work,
        *,
        has_source: bool,
        workers: int,
        stop: threading.Event,
        progress: Callable[[Step], None],
    ) -> None:
        self._sides, self._text, self._work = sides, text, work
        self._workers, self._stop, self._progress = workers, stop, progress
        self._pairs = list(range(1, len(sides))) if has_source else []
        self._count = len(sides[0].model.layers)

    def layers(self) -> list[list[float]]:
        """Walk every layer; for each target the relative error of the states before the first layer and after each."""
        errors = self._begin()
        first = len(errors[0]) - 1 if errors else self._first
        for number in range(first, self._count):
            began = time.monotonic()
            give_back_memory()
            after = []
            for k, side in enumerate(self._sides):
                self.told(Step(number * len(self._sides) + k, self._count * len(self._sides), f"layer {number} of {side.name}"))
                made = self._new(number + 1, k)
                side.run_layer(number, made, workers=self._workers, stop=self._stop)
                after.append(made)
            self._take(after)
            for row, k in zip(errors, self._pairs, strict=True):
                row.append(self._apart(k))
            self._reach(number + 1, errors)
            worst = f", states {max(row[-1] for row in errors):.4f} apart" if errors else ""
            logger.info("layer %d of 0 to %d%s, %.1f s", number, self._count - 1, worst, time.monotonic() - began)
        return errors

    def told(self, step: Step) -> None:
        """Pass on where the run is."""
        self._progress(step)

    def _begin(self) -> list[list[float]]:
        """Where an earlier run stopped, or before the first layer."""
        walks = [side.begin(self._text.tokens, self._work.folder_of(k)) for k, side in enumerate(self._sides)]
        reached = self._work.read()
        if reached is not None:
            shapes = [(walk.shape, side.model.dtype) for walk, side in zip(walks, self._sides, strict=True)]
            kept = self._work.kept_states(reached.layer, reached.states, shapes)
            if kept is not None:
                for walk in walks:
                    walk.embed(None)
                self._take(kept)
            # What layers hand on beside states is not kept.
            if kept is not None and not (reached.layer and any(walk.passes_on for walk in walks)):
                logger.info("going on at layer %d, where an earlier run of the same stopped", reached.layer)
                self._first = reached.layer
                return [list(row) for row in reached.errors]
        states = [self._new(0, k) for k in range(len(self._sides))]
        for walk, made in zip(walks, states, strict=True):
            walk.embed(made.write)
        self._take(states)
        self._first = 0
        errors = [[self._apart(k)] for k in self._pairs]
        self._reach(0, errors)
        return errors

    def _new(self, layer: int, k: int) -> HiddenStates:
        walk = self._sides[k].walk
        assert walk is not None
        return self._work.new_states(layer, k, walk.shape, self._sides[k].model.dtype)

    def _take(self, states: Sequence[HiddenStates]) -> None:
        self.close()
        for side, made in zip(self._sides, states, strict=True):
            side.states = made

    def _reach(self, layer: int, errors: list[list[float]]) -> None:
        opened = [side.states for side in self._sides if side.states is not None]
        for states in opened:
            states.sync()
        self._work.advance(Reached(layer, tuple(states.digest for states in opened), tuple(map(tuple, errors))))

    def _apart(self, k: int) -> float:
        """||target - source|| / ||source|| over all tokens of text, sums in F64."""
        source, target = self._sides[0].states, self._sides[k].states
        assert source is not None
        assert target is not None
        counted = self._text.counted[..., None]
        sums = torch.zeros(len(counted), 2, dtype=torch.float64)

        def work(sample: int) -> None:
            rows = slice(sample, sample + 1)
            one, other = (s.read(sample, sample + 1).float() * counted[rows] for s in (source, target))
            sums[sample, 0], sums[sample, 1] = (other - one).double().square().sum(), one.double().square().sum()

        run_parallel(len(counted), work, workers=self._workers, stop=self._stop)
        apart, whole = sums.sum(0).tolist()
        return float((apart / whole) ** 0.5) if whole else 0.0

    def close(self) -> None:
        """Let go of the states' files, which stay."""
        for side in self._sides:
            if side.states is not None:
                side.states.close()
                side.states = None


@contextmanager
def _work(target: Path, identity: dict[str, Any]) -> Iterator[Work]:
    """A folder in the target, kept until a run is through; elsewhere, and for this run only, where none can be made there."""
    folder = target / _WORK
    if not target.is_dir() or not os.access(target, os.W_OK):
        with tempfile.TemporaryDirectory(prefix="surgeon-evaluation-") as made:
            logger.warning("%s cannot be written to: if this run is stopped, nothing of it is kept", target)
            yield Work(Path(made), identity)
        return
    work = Work(folder, identity)
    yield work
    work.remove()
    cache = folder.parent
    if not any(cache.iterdir()):
        cache.rmdir()


def _identity(sides: Sequence[Side], text: Text, device: torch.device, float_inputs: bool) -> dict[str, Any]:
    import transformers

    return {
        "models": [side.opened.fingerprint() for side in sides],
        "text": text.described["digest"],
        "lengths": text.lengths.tolist(),
        "float_inputs": float_inputs,
        "device": identity_of(device),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
