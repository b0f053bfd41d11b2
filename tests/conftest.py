"""Small data and small models that several test files share. Nothing here needs ../shared, a GPU or a network."""

import http.server
import json
import os
import threading
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may ask the hub, not even for a time-out

import numpy as np
import pytest
import torch
from PIL import Image

from utils import visualize
from utils.evaluation import latency
from utils.inference import exported
from utils.networks.rtdetr import new_rtdetr
from utils.networks.spdnet import SPDNet
from utils.networks.spdnet_init import init_near_identity

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
BOXES = {1: [(1, [8, 8, 30, 40])], 2: [(3, [20, 10, 50, 30]), (1, [4, 50, 16, 30])], 3: []}

# Equal weights give equal last bits, whatever else lies in memory. On CPUs with AMX oneDNN's kernels look at alignment,
# and differ from those that the references were made with.
EXACT_KERNELS = not torch.cpu._is_amx_tile_supported()

# constants of train_unet_derain.py: small squares of whole images, the plan's losses and optimizer
WHOLE_IMAGES = {"CROP_SIZES": (), "CROPS_PER_PAIR": 1, "L1_WEIGHT": 1.0, "SSIM_WEIGHT": 0.2, "PSNR_WEIGHT": 0.0,
                "OPTIMIZER": "adam", "BETAS": (0.9, 0.999), "SCHEDULER": "plateau", "WARMUP_STEPS": 0}

SLOW_FILES = ("test_pretend_gpu.py", "test_feature_training.py", "test_conditional.py", "test_scripts.py",
              "test_export.py", "test_unet_scripts.py", "test_rfdetr_scripts.py", "test_feature_evaluation.py",
              "test_refiner.py", "test_careless_results.py", "test_detector_family.py", "test_export_derainers.py",
              "test_weather_adapter.py", "test_distillation.py")


def pytest_collection_modifyitems(items):
    """Slow files first, so that two processes end at about the same time; --no-loadscope-reorder keeps the order."""
    items.sort(key=lambda item: SLOW_FILES.index(item.path.name) if item.path.name in SLOW_FILES else len(SLOW_FILES))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # small models; more threads only fight with workers and subprocesses


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch):
    """Latencies are measured once and without warm-up: no test reads them."""
    monkeypatch.setattr(latency.latencies.__wrapped__, "__defaults__", (0, 1))


_DRAWN = set()


@pytest.fixture(autouse=True)
def _few_curves(monkeypatch):
    """A training draws its curves once for each set of losses and scores; later ones leave an empty file. Drawing all
    of them took a seventh of the time of all trainings here."""
    draw = visualize.curves

    def curves(history, path, steps=None):
        shown = (*steps, *history[-1]) if steps else ()
        if shown in _DRAWN:
            path.touch()
            return
        draw(history, path, steps)
        if shown:
            _DRAWN.add(shown)
    monkeypatch.setattr(visualize, "curves", curves)


@pytest.fixture
def every_curve(_few_curves):
    """The next curves are drawn, whatever was drawn before."""
    _DRAWN.clear()


def write_coco(root, ids=range(1, 9), size=(96, 96), seed=0, splits=("train", "val"), brightness=255):
    """A COCO-layout set of noise images; image i has the boxes BOXES[i % 3 + 1], so that some have none."""
    rng = np.random.default_rng(seed)
    for split in splits:
        folder = root / f"{split}2017"
        folder.mkdir(parents=True, exist_ok=True)
        (root / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for i in ids:
            pixels = rng.integers(0, brightness, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:012d}.jpg", quality=92)
            images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": size[0], "height": size[1]})
            for category, box in BOXES[i % 3 + 1]:
                annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": category, "bbox": box,
                                    "area": box[2] * box[3], "iscrowd": 0, "segmentation": []})
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def names_in(folder):
    """-> names of what a user sees in a folder; hidden files such as a run's lock are not among them."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def loaded(monkeypatch):
    """The files that were loaded, as exported.load_exported gives them: loading a torch.export file takes seconds, and
    export.py has done it to check it."""
    found, load = [], exported.load_exported
    monkeypatch.setattr(exported, "load_exported", lambda *args, **more: found.append(load(*args, **more)) or found[-1])
    return found


@contextmanager
def serving(handler, monkeypatch):
    """Within, a server on this machine answers with an http.server handler. -> its address"""
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


class Killed(Exception):
    """What a run dies of in `dies_after`."""


def dies_after(batches, function):
    """-> a compute_losses like `function` that raises Killed instead of its next call after `batches`."""
    def compute(*args, **kwargs):
        nonlocal batches
        batches -= 1
        if batches < 0:
            raise Killed
        return function(*args, **kwargs)
    return compute


@pytest.fixture
def coco(tmp_path):
    """A clean root and its darker twin, eight images each: tmp_path/coco, tmp_path/coco_rain."""
    write_coco(tmp_path / "coco")
    write_coco(tmp_path / "coco_rain", brightness=160)
    return tmp_path


@pytest.fixture(scope="session")
def small_detector():
    """A random two-class RT-DETR of the demo's architecture, in eval mode. Do not train it: copy it."""
    torch.manual_seed(0)
    return new_rtdetr("tiny", {0: "person", 1: "car"}).eval()


def small_spdnet(seed=0):
    """SPDNet(8, 1) near the identity."""
    torch.manual_seed(seed)
    model = SPDNet(8, 1)
    init_near_identity(model)
    return model


@pytest.fixture
def weights(tmp_path, small_detector):
    """Files for the scripts: tmp_path/spdnet.pt and tmp_path/rtdetr/."""
    torch.save(small_spdnet().state_dict(), tmp_path / "spdnet.pt")
    small_detector.save_pretrained(tmp_path / "rtdetr")
    return tmp_path


@pytest.fixture
def feature_base(coco, weights):
    """Constants that point Training_FeatureDerain.py at the small data and weights."""
    return {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "PERCENT_DATASET": 100,
            "IMAGE_SIZE": 96, "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "OUTPUT_DIR": str(coco / "out"),
            "PHASE1_EPOCHS": 2, "PHASE2_EPOCHS": 1, "BATCH_SIZE": 2, "WARMUP_STEPS": 0, "NUM_WORKERS": 0,
            "COCO_RATIO": 0.5, "RAIN_RATIO": 0.5}
