"""Decoders whose layers take or return more than hidden states are walked as their own forward runs, bit for bit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensorsurgeon.calibrate.data.data import load_data
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.calibrate.state import CalibrationState, Reached
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.model import StreamedModel, read_weights
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import PlanError
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.quant.threads import one_torch_thread
from tests.calibrate.models import comparable, options_of, plan_of, write_ids
from tests.checkpoints import apply
from tests.families import build
from tests.families.table import FAMILIES

TOKENS = np.random.default_rng(1).integers(3, 400, (7, 40))
SAMPLES = 3  # in a batch; the last batch has one


def walked(folder: Path, work: Path) -> tuple[StreamedModel, Walk, list[torch.Tensor]]:
    """The states before the first layer and after each, from three batches."""
    checkpoint = open_checkpoint(folder)
    model = StreamedModel(checkpoint)
    with Source(checkpoint) as source:
        walk = Walk(model, read_weights(TensorReader(checkpoint, source)), TOKENS, SAMPLES * 40, folder=work)
        hidden = HiddenStates(work / "h", walk.shape, model.dtype, create=True)
        walk.embed(hidden.write)
        states = [hidden.read(0, len(TOKENS))]
        for number in range(len(model.layers)):
            after = HiddenStates(work / f"h{number}", walk.shape, model.dtype, create=True)
            with model.layer(number, walk.read) as layer:
                walk.run_layer(number, layer, hidden, after, workers=2, stop=threading.Event())
            hidden.close()
            hidden = after
            states.append(hidden.read(0, len(TOKENS)))
        hidden.close()
    return model, walk, states


def own(
    folder: Path, name: str, layers: list[str], axis: int, tokens: np.ndarray = TOKENS, samples: int = SAMPLES
) -> list[torch.Tensor]:
    """The same from the class of transformers with all its weights; a layer that is not called hands states on."""
    cls: Any = build.class_of(FAMILIES[name])
    model = cls.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager").eval()
    seen: dict[int, list[torch.Tensor]] = {}

    def before(_: Any, args: Any, kwargs: Any) -> None:
        seen.setdefault(-1, []).append(args[0] if args else kwargs["hidden_states"])

    model.get_submodule(layers[0]).register_forward_pre_hook(before, with_kwargs=True)
    for number, layer in enumerate(layers):
        model.get_submodule(layer).register_forward_hook(
            lambda _, args, out, number=number: seen.setdefault(number, []).append(out[0] if isinstance(out, tuple) else out)
        )
    with one_torch_thread(), torch.no_grad():
        for start in range(0, len(tokens), samples):
            model(input_ids=torch.from_numpy(tokens[start : start + samples]), use_cache=False)
    states: list[torch.Tensor] = []
    for number in range(-1, len(layers)):
        states.append(torch.cat([part.movedim(axis, 0) for part in seen[number]]) if number in seen else states[-1])
    return states


KINDS = {
    "gptj": "a tuple of two",
    "falcon": "a tuple whose second value is None",
    "falcon_h1": "a tuple of one, and a buffer made in the model's __init__",
    "bamba": "two values that are unpacked",
    "bloom": "biases for attention among the arguments",
    "glm_moe_dsa": "chosen tokens that the next layer is called with",
    "gemma3n_text": "four dimensions, keys and values shared between layers, an input per layer made of the text",
    "gemma4_text": "an input per layer made of the text",
    "zamba2": "blocks shared by layers, embeddings as an argument",
    "mamba2": "states in F32",
    "deepseek_v4": "four dimensions, token ids as an argument",
    "mllama": "a layer that text does not reach",
    "longcat_flash": "fewer layers than num_hidden_layers",
    "llama4_text": "a decoder one module deeper",
    "gpt_bigcode": "a mask of booleans as a buffer",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_states_equal_the_models_own_forward(name: str, tmp_path: Path) -> None:
    build.write(name, tmp_path)
    model, walk, found = walked(tmp_path / "source", tmp_path)
    axis = 1 if name == "gemma3n_text" else 0
    expected = own(tmp_path / "source", name, model.layer_names, axis)
    assert len(found) == len(expected) == len(model.layers) + 1
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), f"state {number}"
        assert float(ours.float().std()) > 1e-3
    assert [walk.reaches(number) for number in range(len(model.layers))].count(False) == (name == "mllama")


@pytest.mark.filterwarnings("ignore")
def test_layers_that_reuse_the_choice_of_an_earlier_one_get_that_of_their_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["glm_moe_dsa"]
    config = {**family.config, "num_hidden_layers": 3, "indexer_types": ["full", "shared", "shared"], "index_topk": 8}
    monkeypatch.setitem(FAMILIES, "glm_moe_dsa", family._replace(config=config))
    build.write("glm_moe_dsa", tmp_path)
    model, walk, found = walked(tmp_path / "source", tmp_path)
    assert walk.passes_on
    assert all(map(torch.equal, found, own(tmp_path / "source", "glm_moe_dsa", model.layer_names, 0)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zamba2", "gemma3n_text", "mamba2", "glm_moe_dsa"])
def test_the_last_layer_is_fed_what_the_quantized_model_feeds_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "zamba2":
        # A layer behind the second one that has the shared block: fed what its quantized weights make.
        more = {"num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"]}
        monkeypatch.setitem(FAMILIES, name, FAMILIES[name]._replace(config={**FAMILIES[name].config, **more}))
    build.write(name, tmp_path)
    np.save(tmp_path / "ids.npy", TOKENS)
    plan = plan_of(tmp_path / "source")
    seen: dict[int, torch.Tensor] = {}
    run_layer = Walk.run_layer

    def noting(self: Walk, number: int, layer: Any, inputs: HiddenStates, *rest: Any, **more: Any) -> None:
        seen[number] = inputs.read(0, len(TOKENS))
        run_layer(self, number, layer, inputs, *rest, **more)

    monkeypatch.setattr(Walk, "run_layer", noting)
    options = options_of(tmp_path / "ids.npy", samples=len(TOKENS), sequence_length=40)
    run_calibrated(plan, tmp_path / "out", options, workers=2)
    apply(Dequantize(), tmp_path / "out", tmp_path / "back", workers=1)
    layers = StreamedModel(plan.source).layer_names
    order = load_data(options, plan.source.root, 512).tokens
    expected = own(tmp_path / "back", name, layers, 1 if name == "gemma3n_text" else 0, order, len(TOKENS))[-2]
    assert torch.equal(seen[len(layers) - 1], expected)


class Stopped(Exception):
    """The run dies here."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mamba2", "gemma3n_text"])
def test_a_stopped_run_gives_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build.write(name, tmp_path)
    ids = write_ids(tmp_path / "ids.npy", rows=40)
    options, plan = options_of(ids, samples=40), plan_of(tmp_path / "source")
    run_calibrated(plan, tmp_path / "whole", options, workers=2)
    advance = CalibrationState.advance

    def stopping(self: CalibrationState, reached: Reached, *rest: Any) -> Reached:
        assert advance(self, reached, *rest).layer == 1
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationState, "advance", stopping)
        with pytest.raises(Stopped):
            run_calibrated(plan, tmp_path / "out", options, workers=2)
    run_calibrated(plan, tmp_path / "out", options, workers=2, resume=True)
    assert comparable(tmp_path / "out") == comparable(tmp_path / "whole")
    # What layers handed on is kept: such a run goes on at its layer as others do, and has nothing to say of it.
    assert "hand on more than hidden states" not in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_a_forward_that_fails_is_refused_with_the_class_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["mistral4"]
    # Heads of 32 whose rotary half is all 32: transformers builds it and cannot run it.
    monkeypatch.setitem(FAMILIES, "mistral4", family._replace(config={**family.config, "head_dim": 32}))
    build.write("mistral4", tmp_path)
    said = r"Mistral4ForCausalLM: transformers' own forward .* fails in model\.layers\.0 \(RuntimeError.*method=rtn rounds"
    with pytest.raises(PlanError, match=said):
        walked(tmp_path / "source", tmp_path)
