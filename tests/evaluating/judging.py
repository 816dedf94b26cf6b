"""What transformers itself predicts, for what an evaluation is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.rewriting import steps_of
from tensorsurgeon.quant.threads import one_torch_thread
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import FIXTURE

HELDOUT = FIXTURE.parent / "text" / "heldout.txt"


def convert(transform: str, source: Path, target: Path, **parameters: Any) -> Path:
    run_plan(make_plan(steps_of(load_transform(transform, parameters)), open_checkpoint(source)), target, workers=2)
    return target


def load(folder: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    auto = getattr(transformers, config.architectures[0])
    return auto.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager").eval()


def log_probabilities(model: Any, tokens: np.ndarray) -> Tensor:
    """F64 [sequences, length, vocabulary] of a loaded model, in batches as the walk has them."""
    size = max(1, 2048 // tokens.shape[1])
    with torch.no_grad(), one_torch_thread():
        made = [model(input_ids=ids, use_cache=False).logits for ids in torch.from_numpy(tokens).split(size)]
    return torch.cat(made).double().log_softmax(-1)


def figures(source: Tensor, target: Tensor, tokens: np.ndarray) -> dict[str, float]:
    """What ``surgeon evaluate`` reports, from whole logits."""
    kl = (source.exp() * (source - target)).sum(-1)
    per_sequence = kl.mean(1)
    following = torch.from_numpy(tokens)[:, 1:, None]
    nll = float(-target[:, :-1].gather(-1, following).mean())
    return {
        "kl": float(kl.mean()),
        "kl_se": float(per_sequence.std(correction=1) / len(per_sequence) ** 0.5),
        "reverse_kl": float((target.exp() * (target - source)).sum(-1).mean()),
        "top1_agreement": float((source.argmax(-1) == target.argmax(-1)).double().mean()),
        "nll": nll,
        "perplexity": float(np.exp(nll)),
    }
