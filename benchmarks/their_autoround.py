"""AutoRound on the chunks that ours are calibrated on, run by an interpreter that has it: weights as a reader has them, and seconds.

    PYTHON benchmarks/their_autoround.py ORDERS.json THREADS

It knows text models alone here: of a checkpoint with a vision tower, transformers' text class is loaded, whose linears are the same.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def loader_of(tokens: torch.Tensor, batch: int) -> Any:
    """What AutoRound takes as its data: batches of ids."""
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    return torch.utils.data.DataLoader(rows, batch_size=batch, shuffle=False)


def run(order: dict[str, Any]) -> None:
    import numpy as np
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.from_numpy(np.load(order["tokens"]))
    text = Path(order["folder"]) / "text"
    AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.bfloat16).save_pretrained(text)
    tokenizer = AutoTokenizer.from_pretrained(order["model"])
    tokenizer.save_pretrained(text)
    model = AutoModelForCausalLM.from_pretrained(text, dtype=torch.bfloat16)
    for layer in model.model.layers:
        # It hands each layer the first one's mask, which is a linear attention's; chunks are full, and no layer needs one.
        layer.register_forward_pre_hook(_without_mask, with_kwargs=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    began = time.process_time()
    # The linears of the decoder layers but routers and gates, as in quantize-linears.
    left = {
        name: {"bits": 16, "act_bits": 16}
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in ("lm_head", "gate", "shared_expert_gate")
    }
    tool = AutoRound(
        model=model, tokenizer=tokenizer, scheme=f"W{order['num_bits']}A16",
        bits=order["num_bits"], group_size=order["group_size"], sym=True, iters=order["iters"], nsamples=len(tokens),
        seqlen=tokens.shape[1], batch_size=8, dataset=loader_of(tokens, 8), layer_config=left, device_map="cpu", seed=42,
        enable_torch_compile=False,
    )  # fmt: skip
    made, _ = tool.quantize()
    seconds = time.process_time() - began
    state = made.state_dict()
    print(sorted(state)[:200])
    live = {name: value.contiguous() for name, value in state.items() if name.endswith("weight") and not same(before, name, value)}
    folder = Path(order["folder"])
    save_file(live, folder / "live.safetensors")
    (folder / "seconds.json").write_text(json.dumps(seconds))


def _without_mask(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "attention_mask": None}


def same(before: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> bool:
    known = before.get(name)
    return known is not None and torch.equal(known, value)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    for each in json.loads(Path(sys.argv[1]).read_text()):
        run(each)
