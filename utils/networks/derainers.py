"""Every de-raining network behind one interface: RGB in [0, 1] in, RGB in [0, 1] out, any size.

    load_derainer("prenet", "PReNet_latest.pth", "cpu")(images)      published weights
    load_derainer("nafnet", "outputs_unet/best.pt")(images)          of train_unet_derain.py
    load_derainer("refiner", "outputs_refiner/refiner")(images)      of train_diffusion_refiner.py, de-rainer included

The networks keep the units, the channel order and the names of tensors that their published weights need; what they
need beyond that (padding, BGR, 0 to 255) is done here and nowhere else. MPRNet and Restormer come from the optional
packages of requirements-derain.txt. No weights are part of this project: `Source` says whose they are.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from utils import checkpoint, processes, system
from utils.config import UserError
from utils.networks import rescan
from utils.networks.clamp import clamp_with_return
from utils.networks.ddn import new_ddn
from utils.networks.derainnet import DerainNet
from utils.networks.nafnet import NAFNet
from utils.networks.prenet import PReNet
from utils.networks.refiner import SETTINGS_FILE, RefinedDerainer, load_refiner, read_settings
from utils.networks.spdnet import SPDNet, load_spdnet
from utils.networks.tiling import to_multiple
from utils.networks.unet import UNetDerainer

OWN = "train_unet_derain.py"  # writes checkpoints that say how to build their network


class Source(NamedTuple):
    """Where a network and its published weights come from."""

    paper: str
    year: int
    licence: str  # of the published weights, as their authors state it
    trained_on: str  # what the published weights have seen
    get: str  # where the published weights are


class Network(NamedTuple):
    """How to build a network, and how to call it."""

    build: Callable | None  # (**settings) -> nn.Module; None: from a state dict, by spandrel
    stages: Callable  # (network, images (B, 3, H, W) in [0, 1]) -> the images of its stages, the last is the result
    multiple: int  # that the sides must be of
    source: Source


# ---- how each is called ----------------------------------------------------------------------------------------

def _only(net, images):
    return [net(images)]


def _all(net, images):
    return net(images)


def _rescan(net, images):
    images = images.flip(1)  # BGR, as its authors' code reads files
    return [(images - rain).flip(1) for rain in net(images)]


def _spdnet(net, images):
    return [stage / 255 for stage in reversed(net(images * 255))]


def _mprnet(net, images):
    return list(reversed(net(images)))


_PRENET = Source("Ren et al., Progressive Image Deraining Networks: A Better and Simpler Baseline", 2019, "none stated",
                 "Rain100L, Rain100H or Rain1400, by the file", "github.com/csdwren/PReNet, logs/")
_RESCAN = Source("Li et al., Recurrent Squeeze-and-Excitation Context Aggregation Net", 2018, "MIT (code)",
                 "Rain100H or Rain800", "github.com/XiaLiPKU/RESCAN")
_DDN = Source("Fu et al., Removing Rain from Single Images via a Deep Detail Network", 2017, "non-commercial use only",
              "Rain1400", "github.com/XMU-smartdsp/Removing_Rain")
_OURS = Source("this project", 2026, "the project's", "the pairs of its run", f"python {OWN}")
_REFINED = _OURS._replace(paper="Brooks et al., InstructPix2Pix, with LoRA behind a de-rainer", year=2023,
                          licence="the project's; the base's is CreativeML OpenRAIL-M",
                          get="python train_diffusion_refiner.py")

NETWORKS = {
    "nafnet": Network(NAFNet, _only, 1, _OURS._replace(
        paper="Chen et al., Simple Baselines for Image Restoration", year=2022)),
    "prenet": Network(PReNet, _all, 1, _PRENET),
    "prenet_r": Network(partial(PReNet, shared=True), _all, 1, _PRENET),
    "prn": Network(partial(PReNet, memory=False), _all, 1, _PRENET),
    "prn_r": Network(partial(PReNet, memory=False, shared=True), _all, 1, _PRENET),
    "rescan": Network(rescan.RESCAN, _rescan, 1, _RESCAN),
    "rescan_add": Network(partial(rescan.RESCAN, additive=True), _rescan, 1, _RESCAN),
    "rescan_lstm": Network(partial(rescan.RESCAN, unit=rescan.LSTM), _rescan, 1, _RESCAN),
    "ddn": Network(new_ddn, _only, 1, _DDN),
    "ddn_matlab": Network(partial(new_ddn, "matlab"), _only, 1, _DDN._replace(licence="none stated")),
    "ddn_port": Network(partial(new_ddn, "port"), _only, 1, _DDN._replace(
        licence="none stated", trained_on="Rain100L or Rain100H, by the file",
        get="github.com/HanshuYAN/Deep_Detailed_Network-PyTorch")),
    "derainnet": Network(DerainNet, _only, 1, Source(
        "Fu et al., Clearing the Skies: A Deep Network Architecture for Single-Image Rain Removal", 2017,
        "non-commercial use only", "the paper's own streaks", "none are public in PyTorch's form: train it here")),
    "spdnet": Network(SPDNet, _spdnet, 1, Source(
        "Yi et al., Structure-Preserving Deraining with Residue Channel Prior Guidance", 2021, "none stated",
        "SPA-Data", "github.com/Joyies/SPDNet, model_spa.pt")),
    "mprnet": Network(None, _mprnet, 8, Source(
        "Zamir et al., Multi-Stage Progressive Image Restoration", 2021, "Academic Public License, non-commercial",
        "Rain13K", "github.com/swz30/MPRNet, Deraining/pretrained_models/model_deraining.pth")),
    "restormer": Network(None, _only, 8, Source(
        "Zamir et al., Restormer: Efficient Transformer for High-Resolution Image Restoration", 2022,
        "Academic Public License, non-commercial", "Rain13K",
        "github.com/swz30/Restormer/releases/download/v1.0/deraining.pth")),
}
OTHERS = ("unet", "refiner")  # names that load_derainer takes beside these
TRAINABLE = tuple(name for name, network in NETWORKS.items() if network.build)
STAGED = tuple(name for name in TRAINABLE if name == "spdnet" or name.startswith(("prenet", "prn", "rescan")))
_SMALLEST = 8  # side in pixels below which images are mirrored: SPDNet needs 5, networks with halvings a few


# ---- the wrapper -----------------------------------------------------------------------------------------------

class Derainer(nn.Module):
    """A network of NETWORKS in this project's unit.

    Args:
        arch: its name; settings: of its class, such as NAFNet's `width`.
        net: the network itself where it is there already.
    """

    def __init__(self, arch, net=None, **settings):
        super().__init__()
        self.model_args = {"arch": arch} | settings
        self.net = NETWORKS[arch].build(**settings) if net is None else net
        self.source = NETWORKS[arch].source
        self.multiple = getattr(self.net, "multiple", NETWORKS[arch].multiple)

    def forward(self, images, every_stage=False):
        """De-rain a batch; mirrored at the border up to the network's multiple and cut back.

        Args:
            images: (B, 3, H, W) RGB in [0, 1], any size.
            every_stage: also the images of the network's earlier stages or passes.
        Returns:
            (B, 3, H, W) float32 in [0, 1], or the list of them, the result last.
        """
        height, width = images.shape[-2:]
        padded = to_multiple(images, self.multiple, _SMALLEST)
        stages = NETWORKS[self.model_args["arch"]].stages(self.net, padded)
        stages = [clamp_with_return(stage[..., :height, :width].float())
                  for stage in (stages if every_stage else stages[-1:])]
        return stages if every_stage else stages[0]


# ---- from files ------------------------------------------------------------------------------------------------

def load_derainer(name, weights, device="cpu", constant="weights"):
    """-> the de-rainer in eval mode, with `.source`: (B, 3, H, W) RGB in [0, 1] -> the same without rain.

    Args:
        name: of NETWORKS, or "unet" for the U-Nets of train_unet_derain.py, "refiner" for one of those with a refiner.
        weights: the published file (a state dict, .pth or .safetensors), a checkpoint of train_unet_derain.py, or a
            refiner's folder.
        constant: the script's constant that holds the path, for messages.
    Raises:
        UserError: an unknown name, a missing file (it says where to get it), or one that does not fit.
    """
    require_name(name, constant)
    if name == "refiner":
        return load_refined(weights, device, constant)
    if problem := system.absent(weights):
        raise UserError(f"{constant} = '{weights}' {problem}. Weights of {name}: {source_of(name).get}")
    content = checkpoint.load(weights)
    if _is_own(content):
        model = load_trained(weights, device, constant, content)
        require_arch(model, name, f"{constant} = '{weights}'")
        return model
    if name in ("unet", "nafnet"):
        raise UserError(f"{constant} = '{weights}' is not a file of {OWN} (no model_args of its network in it)")
    if NETWORKS[name].build is None:
        return Derainer(name, _by_spandrel(name, weights, content, constant)).to(device).eval()
    if name == "spdnet":
        net = load_spdnet(weights, constant=constant)
        return Derainer(name, net, n_feats=net.n_feats, n_resblocks=net.n_resblocks).to(device).eval()
    model = Derainer(name)
    state = {key: value.float() if value.is_floating_point() else value
             for key, value in checkpoint.state_of(content, weights).items()}
    fits = _shapes(state) == _shapes(model.net.state_dict())
    checkpoint.load_into(model.net, state, f"{constant} = '{weights}'", name, "" if fits else _other_kinds(name, state))
    return model.to(device).eval()


def require_arch(model, name, what):
    """UserError where `model` of train_unet_derain.py is another network than `name` of load_derainer; what: the file,
    for the message."""
    found = model.model_args["arch"]
    if name != found and (name != "unet" or found in NETWORKS):
        raise UserError(f"{what} holds a network with ARCH = {found!r}, not {name!r}")


def other_derainer(folder, derainer, constant="REFINER_DIR"):
    """-> a line where a refiner's folder was trained behind another network than the file `derainer`, "" where it is
    that one. Refiners of earlier versions know the path alone."""
    content = read_settings(folder, constant)
    known = content.get("derainer_digest")
    if (checkpoint.file_digest(derainer) == known if known else
            Path(content["derainer"]).resolve() == Path(derainer).resolve()):
        return ""
    same = " as it was then" if Path(content["derainer"]).resolve() == Path(derainer).resolve() else ""
    return (f"note: {constant} = '{folder}' was trained behind {content['derainer']}{same}, not behind '{derainer}'"
            f"{' as it is now' if same else ''}, whose traces it has not seen")


def load_refined(folder, device="cpu", constant="REFINER_DIR"):
    """-> a refiner's folder as a de-rainer: the network that it was trained behind, then the refiner.

    Raises:
        UserError: no such folder, its de-rainer or its base is missing; names `constant`.
    """
    derainer = read_settings(folder, constant)["derainer"]
    if problem := system.absent(derainer):
        raise UserError(f"{constant} = '{folder}': its de-rainer '{derainer}' {problem}: put it back, or write its "
                        f"path into {Path(folder).as_posix()}/{SETTINGS_FILE}")
    model = RefinedDerainer(load_trained(derainer, device, constant), load_refiner(folder, device, constant=constant))
    if note := other_derainer(folder, derainer, constant):
        processes.say(note)
    model.source = _REFINED
    return model.eval()


def require_name(name, constant):
    """UserError where no de-rainer has that name."""
    if name not in OTHERS and name not in NETWORKS:
        raise UserError(f"{constant}: no de-rainer is called {name!r}; choose one of "
                        f"{', '.join((*OTHERS, *NETWORKS))}")


def source_of(name):
    """-> Source of a network of NETWORKS, or of OTHERS."""
    return NETWORKS[name].source if name in NETWORKS else _REFINED if name == "refiner" else _OURS


def _is_own(content):
    """-> whether a file's content is a checkpoint of train_unet_derain.py."""
    arguments = content.get("model_args") if isinstance(content, dict) else None
    return isinstance(arguments, dict) and "arch" in arguments


def load_trained(path, device="cpu", constant="UNET_PATH", content=None):
    """-> the network of a best.pt, last.pt or epoch_*.pt of train_unet_derain.py, in eval mode: UNetDerainer or
    Derainer, with `image_size`: side of the squares that it was trained on, None where the file does not say or it saw
    crops at the images' own scale. content: of the file, where it is there already.

    Raises:
        UserError: the file is missing or holds something else; names `constant`.
    """
    def build(arch, **settings):
        if arch in TRAINABLE:
            return Derainer(arch, **settings)
        model = UNetDerainer(arch, **settings)
        model.source = _OURS
        return model
    if content is None and not system.absent(path):
        content = checkpoint.load(path)
    model = checkpoint.load_network(path, build, ("arch",), constant, OWN, device, content)
    constants = content.get("constants")
    constants = constants if isinstance(constants, dict) else {}
    model.image_size = None if constants.get("CROP_SIZES") else constants.get("IMAGE_SIZE")
    return model


def _other_kinds(name, state):
    """-> a sentence that names the network that a state dict fits, "" where none does."""
    for other in TRAINABLE:
        if other not in (name, "nafnet", "spdnet") and _shapes(NETWORKS[other].build().state_dict()) == _shapes(state):
            return f"It fits {other}"
    return ""


def _shapes(state):
    return {key: value.shape for key, value in state.items()}


def _by_spandrel(name, weights, content, constant):
    """-> MPRNet or Restormer from its published file's content, by the optional package spandrel."""
    try:
        import spandrel
        import spandrel_extra_arches
    except ImportError:
        raise UserError(f"{constant}: {name} needs optional packages: pip install -r requirements-derain.txt (their "
                        "architectures' licences are non-commercial)") from None
    spandrel_extra_arches.install(ignore_duplicates=True)
    state = checkpoint.state_of(content, weights)
    if all(key.startswith("generator.") for key in state):  # mmagic's copy
        state = {key.removeprefix("generator."): value for key, value in state.items()}
    try:
        found = spandrel.ModelLoader().load_from_state_dict(dict(state))
    except (spandrel.UnsupportedModelError, KeyError, RuntimeError) as error:
        raise UserError(f"{constant} = '{weights}' does not fit {name}: spandrel finds no network for it") from error
    if found.architecture.id.lower() != name:
        raise UserError(f"{constant} = '{weights}' holds {found.architecture.name}, not {name}")
    return found.model
