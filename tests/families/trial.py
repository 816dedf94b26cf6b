"""One family through everything: converted by the command line, read back by transformers, compared with what it was."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from torch import Tensor

from tensorsurgeon.calibrate.codes.rules import NOT_REACHED
from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.cli import main
from tests.families import build
from tests.families.table import FAMILIES

# Transform, bits, and the most that the values of one tensor may be off, relative to their size: what rounding explains.
TRANSFORMS = (("ct-w4a16-g32", 0.14), ("ct-w8a8-int8", 0.02))
ENCODERS = ("whisper",)  # nothing to calibrate by next tokens
SPREAD = 3.0  # how much farther logits may move than random errors of the same size move them


@dataclass
class Row:
    """What came of one family: a word for each stage, `right` or what was wrong with it."""

    family: str
    stages: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


class Wrong(Exception):
    """A stage that did not do what it should; the message says how."""


def fold(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def names(found: set[str]) -> str:
    folded = sorted({fold(name) for name in found})
    return ", ".join(folded[:4]) + (f" and {len(folded) - 4} more" if len(folded) > 4 else "")


def surgeon(*arguments: object) -> str:
    """What a command that must succeed prints. Raises Wrong with its message, or with its traceback's last line."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    if result.exit_code == 0:
        return str(result.stdout)
    if not isinstance(result.exception, SystemExit):
        at = traceback.extract_tb(result.exc_info[2])[-1]  # type: ignore[index]
        place = Path(at.filename).parts[-2:]
        raise Wrong(f"traceback: {type(result.exception).__name__}: {result.exception} ({'/'.join(place)}:{at.lineno})")
    said = [
        line.removeprefix("surgeon: ") for line in (result.stderr + result.stdout).splitlines() if line.startswith("surgeon: ")
    ]
    faults = [line for line in result.stdout.splitlines() if re.match(r"\s*(fault|unsound|✗|error)", line)]
    raise Wrong(f"exit {result.exit_code}: {(said or faults or result.stdout.splitlines() or ['nothing said'])[0]}")


def check_scope(folder: Path, target: Path) -> None:
    """What is no longer there byte for byte is what should have been quantized, and nothing else."""
    scope, source, made = (build.tensors_of(path) for path in (folder / "scope", folder / "source", target))

    def kept(name: str) -> bool:
        return (
            name in source and name in made and source[name].dtype == made[name].dtype and torch.equal(source[name], made[name])
        )

    marks = {name: int(mark.flatten()[0].item()) for name, mark in scope.items()}
    wrongly = {name for name, mark in marks.items() if mark == 0 and not kept(name)}
    missed = {name for name, mark in marks.items() if mark == 1 and kept(name)}
    if wrongly or missed:
        raise Wrong("; ".join(f"{word} {names(found)}" for word, found in (("takes", wrongly), ("leaves", missed)) if found))


def load(folder: Path, name: str) -> torch.nn.Module:
    """The class of transformers with the weights of a folder, in F32, none of them missing."""
    model, info = build.class_of(FAMILIES[name]).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    missing = {key for key in info["missing_keys"] if "inv_freq" not in key}
    if missing or info["mismatched_keys"]:
        raise Wrong(f"transformers misses {names(missing | {key[0] for key in info['mismatched_keys']})}")
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 400, (2, 24), generator=generator)
    if name == "whisper":
        return model(input_features=torch.randn(2, 16, 128, generator=generator), decoder_input_ids=tokens).logits
    return model(input_ids=tokens, use_cache=False).logits


def distance(a: Tensor, b: Tensor) -> float:
    """How far logits are apart at the median token: a mistake moves all, an expert chosen otherwise by a hair only some."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def off(value: Tensor, was: Tensor) -> float:
    """The greatest relative error of a tensor; of a stack that of each of its matrices."""
    if was.ndim < 3:
        return float((value - was).norm() / was.norm().clamp_min(1e-30))
    return float(((value - was).flatten(1).norm(dim=1) / was.flatten(1).norm(dim=1).clamp_min(1e-30)).max())


def check_values(read: torch.nn.Module, reference: torch.nn.Module, most: float) -> dict[str, float]:
    """How far each parameter that changed is off."""
    was = dict(reference.named_parameters())
    changed = {key: off(value.data, was[key].data) for key, value in read.named_parameters() if not torch.equal(value, was[key])}
    if not changed:
        raise Wrong("nothing was quantized")
    if scrambled := {key for key, error in changed.items() if not error <= most}:
        raise Wrong(f"off by {max(changed[key] for key in scrambled):.2f}: {names(scrambled)}")
    return changed


def check_logits(read: torch.nn.Module, reference: torch.nn.Module, changed: dict[str, float], name: str) -> tuple[float, float]:
    """The distance of the logits, and the most that it may be: what random errors of the same size bring."""
    expected = logits(reference, name)
    if not torch.isfinite(expected).all():
        raise Wrong("the harness's own model has logits that are not finite")
    found = distance(logits(read, name), expected)
    noise = 0.0
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        errors = {key: (dict(read.named_parameters())[key] - state[key]).square().mean().sqrt() for key in changed}
        moved = {key: state[key] + torch.randn(state[key].shape, generator=generator) * error for key, error in errors.items()}
        reference.load_state_dict(moved, strict=False)
        noise = max(noise, distance(logits(reference, name), expected))
    reference.load_state_dict(state)
    if not found <= SPREAD * noise:
        raise Wrong(f"logits off by {found:.3f}, random errors bring {noise:.3f}")
    return found, SPREAD * noise


def mistaken(parameters: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The parameters with a mistake that fits their shapes: gate and up swapped, or square matrices transposed."""
    if kind == "transposed":
        return {
            key: value.transpose(-1, -2)
            for key, value in parameters.items()
            if value.ndim >= 2 and value.shape[-1] == value.shape[-2]
        }
    swapped: dict[str, Tensor] = {}
    for key, value in parameters.items():
        for one, other in (("gate_proj", "up_proj"), ("w1", "w3"), ("w1", "v1")):
            partner = key.replace(one, other)
            if one in key.split(".") and partner in parameters and parameters[partner].shape == value.shape:
                swapped |= {key: parameters[partner], partner: value}
        if re.search(r"gate_up_proj(\.weight)?$|input_linear\.weight$", key):
            axis = -1 if value.ndim == 3 and value.shape[-1] > value.shape[-2] else -2
            swapped[key] = value.roll(value.shape[axis] // 2, axis)
    return swapped


def check_that_mistakes_show(
    reference: torch.nn.Module, changed: dict[str, float], name: str, allowed: float, most: float
) -> None:
    """The two checks before would have failed had gate and up been swapped, or square matrices transposed."""
    expected = logits(reference, name)
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    for kind in ("swapped", "transposed"):
        wrong = mistaken({key: state[key] for key in changed}, kind)
        if not wrong:
            continue
        if unseen := {key for key, value in wrong.items() if off(value, state[key]) <= most}:
            raise Wrong(f"{kind} {names(unseen)} would pass as rounding")
        reference.load_state_dict(wrong, strict=False)
        if distance(logits(reference, name), expected) <= allowed:
            raise Wrong(f"logits would not show {kind} weights")
        reference.load_state_dict(state)


def calibrated(folder: Path, source: Path) -> None:
    """Every linear that is quantized and that text reaches was quantized by GPTQ. The tokens make two batches."""
    generator = torch.Generator().manual_seed(2)
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps(torch.randint(3, 400, (40, 64), generator=generator).tolist()))
    target = folder / "gptq"
    options = ("--calibration", tokens, "--samples", 40, "--sequence-length", 64)
    surgeon("apply", "ct-w4a16-g32", source, target, "--quiet", "--set", "method=gptq", *options)
    rows = read_log(target / LOG_NAME)
    rows = [row for row in rows if row.note != NOT_REACHED]
    if other := {row.module for row in rows if row.method != "gptq"}:
        raise Wrong(
            f"{len(other)} of {len(rows)} not by gptq: {names(other)} ({next(row.note for row in rows if row.method != 'gptq')})"
        )
    surgeon("verify", target, "--against", source)


def stage(row: Row, name: str, function: Any, *arguments: Any) -> Any:
    """Run one stage; what goes wrong becomes its word, and None is returned."""
    try:
        found = function(*arguments)
    except Wrong as wrong:
        row.stages[name] = re.sub(r"/\S*/(?=source|reference|ct-|gptq)", "", str(wrong))
    except Exception as error:  # noqa: BLE001
        row.stages[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    else:
        row.stages[name] = "right"
        return found
    return None


def try_family(name: str, folder: Path, calibrate: bool = True) -> Row:
    """Everything for one row of the table, in FOLDER, which is emptied."""
    torch.set_num_threads(1)
    row = Row(name)
    shutil.rmtree(folder, ignore_errors=True)
    stage(row, "built", build.write, name, folder)
    source = folder / "source"
    reference = stage(row, "built", load, folder / "reference", name) if row.stages["built"] == "right" else None
    if reference is None:
        return row
    for transform, most in TRANSFORMS:
        target, back = folder / transform, folder / f"{transform}-back"
        at = transform.split("-")[1]
        stage(row, f"{at} plan", surgeon, "plan", transform, source)
        if row.stages[f"{at} plan"] == "right":
            stage(row, f"{at} apply", surgeon, "apply", transform, source, target, "--quiet")
        if row.stages.get(f"{at} apply") != "right":
            continue
        stage(row, f"{at} scope", check_scope, folder, target)
        stage(row, f"{at} verify", surgeon, "verify", target, "--against", source)
        stage(row, f"{at} dequantize", surgeon, "apply", "dequantize", target, back, "--quiet", "--set", "dtype=F32")
        read = stage(row, f"{at} read", load, back, name) if row.stages[f"{at} dequantize"] == "right" else None
        changed = stage(row, f"{at} values", check_values, read, reference, most) if read is not None else None
        bounds = stage(row, f"{at} logits", check_logits, read, reference, changed, name) if changed else None
        if changed and bounds:
            row.figures |= {f"{at} values": max(changed.values()), f"{at} logits": bounds[0], f"{at} allowed": bounds[1]}
            if at == "w8a8":
                stage(row, "mistakes show", check_that_mistakes_show, reference, changed, name, bounds[1], most)
    if calibrate and name not in ENCODERS and row.stages["w4a16 plan"] == "right":
        stage(row, "gptq", calibrated, folder, source)
    return row
