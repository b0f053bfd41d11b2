"""Golden hashes: prove that a change of the code's shape (files moved, functions split) changed no number.

    python -m tools.golden record --work ../golden/before --out before.json      # with the old code
    python -m tools.golden record --work ../golden/after --out after.json        # with the new code, same machine
    python -m tools.golden compare before.json after.json
    python -m tools.golden resume --from ../golden/before --work ../golden/resumed --out resumed.json
    python -m tools.golden compare before.json resumed.json --shared

`record` runs every script as a user would, on a dozen small scenes and one CPU thread, and writes down every weight,
optimizer state and metric, and a hash of every picture's pixels. Each training is stopped with Ctrl+C in the middle of
its second epoch, and resumed. `resume` shows that files written by other code are still read: evaluations run on the
finished weights of --from, and its stopped trainings go on from their last.pt. The numbers depend on processor and
library versions, so the hashes are compared on one machine and never committed. Not compared: times and what is
computed or drawn from them, paths, versions, TensorBoard's files, and the bytes of files (only what they hold).
"""

import argparse
import ast
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

_ROOT = Path(__file__).resolve().parent.parent
TRAIN_IMAGES, VAL_IMAGES = 8, 4         # scenes; at batches of 4 an epoch is two optimizer steps
TIMEOUT = 3600                          # seconds for one script; a minute is usual, on a busy machine far more
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
               "MPLBACKEND": "Agg", "PYTHONHASHSEED": "0"}
COMMON = {  # on top of every script's DEMO dict, where the script has a constant of that name
    "NUM_EPOCHS": 2, "EPOCHS": 2, "SWEEP_EPOCHS": 1, "BATCH_SIZE": 4, "BATCH": 4, "EVAL_BATCH_SIZE": 4,
    "WARMUP_STEPS": 1, "DATALOADER_WORKERS": 0, "NUM_WORKERS": 0, "PERCENT_DATASET": 100, "VAL_IMAGES": VAL_IMAGES}
OUTPUTS = ("OUTPUT_DIR", "CHECKPOINT_DIR", "RUNS_DIR", "OUTPUT", "OUT")  # constants that say where a script writes
# show times, or may; the report says when it was written and holds what results.json has as well
TIMED_FILES = {"curves.png", "latency_map.png", "threshold_sweep.png", "report.html"}
TIMED_KEYS = re.compile(r"environment|time|seconds|fps|milliseconds.*|ms|ms_.*|.*per_s|images_per_s_.*")
PICTURES, VIDEOS = {".png", ".jpg"}, {".mp4", ".avi"}
MACHINE_LINES = re.compile(r"Python|packages:|torch|GPU|GB free")  # of what validate_setup.py prints
# Ctrl+C right after the optimizer step of that number, in the script's own process so that it is always the same one
INTERRUPTED = """
import runpy, signal, sys
from pathlib import Path
from torch.optim.optimizer import register_optimizer_step_post_hook
del sys.argv[0]
left = int(sys.argv.pop(1))
def count(*_):
    global left
    left -= 1
    if left == 0:
        signal.raise_signal(signal.SIGINT)
register_optimizer_step_post_hook(count)
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Step(NamedTuple):
    """One script; it writes into runs/<name> below the work folder, where it is started."""

    script: str
    constants: dict = {}  # differences from DEMO and COMMON
    needs: tuple = ()     # steps whose files it reads
    stop_after: int = 0   # optimizer steps of a training before Ctrl+C; 0: no training, or one that is not stopped
    resume: object = True  # the value of RESUME
    shown: bool = False   # its console output counts as well


UNET = {"RAINY_DIR": "./runs/windshield", "CLEAR_DIR": "./demo/coco", "REAL_DIR": "./demo/coco_rain/val2017",
        "TRAIN_PAIRS": 8, "VAL_PAIRS": 2, "TEST_PAIRS": 2, "SEQUENCE_SEPARATOR": "", "SAMPLE_EVERY": 1, "REAL_EVERY": 1,
        "CHECKPOINT_EVERY": 1}
CLASSES = ("stop sign", "car", "bus", "traffic light", "person")
STEPS = {
    "streaks": Step("make_rain", {"OUT": "", "INTENSITY": "random", "WORKERS": 1}),
    "windshield": Step("make_rain", {"OUT": "", "KIND": "windshield", "INTENSITY": "random", "WORKERS": 1}),
    "validate_setup": Step("validate_setup", shown=True),
    "spdnet": Step("Training_SPDNet", stop_after=3),
    "adaptation": Step("Training_SPDNet_Adaptation",
                       {"RECONSTRUCTION_WEIGHT": 1.0, "IDENTITY_WEIGHT": 1.0}, stop_after=3),
    "rtdetr": Step("Training_RTDETR", stop_after=3),
    "rtdetr_rain": Step("Training_RTDETR", {"RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "COCO_RATIO": 0.5,
                                            "RAIN_RATIO": 0.5, "AUGMENTATION": "full"}, stop_after=3),
    "rain_detector": Step("Training_RainDetector", {"VALIDATION_SHARE": 0.25}, stop_after=4),
    "conditional": Step("Training_Conditional", stop_after=3),
    "adapter": Step("Training_WeatherAdapter", stop_after=3),
    "feature": Step("Training_FeatureDerain", {"PHASE1_EPOCHS": 2, "PHASE2_EPOCHS": 1}, stop_after=3),  # in phase 1
    "feature_light": Step("Training_FeatureDerain", {"PHASE1_EPOCHS": 1, "PHASE2_EPOCHS": 2,
                                                     "DERAIN_TYPE": "lightweight"}, stop_after=5),  # in phase 2
    "unet": Step("train_unet_derain", UNET, ("windshield",), stop_after=3),
    "unet_resnet34": Step("train_unet_derain", UNET | {"ARCH": "resnet34", "ENCODER_WEIGHTS": "", "RANDOM_CROP": True,
                                                       "SCHEDULER": "plateau"}, ("windshield",), stop_after=3),
    "stage1": Step("train_detector_stage1", {"PRETRAIN_EXCLUDE_KEYS": (), "RUN_TEST": True}, stop_after=3,
                   resume="last"),
    "stage1_new": Step("train_detector_stage1", {"PRETRAIN_WEIGHTS": "none", "AUGMENTATION": "full",
                                                 "MULTI_SCALE": True, "LAYER_DECAY": 0.8}, stop_after=3, resume="last"),
    "shrink": Step("shrink_head", {"OUT_CKPT": "./runs/shrink/two.pth"}),
    "shrink_stage1": Step("shrink_head", {"IN_CKPT": "./runs/stage1/*/checkpoint_best_regular.pth", "KEEP": CLASSES,
                                          "OUT_CKPT": "./runs/shrink_stage1/all.pth"}, ("stage1",)),
    "stage2": Step("train_seg_stage2", {"CHECKPOINT": "./runs/shrink_stage1/all.pth"}, ("shrink_stage1",),
                   stop_after=3, resume="last"),
    "stage2_uncached": Step("train_seg_stage2", {"CACHE_FEATURES": False}, stop_after=3, resume="last"),
    "single_stage": Step("train_seg_single_stage", stop_after=3, resume="last"),
    "sweep": Step("tools/sweep_unet_derain", {"BASE": UNET}, ("windshield",)),
    "eval_adaptation": Step("Eval_SPDNet_Adaptation", {"ADAPTED_MODEL_PATH": "./runs/adaptation/spdnet_adapted.pt"},
                            ("adaptation",)),
    "eval_conditional": Step("Eval_conditional", {
        "SOFT_PIPELINE_DIR": "./runs/conditional/pipeline", "HARD_PIPELINE_DIR": "",
        "FEATURE_MODEL_DIR": "./runs/feature/model", "ADAPTER_PATH": "./runs/adapter/rain.safetensors"},
        ("conditional", "feature", "adapter")),
    "eval_feature": Step("Eval_FeatureDerain", {"MULTISCALE_MODEL_NAME": "./runs/feature/model",
                                                "LIGHTWEIGHT_MODEL_NAME": "./runs/feature_light/model"},
                         ("feature", "feature_light")),
    "eval_unet": Step("Eval_unet_derain", {
        "CLEAR_DIR": UNET["CLEAR_DIR"], "RAINY_DIR": UNET["RAINY_DIR"], "REAL_DIR": UNET["REAL_DIR"],
        "SPLITS_FILE": "./runs/unet/splits.json", "UNET_PATH": "./runs/unet/best.pt"}, ("unet",)),
    "eval_robustness": Step("Eval_robustness", {"WEATHER": ("rain", "jpeg"), "RESAMPLES": 5}),
    "detect_images": Step("detect", {"SOURCE": "./demo/coco_rain/val2017"}),
    "detect_pipeline": Step("detect", {"SOURCE": "./demo/coco/val2017", "PIPELINE_DIR": "./runs/conditional/pipeline"},
                            ("conditional",)),
    "detect_feature": Step("detect", {"SOURCE": "./demo/coco_rain/val2017", "MODEL": "feature", "SHOW_DERAINED": False,
                                      "FEATURE_MODEL_DIR": "./runs/feature/model"}, ("feature",)),
    "detect_video": Step("detect", {"demo": True}),
    "export": Step("export", {"MODEL_NAME": "./runs/feature/model", "ADAPTER_PATH": "", "RFDETR_PATH": "",
                              "FORMATS": ("onnx", "torch.export")}, ("feature",)),
}


# ---- running the scripts -------------------------------------------------------------------------------------------

def draw_scenes(demo, train=TRAIN_IMAGES, val=VAL_IMAGES):
    """The small data sets, in the layout of ./demo, `train` and `val` scenes. Here and in `content_of` alone modules of
    this project are used."""
    from utils.demo.coco import ensure_demo
    from utils.demo.roboflow import ensure_dataset
    ensure_demo(demo, train, val)
    ensure_dataset(demo / "dataset", demo, train, val - 1, 1)


def demo_of(script):
    """-> ({constant: value} of a script's DEMO dict, names of all its constants), read from its source."""
    source = (_ROOT / f"{script}.py").read_text(encoding="utf-8")
    names = re.findall(r"^([A-Z][A-Z0-9_]*)(?:: [^=\n]+)? = ", source, re.MULTILINE)
    demo = next((node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)
                 and getattr(node.targets[0], "id", "") == "DEMO"), None)
    return ast.literal_eval(demo) if demo else {}, names


def constants_of(name, step, work):
    """-> {constant: value} with which a step runs in the folder `work`."""
    demo, names = demo_of(step.script)
    values = demo | {key: value for key, value in COMMON.items() if key in names} | step.constants
    if values.pop("demo", False):  # draws what is missing itself
        return {"demo": True, "OUTPUT": f"./runs/{name}"}
    values |= {key: f"./runs/{name}" for key in OUTPUTS if key in values}
    if step.script == "tools/sweep_unet_derain":  # its trials are trainings with these constants
        values["BASE"] = demo_of("train_unet_derain")[0] | demo["BASE"] | COMMON | values["BASE"]
        trained = demo_of("train_unet_derain")[1]
        values["BASE"] = {key: value for key, value in values["BASE"].items()
                          if key in trained and key not in ("CHECKPOINT_DIR", "EPOCHS")}
    if step.script == "export" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        values["FORMATS"] = ("torch.export",)
    return {key: "./" + next(work.glob(value)).relative_to(work).as_posix()
            if isinstance(value, str) and "*" in value else value for key, value in values.items()}


def command_line(name, step, work):
    """-> the flags of a step."""
    flags = []
    for key, value in constants_of(name, step, work).items():
        flags += ["--demo"] if key == "demo" else [f"--{key}", value if isinstance(value, str) else repr(value)]
    return flags


def run(name, step, work, part=""):
    """Run a step (part: "", "stopped" or "resumed"). -> its entries, {"failed": ...} where it did not work."""
    words = [sys.executable]
    try:
        script = str(_ROOT / f"{step.script}.py")
        words += ["-c", INTERRUPTED, script, str(step.stop_after)] if part == "stopped" else [script]
        words += command_line(name, step, work) + (["--RESUME", str(step.resume)] if part == "resumed" else [])
        env = os.environ | ENVIRONMENT | {"PYTHONPATH": str(_ROOT)}  # for the scripts in tools/
        done = subprocess.run(words, cwd=work, env=env, timeout=TIMEOUT, text=True,
                              encoding="utf-8", errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        (work / "logs" / f"{name} {part}.txt").write_text(done.stdout, encoding="utf-8")
        if done.returncode or (part == "stopped" and "interrupted" not in done.stdout):
            raise RuntimeError(f"exit code {done.returncode}\n{done.stdout[-2000:]}")
        entries = entries_of(work / "runs" / name)
        if part == "stopped":
            shutil.copytree(work / "runs" / name, work / "halfway" / name)
        if step.shown:
            entries["console"] = "\n".join(x for x in done.stdout.splitlines() if not MACHINE_LINES.search(x))
        return entries
    except Exception as error:  # one step that fails must not hide the others
        print(f"FAILED: {name} {part}: {type(error).__name__}: {error}", flush=True)
        return {"failed": type(error).__name__}


def run_all(tasks, jobs):
    """Run {name: (function, names it needs)}, `jobs` at a time. -> {name: entries}"""
    waiting, running, found = dict(tasks), {}, {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for name, (function, needs) in list(waiting.items()):
                if len(running) < jobs and all(need in found for need in needs if need in tasks):
                    running[pool.submit(function)] = name, time.monotonic()
                    del waiting[name]
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                name, start = running.pop(future)
                found[name] = future.result()
                print(f"{name}: {len(found[name])} entries, {time.monotonic() - start:.0f} s", flush=True)
    return {name: found[name] for name in tasks}


def record(work, only, jobs):
    """Everything, or the steps `only` and what they need. -> {step: entries}"""
    chosen = set(only or STEPS)
    while more := {need for name in chosen for need in STEPS[name].needs} - chosen:
        chosen |= more
    draw_scenes(work / "demo")
    tasks = {}
    for name, step in STEPS.items():
        needs = [f"{need} resumed" if STEPS[need].stop_after else need for need in step.needs]
        if name in chosen and step.stop_after:
            tasks[f"{name} stopped"] = partial(run, name, step, work, "stopped"), needs
            tasks[f"{name} resumed"] = partial(run, name, step, work, "resumed"), (f"{name} stopped",)
        elif name in chosen:
            tasks[name] = partial(run, name, step, work), needs
    return {"scenes": entries_of(work / "demo")} | run_all(tasks, jobs)


def resume(work, earlier, only, jobs):
    """Go on with the files of an earlier `record`. -> {step: entries} of what reads weights or last.pt"""
    shutil.copytree(earlier / "demo", work / "demo")
    shutil.copytree(earlier / "runs", work / "runs")
    chosen = {name: step for name, step in STEPS.items()
              if name in (only or STEPS) and (earlier / "runs" / name).exists()}
    readers = {name: step for name, step in chosen.items()
               if not step.stop_after and any(STEPS[need].stop_after for need in step.needs)}
    stopped = {name: step for name, step in chosen.items() if step.stop_after}
    for name in readers:
        shutil.rmtree(work / "runs" / name)
    found = run_all({name: (partial(run, name, step, work), ()) for name, step in readers.items()}, jobs)
    for name in stopped:
        shutil.rmtree(work / "runs" / name)
        shutil.copytree(earlier / "halfway" / name, work / "runs" / name)
    return found | run_all({f"{name} resumed": (partial(run, name, step, work, "resumed"), ())
                            for name, step in stopped.items()}, jobs)


# ---- what files hold -----------------------------------------------------------------------------------------------

def entries_of(folder):
    """-> {"file: key": number, text or hash} of all files below a folder."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        hidden = path.name.startswith(".")  # locks
        if path.is_file() and not hidden and "tb" not in path.relative_to(folder).parts and (
                path.name not in TIMED_FILES):
            flatten(content_of(path), path.relative_to(folder).as_posix() + ":", entries)
    return entries


def content_of(path):
    """-> a file's content: nested dicts and lists of arrays, numbers and text."""
    import torch  # slow to import: not for `compare`
    torch.set_num_threads(1)
    if path.suffix in PICTURES:
        with Image.open(path) as image:
            return np.asarray(image)
    if path.suffix in VIDEOS:
        import cv2
        video, frames = cv2.VideoCapture(str(path)), []
        while (frame := video.read()[1]) is not None:
            frames.append(frame)
        return np.stack(frames)
    if path.suffix == ".md":  # a model's card names the commit
        lines = path.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if not line.startswith("Trained with RainSight")]
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix in (".pt", ".pth"):
        from utils import checkpoint
        return checkpoint.load(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file
        return load_file(path)
    if path.suffix in (".onnx", ".pt2"):
        return outputs_of(path)
    return path.read_bytes()


def outputs_of(path):
    """-> the outputs of an exported model for a fixed image: its file's bytes are not the same twice."""
    import torch
    pixels = np.random.default_rng(0).random((1, 3, 160, 160), dtype=np.float32)
    if path.suffix == ".pt2":
        return list(torch.export.load(path).module()(torch.from_numpy(pixels)))
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: pixels})


def flatten(value, key, entries):
    """Write the leaves of a file's content into `entries`."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in pairs:
            is_path = isinstance(inner, str) and ("/" in inner or "\\" in inner)
            elsewhere = is_path and ("constants" in key or Path(inner).is_absolute())
            if not TIMED_KEYS.fullmatch(str(name)) and not elsewhere:
                flatten(inner, f"{key} {name}", entries)
        if not value:
            entries[key] = "empty"
    elif isinstance(value, (str, int, float, type(None))):
        entries[key] = repr(value)
    elif isinstance(value, bytes):
        entries[key] = hashlib.sha256(value).hexdigest()[:16]
    else:
        if hasattr(value, "detach"):  # a tensor, as its bytes: numpy has no bfloat16
            import torch
            shape, kind = tuple(value.shape), str(value.dtype)
            value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            shape, kind = value.shape, str(value.dtype)
        entries[key] = f"{kind} {shape} " + hashlib.sha256(np.ascontiguousarray(value)).hexdigest()[:16]


# ---- the commands --------------------------------------------------------------------------------------------------

def compare(first, second, shared):
    """Print what differs. -> how many entries"""
    a, b = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (first, second))
    different = equal = 0
    for step in [name for name in a | b if not shared or (name in a and name in b)]:
        for entry in a.get(step, {}) | b.get(step, {}):
            values = [found.get(step, {}).get(entry, "missing") for found in (a, b)]
            if values[0] == values[1] and entry != "failed":
                equal += 1
            else:
                different += 1
                print(f"{step} | {entry} {values[0]} -> {values[1]}")
    print(f"{equal} entries are equal, {different} differ or are missing")
    return different if equal else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "resume"):
        command = commands.add_parser(name)
        command.add_argument("--work", type=Path, required=True, help="a new folder for everything that is written")
        command.add_argument("--out", type=Path, required=True, help="the JSON file of hashes")
        command.add_argument("--only", nargs="+", choices=STEPS, metavar="NAME", help=", ".join(STEPS))
        command.add_argument("--jobs", type=int, default=2, help="scripts that run at the same time (default 2)")
    command.add_argument("--from", dest="earlier", type=Path, required=True, help="the --work of an earlier record")
    command = commands.add_parser("compare")
    command.add_argument("files", nargs=2)
    command.add_argument("--shared", action="store_true", help="only the steps that both files have")
    cfg = parser.parse_args()
    if cfg.command == "compare":
        return 1 if compare(*cfg.files, cfg.shared) else 0
    work = cfg.work.resolve()
    if work.exists() and any(work.iterdir()):
        parser.error(f"--work {cfg.work.as_posix()} is not empty: give a new folder")
    (work / "logs").mkdir(parents=True)
    shutil.copytree(_ROOT / "assets", work / "assets")
    start = time.monotonic()
    if cfg.command == "record":
        found = record(work, cfg.only, cfg.jobs)
    else:
        found = resume(work, cfg.earlier.resolve(), cfg.only, cfg.jobs)
    cfg.out.write_text(json.dumps(found, indent=0), encoding="utf-8")
    failed = [name for name, entries in found.items() if "failed" in entries]
    print(f"{cfg.out.as_posix()}: {sum(map(len, found.values()))} entries of {len(found)} steps in "
          f"{time.monotonic() - start:.0f} s" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
