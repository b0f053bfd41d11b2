"""Refiners: what is left of the rain after a de-rainer, and what the de-rainer itself has done, taken off its output.

Three of one interface, refiner(derained) -> refined, (B, 3, H, W) RGB in [0, 1], any size:

    "one_step"  InstructPix2Pix with LoRA, one deterministic step at a fixed time, as OSEDiff (Wu et al., NeurIPS 2024)
                and pix2pix-turbo (Parmar et al., 2024) take it, trained through the decoder with a loss of pixels.
    "sample"    the same network, trained as diffusion models are (the noise's error), some steps from the partly noised
                latents of the de-rained image (SDEdit, Meng et al., ICLR 2022).
    "pixel"     a NAFNet with as many trained parameters: whether diffusion was needed at all.

Both diffusion modes are anchored: U + D(z') - D(E(U)) with the de-rained image U, encoder E and decoder D. What the
autoencoder loses cancels out, and an untrained refiner returns its input.
"""

import copy
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed
from torchvision.transforms import v2

from utils import checkpoint, freeze, system
from utils.config import UserError
from utils.networks import diffusion_base
from utils.networks.clamp import clamp_with_return
from utils.networks.nafnet import NAFNet
from utils.networks.tiling import to_multiple

MODES = ("one_step", "sample", "pixel")
SETTINGS_FILE, OWN_FILE, LORA_FILE = "refiner.json", "refiner.safetensors", "pytorch_lora_weights.safetensors"
TRAINER = "train_diffusion_refiner.py"
# what refiner.json holds, and its settings: {name: what is there}
_NUMBER = (int, float)
_ENTRIES = {"settings": dict, "blend": _NUMBER, "base": str, "prompt": str, "derainer": str}
_PIXEL = {"mode": str, "width": int, "lock_sigma": _NUMBER}
_DIFFUSION = {"mode": str, "time": int, "strength": _NUMBER, "steps": int, "rank": int, "alpha": int, "targets": list,
              "skips": bool, "seed": int, "lock_sigma": _NUMBER}
# layers of the U-Net by the ends of their names
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL_LAYERS = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
              "conv_in", "conv_out", "time_emb_proj")


class Refiner(nn.Module):
    """What the three modes have in common: correction, low-frequency lock, blend.

    Args:
        lock_sigma: the correction loses what a Gaussian of this many pixels keeps, so that colours and brightness stay
            the de-rainer's; 0 for none.
    """

    def __init__(self, lock_sigma=0.0):
        super().__init__()
        self.lock_sigma = lock_sigma
        self.blend = 1.0  # share of the correction in eval mode; chosen on validation pairs

    def correction(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, 3, H, W), what is to be added to it."""
        found = self.raw_correction(images)
        if self.lock_sigma:
            side = 2 * math.ceil(3 * self.lock_sigma) + 1
            half = side // 2
            wide = F.pad(found, (half,) * 4, mode="replicate")
            for kernel in ([side, 1], [1, side]):  # one axis after the other: torchvision's kernel is a square
                wide = v2.functional.gaussian_blur(wide, kernel, [self.lock_sigma] * 2)
            found = found - wide[..., half:-half, half:-half]
        return found

    def forward(self, images, targets=None):
        """Refine a batch.

        Args:
            images: (B, 3, H, W) RGB in [0, 1], de-rained.
            targets: (B, 3, H, W), the clean images, in the training of mode "sample" alone.
        Returns:
            (B, 3, H, W) in [0, 1], or with targets the squared error of the predicted noise, a scalar.
        """
        if targets is not None:
            return self.noise_loss(images, targets)
        share = 1.0 if self.training else self.blend
        return clamp_with_return(images + share * self.correction(images)) if share else images


class PixelRefiner(Refiner):
    """Mode "pixel": NAFNet (Chen et al., ECCV 2022) on the pixels.

    Args:
        parameters: about how many it should have.
    """

    def __init__(self, parameters=None, lock_sigma=0.0, width=None):
        super().__init__(lock_sigma)
        make = partial(NAFNet, encoder=(1, 1), middle=2, decoder=(1, 1), patch=1)
        if width is None:
            with torch.device("meta"):
                width = min(range(4, 128, 2), key=lambda w: abs(sum(p.numel() for p in make(w).parameters())
                                                                - parameters))
        self.net = make(width)
        self.settings = {"mode": "pixel", "width": width, "lock_sigma": lock_sigma}

    def raw_correction(self, images):
        """See `correction`."""
        height, width = images.shape[-2:]
        padded = to_multiple(images, self.net.multiple)
        return (self.net(padded) - padded)[..., :height, :width].float()

    def write(self, folder):
        """Its weights, into a folder that exists."""
        save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()},
                  Path(folder) / OWN_FILE)

    def read(self, folder, constant):
        """See `load_refiner`."""
        checkpoint.load_into(self, checkpoint.load(Path(folder) / OWN_FILE), f"{constant}: {folder}/{OWN_FILE}")


class DiffusionRefiner(Refiner):
    """Modes "one_step" and "sample": a frozen InstructPix2Pix, LoRA in its U-Net (Hu et al., ICLR 2022).

    Beside LoRA train, in mode "one_step", a gain per latent channel and 1x1 convolutions from the encoder's levels to
    the decoder's (as in pix2pix-turbo), all zero at the start: they make the untrained refiner the identity and carry
    detail past the latents.

    Args:
        base: diffusion_base.Base; it is changed in place.
        mode: "one_step" or "sample"; time: the step's fixed time, of the scheduler's (0 to 999).
        strength, steps: of mode "sample": how much noise it starts from (0 none, 1 noise alone), and how many steps.
        rank, alpha, targets: LoRA's rank, scale (alpha / rank) and the ends of the names of its layers.
        skips: whether the convolutions past the latents are there; seed: of the sampled noise, the same for all images.
        checkpointing: recompute activations in the backward pass: less memory, a third more time.
    """

    def __init__(self, base, mode="one_step", time=250, strength=0.3, steps=2, rank=8, alpha=8, targets=ALL_LAYERS,
                 skips=True, seed=0, lock_sigma=0.0, checkpointing=False):
        super().__init__(lock_sigma)
        if not 0 <= time < base.scheduler.config.num_train_timesteps:
            raise UserError(f"TIME = {time}: choose a step of the scheduler, 0 to "
                            f"{base.scheduler.config.num_train_timesteps - 1}")
        if mode == "sample" and strength and (walk := _walk(steps, strength)) > len(base.scheduler.alphas_cumprod):
            raise UserError(f"STEPS = {steps}, STRENGTH = {strength}: that is a walk of {walk} steps in all, of which "
                            f"the scheduler has {len(base.scheduler.alphas_cumprod)}: fewer STEPS or more STRENGTH")
        if base.scheduler.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise UserError(f"BASE_MODEL: its scheduler's prediction_type = "
                            f"{base.scheduler.config.prediction_type!r} is none that the refiner knows")
        self.settings = {"mode": mode, "time": time, "strength": strength, "steps": steps, "rank": rank,
                         "alpha": alpha, "targets": list(targets), "skips": skips, "seed": seed,
                         "lock_sigma": lock_sigma}
        self.mode, self.time, self.strength, self.steps, self.seed = mode, time, strength, steps, seed
        self.checkpointing, self.scheduler = checkpointing, base.scheduler
        self.vae = freeze.freeze(base.vae)
        self.unet = _with_lora(base.unet, rank, alpha, targets)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.register_buffer("prompt", base.prompt, persistent=False)
        if mode == "one_step":
            device = base.prompt.device
            self.gain = nn.Parameter(torch.zeros(1, diffusion_base.LATENTS, 1, 1, device=device))
            self.skips = nn.ModuleList(_zero_convolution(up, down, device) for up, down in self._levels()
                                       ) if skips else None
        self.factor = 2 ** (len(base.vae.config.block_out_channels) - 1)  # pixels per latent
        self.multiple = self.factor * 2 ** (len(base.unet.config.block_out_channels) - 1)

    def _levels(self):
        """-> [(block of the decoder, the encoder's block of the same size), ...] from the smallest on."""
        return list(zip(self.vae.decoder.up_blocks, reversed(self.vae.encoder.down_blocks), strict=True))

    @property
    def model_args(self):
        """What is needed to build this module again beside its base, as plain data."""
        return self.settings

    # ---- what is saved: the trained tensors alone, the base is read from its own files

    def state_dict(self, *args, **kwargs):
        """-> the trained tensors."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def load_state_dict(self, state, strict=True):
        """Take the trained tensors back."""
        super().load_state_dict(state, strict=False)

    def write(self, folder):
        """LoRA as diffusers' load_lora_weights reads it, and what cannot go into that file, into a folder."""
        diffusers, peft = diffusion_base.diffusers_and_peft()
        from diffusers.training_utils import _collate_lora_metadata  # without it alpha / rank is lost
        layers = {name: value.detach().cpu() for name, value in peft.get_peft_model_state_dict(self.unet).items()}
        diffusers.StableDiffusionInstructPix2PixPipeline.save_lora_weights(
            folder, unet_lora_layers=layers, **_collate_lora_metadata({"unet": self.unet}))
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("unet.")}
        save_file({name: value.detach().cpu().contiguous() for name, value in own.items()}
                  | {"prompt": self.prompt.detach().cpu().contiguous()}, Path(folder) / OWN_FILE)

    def read(self, folder, constant):
        """See `load_refiner`."""
        own = checkpoint.load(Path(folder) / OWN_FILE)
        prompt = own.pop("prompt", self.prompt)
        if prompt.shape != self.prompt.shape:
            raise UserError(f"{constant} = '{folder}': {OWN_FILE} has a prompt of another text encoder than its base")
        self.prompt.copy_(prompt)  # the one it was trained with, whatever refiner.json says
        lora = checkpoint.load(Path(folder) / LORA_FILE)
        lora = {name.removesuffix(".weight") + ".default.weight": value for name, value in lora.items()}
        checkpoint.load_into(self, own | lora, f"{constant} = '{folder}'", "its own settings")

    # ---- the autoencoder

    def encode(self, images):
        """(B, 3, H, W) in [0, 1] -> latents' mean (B, 4, h, w), the inputs of the encoder's levels."""
        vae, levels = self.vae, []
        x = vae.encoder.conv_in((2 * images - 1).to(vae.dtype))
        for block in vae.encoder.down_blocks:
            levels.append(x)
            x = block(x)
        x = vae.encoder.mid_block(x)
        x = vae.encoder.conv_out(vae.encoder.conv_act(vae.encoder.conv_norm_out(x)))
        x = vae.quant_conv(x) if vae.quant_conv is not None else x
        return x.chunk(2, 1)[0], levels

    def decode(self, latents, levels=None):
        """(B, 4, h, w), scaled -> (B, 3, H, W) about [0, 1]; levels: of `encode`, for the skip convolutions."""
        vae = self.vae
        x = (latents / vae.config.scaling_factor).to(vae.dtype)
        x = vae.post_quant_conv(x) if vae.post_quant_conv is not None else x
        x = vae.decoder.mid_block(vae.decoder.conv_in(x))
        for i, block in enumerate(vae.decoder.up_blocks):
            if levels is not None:
                x = x + self.skips[i](levels[-1 - i].to(self.gain.dtype)).to(x.dtype)
            heavy = self.checkpointing and torch.is_grad_enabled()
            x = checkpointed(block, x, use_reentrant=False) if heavy else block(x)
        x = vae.decoder.conv_out(vae.decoder.conv_act(vae.decoder.conv_norm_out(x)))
        return (x.float() + 1) / 2

    # ---- the U-Net

    def predict(self, latents, time, condition):
        """The U-Net's output (B, 4, h, w) float32 for noisy latents at a time, () or (B,), and the image's latents."""
        dtype = self.unet.dtype
        seen = torch.cat([latents, condition], 1).to(dtype)
        prompt = self.prompt.to(dtype).expand(seen.shape[0], -1, -1)  # len would fix an exported file's batch
        return self.unet(seen, time, encoder_hidden_states=prompt).sample.float()

    def clean_latents(self, latents, found):
        """-> the clean latents that an output `found` of the U-Net at the fixed time stands for."""
        kept = self.scheduler.alphas_cumprod[self.time].item()
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return found
        if kind == "v_prediction":
            return kept**0.5 * latents - (1 - kept) ** 0.5 * found
        return (latents - (1 - kept) ** 0.5 * found) / kept**0.5

    def raw_correction(self, images):
        """See `correction`."""
        height, width = images.shape[-2:]
        padded = to_multiple(images, self.multiple)
        with torch.no_grad():
            condition, levels = self.encode(padded)
            latents = condition.float() * self.vae.config.scaling_factor
            anchor = self.decode(latents)
        if self.mode == "one_step":
            time = torch.tensor(self.time, device=latents.device)
            clean = self.clean_latents(latents, self.predict(latents, time, condition))
            found = self.decode(latents + self.gain * (clean - latents), levels if self.skips is not None else None)
        else:
            found = self.decode(self.sampled(latents, condition))
        return (found - anchor)[..., :height, :width]

    def sampled(self, latents, condition):
        """Steps of DDIM (Song et al., ICLR 2021) from the partly noised latents, all (B, 4, h, w)."""
        if not self.steps or not self.strength:
            return latents
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(_walk(self.steps, self.strength), device=latents.device)
        times = scheduler.timesteps[-self.steps:]
        generator = torch.Generator().manual_seed(self.seed)  # the CPU's: the same on every device
        noise = torch.randn(1, *latents.shape[1:], generator=generator).to(latents.device).expand_as(latents)
        found = (noise * scheduler.init_noise_sigma if self.strength == 1 else
                 scheduler.add_noise(latents, noise, times[:1]))
        for time in times:
            output = self.predict(scheduler.scale_model_input(found, time), time, condition)
            found = scheduler.step(output, time, found).prev_sample
        return found

    def noise_loss(self, images, targets):
        """Squared error of the predicted noise in the clean image's latents, at random times: scalar."""
        height, width = images.shape[-2:]
        if height % self.multiple or width % self.multiple:
            images, targets = (to_multiple(batch, self.multiple) for batch in (images, targets))
        with torch.no_grad():
            condition, clean = self.encode(images)[0], self.encode(targets)[0].float() * self.vae.config.scaling_factor
        noise = torch.randn_like(clean)
        times = torch.randint(self.scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        found = self.predict(self.scheduler.add_noise(clean, noise, times), times, condition)
        kind = self.scheduler.config.prediction_type
        wanted = (self.scheduler.get_velocity(clean, noise, times) if kind == "v_prediction" else
                  clean if kind == "sample" else noise)
        return F.mse_loss(found, wanted)


def _walk(steps, strength):
    """-> how many steps the scheduler takes from noise alone, of which the last `steps` are gone."""
    return max(steps, round(steps / strength))


def _zero_convolution(up, down, device):
    """-> 1x1 convolution from what an encoder's block takes to what a decoder's block takes, zero at the start."""
    layer = nn.Conv2d(down.resnets[0].in_channels, up.resnets[0].in_channels, 1, bias=False, device=device)
    nn.init.zeros_(layer.weight)
    return layer


def _with_lora(unet, rank, alpha, targets):
    """-> the U-Net with LoRA layers, which alone train and are float32."""
    _, peft = diffusion_base.diffusers_and_peft()
    names = [name for name, _ in unet.named_modules()]
    if unknown := [end for end in targets if end not in ALL_LAYERS
                   and not any(name == end or name.endswith(f".{end}") for name in names)]:
        raise UserError(f"LORA_TARGETS = {tuple(targets)}: no layer of the U-Net has a name that ends in "
                        f"{system.listed(unknown)}; choose from {', '.join(ALL_LAYERS)}")
    try:
        unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    except ValueError as error:
        raise UserError(f"LORA_TARGETS = {tuple(targets)}: LoRA takes linear layers and convolutions alone; choose "
                        f"from {', '.join(ALL_LAYERS)}") from error
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return unet


# ---- files -------------------------------------------------------------------------------------------------------

def save_refiner(refiner, folder, **more):
    """Write a folder that `load_refiner` reads; more: further entries of refiner.json, such as `base` and `prompt`.

    The old folder stays until the new one is complete.
    """
    def write(path):
        path.mkdir(parents=True)
        refiner.write(path)
        content = {"settings": refiner.settings, "blend": refiner.blend} | more
        (path / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    checkpoint.replace_folder(write, folder)


def read_settings(folder, constant="REFINER_DIR"):
    """-> {"settings", "blend", "base", "prompt", "derainer", perhaps "derainer_digest"} of a refiner's folder.

    Raises:
        UserError: not there, no refiner, or damaged; names `constant`.
    """
    if problem := system.absent(folder, folder=True):
        raise UserError(f"{constant} = '{folder}' {problem}: train a refiner with {TRAINER}")
    content = checkpoint.load_settings(Path(folder) / SETTINGS_FILE, _ENTRIES, constant, "it is no refiner; "
                                       f"{TRAINER} writes one into OUTPUT_DIR/refiner", optional=("derainer_digest",))
    settings = content["settings"]
    kinds = _PIXEL if isinstance(settings, dict) and settings.get("mode") == "pixel" else _DIFFUSION
    if not (_of_kinds(content, _ENTRIES) and 0 <= content["blend"] <= 1 and settings.keys() == kinds.keys()
            and _of_kinds(settings, kinds) and settings["mode"] in MODES and settings["lock_sigma"] >= 0
            and settings.get("rank", 1) > 0):
        raise UserError(f"{constant} = '{folder}': {SETTINGS_FILE} is damaged; save the refiner again")
    return content


def _of_kinds(content, kinds):
    return all(isinstance(content[name], kind) for name, kind in kinds.items())


def load_refiner(folder, device="cpu", dtype=torch.float32, constant="REFINER_DIR", base=None):
    """-> the refiner of a folder, in eval mode, with the blend that was chosen on validation pairs.

    Args:
        dtype: of the frozen base's weights; base: hub id or folder that is used instead of the one it was trained on.
    Raises:
        UserError: not there, damaged, or its base is not to be had; names `constant`.
    """
    content = read_settings(folder, constant)
    settings = content["settings"]
    if settings["mode"] == "pixel":
        refiner = PixelRefiner(lock_sigma=settings["lock_sigma"], width=settings["width"])
    else:
        refiner = DiffusionRefiner(diffusion_base.load_base(
            base or content["base"], content["prompt"], dtype, f"{constant}: base"), **settings)
    refiner.read(folder, constant)
    refiner.blend = float(content["blend"])
    return refiner.to(device).eval()


def merged(refiner):
    """-> a copy of a refiner whose U-Net has LoRA within its weights: fewer layers, the same answers to rounding."""
    refiner = copy.deepcopy(refiner)
    if isinstance(refiner, DiffusionRefiner):
        refiner.unet.fuse_lora()
        refiner.unet.unload_lora()
        refiner.requires_grad_(False)
    return refiner.eval()


class RefinedDerainer(nn.Module):
    """A de-rainer and a refiner behind it: rainy (B, 3, H, W) in [0, 1] -> refined, the same."""

    def __init__(self, derainer, refiner):
        super().__init__()
        self.derainer, self.refiner = derainer, refiner

    def forward(self, images):
        """De-rain, then refine."""
        return self.refiner(self.derainer(images))
