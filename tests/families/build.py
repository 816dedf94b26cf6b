"""A family built tiny: transformers' own class with random weights, written as its publisher stores it.

`write` makes three folders: the checkpoint to convert; the reference, whose weights are what a reader of that checkpoint
computes with (the same but for quantized sources); and the scope, the same names holding 1 where a linear is
that a conversion should quantize, 2 where it may and 0 elsewhere. The scope is stored by the same code as the weights, so it
needs no knowledge of how modules and names on disk belong together.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.families import published
from tests.families.table import FAMILIES, Family

SEED = 20261
STILL = re.compile(r"(A_log|dt_bias|\.D|decay|slope_rate)$")  # decays and time steps: random ones make a state space explode
# Linears of decoder layers that engines or the model's arithmetic want as they are: gates of one row, routers that are plain
# linears, sparse-attention indexers, AltUp's mixing, hyper-connections, compressors of keys.
STAYS = re.compile(r"shared_expert_gate|altup|indexer|\.router(\.|$)|\.gate$|\.gate\.wg$|hyper_connection|compressor")
# Small or low-rank ones, where either choice loads and computes well.
MAY = re.compile(r"in_proj_(a|b|ba)$|laurel|per_layer_|dt_proj|adapter|\.b_proj$|[fg]_[ab]_proj$|\.linear$")


def model_of(family: Family) -> transformers.PreTrainedModel:
    """The class that the row names, in BF16, with its random weights."""
    torch.manual_seed(SEED)
    config = transformers.AutoConfig.for_model(**family.config)
    config.architectures = [family.architecture]
    model = class_of(family)(config).float().eval()
    randomize(model)
    return model.to(torch.bfloat16)


def class_of(family: Family) -> type[transformers.PreTrainedModel]:
    """transformers' class of the architecture, whose name may differ from the published one by capitals."""
    found = next((name for name in dir(transformers) if name.lower() == family.architecture.lower()), None)
    if found is None:
        raise LookupError(f"transformers {transformers.__version__} has no {family.architecture}")
    cls: type[transformers.PreTrainedModel] = getattr(transformers, found)
    return cls


def randomize(model: nn.Module) -> None:
    """Weights that keep activations near one, each tensor at its own scale: a value in the wrong place is far off."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.nan_to_num_(posinf=100, neginf=-100)  # limits that a trained model has and a new one leaves open
        for name, parameter in model.named_parameters():
            if STILL.search(name):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(noise * 0.05)
            elif "embed" in name or "norm" in ".".join(name.split(".")[-2:]):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * (0.5 + torch.rand((), generator=generator)) / parameter.shape[-1] ** 0.5)


def decoder_layers(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of the text model's layers, of an encoder-decoder both sides'."""
    config = model.config.get_text_config(decoder=True)
    number = getattr(config, "num_hidden_layers", None)
    tower = re.compile(r"(^|\.)(visual|vision|audio|image|multi_modal|projector|connector)")
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and re.search(r"(layers|h|blocks)$", name) and not tower.search(name)
    ]
    outer = [name for name in found if not any(name.startswith(other + ".") for other in found if other != name)]
    if not outer:
        raise LookupError(f"no list of {number} decoder layers in {type(model).__name__}")
    return tuple(f"{name}." for name in outer)


def scope_of(model: nn.Module, family: Family) -> dict[str, int]:
    """For each parameter of the model's own names 1 if a conversion should quantize it, 2 if it may, else 0."""
    layers = decoder_layers(model)
    modules = dict(model.named_modules())
    experts = {
        name for name, module in modules.items() if re.search(r"(Experts|ExpertGLU|ParallelExperts)", type(module).__name__)
    }
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        kind = type(modules[owner]).__name__
        linear = (
            leaf == "weight"
            and parameter.ndim == 2
            and (isinstance(modules[owner], nn.Linear) or kind in ("Conv1D", "FalconLinear"))
        )
        stacked = parameter.ndim >= 2 and owner in experts and "bias" not in leaf
        found[name] = 0
        stays = STAYS.search(owner) or (family.stays and re.search(family.stays, owner))
        if name.startswith(layers) and (linear or stacked) and not stays:
            found[name] = 2 if MAY.search(owner) else 1
        if owner in experts and "bias" in leaf:
            found[name] = 2  # split with its stack, if that is
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write(name: str, folder: Path) -> None:
    """FOLDER/source, FOLDER/reference and FOLDER/scope of one row."""
    family = FAMILIES[name]
    model = model_of(family)
    scope = scope_of(model, family)
    plain, config = saved(model, family, folder / "reference")
    with torch.no_grad():
        for key, value in (*model.named_parameters(), *model.named_buffers()):
            value.fill_(scope.get(key, 0))
    marked, _ = saved(model, family, folder / "scope")
    head = published.mtp_of(family, plain)  # transformers drops it when it saves
    linears = {key for key, value in marked.items() if bool((value == 1).all())}
    source, reference, quantized = published.as_source(family, plain, config, linears)
    store(folder / "source", source | head, quantized)
    store(folder / "reference", reference | head, config)
    store(folder / "scope", marked | {key: torch.zeros_like(value) for key, value in head.items()}, config)


def saved(model: transformers.PreTrainedModel, family: Family, folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors that transformers saves, as their publisher would have stored them, and the config."""
    shutil.rmtree(folder, ignore_errors=True)
    native = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(folder)
    return published.as_published(family, tensors_of(folder), native), json.loads((folder / "config.json").read_text())


def store(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
