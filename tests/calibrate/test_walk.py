"""The walk gives what transformers' own forward gives, bit for bit."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.lines import lines_of
from tensorsurgeon.calibrate.walk.model import StreamedModel, read_weights
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import CheckpointError, NumericError, SurgeonError
from tensorsurgeon.quant.threads import one_torch_thread
from tests.calibrate.models import save_random
from tests.checkpoints import FIXTURE


def walk_through(
    folder: Path, tokens: np.ndarray, work: Path, *, implementation: str | None, workers: int = 2
) -> list[torch.Tensor]:
    """Hidden states before the first layer and after each."""
    checkpoint = open_checkpoint(folder)
    model = StreamedModel(checkpoint, experts_implementation=implementation)
    with Source(checkpoint) as source:
        walk = Walk(model, read_weights(TensorReader(checkpoint, source)), tokens)
        hidden = HiddenStates(work / "h", walk.shape, model.dtype, create=True)
        walk.embed(hidden.write)
        states = [hidden.read(0, len(tokens))]
        for number in range(len(model.layers)):
            after = HiddenStates(work / f"h{number}", walk.shape, model.dtype, create=True)
            with model.layer(number, walk.read) as layer:
                walk.run_layer(number, layer, hidden, after, workers=workers, stop=threading.Event())
            assert all(p.is_meta for p in model.layers[number].parameters())
            hidden.close()
            hidden = after
            states.append(hidden.read(0, len(tokens)))
        hidden.close()
    assert [b - a for a, b in walk.batches][:-1] == [walk.batches[0][1]] * (len(walk.batches) - 1)
    return states


def full_forward(folder: Path, tokens: np.ndarray, implementation: str | None) -> list[torch.Tensor]:
    """The same out of the model as transformers loads it, in the walk's batches; the last is after the final norm."""
    import transformers

    known = {} if implementation is None else {"experts_implementation": implementation}
    has_vision = folder == FIXTURE or "split" in folder.name
    auto = transformers.AutoModelForImageTextToText if has_vision else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.bfloat16, **known).eval()
    size = max(1, 2048 // tokens.shape[1])
    parts = []
    norms = []
    last = model.get_decoder().layers[-1]
    last.register_forward_hook(lambda module, args, out: norms.append(out[0] if isinstance(out, tuple) else out))
    with one_torch_thread(), torch.no_grad():
        for start in range(0, len(tokens), size):
            ids = torch.from_numpy(tokens[start : start + size])
            parts.append(model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states)
    states = [torch.cat(batch) for batch in zip(*parts, strict=True)]
    # transformers reports the last state after the norm; the hook has it before.
    return [*states[:-1], torch.cat(norms)]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"state {number} differs by {float((a - b).abs().max())}"
        assert float(a.float().std()) > 1e-3


@pytest.mark.parametrize("implementation", ["eager", None])
@pytest.mark.parametrize("experts", ["fused", "split"])
def test_hidden_states_equal_the_full_forward_with_fused_and_per_expert_experts(
    experts: str, implementation: str | None, split_checkpoint: Path, tmp_path: Path
) -> None:
    folder = FIXTURE if experts == "fused" else split_checkpoint
    tokens = np.random.default_rng(1).integers(0, 2000, (19, 200))  # a last batch that is smaller than the others
    found = walk_through(folder, tokens, tmp_path, implementation=implementation)
    assert_equal(found, full_forward(folder, tokens, implementation))


@pytest.mark.parametrize("kind", ["llama", "tied", "gemma3", "qwen3_moe", "mixtral"])
def test_hidden_states_equal_the_full_forward_of_other_architectures(kind: str, tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", kind)
    tokens = np.random.default_rng(2).integers(0, 96, (5, 48))
    assert_equal(walk_through(folder, tokens, tmp_path, implementation="eager"), full_forward(folder, tokens, "eager"))


def test_one_worker_and_three_give_the_same_states(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "qwen3_moe")
    tokens = np.random.default_rng(3).integers(0, 96, (90, 64))
    one = walk_through(folder, tokens, tmp_path, implementation="eager", workers=1)
    three = walk_through(folder, tokens, tmp_path, implementation="eager", workers=3)
    assert all(map(torch.equal, one, three))


def test_every_row_of_every_expert_is_traced_to_where_transformers_puts_it(split_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(split_checkpoint)
    model = StreamedModel(checkpoint)
    traced = model.traced(0)
    seen = 0
    with Source(checkpoint) as source:
        reader = TensorReader(checkpoint, source)
        with model.layer(0, read_weights(reader)) as layer:
            for (name, turned), runs in traced.runs.items():
                if turned:
                    continue
                rows = torch.from_numpy(reader.array(name).astype(np.float32)).reshape(-1, checkpoint.specs[name].shape[-1])
                for first, lines in runs:
                    found = lines_of(layer.get_parameter(lines.name.removeprefix(model.layer_names[0] + ".")), lines)
                    assert torch.equal(found.float(), rows[first : first + lines.total])
                    seen += lines.total
    assert seen > 8 * 3 * 128


def test_hidden_states_that_are_not_finite_name_the_layer_and_the_sample(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = np.full((3, 16), 7)
    tokens[2, 3] = 5
    with pytest.raises(NumericError, match=r"the embeddings: hidden states of calibration sample 2 are not finite"):
        walk_through(folder, tokens, tmp_path, implementation="eager")


def test_a_layer_that_misses_a_tensor_is_named(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1: no tensor of the checkpoint makes mlp\.up_proj\.weight"):
        walk_through(folder, np.full((1, 8), 1), tmp_path, implementation="eager")


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nobody", "architectures": ["Nobody"]}))
    with pytest.raises(CheckpointError, match="does not know this model"):
        StreamedModel(open_checkpoint(folder))


def test_a_quantization_that_no_tensor_shows_is_refused(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(SurgeonError):
        StreamedModel(open_checkpoint(folder))
