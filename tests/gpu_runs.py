"""The steps of the golden run on the pretend GPU and on the CPU, each in a process of its own."""

import contextlib
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from script_processes import ROOT, finished, started

from tools import golden
from utils.evaluation import latency

SCENES = 4, 3                # training and validation scenes
BUSY = 15                    # lines of an audit's table that are shown
SETTINGS = {  # on top of the steps' own: small images, two optimizer steps at batches of 2
    "NUM_EPOCHS": 1, "EPOCHS": 1, "PHASE1_EPOCHS": 1, "PHASE2_EPOCHS": 1, "BATCH_SIZE": 2, "BATCH": 2, "IMAGE_SIZE": 96,
    "DETECTOR_SIZE": 96, "LATENCY_SIZE": 64, "TRAIN_PAIRS": 4, "VAL_PAIRS": 1, "TEST_PAIRS": 1, "CROP": 32,
    "FORMATS": ("torch.export",), "MAX_FRAMES": 3, "VALIDATION_SHARE": 0.5}
STEPS = golden.STEPS | {"eval_baselines": golden.Step("Eval_derain_baselines", {
    "TEST_SETS": ("./pairs",), "SPLITS_FILE": "", "MAX_IMAGES": 2, "LABELED_RAIN_DIR": "./demo/coco_rain",
    "MODELS": {"SPDNet": ("spdnet", "./assets/demo/spdnet.pt")}}, ())}


def prepare(work):
    """Fill the folder `work`, where scripts are started: small scenes, pairs of them, the demo's weights."""
    golden.draw_scenes(work / "demo", *SCENES)
    for name, source in (("rainy", "coco_rain"), ("clean", "coco")):
        shutil.copytree(work / "demo" / source / "val2017", work / "pairs" / name)
    shutil.copytree(ROOT / "assets", work / "assets")


def outcome(work, name, device, where="", **constants):
    """Run one of STEPS in `work`.

    Args:
        device: "cuda" for the pretend GPU, whose random stream is the CPU's; "cpu"; where: name of the output folder,
            the step's name unless given; constants: {constant: value} on top of the step's.
    Returns:
        {"history": [{name: number}, ...] of a training, "seconds" of the processor; on the GPU also "waits" and
        "launches" of the second optimizer step, "validation": waits of an epoch's validation, "whole": waits of the
        run, "table": what the step (the run, of other scripts) waited for, "validation_table": the same of the
        validation; on the CPU "training_bytes" and "validation_bytes" of tensors, most at any moment}
    """
    step = STEPS[name]
    known = golden.demo_of(step.script)[1]
    values = golden.constants_of(where or name, step, work)
    values |= {key: value for key, value in (SETTINGS | constants).items() if key in known}
    file = work / f"{where or name} {device}.json"
    process = started(_run, step.script, values, device, work, file)
    log = finished(process, file.with_suffix(".txt"))
    return json.loads(file.read_text(encoding="utf-8")) | {"printed": log}


def _run(script, values, device, work, file):
    """What a process does."""
    with open(file.with_suffix(".txt"), "wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.chdir(work)
    torch.set_num_threads(1)
    with on_device(device) as audit:
        latency.latencies.__wrapped__.__defaults__ = 0, 1  # measured once and without warm-up
        counted = Counted(audit)
        result = importlib.import_module(script.replace("/", ".")).main(**values)
        found = {"history": histories(result), "seconds": time.process_time()} | counted.report()
    file.write_text(json.dumps(found), encoding="utf-8")


@contextlib.contextmanager
def on_device(device):
    """Within, the process has a pretend GPU ("cuda") or none ("cpu"). -> its audit, or None"""
    if device == "cpu":
        yield None
        return
    import pretend_cuda  # here: it leaves traces in the process

    from utils.training import needs
    # tensors without content cannot pose as the pretend GPU's; what counts them has tests of its own
    needs.of_training = lambda *given: needs.Needs(0.1, 0.1, 0.1, 40.0, 2)
    with pretend_cuda.on(str(ROOT), own_stream=False) as audit:
        yield audit


def histories(result):
    """-> [{name: number}, ...]: the epochs of what a training script's main returned, [] of another script."""
    if not isinstance(result, dict):
        return []
    phases = [result] if "history" in result else [value for value in result.values() if isinstance(value, dict)]
    return [{key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "images_per_s"}
            for phase in phases for record in phase.get("history", [])]


class Counted:
    """Takes the audit's counters apart: one optimizer step, one validation, the rest."""

    def __init__(self, audit):
        self.audit, self.marks, self.validation = audit, [], Counter()
        if audit is None:
            self.bytes = {}
            self._count_bytes()
        else:
            self._count_waits(audit)

    def _count_bytes(self):
        from utils import memory
        from utils.training import engine
        plain = engine.train_one_epoch, engine.finish_epoch

        def peak(name, work):
            found = []
            peak = memory.peak_bytes(lambda: found.append(work()))
            self.bytes[f"{name}_bytes"] = max(peak, self.bytes.get(f"{name}_bytes", 0))
            return found[0]

        def finish_epoch(run, record, evaluate, *rest):
            counted = evaluate and (lambda model: peak("validation", lambda: evaluate(model)))
            return plain[1](run, record, counted, *rest)
        engine.train_one_epoch = lambda *given: peak("training", lambda: plain[0](*given))
        engine.finish_epoch = finish_epoch

    def _count_waits(self, audit):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        from utils.training import engine
        register_optimizer_step_post_hook(lambda *_: self.marks.append(audit.counts()))
        plain = engine.finish_epoch

        def finish_epoch(run, record, evaluate, *rest):
            def counted(model):
                before = audit.counts()
                metrics = evaluate(model)
                self.validation = audit.counts()[0] - before[0]
                return metrics
            return plain(run, record, counted if evaluate else evaluate, *rest)
        engine.finish_epoch = finish_epoch

    def report(self):
        if self.audit is None:
            return self.bytes
        waits, launches = self.audit.counts()
        found = {"whole": waits.total(), "validation": self.validation.total(), "table": table(waits)}
        if len(self.marks) > 1:
            (waits, launches), (later_waits, later_launches) = self.marks[:2]
            waits, launches = later_waits - waits, later_launches - launches
            found |= {"waits": waits.total(), "launches": launches, "table": table(waits)}
        return found | {"validation_table": table(self.validation)}


def table(counter):
    """-> the largest counts as text."""
    return "\n".join(f"{count:6d}  {text}" for text, count in counter.most_common(BUSY))


def report(folder):
    """In a process: tools/gpu_report.py's demo on the pretend GPU, into the folder."""
    with open(folder / "report.txt", "wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    torch.set_num_threads(1)
    with on_device("cuda"):
        from tools import gpu_report
        gpu_report.main(demo=True, OUT=str(folder / "report.md"))


def faults(file):
    """In a process: write what the pretend GPU fails to notice, or why it cannot be had, to a file."""
    try:
        import pretend_cuda
    except (AttributeError, ImportError, RuntimeError, TypeError):
        file.write_text(traceback.format_exc(limit=-1), encoding="utf-8")
        sys.exit(3)
    with pretend_cuda.on():
        x, cpu = torch.rand(4, 3, device="cuda"), torch.rand(4, 3)
        whole = torch.ones(2, 2, dtype=torch.long, device="cuda")
        wrong = {"two devices": lambda: x * cpu, "numpy": lambda: x.numpy(), "an index": lambda: cpu[whole[0]],
                 "integer matmul": lambda: whole @ whole, "a second GPU": lambda: torch.zeros(1, device="cuda:1"),
                 "a generator": lambda: torch.rand(2, device="cuda", generator=torch.Generator())}
        missed = []
        for name, action in wrong.items():
            with contextlib.suppress(RuntimeError, TypeError):
                action()
                missed.append(name)
    file.write_text(", ".join(missed), encoding="utf-8")


def reason_to_skip(folder):
    """-> why there is no pretend GPU here, in words, or None; AssertionError where it overlooks a fault."""
    file = Path(folder) / "faults.txt"
    process = started(faults, file)
    process.join()
    text = file.read_text(encoding="utf-8")
    if process.exitcode == 3:
        return f"torch {torch.__version__} lacks what pretend_cuda builds on: {text.splitlines()[-1]}"
    assert process.exitcode == 0 and not text, f"the pretend GPU overlooks: {text}"
    return None
