"""Weather adapters: a megabyte or two that turn a detector into one that knows a weather, and leave the detector alone.

Low-rank changes of attention, feed-forward and convolution weights (Hu et al., "LoRA", ICLR 2022; through peft while
they train), and the few thin layers that are cheap to keep in full: scales and shifts of normalisations, the stem's
first convolution. `fold` adds them to a copy of the detector, so that a rainy image costs what a clean one costs.

A file holds {"<layer>.lora_A", "<layer>.lora_B", "<thin parameter>": tensors} and, as metadata, what it belongs to.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from utils import checkpoint, freeze, system
from utils.config import UserError, writing
from utils.networks.rtdetr import rtdetr_of

SUFFIX = ".safetensors"
FORMAT = "rainsight-weather-adapter-1"
TARGETS = ("attention", "feed_forward", "convolutions")
_HEADS = ("class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head")  # small, and shared with the clean branch
_NORMS = (nn.LayerNorm, nn.BatchNorm2d)


def target_of(name, module):
    """-> which of TARGETS a layer belongs to, None where it gets no low-rank change."""
    if any(head in name for head in _HEADS):
        return None
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return "convolutions"
    if isinstance(module, nn.Linear):
        return "attention" if "attn" in name else "feed_forward"
    return None


def thin_parameters(detector):
    """-> names of the parameters that are kept in full: normalisations' and the first convolution's."""
    norms = [f"{name}.{own}" for name, module in detector.named_modules() if isinstance(module, _NORMS)
             for own, _ in module.named_parameters(recurse=False)]
    stem = next((f"{name}.weight" for name, module in detector.named_modules() if isinstance(module, nn.Conv2d)), None)
    return [*norms, stem]


def _peft():
    """The optional package, or one line that says how to get it."""
    try:
        import peft
    except ImportError:
        raise UserError("adapters are trained through peft: pip install -r requirements-diffusion.txt (reading and "
                        "folding them needs nothing)") from None
    return peft


def inject(detector, rank, alpha, targets, thin=True):
    """-> a copy of the detector in which only the adapter trains; it computes what the detector computes.

    Args:
        detector: of load_rtdetr; rank, alpha: of the low-rank changes, which count alpha / rank.
        targets: some of TARGETS; thin: also `thin_parameters`.
    """
    peft = _peft()
    model = freeze.unfreeze(copy.deepcopy(detector))
    chosen = [name for name, module in model.named_modules() if target_of(name, module) in targets]
    small = set(thin_parameters(model)) if thin else set()
    chosen = [name for name in chosen if f"{name}.weight" not in small]
    model.requires_grad_(False)
    # of a transformers model itself peft would ask for word embeddings, which some detectors refuse to answer
    within = nn.ModuleDict({"detector": model})
    peft.inject_adapter_in_model(peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=[f"detector.{name}" for name in chosen], lora_dropout=0.0,
        bias="none"), within)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name in small)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            freeze.pin_to_eval(module)  # small batches of one weather would spoil its statistics
    return model


def tensors_of(model):
    """-> the adapter of an `inject`ed model as plain tensors on the CPU."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = name.replace(".lora_A.default.weight", ".lora_A").replace(".lora_B.default.weight", ".lora_B")
            found[layer] = parameter.detach().cpu().contiguous().clone()
    return found


def is_adapter(name):
    """-> whether a constant that may name a detector names an adapter's file."""
    return str(name).endswith(SUFFIX)


def write(model, path, base, **settings):
    """Write the adapter of an `inject`ed model, or of a wrapper's (see rtdetr_of).

    Args:
        base: freeze.fingerprint of the detector; settings: rank and alpha, and further plain data to keep (weather).
    """
    metadata = {"format": FORMAT, "base": base, "settings": json.dumps(settings)}
    with writing(path), system.written(Path(path)) as temporary:
        save_file(tensors_of(rtdetr_of(model)), temporary, metadata)
        system.give_usual_rights(temporary)


def read(path, constant):
    """-> ({name: Tensor}, {"base", "rank", "alpha", ...}) of an adapter's file; UserError that names `constant`."""
    if problem := system.absent(path):
        raise UserError(f"{constant} = '{path}' {problem}: train one with Training_WeatherAdapter.py")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        settings = json.loads(metadata.get("settings", "null"))
    except (SafetensorError, OSError, ValueError):
        metadata, settings = {}, None
    if metadata.get("format") != FORMAT or not isinstance(settings, dict) or not {"rank", "alpha"} <= settings.keys():
        raise UserError(f"{constant} = '{path}' is no adapter of Training_WeatherAdapter.py, or is damaged")
    return checkpoint.load(path), settings | {"base": metadata["base"]}


@torch.no_grad()
def fold(detector, path, constant, base="RTDETR_MODEL_NAME"):
    """-> a copy of the detector with the adapter added to its weights, frozen.

    Args:
        detector: the one that the adapter was trained for; constant, base: the script's names of the adapter's file and
            of the detector, for messages.
    Raises:
        UserError: no adapter, or one of another detector.
    """
    tensors, settings = read(path, constant)
    if settings["base"] != freeze.fingerprint(detector):
        raise UserError(f"{constant} = '{path}' was trained for another detector than {base}, or for other weights of "
                        "it: an adapter fits one detector only")
    model = freeze.unfreeze(copy.deepcopy(detector))
    scale, parameters = settings["alpha"] / settings["rank"], dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name.endswith(".lora_B"):
            continue
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            weight = parameters[f"{layer}.weight"]
            weight += scale * product(tensor, tensors[f"{layer}.lora_B"]).to(weight.device)
        else:
            parameters[name].copy_(tensor)
    return freeze.freeze(model)


def product(down, up):
    """The change that a layer's two factors make: (r, in) and (out, r) -> (out, in); of a convolution (r, in, k, k) and
    (out, r, 1, 1) -> (out, in, k, k)."""
    return torch.einsum("or,ri...->oi...", up.flatten(1), down)
