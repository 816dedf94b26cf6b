"""AutoRound on the chunks that ours are calibrated on, scored by the same judge.

    PYTHON benchmarks/their_autoround.py ORDERS.json THREADS     # by an interpreter that has auto-round, as bench_quality.py does

Of a checkpoint with a vision tower, transformers' text class is loaded, whose linears are the same. AutoRound leaves linears
as they are whose outputs are no multiple of 32 (a and b of a linear attention); ours have those quantized too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from bench_kl import Judge

# The linears of the decoder layers but routers and gates, as in our quantize-linears.
_LEFT = ("lm_head", "gate", "shared_expert_gate")


def serve(order: dict[str, Any]) -> None:
    """The other interpreter: the weights that it changed, as a reader has them, and its CPU seconds."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(order["folder"])
    tokens = torch.from_numpy(np.load(order["tokens"]))
    tokenizer = AutoTokenizer.from_pretrained(order["model"])
    # Its multimodal path wants a processor, so the text model is saved by itself.
    AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.bfloat16).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    model = AutoModelForCausalLM.from_pretrained(folder / "text", dtype=torch.bfloat16)
    for layer in model.model.layers:
        # It hands each layer the first one's mask, which may be a linear attention's; chunks are full, and no layer needs one.
        layer.register_forward_pre_hook(_without_mask, with_kwargs=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    left = {
        name: {"bits": 16, "act_bits": 16}
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _LEFT
    }
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    began = time.process_time()
    tool = AutoRound(
        model=model, tokenizer=tokenizer, scheme=f"W{order['num_bits']}A16", bits=order["num_bits"],
        group_size=order["group_size"], sym=True, iters=order["steps"], nsamples=len(tokens), seqlen=tokens.shape[1],
        batch_size=8, dataset=torch.utils.data.DataLoader(rows, batch_size=8), layer_config=left, device_map="cpu", seed=42,
        enable_torch_compile=False,
    )  # fmt: skip
    made, _ = tool.quantize()
    seconds = time.process_time() - began
    live = {
        name: value.contiguous()
        for name, value in made.state_dict().items()
        if name.endswith("weight") and not (name in before and torch.equal(before[name], value))
    }
    save_file(live, folder / "live.safetensors")
    (folder / "seconds.json").write_text(json.dumps(seconds))


def _without_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attention_mask": None}


def autoround_run(
    interpreter: Path, judge: Judge, model: Path, tokens: np.ndarray, grid: tuple[int, int], steps: int, work: Path
) -> dict[str, Any]:
    """KL and NLL by sequence of what AutoRound makes of ``tokens`` in so many steps, and its CPU seconds."""
    folder = work / "autoround"
    folder.mkdir()
    np.save(folder / "tokens.npy", tokens)
    order = {
        "model": str(model), "tokens": str(folder / "tokens.npy"), "num_bits": grid[0], "group_size": grid[1],
        "steps": steps, "folder": str(folder),
    }  # fmt: skip
    (folder / "orders.json").write_text(json.dumps([order]))
    with open(folder / "log", "w") as log:
        command = [interpreter, __file__, folder / "orders.json", "1"]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise SystemExit(f"{(folder / 'log').read_text()[-4000:]}\nAutoRound's interpreter stopped with {code}")
    scored = score(judge, model, folder / "live.safetensors", work)
    seconds = json.loads((folder / "seconds.json").read_text())
    shutil.rmtree(folder)
    return {**scored, "seconds": seconds}


def score(judge: Judge, model: Path, live: Path, work: Path) -> dict[str, Any]:
    """The original with the weights of ``live`` in the place of its own; experts are stored one by one."""
    from tensorsurgeon.checkpoint.folder import open_checkpoint
    from tensorsurgeon.planning.plan import make_plan
    from tensorsurgeon.planning.rewriting import steps_of
    from tensorsurgeon.recipes.library import load_transform
    from tensorsurgeon.running.run import run_plan

    split = work / "split"
    run_plan(make_plan(steps_of(load_transform("split-experts", {"exclude": ["maybe:role:mtp"]})), open_checkpoint(model)), split)
    tensors = {name: tensor for path in sorted(split.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    for name, tensor in load_file(live).items():
        place = name if name in tensors else name.replace("model.", "model.language_model.", 1)
        if place not in tensors:
            raise SystemExit(f"AutoRound changed {name}, which the checkpoint does not have")
        tensors[place] = tensor.to(tensors[place].dtype)
    for path in split.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, split / "model.safetensors", {"format": "pt"})
    scored = judge.score(split)
    shutil.rmtree(split)
    return scored


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    for each in json.loads(Path(sys.argv[1]).read_text()):
        serve(each)
