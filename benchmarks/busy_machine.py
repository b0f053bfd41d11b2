"""What other work on the same cores costs a training, and how OpenMP's threads should wait (see utils/threads.py).

    python -m benchmarks.busy_machine

Training steps of the feature demo's model on random images, with and without a busy process on each core. Each
measurement is a process of its own, as the setting is read when torch is loaded. "free" is only free where nothing else
runs on the machine.
"""

import os
import subprocess
import sys
import time

import utils.threads  # noqa: F401 (before torch)

import torch

from utils import config, losses, report, system, threads
from utils.feature_derain import create_feature_derain_rtdetr

SECONDS = 8.0                           # of training steps per measurement, after three steps of warm-up
ROUNDS = 3                              # every variant once per round; the best round counts, as disturbance only slows
IMAGES = 8                              # batch, as in the demo
IMAGE_SIZE = 160                        # side of the square images, as in the demo
VARIANTS = ("spinning", "short spin", "passive", "one thread", "this project")  # names of _ENVIRONMENTS below
CHILD = False                           # internal: this is one of the measured processes

_ENVIRONMENTS = {
    "spinning": {"GOMP_SPINCOUNT": threads.LONG_SPIN},  # libgomp's default
    "short spin": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "this project": {},  # spinning or sleeping, as utils/threads.py finds the machine
}


def images_per_s(cfg):
    """Train the feature demo's model on random images for cfg.SECONDS. -> images per second"""
    torch.manual_seed(0)
    model = create_feature_derain_rtdetr("./assets/demo/rtdetr", "multiscale", width=1.0)
    model.unfreeze_detector(True)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    images, twins = torch.rand(2, cfg.IMAGES, 3, cfg.IMAGE_SIZE, cfg.IMAGE_SIZE)
    labels = [{"class_labels": torch.tensor([0, 1]), "boxes": torch.full((2, 4), 0.4)} for _ in range(cfg.IMAGES)]

    def step():
        outputs = model(images, labels=labels, masks=True)
        (outputs.loss + losses.rain_mask_loss(outputs.masks, images, twins)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < cfg.SECONDS:
        step()
        done += 1
    return done * cfg.IMAGES / (time.perf_counter() - start)


def measured(cfg, variant):
    """-> images per second of a process with the variant's environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
    command = [sys.executable, "-m", "benchmarks.busy_machine", "--CHILD", "True"]
    for name in ("SECONDS", "IMAGES", "IMAGE_SIZE"):
        command += [f"--{name}", str(getattr(cfg, name))]
    done = subprocess.run(command, env=inherited | _ENVIRONMENTS[variant], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(**overrides):
    """-> {variant: {"free", "busy": images/s}}."""
    cfg = config.resolve(globals(), overrides)
    if cfg.CHILD:
        print(images_per_s(cfg))
        return None
    if unknown := [variant for variant in cfg.VARIANTS if variant not in _ENVIRONMENTS]:
        raise config.UserError(f"VARIANTS: {unknown[0]!r} is unknown; choose from {', '.join(_ENVIRONMENTS)}")
    found = {variant: {"free": 0.0, "busy": 0.0} for variant in cfg.VARIANTS}
    for _ in range(cfg.ROUNDS):
        for state, number in (("free", 0), ("busy", system.available_cores())):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
            try:
                for variant in cfg.VARIANTS:
                    found[variant][state] = max(found[variant][state], measured(cfg, variant))
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
    rows = [{"variant": name} | values | {"share": values["busy"] / values["free"]} for name, values in found.items()]
    print(f"{system.available_cores()} cores, images/s, best of {cfg.ROUNDS}")
    print(report.table(rows, {"variant": "threads wait", "free": "free", "busy": "a busy process on each core",
                              "share": "busy / free"}))
    return found


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
