"""A tiny InstructPix2Pix for the refiner's tests and --demo: the real classes of diffusers, about 4 MB.

    python -m tools.tiny_diffusion_base                 # about ten minutes on one CPU core

Not a model to use: its autoencoder and its U-Net know 1,200 drawn street scenes and five edits, each with its
instruction ("make it darker", ...), and nothing else. The folder has the files, the key names and the arithmetic of
timbrooks/instruct-pix2pix (Brooks et al., "InstructPix2Pix", CVPR 2023): latents of an eighth of the side, a U-Net that
sees the noisy latents beside those of the image, a CLIP text encoder (which stays random). Weights are stored in fp16.
"""

import json
from functools import partial
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from torchvision.transforms import v2
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from utils import config, datasets, processes
from utils.demo.coco import ensure_demo
from utils.images import to_floats

OUT = "./assets/demo/instruct_pix2pix_tiny"
AUTOENCODER_STEPS = 900                 # of 8 crops each
UNET_STEPS = 900                        # of 16 crops each
CROP = 96                               # side of the crops of the 160 x 160 scenes
SEED = 0

_EDITS = {
    "make it darker": lambda images: images * 0.6,
    "make it brighter": lambda images: (images * 1.3 + 0.05).clamp(max=1),
    "make it grey": lambda images: v2.functional.rgb_to_grayscale(images, 3),
    "blur it": partial(v2.functional.gaussian_blur, kernel_size=[9, 9], sigma=[1.5, 1.5]),
}
_CARD = """---
license: apache-2.0
---
A tiny InstructPix2Pix of diffusers' real classes for the demo and the tests of the refiner, trained from nothing on
drawn scenes by `python -m tools.tiny_diffusion_base`. Part of RainSight, under its licence.
"""
_RESTORE = "remove blur, enhance image quality"  # the fifth edit: from the blurred image back


def new_tokenizer(folder):
    """-> CLIPTokenizer that knows single letters alone (CLIP's form of vocabulary, without merges)."""
    letters = [chr(code) for code in range(33, 127)]
    words = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77)


def new_parts(tokenizer):
    """-> autoencoder, U-Net, text encoder with random weights."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=160)
    unet = UNet2DConditionModel(
        sample_size=20, in_channels=8, out_channels=4, block_out_channels=(32, 64, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1))
    return vae, unet, text


def load_scenes(root):
    """-> (N, 3, 160, 160) uint8, the demo's clean training scenes."""
    return torch.stack([datasets.read_image(path) for path in sorted((root / "coco" / "train2017").iterdir())])


def crops(scenes, count, side, generator):
    """-> (count, 3, side, side) in [0, 1], random squares, half of them mirrored."""
    found = []
    for index in torch.randint(len(scenes), (count,), generator=generator).tolist():
        top, left, mirror = (int(torch.randint(n, (), generator=generator)) for n in (
            scenes.shape[-2] - side + 1, scenes.shape[-1] - side + 1, 2))
        part = scenes[index, :, top:top + side, left:left + side]
        found.append(part.flip(-1) if mirror else part)
    return to_floats(torch.stack(found))


def train(parameters, loss_of, steps, name, rate=2e-3):
    """AdamW with one cosine; loss_of: () -> scalar."""
    optimizer = torch.optim.AdamW(parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    mean = None
    for step in processes.progress(range(steps), name):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 99:
            processes.say(f"{name}, step {step + 1}: {mean:.4f}")


def train_autoencoder(cfg, vae, scenes, generator):
    """L1, SSIM's edges through gradients, and a trace of KL; then the latents' scale goes into the configuration."""
    def loss_of():
        images = crops(scenes, 8, cfg.CROP, generator) * 2 - 1
        posterior = vae.encode(images).latent_dist
        found = vae.decode(posterior.sample(generator)).sample
        edges = sum(F.l1_loss(found.diff(dim=dim), images.diff(dim=dim)) for dim in (-1, -2))
        return F.l1_loss(found, images) + edges + 1e-6 * posterior.kl().mean()
    train(list(vae.parameters()), loss_of, cfg.AUTOENCODER_STEPS, "autoencoder")
    with torch.no_grad():
        latents = vae.encode(crops(scenes, 64, cfg.CROP, generator) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def edited(images, generator):
    """-> images before, after an edit, the edit's number for each."""
    which = torch.randint(len(_EDITS) + 1, (len(images),), generator=generator)
    after = torch.stack([[*_EDITS.values(), _EDITS["blur it"]][i](image) for i, image in
                         zip(which, images, strict=True)])
    back = (which == len(_EDITS)).view(-1, 1, 1, 1)
    return torch.where(back, after, images), torch.where(back, images, after), which


def train_unet(cfg, pipeline, scenes, generator):
    """InstructPix2Pix's loss: the noise in the edited image's latents, given the image and the instruction."""
    vae, unet, scheduler = pipeline.vae, pipeline.unet, pipeline.scheduler
    with torch.no_grad():
        prompts = torch.cat([pipeline._encode_prompt(prompt, "cpu", 1, False) for prompt in (*_EDITS, _RESTORE)])

    def loss_of():
        before, after, which = edited(crops(scenes, 16, cfg.CROP, generator), generator)
        with torch.no_grad():
            known = vae.encode(before * 2 - 1).latent_dist.mean
            target = vae.encode(after * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        noise = torch.randn(target.shape, generator=generator)
        times = torch.randint(len(scheduler.alphas_cumprod), (len(target),), generator=generator)
        found = unet(torch.cat([scheduler.add_noise(target, noise, times), known], 1), times,
                     encoder_hidden_states=prompts[which]).sample
        return F.mse_loss(found, noise)
    train(list(unet.parameters()), loss_of, cfg.UNET_STEPS, "U-Net", 1e-3)


def main(**overrides):
    """Train and write the pipeline; -> PSNR in dB of the autoencoder's reconstructions of validation scenes."""
    cfg = config.resolve(globals(), overrides)
    if Path(cfg.OUT).exists() and cfg.OUT != OUT:  # the default is this project's own, which is made anew
        raise config.UserError(f"OUT = '{cfg.OUT}' is there already: give the name of a new folder")
    root = ensure_demo("./demo")
    scenes, generator = load_scenes(root), torch.Generator().manual_seed(cfg.SEED)
    torch.manual_seed(cfg.SEED)
    tokenizer = new_tokenizer(Path(cfg.OUT) / "tokenizer")
    vae, unet, text = new_parts(tokenizer)
    train_autoencoder(cfg, vae, scenes, generator)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=vae, text_encoder=text.eval(), tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    train_unet(cfg, pipeline, scenes, generator)
    pipeline.to(torch.float16).save_pretrained(cfg.OUT)
    (Path(cfg.OUT) / "README.md").write_text(_CARD, encoding="utf-8")
    pipeline.to(torch.float32)
    with torch.no_grad():
        held = torch.stack([datasets.read_image(path) for path in
                            sorted((root / "coco" / "val2017").iterdir())[:50]])
        held = to_floats(held) * 2 - 1
        error = (vae.decode(vae.encode(held).latent_dist.mean).sample.clamp(-1, 1) - held).square().flatten(1).mean(1)
    psnr = (10 * (4 / error).log10()).mean().item()
    print(f"written: {cfg.OUT}; its autoencoder gives scenes back with {psnr:.2f} dB")
    return psnr


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
