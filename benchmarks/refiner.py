"""Time and memory of the refiner's modes, with random weights of the published base's sizes.

    python -m benchmarks.refiner                 # 859.5M + 83.7M parameters: 8 GB of memory, minutes on a CPU
    python -m benchmarks.refiner --demo          # the tiny base

A call refines one image (batch 1, median of REPEATS after one warm-up, all modes in turns). Memory: the weights and the
tensors of a call, and of a training step with and without GRADIENT_CHECKPOINTING, as utils/memory.py counts
(on "meta" for training steps, so that they need no memory).
"""

import utils.threads  # noqa: F401 (before torch)

import torch
from torch import nn

from utils import config, freeze, memory, processes, report
from utils.evaluation import latency
from utils.networks import diffusion_base
from utils.networks.refiner import DiffusionRefiner, PixelRefiner

SIZES = (256, 512)                      # sides of the square images
REPEATS = 3
PRECISION = "float32"                   # of the base: float32, bf16 or fp16
BASE_MODEL: str | None = ""             # folder whose sizes are taken; "" for the published ones
DEMO = {"BASE_MODEL": "./assets/demo/instruct_pix2pix_tiny", "SIZES": (96, 160)}

_MODES = {"one_step": {"mode": "one_step"}, "sample, 1 step": {"mode": "sample", "steps": 1},
          "sample, 2 steps": {"mode": "sample", "steps": 2}}


def build(cfg, device, **settings):
    """-> DiffusionRefiner with random weights."""
    sizes = diffusion_base.settings_of(cfg.BASE_MODEL) if cfg.BASE_MODEL else (None, None)
    base = diffusion_base.random_base(*sizes, diffusion_base.DTYPES[cfg.PRECISION], device)
    return DiffusionRefiner(base, **settings)


class InMode(nn.Module):
    """One refiner in several modes: its weights are there once."""

    def __init__(self, refiner, mode, steps=1):
        super().__init__()
        self.refiner, self.mode, self.steps = refiner, mode, steps

    def forward(self, images):
        """(B, 3, H, W) in [0, 1] -> the same, refined."""
        self.refiner.mode, self.refiner.steps = self.mode, self.steps
        return self.refiner(images)


def training_gigabytes(cfg, size, mode, checkpointing):
    """-> GB of weights, Adam's state and the tensors of one training step, batch 1; counted without making them."""
    model = build(cfg, "meta", mode=mode, checkpointing=checkpointing).train()
    images = torch.empty(1, 3, size, size, device="meta")

    def step():
        (model(images, images) if mode == "sample" else model(images).mean()).backward()
    return sum(memory.training_gigabytes(model, step).values())


def main(**overrides):
    """Print the tables; -> rows."""
    cfg = config.resolve(globals(), overrides)
    diffusion_base.diffusers_and_peft()
    device, rows = processes.announced_device(), []
    one = build(cfg, device).eval()
    models = {name: InMode(one, **settings) for name, settings in _MODES.items()}
    models["pixel"] = PixelRefiner(freeze.count_parameters(one)[1]).to(device).eval()
    for size in cfg.SIZES:
        images = torch.rand(1, 3, size, size, device=device)
        times = latency.latencies(models, images, warmup=1, repeats=cfg.REPEATS)
        for name, model in models.items():
            row = {"mode": name, "size": size, "ms": times[name], "ratio": times[name] / times["sample, 1 step"],
                   "call GB": memory.peak_gigabytes(model, images)}
            if name in ("one_step", "sample, 1 step"):
                mode = _MODES[name]["mode"]
                row |= {"training GB": training_gigabytes(cfg, size, mode, False),
                        "checkpointed GB": training_gigabytes(cfg, size, mode, True)}
            rows.append(row)
    print(report.table(rows, {name: name for name in ("mode", "size", "ms", "ratio", "call GB", "training GB",
                                                      "checkpointed GB")}))
    return rows


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
