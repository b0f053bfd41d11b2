"""Ten minutes on a GPU, one Markdown page: does it compute what the CPU computes, what does each training need beside
the estimate, how fast is it, where does the CPU wait for it, which of FAST pays.

    python -m tools.gpu_report                      # writes gpu_report.md

Networks have the published sizes and random weights, trainings the scripts' own settings, on a few drawn scenes: their
decoding is cheaper than that of photographs. A row that fails says why, and the others go on.
"""

import contextlib
import copy
import dataclasses
import importlib
import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import utils.threads  # noqa: F401 (before torch)

import torch

from rfdetr.config import COCO_HEAD_ROWS, COCO_ROWS
from rfdetr.model import RFDETR
from tools import memory_table
from utils import config, fast, processes, report, system
from utils.conditional_model import ConditionalRainRobustRTDETR
from utils.evaluation import latency
from utils.feature_derain import FeatureDerainRTDETR
from utils.inference.deployable import Deployable
from utils.networks import derainers, onnx_file, rtdetr
from utils.networks.rain_detector import RainDetector
from utils.networks.spdnet import SPDNet
from utils.networks.spdnet_init import init_near_identity
from utils.networks.unet import new_unet
from utils.training import engine, needs

OUT = "./gpu_report.md"
IMAGE_SIZE = 640                        # of detectors and of SPDNet in front of them
UNET_SIZE = 256                         # of the windshield networks
DETECTOR = "r18"                        # RT-DETR: r18, r34, r50 or tiny
RFDETR_SIZE = "nano"                    # a key of rfdetr/config.py's SIZES
SCENES = (64, 4)                        # drawn for the trainings: to train on, to validate on
TRAININGS = ()                          # scripts, () for all
REPEATS = 10                            # calls of which a latency is the median
COMPILE = True                          # also what needs torch.compile: minutes

DEMO = {"IMAGE_SIZE": 96, "UNET_SIZE": 64, "DETECTOR": "tiny", "RFDETR_SIZE": "tiny", "SCENES": (4, 2), "REPEATS": 1,
        "TRAININGS": ("Training_RainDetector",), "COMPILE": False}
_SPDNET_FLOP = 1.12e12                  # of one 640 x 640 image: multiplications and additions


# ---- networks --------------------------------------------------------------------------------------------------

class Case:
    """A network with its call: run(net, images) -> tensors that do not hang on the order of equal scores."""

    def __init__(self, net, side, run=lambda net, images: [net(images)]):
        self.net, self.side, self.run = net.eval(), side, run
        with torch.no_grad():
            for parameter in net.parameters():  # a new de-rainer is the identity, which any device computes
                parameter += 2e-3 * torch.randn_like(parameter)


def detector_levels(net, images):
    """What RT-DETR's decoder starts from, and the queries' best scores in order."""
    levels = rtdetr.encode(net, rtdetr.backbone_features(net, images))[1].last_hidden_state
    return [*levels, net(pixel_values=images).logits.amax(2).sort(1).values]


def cases(cfg):
    """-> {name: Case} on the CPU."""
    torch.manual_seed(0)
    classes = dict(enumerate(COCO_ROWS))
    detector = rtdetr.new_rtdetr(cfg.DETECTOR, classes, train_backbone_norms=False)
    spdnet = init_near_identity(SPDNet())
    found = {
        "SPDNet": Case(derainers.Derainer("spdnet", spdnet), cfg.IMAGE_SIZE),
        f"RT-DETR {cfg.DETECTOR}": Case(detector, cfg.IMAGE_SIZE, detector_levels),
        "feature module in it": Case(
            FeatureDerainRTDETR(copy.deepcopy(detector)), cfg.IMAGE_SIZE,
            lambda net, images: list(net(images, detect=False, feature_level="encoder").features)),
        "gate, SPDNet, RT-DETR": Case(
            ConditionalRainRobustRTDETR(RainDetector(), spdnet, detector, rain_threshold=0.0), cfg.IMAGE_SIZE,
            lambda net, images: [net(images).derained]),
        "rain detector": Case(RainDetector(), cfg.UNET_SIZE, lambda net, images: [net.logit(images)]),
        "U-Net": Case(new_unet("unet"), cfg.UNET_SIZE),
        f"RF-DETR {cfg.RFDETR_SIZE}, masks": Case(
            RFDETR(cfg.RFDETR_SIZE, COCO_HEAD_ROWS, mask_head="nano"), None,
            lambda net, images: [net(images)["pixel_embedding"]]),
    }
    names = ("nafnet", "prenet", "rescan", "ddn", "derainnet")
    return found | {name: Case(derainers.Derainer(name), cfg.UNET_SIZE) for name in names}


def images_for(case, device, batch=1):
    side = case.side or case.net.model_args["resolution"]
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def parity(case, device):
    """-> {"float32", "bf16": norm of the difference to the CPU's float32 over its norm, the largest of all outputs}."""
    images, found = images_for(case, "cpu"), {}
    expected = case.run(case.net, images)
    own = copy.deepcopy(case.net).to(device)
    for name, half in (("float32", False), ("bf16", True)):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            outputs = case.run(own, images.to(device))
        found[name] = max(((a.cpu().float() - b.float()).norm() / b.float().norm()).item()
                          for a, b in zip(outputs, expected, strict=True))
    return {name: f"{value:.1e}" for name, value in found.items()}


@torch.no_grad()
def speed(case, device, cfg):
    """-> {variant: ms of a batch of 1}, all in one run."""
    images = images_for(case, device)
    plain = copy.deepcopy(case.net).to(device)

    def half(net, images):
        with torch.autocast(device.type, torch.bfloat16):
            return case.run(net, images)
    variants = {"float32": partial(case.run, plain), "bf16": partial(half, plain)}
    for name in fast.INFERENCE:
        if name != "tf32" and (cfg.COMPILE or name == "channels_last"):
            net = copy.deepcopy(plain)
            fast.switch_on((name,), device, net)
            variants[name] = partial(case.run, net)
    found = latency.latencies(variants, images, repeats=cfg.REPEATS)
    before = torch.get_float32_matmul_precision()
    fast.switch_on(("tf32",), device)  # of the whole process, so last
    found["tf32"] = latency.latencies({"tf32": partial(case.run, plain)}, images, repeats=cfg.REPEATS)["tf32"]
    torch.set_float32_matmul_precision(before)
    return found


# ---- trainings -------------------------------------------------------------------------------------------------

def training(script, constants):
    """Three epochs of a script's training: warm-up, speed, waits.

    Returns:
        {"batch", "estimated GB", "measured GB", "steps/s", "data": share of the step that waits for data, "waits": per
        step}.
    """
    fit, one_epoch, found = engine.fit, engine.train_one_epoch, {}

    def measured_epoch(run, compute_losses):
        if run.epoch < 2:
            return one_epoch(run, compute_losses)
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                record = one_epoch(run, compute_losses)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        steps = len(run.loader.batch_sampler)
        found["waits"] = round(sum("synchronizing" in str(one.message) for one in noted) / steps, 1)
        return record

    def three_epochs(model, loader, compute_losses, plan, *, parameters, optimizer=torch.optim.AdamW, **others):
        found["batch"] = plan.batch_size
        found["estimated GB"] = needs.of_training(model, loader, compute_losses, plan, parameters, optimizer).total
        plan = dataclasses.replace(plan, epochs=3, resume=False, checkpoint_steps=10**9)
        torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            history = fit(model, loader, compute_losses, plan, output_dir=folder, parameters=parameters,
                          optimizer=optimizer)["history"]
        found["measured GB"] = torch.cuda.max_memory_allocated() / 1e9
        found["steps/s"] = history[1]["images_per_s"] / plan.batch_size
        found["data"] = history[1]["time"].get("data", 0.0)
        raise memory_table.Found
    quiet = open(os.devnull, "w", encoding="utf-8")
    with mock.patch.object(engine, "fit", three_epochs), mock.patch.object(engine, "train_one_epoch", measured_epoch), \
            quiet, contextlib.redirect_stdout(quiet), contextlib.suppress(memory_table.Found):
        importlib.import_module(script).main(**memory_table.settings_of(script), **constants)
    return found


# ---- the page --------------------------------------------------------------------------------------------------

def guarded(work, *given):
    """-> work(*given), or {"failed": why}."""
    try:
        return work(*given)
    except Exception as error:  # the report is there to find such things
        return {"failed": f"{type(error).__name__}: {system.listed(str(error).splitlines() or [''], 1)}"[:200]}
    finally:
        torch.cuda.empty_cache()


def exported(case, device, cfg):
    """-> {"difference": of the exported RT-DETR on the GPU to PyTorch there, "ms": of one image}."""
    model, images = Deployable(case.net).eval().to(device), images_for(case, device)
    with torch.no_grad():
        program = onnx_file.export_program(model, images).module()
        difference = onnx_file.difference([value.cpu() for value in program(images)],
                                          [value.cpu() for value in model(images)])
        return {"difference": f"{difference:.1e}"} | {
            "ms": latency.latencies({"ms": program}, images, repeats=cfg.REPEATS)["ms"]}


def as_markdown(rows, title):
    """{name: {column: value}} -> a heading and a table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))

    def cell(value):
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")
    texts = [{"": name} | {column: cell(row.get(column)) for column in columns} for name, row in rows.items()]
    return f"## {title}\n\n" + report.markdown(texts, {"": ""} | {column: column for column in columns}).rstrip()


def measure(cfg, device):
    """-> {heading: {row: {column: value}}}"""
    found, start = {}, time.monotonic()

    def said(name):
        print(f"{time.monotonic() - start:5.0f} s  {name}", flush=True)
        return name
    networks = cases(cfg)
    found["The CPU's outputs: relative difference"] = {
        said(f"parity: {name}").split(": ", 1)[1]: guarded(parity, case, device) for name, case in networks.items()}
    found["Milliseconds of one image"] = {
        said(f"speed: {name}").split(": ", 1)[1]: guarded(speed, case, device, cfg) for name, case in networks.items()}
    detector = networks[f"RT-DETR {cfg.DETECTOR}"]
    found["An exported detector"] = {"torch.export": guarded(exported, detector, device, cfg)}
    scripts = {}
    for script, constants in memory_table.ROWS:
        if not cfg.TRAININGS or script in cfg.TRAININGS:
            name = said(" ".join([script, *(f"{key}={value!r}" for key, value in constants.items())]))
            scripts[name] = guarded(training, script, constants)
            if "measured GB" in scripts[name]:
                own = scripts[name]
                own["measured / estimated"] = own["measured GB"] / own["estimated GB"]
    found["Trainings at the scripts' settings"] = scripts
    return found


def main(**overrides):
    """-> Path of the page."""
    cfg = config.resolve(globals(), overrides)
    memory_table.require_scripts("TRAININGS", cfg.TRAININGS)
    device = processes.announced_device()
    if device.type != "cuda":
        raise config.UserError("tools.gpu_report measures a GPU, and torch finds none here")
    out = Path(cfg.OUT).absolute()
    report.output_folder(out.parent, [out.name])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        memory_table.prepare(*cfg.SCENES, side=cfg.IMAGE_SIZE)
        found = measure(cfg, device)
    where = report.environment()
    spdnet = found["Milliseconds of one image"]["SPDNet"].get("float32")
    text = "\n\n".join([
        "# What a GPU does with it", f"`python -m tools.gpu_report`, commit {where['commit']}, {where['date'][:10]}",
        "\n".join(f"- {name}: {where[name]}" for name in ("device", "machine", "python", "torch", "transformers")),
        *(as_markdown(rows, title) for title, rows in found.items()),
        "SPDNet at 640 x 640 is 1.12 TFLOP of arithmetic" + (
            f": {_SPDNET_FLOP / spdnet / 1e9:.1f} TFLOP/s in float32." if spdnet and cfg.IMAGE_SIZE == 640 else ".")])
    with config.writing(out), system.written(out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"written: {out.as_posix()}")
    return out


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
