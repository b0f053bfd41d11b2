"""The parts of a pretrained InstructPix2Pix (Brooks et al., CVPR 2023) that the refiner is built on.

diffusers and peft are optional (requirements-diffusion.txt): they are imported by the functions that need them, so that
every other script works without.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from utils import checkpoint, system
from utils.config import UserError

disable_progress_bar()  # transformers draws bars in block characters, even for a file of a megabyte

PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LATENTS, CONDITIONED = 4, 8  # channels of the latents; of what the U-Net sees: noisy latents and those of the image
_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")  # of the files that diffusers reads
_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}

# timbrooks/instruct-pix2pix has these (its unet/config.json and vae/config.json); what they leave out is diffusers'
# default. For the memory of a run before anything is downloaded, and for timings with random weights
PUBLISHED = "timbrooks/instruct-pix2pix"
PUBLISHED_GIGABYTES = {"unet": 3.44, "vae": 0.33, "text_encoder": 0.49}  # its float32 safetensors files
UNET = {"sample_size": 64, "in_channels": CONDITIONED, "cross_attention_dim": 768, "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": LATENTS,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
TOKENS, WIDTH = 77, 768  # of its encoded prompt


# of the weights, as its card and the card of the model that it was made from state them
PUBLISHED_LICENCE = "MIT, made from Stable Diffusion 1.5 (CreativeML OpenRAIL-M)"


class Base(NamedTuple):
    """Parts of a pipeline of diffusers."""

    unet: nn.Module  # UNet2DConditionModel
    vae: nn.Module  # AutoencoderKL
    scheduler: object  # DDIMScheduler
    prompt: torch.Tensor  # (1, T, D), the encoded prompt


def diffusers_and_peft():
    """-> the two packages; UserError with the command that installs them."""
    try:
        import diffusers
        import peft
    except ImportError as error:
        raise UserError("the diffusion refiner needs optional packages: pip install -r requirements-diffusion.txt"
                        ) from error
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers, peft


def settings_of(name, constant="BASE_MODEL"):
    """-> (config of the U-Net, config of the autoencoder), from a local folder or, for a hub id, what is built in.

    Raises:
        UserError: no pipeline, half of one, or one for another task; names `constant`.
    """
    if not checkpoint.is_local(name):
        return UNET, VAE
    root = Path(name)
    if problem := system.absent(name, folder=True):
        raise UserError(f"{constant} = '{name}' {problem}. Give a folder with an InstructPix2Pix pipeline, or its hub "
                        f"id {PUBLISHED}")
    missing = [] if (root / "model_index.json").is_file() else ["model_index.json"]
    for part in PARTS:
        file = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(part, "config.json")
        missing += [] if (root / part / file).is_file() else [f"{part}/{file}"]
        if part in _WEIGHTS and not any((root / part / f"{_WEIGHTS[part]}{ending}").is_file() for ending in _ENDINGS):
            missing.append(f"{part}/{_WEIGHTS[part]}.safetensors")
    words = root / "tokenizer"
    if not (words / "tokenizer.json").is_file():  # without any of them transformers makes an empty tokenizer
        missing += [f"tokenizer/{file}" for file in ("vocab.json", "merges.txt") if not (words / file).is_file()]
    if "model_index.json" in missing and len(missing) > 1:
        raise UserError(f"{constant} = '{name}' is no pipeline of diffusers (no {system.listed(missing, 2)}): give the "
                        f"folder that 'hf download {PUBLISHED} --local-dir FOLDER' fills")
    if missing:
        raise UserError(f"{constant} = '{name}' is incomplete: {system.listed(missing, 3)} missing. Repeat 'hf "
                        f"download {PUBLISHED} --local-dir FOLDER', it goes on where it stopped")
    try:
        unet, vae = (system.read_json(root / part / "config.json") for part in ("unet", "vae"))
        channels, latents = unet.get("in_channels"), vae.get("latent_channels", LATENTS)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{constant} = '{name}': its config.json of unet or vae is damaged") from error
    require_conditioned(channels, f"{constant} = '{name}'")
    if latents != LATENTS:
        raise UserError(f"{constant} = '{name}': its vae has {latents} latent channels and is another model's; use "
                        f"that of {PUBLISHED}, with {LATENTS}")
    return unet, vae


def licence_of(name):
    """-> the licence of a base's weights: what the card in its folder states (`license:` on top of README.md), of the
    published one PUBLISHED_LICENCE; "" where nothing is known."""
    if name == PUBLISHED:
        return PUBLISHED_LICENCE
    card = Path(name) / "README.md"
    if not card.is_file():
        return ""
    top = re.match(r"---\r?\n(.*?)\n---", card.read_text(encoding="utf-8-sig", errors="replace"), re.DOTALL)
    stated = dict(re.findall(r"^(license|license_name):[ \t]*['\"]?([^'\"\r\n]+)", top[1] if top else "", re.MULTILINE))
    licence = stated.get("license", "").strip()
    if licence == "other":  # on the hub: license_name says which
        return stated.get("license_name", "").strip()
    return "" if licence == "unknown" else licence


def require_conditioned(channels, what):
    """UserError for a U-Net that sees no image."""
    if channels != CONDITIONED:
        plain = " as a plain Stable Diffusion has" if channels == LATENTS else ""
        raise UserError(f"{what}: its U-Net takes {channels} channels{plain}; InstructPix2Pix takes {CONDITIONED}, "
                        f"noisy latents and those of the image: use {PUBLISHED} or a model fine-tuned from it")


def load_base(name, prompt, dtype=torch.float32, constant="BASE_MODEL"):
    """-> Base, frozen and in eval mode, on the CPU.

    Args:
        name: hub id or local folder of a pipeline; prompt: text, encoded here, so that the text encoder is not needed
            later; dtype: of the U-Net's and the autoencoder's weights.
    Raises:
        UserError: not installed, not there, damaged, another kind of pipeline; names `constant`.
    """
    diffusers, _ = diffusers_and_peft()
    settings_of(name, constant)  # finds what is wrong with a local folder
    from transformers import CLIPTextModel, CLIPTokenizer
    options = {"local_files_only": checkpoint.is_local(name)}
    try:
        unet = diffusers.UNet2DConditionModel.from_pretrained(name, subfolder="unet", dtype=dtype, **options)
        require_conditioned(unet.config.in_channels, f"{constant} = '{name}'")
        vae = diffusers.AutoencoderKL.from_pretrained(name, subfolder="vae", dtype=dtype, **options)
        scheduler = diffusers.DDIMScheduler.from_pretrained(name, subfolder="scheduler", **options)
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **options)
        text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", dtype=torch.float32, **options)
        encoded = encode(prompt, tokenizer, text_encoder.eval())
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # huggingface_hub, httpx, safetensors raise many kinds
        raise UserError(f"{constant} = '{name}' cannot be loaded: {_reason(error, name)}") from error
    for part in (unet, vae):
        part.requires_grad_(False).eval()
    return Base(unet, vae, scheduler, encoded)


def _reason(error, name):
    """-> why a base could not be loaded, and what to do, in words."""
    text = str(error).strip()
    if checkpoint.unpickled(error):
        return "its weights are damaged, or hold other things than tensors; .safetensors is the safe form"
    first = (text.splitlines()[0][:200] if text else type(error).__name__).rstrip(".")
    if checkpoint.is_local(name):
        return (f"{first}. A file of it is damaged, half there or another model's: delete it and repeat 'hf download "
                f"{PUBLISHED} --local-dir FOLDER'")
    return (f"no folder has that name here, and the hub: {first}. Where the hub is out of reach, run 'hf download "
            f"{PUBLISHED} --local-dir instruct-pix2pix' on a machine with network and give that folder; --demo needs "
            "no download")


@torch.no_grad()
def encode(prompt, tokenizer, text_encoder):
    """-> (1, T, D) float32, a prompt as the U-Net takes it."""
    tokens = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                       return_tensors="pt")
    return text_encoder(tokens.input_ids)[0].float()


def downloads(name):
    """-> lines about what a base would fetch."""
    if checkpoint.is_local(name):
        return [f"{name}: a local folder, nothing is downloaded"]
    files = ", ".join(f"{part} {size:.2f} GB" for part, size in PUBLISHED_GIGABYTES.items())
    return [f"{name}: downloaded once into the Hugging Face cache ({files} for {PUBLISHED}, with scheduler and "
            "tokenizer), where it is not there yet"]


def random_base(unet=None, vae=None, dtype=torch.float32, device="cpu"):
    """-> Base with random weights, by default of the published sizes: for timings, and on "meta" for memory."""
    diffusers, _ = diffusers_and_peft()
    unet, vae = ({name: value for name, value in settings.items() if not name.startswith("_")}
                 for settings in (unet or UNET, vae or VAE))
    with torch.device(device):
        parts = [diffusers.UNet2DConditionModel(**unet), diffusers.AutoencoderKL(**vae)]
        prompt = torch.zeros(1, TOKENS, parts[0].config.cross_attention_dim)
    for part in parts:
        part.requires_grad_(False).eval().to(dtype)
    return Base(*parts, diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                                clip_sample=False, set_alpha_to_one=False, steps_offset=1), prompt)
