"""vLLM serves quantized models of many families as transformers computes their dequantized weights.

Tiny models of transformers' own classes with random weights, stored as published (tests/families). Random weights predict
nothing, so log-probabilities are compared token by token with those of an independent program in F32: transformers on the
dequantized checkpoint. How far they may be apart is said by mistakes: what transformers computes with gate and up swapped, or
with square matrices transposed, is the distance of a layout that is read wrong. Medians over tokens, for an expert chosen
otherwise by a hair moves some tokens far.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.engines.advice import advise
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.library import load_transform
from tests.engines.conftest import Convert
from tests.engines.judging import Conversion, Engine, Row, conversion
from tests.engines.known_refusals import answer, served
from tests.families import build
from tests.families.trial import load, mistaken

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

W8A8, GPTQ, W4A16 = conversion("ct-w8a8-int8"), conversion("gptq-int4-g128", "scope=all"), conversion("ct-w4a16-g32")
MIXED = conversion("mixed", "attention=w8a8", "mlp=w4a16")
ATTENTION = conversion("ct-w8a8-int8", "where=role:attention", "split_experts=false")

SERVED: dict[str, tuple[Conversion, ...]] = {
    "llama": (W8A8, GPTQ, W4A16, MIXED),
    "qwen3_moe": (W8A8, GPTQ),
    "mixtral": (W8A8, GPTQ),  # experts as w1, w2, w3
    "gemma3": (W8A8, W4A16),  # a vision tower, other names in the engine
    "granitemoe": (W8A8,),  # experts from stacks of another name
    "gpt_oss": (ATTENTION,),  # experts stay one tensor; the engine says attn for self_attn
}
# Served without a word, its experts never loaded: what the plan says of it must be that.
GARBAGE = ("gpt_oss", W8A8)

# Median distances, of what is served and of the nearest mistake, in nats: llama .02 and .59 (W8A8), .008 and .60 (GPTQ);
# qwen3_moe .0055 and .073; mixtral .02 and .64; granitemoe .024 and .31; gemma3 .15 and .79, where BF16 alone makes .15.
NEAR, FAR = 0.25, 0.75


class Model(NamedTuple):
    """A family's checkpoint as published, and the tokens it is asked about, [sequences, positions]."""

    name: str
    source: Path
    tokens: torch.Tensor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("families")
    tokens = torch.randint(3, 400, (6, 48), generator=torch.Generator().manual_seed(1))
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    found = {}
    for name in SERVED:
        build.write(name, folder / f"{name}-built")
        found[name] = Model(name, (folder / f"{name}-built" / "source").rename(folder / name), tokens)
    return found


@pytest.fixture(scope="module")
def swapped(models: dict[str, Model], convert: Convert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose codes of gate and up stand in each other's place: what a wrong writer would make."""
    folder = convert(models["llama"].source, W8A8)
    tensors = load_file(folder / "model.safetensors")
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    turned = {name: next((name.replace(a, b) for a, b in other.items() if a in name), name) for name in tensors}
    wrong = tmp_path_factory.mktemp("wrong") / "llama-swapped"
    wrong.mkdir()
    save_file({turned[name]: tensor for name, tensor in tensors.items()}, wrong / "model.safetensors", {"format": "pt"})
    (wrong / "config.json").write_bytes((folder / "config.json").read_bytes())
    return wrong


@pytest.fixture(scope="module")
def scores(vllm: Engine, models: dict[str, Model], convert: Convert, swapped: Path) -> dict[str, Row]:
    asked = [(name, made) for name, several in SERVED.items() for made in several] + [GARBAGE]
    checkpoints = [convert(models[name].source, made) for name, made in asked]
    tokens = next(iter(models.values())).source.parent / "tokens.json"
    return vllm.ask("vllm_score.py", "--json", "--each", "--tokens", tokens, *checkpoints, swapped)


Distances = Callable[[str, Conversion, np.ndarray], tuple[float, float]]


@pytest.fixture(scope="module")
def distances(models: dict[str, Model], convert: Convert) -> Distances:
    """How far log-probabilities are from those of the dequantized weights, and of the nearest mistake in these."""

    @torch.no_grad()
    def logprobs(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
        every = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)[:, :-1]
        return every.gather(2, tokens[:, 1:, None]).flatten().numpy()

    def measure(name: str, made: Conversion, found: np.ndarray) -> tuple[float, float]:
        tokens = models[name].tokens
        model = load(convert(models[name].source, *made.then_dequantized("F32")), name)
        right = {key: value.clone() for key, value in model.state_dict().items()}
        apart = float(np.median(np.abs(found - logprobs(model, tokens))))
        wrong = [changed for kind in ("swapped", "transposed") if (changed := mistaken(right, kind))]
        assert wrong, f"{name} has no matrices that could be swapped or transposed"
        mistakes = []
        for changed in wrong:
            model.load_state_dict({**right, **changed})
            mistakes.append(float(np.median(np.abs(found - logprobs(model, tokens)))))
        return apart, min(mistakes)

    return measure


@pytest.mark.parametrize(("name", "made"), [(name, made) for name, several in SERVED.items() for made in several], ids=str)
def test_a_family_is_served_as_transformers_computes_it(
    vllm: Engine,
    models: dict[str, Model],
    convert: Convert,
    scores: dict[str, Row],
    distances: Distances,
    name: str,
    made: Conversion,
) -> None:
    source = models[name].source
    row, how = served(vllm, scores, convert(source, made), source, made)
    apart, mistake = distances(name, made, np.array(row["logprobs"]))
    answer(source, made, f"{apart:.4f} nats from its dequantized weights in transformers, a mistake {mistake:.4f}{how}")
    assert apart <= NEAR * mistake, f"{vllm.name}: {name} in {made} is {apart:.4f} nats off, a mistake would be {mistake:.4f}"


def test_codes_in_the_wrong_place_would_fail(
    vllm: Engine, models: dict[str, Model], convert: Convert, scores: dict[str, Row], swapped: Path, distances: Distances
) -> None:
    right, wrong = (
        np.array(vllm.accepted(scores, folder)["logprobs"]) for folder in (convert(models["llama"].source, W8A8), swapped)
    )
    _, mistake = distances("llama", W8A8, right)
    apart, _ = distances("llama", W8A8, wrong)
    assert apart > NEAR * mistake, f"gate and up swapped on disk: {apart:.4f} nats off"


def test_what_the_engine_passes_over_is_said_to_be_garbage(
    vllm: Engine, models: dict[str, Model], convert: Convert, scores: dict[str, Row], distances: Distances
) -> None:
    """Fails as soon as vLLM reads the experts: then the advice is to be changed."""
    name, made = GARBAGE
    source = models[name].source
    row = vllm.accepted(scores, convert(source, made))
    found = np.array(row["logprobs"])
    if np.isfinite(found).all():
        apart, mistake = distances(name, made, found)
        assert apart > FAR * mistake, f"{vllm.name} reads gpt-oss's experts one by one after all: {apart:.4f}, {mistake:.4f}"
    plan = make_plan(load_transform(made.transform), open_checkpoint(source))
    assert any(one.severity == "silent-garbage" and "experts" in one.subject for one in advise(plan, "vllm", 1))
