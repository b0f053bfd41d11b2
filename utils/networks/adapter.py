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
from utils.networks.rtdetr import id2label_of, rtdetr_of

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


@torch.no_grad()
def approximate(model, target, constant):
    """Set the adapter of an `inject`ed model to the one that comes closest to turning its detector into another.

    A layer's change is cut to its largest singular values (Eckart and Young, "The approximation of one matrix by
    another of lower rank", 1936). What other running statistics of a BatchNorm do is done by its scale and shift,
    where these are adapted. What an adapter leaves alone (heads, biases of other layers) stays the detector's own.

    Args:
        target: a detector of the same form, such as a specialist that was trained from this one; constant: the script's
            for it, for messages.
    Returns:
        the share of the low-rank layers' change, in squared norm, that the adapter holds: 1 is all of it.
    Raises:
        UserError: a target with other classes, layers or frozen parts, or with weights that are no numbers.
    """
    _require_same_layers(model, target, constant)
    wanted, kept, whole = dict(target.named_modules()), 0.0, 0.0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            change = wanted[name].weight.to(module.weight.device) - module.weight
            found, held = _low_rank(change, module.weight.abs().max(), module.lora_A["default"].weight,
                                    module.lora_B["default"].weight, module.scaling["default"])
            kept, whole = kept + found, whole + held
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            parameter.copy_(_as_with_the_statistics_of(model, wanted, name))
    return kept / whole if whole else 1.0


def _require_same_layers(model, target, constant):
    """UserError that names `constant` unless an adapter of `model` can come close to `target`."""
    def form(detector):
        own = {name.replace(".base_layer.", "."): tuple(p.shape) for name, p in detector.named_parameters()
               if ".lora_" not in name}
        return own, tuple(id2label_of(detector).values())
    if form(model) != form(target):
        raise UserError(f"{constant}: that detector has other layers or classes than RTDETR_MODEL_NAME: give an "
                        "adapter of it, or a detector that was trained from it")
    if not all(p.isfinite().all() for p in target.parameters()):
        raise UserError(f"{constant}: that detector's weights are not all finite: it is damaged, or its training "
                        "failed")
    alive = {name for name, module in target.named_modules() if isinstance(module, nn.BatchNorm2d)}
    own = {name.replace(".base_layer.", "."): value for name, value in model.named_buffers()}
    for name, value in target.named_buffers():  # BatchNorms that were frozen for good hold all they do in buffers
        if name.rpartition(".")[0] not in alive and not torch.equal(value.to(own[name].device), own[name]):
            raise UserError(f"{constant}: that detector differs from RTDETR_MODEL_NAME in what never trains ({name}): "
                            "it was not trained from it")


def _low_rank(change, largest, down, up, scale):
    """Write the best factors of `change` (see `product`) into `down` and `up`, which count `scale`; -> its squared norm
    within them, and in all. Rows of `down` beyond the rank of the change stay as they are, to be learnt; largest: of
    the weights that the change is the difference of, by which it is rounded."""
    left, size, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    noise = max(size[0], largest) * max(change.shape[0], change[0].numel()) * torch.finfo(size.dtype).eps
    rank = min(len(down), int((size > noise).sum()))
    root = (size[:rank] / scale).sqrt()
    down[:rank] = (root[:, None] * right[:rank]).view_as(down[:rank])
    up.zero_()
    up[:, :rank] = (left[:, :rank] * root).view_as(up[:, :rank])
    return size[:rank].square().sum().item(), size.square().sum().item()


def _as_with_the_statistics_of(model, wanted, name):
    """-> value of one of the model's `thin_parameters` that makes its layer do what its namesake among `wanted` ({name:
    module}) does, also where that is a BatchNorm with other running statistics."""
    layer, _, own = name.rpartition(".")
    module, other = model.get_submodule(layer), wanted[layer]
    if not isinstance(module, nn.BatchNorm2d):
        return getattr(other, own)
    scale = other.weight / (other.running_var + other.eps).sqrt()
    if own == "weight":
        return scale * (module.running_var + module.eps).sqrt().to(scale.device)
    return other.bias + scale * (module.running_mean.to(scale.device) - other.running_mean)


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
