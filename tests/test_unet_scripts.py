"""The U-Net's scripts for real, on a dozen small pairs: training, resume, evaluation, sweep, notebook, demo data."""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import WHOLE_IMAGES, Killed, dies_after, names_in
from nbclient import NotebookClient
from PIL import Image
from script_processes import on_two_nodes, on_two_processes, with_spawned_loaders
from test_unet import write_pairs

import Eval_unet_derain
import train_unet_derain as train
from tools import sweep_unet_derain
from utils.config import UserError
from utils.datasets import windshield_pairs
from utils.demo import windshield as demo_windshield
from utils.demo.coco import ensure_demo
from utils.demo.windshield import MARKER
from utils.networks import derainers
from utils.weather import windshield

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def base(tmp_path):
    """Constants that point the training at small pairs."""
    write_pairs(tmp_path / "data", count=20)
    real = tmp_path / "data" / "real"
    (real / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "sub/a.jpg")):
        Image.new("RGB", (90 + i, 70), (80, 120, 40 * i)).save(real / name)
    return WHOLE_IMAGES | {
            "CLEAR_DIR": str(tmp_path / "data" / "clear"), "RAINY_DIR": str(tmp_path / "data" / "rainy"),
            "REAL_DIR": str(real), "CHECKPOINT_DIR": str(tmp_path / "out"), "IMAGE_SIZE": 32, "ARCH": "unet",
            "BASE_WIDTH": 4, "ENCODER_WEIGHTS": "", "PERCEPTUAL_WEIGHT": 0.0, "TRAIN_PAIRS": 12, "VAL_PAIRS": 4,
            "TEST_PAIRS": 4, "EPOCHS": 3, "BATCH_SIZE": 4, "LEARNING_RATE": 5e-3, "DATALOADER_WORKERS": 0}


def test_training_lowers_its_loss_and_writes_everything(base, capsys, every_curve):
    result = train.main(**base, EARLY_STOPPING_PATIENCE=50, CHECKPOINT_EVERY=2, SAMPLE_EVERY=2, REAL_EVERY=2)
    first, last = result["history"][0], result["history"][-1]
    assert last["loss"] < first["loss"] and {"l1", "ssim_loss", "val/loss", "val/psnr", "val/ssim_y"} <= set(last)
    assert last["loss"] == pytest.approx(last["l1"] + 0.2 * last["ssim_loss"], rel=1e-5)
    out = Path(base["CHECKPOINT_DIR"])
    assert names_in(out) == {"last.pt", "best.pt", "metrics.json", "curves.png", "tb", "splits.json", "checkpoints",
                             "samples", "real_rain"}
    assert {path.relative_to(out).as_posix() for path in out.glob("*/epoch_*")} == {
        "checkpoints/epoch_0002.pt", "samples/epoch_0002.png", "samples/epoch_0003.png", "real_rain/epoch_0002.png",
        "real_rain/epoch_0003.png"}
    kept = torch.load(out / "checkpoints" / "epoch_0002.pt")
    assert kept["epoch"] == 2 and {"model", "optimizer", "best_score", "history", "constants"} <= set(kept)
    assert kept["constants"]["SSIM_WEIGHT"] == 0.2  # the plan: the loss weights are in the checkpoint
    best = torch.load(out / "best.pt")
    assert best["metrics"]["val/psnr"] == pytest.approx(result["best_score"])
    split = json.loads((out / "splits.json").read_text(encoding="utf-8"))
    assert [len(split[part]) for part in windshield_pairs.PARTS] == [12, 4, 4]
    shown = capsys.readouterr().out
    assert "rainy input" in shown and "gain: " in shown and shown.isascii()
    train.main(**base | {"EPOCHS": 1})
    assert (out / "previous_1" / "checkpoints" / "epoch_0002.pt").is_file() and not (out / "checkpoints").exists()


def test_a_stopped_run_resumes_bit_for_bit_with_plateau_and_dropout(base, tmp_path, monkeypatch):
    settings = base | {"PLATEAU_PATIENCE": 0, "PLATEAU_FACTOR": 0.1, "DROPOUT": 0.3, "CHECKPOINT_STEPS": 1,
                       "LEARNING_RATE": 0.05}
    whole = train.main(**settings | {"CHECKPOINT_DIR": str(tmp_path / "whole"), "EPOCHS": 4})
    rates = [torch.load(tmp_path / "whole" / "last.pt")["optimizer"]["param_groups"][0]["lr"]]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "compute_losses", dies_after(8, train.compute_losses))  # in the third epoch
        train.main(**settings | {"EPOCHS": 4})
    resumed = train.main(**settings | {"EPOCHS": 4, "RESUME": True})
    a, b = (torch.load(Path(out) / "last.pt") for out in (tmp_path / "whole", base["CHECKPOINT_DIR"]))
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    assert [r["val/psnr"] for r in whole["history"]] == [r["val/psnr"] for r in resumed["history"]]
    rates.append(b["optimizer"]["param_groups"][0]["lr"])
    assert rates[0] == rates[1] < 0.05  # the plateau was there


def test_resume_keeps_the_split_although_pairs_were_added(base, tmp_path):
    train.main(**base | {"EPOCHS": 1})
    file = Path(base["CHECKPOINT_DIR"]) / "splits.json"
    before = file.read_text(encoding="utf-8")
    write_pairs(tmp_path / "data", count=26)
    train.main(**base | {"EPOCHS": 2, "RESUME": True})
    assert file.read_text(encoding="utf-8") == before


def test_two_machines_equal_two_processes_of_one(base, tmp_path):
    settings = base | {"EPOCHS": 1, "BATCH_SIZE": 2}
    first, second = on_two_nodes("train_unet_derain", settings | {"CHECKPOINT_DIR": str(tmp_path / "nodes")})
    assert "gain: " in first and "gain: " not in second  # one of them prints and writes
    on_two_processes("train_unet_derain", settings | {"CHECKPOINT_DIR": str(tmp_path / "processes")})
    nodes, processes = (torch.load(tmp_path / name / "last.pt") for name in ("nodes", "processes"))
    assert nodes["step"] == processes["step"] == 3  # 12 images, two at a time in each of two processes
    assert all(torch.equal(value, processes["model"][name]) for name, value in nodes["model"].items())


def test_two_processes_log_what_one_measures_with_their_weights(base, tmp_path):
    """BatchNorm sees half of each batch per process, so weights differ from one process's; the metrics must not."""
    settings = base | {"VAL_PAIRS": 5, "TEST_PAIRS": 3, "EPOCHS": 2, "BATCH_SIZE": 2, "REAL_DIR": ""}
    printed = on_two_processes("train_unet_derain", settings)
    assert printed.count("epoch 2/2") == 1  # one process reports
    out = Path(base["CHECKPOINT_DIR"])
    content = torch.load(out / "best.pt")
    cfg = train.config.resolve(vars(train), settings | {"RESUME": True})  # the split of that run
    _, loader = train.build_loaders(cfg, train.build_data(cfg))
    model = derainers.load_trained(out / "best.pt")
    measured = train.evaluate(model, loader, "cpu", train.build_plan(cfg).loss_weights)
    assert len(loader.dataset) == 5  # odd: the processes hold 3 and 2
    for name in ("val/psnr", "val/ssim", "val/psnr_y", "val/ssim_y"):
        assert content["metrics"][name] == pytest.approx(measured[name], rel=1e-5), name


@pytest.mark.parametrize("changes", [
    {"ARCH": "resnet34", "RESIDUAL": False, "OPTIMIZER": "sgd", "SCHEDULER": "step", "BATCH_SIZE": 6},
    {"PRECISION": "bf16", "RANDOM_CROP": True, "OPTIMIZER": "adamw", "SCHEDULER": "cosine", "CHANNELS_LAST": False},
    {"PRECISION": "fp16", "GRADIENT_ACCUMULATION_STEPS": 2, "REAL_DIR": "", "COLOR_JITTER": 0.0, "L1_WEIGHT": 0.0},
])
def test_variants_train(base, changes):
    history = train.main(**base | {"EPOCHS": 2} | changes)["history"]
    assert len(history) == 2 and all(torch.isfinite(torch.tensor(record["loss"])) for record in history)
    state = torch.load(Path(base["CHECKPOINT_DIR"]) / "last.pt")
    assert all(value.dtype in (torch.float32, torch.int64) for value in state["model"].values())
    if changes.get("PRECISION") == "fp16":
        assert state["scaler"]["scale"] > 1 and state["step"] == 4
    model = derainers.load_trained(Path(base["CHECKPOINT_DIR"]) / "best.pt")
    assert model.model_args["arch"] == changes.get("ARCH", "unet")


def test_the_perceptual_loss_takes_part(base, tmp_path):
    from torchvision.models import vgg16
    torch.manual_seed(0)
    torch.save({f"features.{name}": value for name, value in vgg16(weights=None, init_weights=False)
                .features.state_dict().items()}, tmp_path / "vgg16.pt")
    record = train.main(**base | {"EPOCHS": 1, "PERCEPTUAL_WEIGHT": 0.5, "PERCEPTUAL_WEIGHTS":
                                  str(tmp_path / "vgg16.pt")})["history"][0]
    assert record["loss"] == pytest.approx(record["l1"] + 0.5 * record["perceptual"] + 0.2 * record["ssim_loss"],
                                           rel=1e-5)
    assert not any("features" in name for name in torch.load(Path(base["CHECKPOINT_DIR"]) / "last.pt")["model"])


def test_reasons_to_stop_and_the_warning():
    cfg = train.config.resolve(vars(train), {"EARLY_STOPPING_PATIENCE": 3, "TARGET_PSNR": 28.0, "TARGET_SSIM": 0.85})

    def epoch(loss, val, psnr=20.0, ssim=0.5):
        return {"loss": loss, "val/loss": val, "val/psnr": psnr, "val/ssim": ssim}
    assert train.stop_reason([epoch(1, 1, 28.1, 0.84)], cfg) is None
    assert "target reached: PSNR 28.10" in train.stop_reason([epoch(1, 1, 28.1, 0.86)], cfg)
    assert train.stop_reason([epoch(1, 1, 50.0, 0.99)], train.config.resolve(vars(train), {})) is None  # off by default
    falling = [epoch(1, 1 - i / 10) for i in range(5)]
    assert train.stop_reason(falling, cfg) is None
    assert train.stop_reason(falling + [epoch(1, 0.9)] * 2, cfg) is None
    assert "no lower val/loss in 3 epochs" in train.stop_reason(falling + [epoch(1, 0.9)] * 3, cfg)
    never = train.config.resolve(vars(train), {"EARLY_STOPPING_PATIENCE": 0})
    assert train.stop_reason(falling + [epoch(1, 0.9)] * 3, never) is None
    apart = [epoch(1 - i / 20, 0.5 + i / 20) for i in range(10)]
    assert train.is_overfitting(apart) and not train.is_overfitting(apart[:9])
    assert not train.is_overfitting([epoch(1 - i / 20, 1 - i / 20) for i in range(10)])
    assert not train.is_overfitting([epoch(1 + i / 20, 1 + i / 20) for i in range(10)])  # both rise: no overfitting


def test_no_import_becomes_a_constant_of_the_script():
    written = re.findall(r"^([A-Z][A-Z0-9_]*)\b.* = ", Path(train.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert set(train.config.constants_of(vars(train))) == set(written) - {"DEMO"}


def test_the_targets_end_a_run(base, capsys):
    result = train.main(**base, TARGET_PSNR=1.0, TARGET_SSIM=0.01)
    assert len(result["history"]) == 1 and "target reached" in result["stopped"]
    again = train.main(**base, TARGET_PSNR=1.0, TARGET_SSIM=0.01, RESUME=True)  # it is not trained on by a resume
    assert len(again["history"]) == 1 and "target reached" in again["stopped"]


@pytest.mark.parametrize(("change", "message"), [
    ({"RAINY_DIR": "./none"}, "RAINY_DIR.*make_rain.py --kind windshield"),
    ({"CLEAR_DIR": "./none"}, "CLEAR_DIR.*--demo"),
    ({"IMAGE_SIZE": 100}, "IMAGE_SIZE = 100: choose a multiple of 32"),
    ({"EPOCHS": 0}, "^EPOCHS = 0"),
    ({"L1_WEIGHT": -1.0}, "L1_WEIGHT = -1.0"),
    ({"EARLY_STOPPING_PATIENCE": -1}, "EARLY_STOPPING_PATIENCE = -1"),
    ({"PLATEAU_PATIENCE": -1}, "PLATEAU_PATIENCE = -1"),
    ({"SCHEDULER": "linear"}, "SCHEDULER = 'linear'"),
    ({"OPTIMIZER": "lion"}, "OPTIMIZER"),
    ({"PRECISION": "int8"}, "PRECISION"),
    ({"ARCH": "resnet35"}, "ARCH"),
    ({"L1_WEIGHT": 0.0, "SSIM_WEIGHT": 0.0}, "every loss weight is 0 .L1_WEIGHT, PERCEPTUAL_WEIGHT, SSIM_WEIGHT"),
    ({"PLATEAU_FACTOR": 1.0}, "PLATEAU_FACTOR"),
    ({"FLIP": 2.0}, "FLIP"),
    ({"TILE": 100}, "TILE"),
    ({"VAL_PAIRS": 0}, "VAL_PAIRS = 0"),
    ({"SPLITS_FILE": "./none.json"}, "SPLITS_FILE"),
    ({"PERCEPTUAL_WEIGHT": 0.1, "PERCEPTUAL_WEIGHTS": "./none.pt"}, "none.pt"),
    ({"BATCH_SIZE": -1}, "BATCH_SIZE"),
])
def test_training_refuses_with_one_clear_line(base, change, message):
    with pytest.raises(UserError, match=message) as error:
        train.main(**base | change)
    assert "\n" not in str(error.value)
    assert not (Path(base["CHECKPOINT_DIR"]) / "last.pt").exists()


def test_loader_processes_start_by_spawn_as_on_windows(base):
    with_spawned_loaders("train_unet_derain", base | {"DATALOADER_WORKERS": 1, "EPOCHS": 1})
    assert (Path(base["CHECKPOINT_DIR"]) / "best.pt").is_file()


def test_evaluation_reports_pairs_and_real_rain(base, tmp_path, weights, coco, capsys):
    train.main(**base | {"EPOCHS": 1})
    out = Path(base["CHECKPOINT_DIR"])
    (tmp_path / "data" / "rainy" / "rain.json").write_text(json.dumps(
        {"kind": "windshield", "seed": 5, "intensity": "heavy", "version": windshield.VERSION}), encoding="utf-8")
    settings = {name: base[name] for name in ("CLEAR_DIR", "RAINY_DIR", "REAL_DIR", "IMAGE_SIZE",
                                              "DATALOADER_WORKERS")} | {
        "SPLITS_FILE": str(out / "splits.json"), "UNET_PATH": str(out / "best.pt"), "TILE": 64, "OVERLAP": 32,
        "LPIPS_WEIGHTS": "", "OUTPUT_DIR": str(tmp_path / "eval")}
    results = Eval_unet_derain.main(**settings | {
        "RAIN_DETECTOR_PATH": str(ROOT / "assets" / "demo" / "rain_detector.pt"),
        "LABELED_RAIN_DIR": str(coco / "coco_rain"), "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "DETECTOR_SIZE": 96})
    rows = {(row["images"], row["size"], row["network"]): row for row in results["pairs"]}
    assert set(rows) == {(images, size, network) for images in ("all", "heavy") for size in ("native", "32, as trained")
                         for network in ("rainy input", "U-Net")}
    assert all(row["count"] == 4 and "lpips" not in row for row in rows.values())
    # by hand, for the images as they are
    split = json.loads((out / "splits.json").read_text(encoding="utf-8"))
    found, _ = windshield_pairs.find_pairs(base["RAINY_DIR"], base["CLEAR_DIR"])
    values = []
    for name in split["test"]:
        a, b = (torch.from_numpy(np.asarray(Image.open(path)).copy()).double() / 255
                for path in found[name])
        values.append(10 * torch.log10(1 / (a - b).square().mean()).item())
    assert rows["all", "native", "rainy input"]["psnr"] == pytest.approx(sum(values) / 4, abs=1e-4)
    assert {path.relative_to(tmp_path / "eval").as_posix() for path in (tmp_path / "eval").rglob("*.*")} == {
        "results.json", "pairs.png", "real_rain.png", "restored/a.png", "restored/sub/a.png"}
    assert Image.open(tmp_path / "eval" / "restored" / "sub" / "a.png").size == (91, 70)
    assert all(0 <= row["rain before"] <= 1 and 0 <= row["rain after"] <= 1 for row in results["real"])
    assert [row["network"] for row in results["detection"]] == ["RT-DETR", "U-Net + RT-DETR"]
    shown = capsys.readouterr().out
    assert "LPIPS is left out" in shown and "mean probability of rain" in shown and shown.isascii()
    for change, message in (({"UNET_PATH": "./none.pt"}, "UNET_PATH"), ({"TILE": 100}, "TILE"),
                            ({"RAINY_DIR": "", "REAL_DIR": ""}, "nothing to evaluate"),
                            ({"LPIPS_WEIGHTS": "./none.pt"}, "none.pt"), ({"SPLITS_FILE": "./none"}, "SPLITS_FILE")):
        with pytest.raises(UserError, match=message):
            Eval_unet_derain.main(**settings | change)


def test_lpips_that_cannot_be_reached_is_left_out_and_said(monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    cfg = Eval_unet_derain.config.resolve(vars(Eval_unet_derain), {})
    assert Eval_unet_derain.lpips_or_note(cfg, "cpu") is None
    assert "note: LPIPS is left out. LPIPS_WEIGHTS = 'imagenet'" in capsys.readouterr().out


def test_sweep_keeps_the_better_value_and_goes_on_after_a_stop(base, tmp_path, monkeypatch, capsys):
    fixed = {name: value for name, value in base.items() if name not in ("CHECKPOINT_DIR", "EPOCHS", "LEARNING_RATE")}
    gains, begun = {(): 1.0, (3e-3,): 1.02, (1e-2,): 3.0, (1e-2, False): 2.0}, []

    def pretend(**settings):
        """Stands in for the training: gains are known, the second trial is stopped the first time."""
        begun.append((settings["LEARNING_RATE"] if "LEARNING_RATE" in settings else None, settings["RESUME"]))
        if len(begun) == 2:
            return {"stopped": "interrupted"}
        key = tuple(settings[name] for name in ("LEARNING_RATE", "RESIDUAL") if name in settings)
        record = {"val/psnr": 20 + gains[key], "val/ssim": 0.5, "val/loss": 0.1, "images_per_s": 1.0}
        return {"stopped": "", "history": [record], "best_epoch": 1, "rainy_input": {"val/psnr": 20.0}}
    monkeypatch.setattr(train, "main", pretend)
    settings = {"BASE": fixed, "VARIABLES": {"LEARNING_RATE": (3e-3, 1e-2), "RESIDUAL": (True, False)},
                "OUTPUT_DIR": str(tmp_path / "sweep"), "SWEEP_EPOCHS": 1}
    with pytest.raises(KeyboardInterrupt):
        sweep_unet_derain.main(**settings)
    result = sweep_unet_derain.main(**settings)
    assert begun == [(None, False), (3e-3, False), (3e-3, True), (1e-2, False), (1e-2, False)]
    assert result["kept"] == {"LEARNING_RATE": 1e-2}
    assert [row["kept"] for row in result["trials"]] == ["yes", "", "yes", ""]  # 0.02 dB more are not enough
    assert sweep_unet_derain.main(**settings) == result and len(begun) == 5  # nothing is trained twice
    assert "--LEARNING_RATE 0.01" in capsys.readouterr().out
    assert {"sweep.json", "sweep.png"} <= {path.name for path in (tmp_path / "sweep").iterdir()}


@pytest.mark.parametrize(("change", "message"), [
    ({"VARIABLES": {"LEARNING": (1,)}}, "LEARNING"), ({"VARIABLES": {}}, "empty"),
    ({"VARIABLES": {"EPOCHS": (1,)}}, "EPOCHS"), ({"VARIABLES": {"FLIP": 0.3}}, "tuple"),
    ({"VARIABLES": {"SCHEDULER": ("x",)}}, "SCHEDULER"), ({"SWEEP_EPOCHS": 0}, "SWEEP_EPOCHS")])
def test_sweep_refuses_before_it_trains(base, tmp_path, change, message):
    settings = {"BASE": {name: value for name, value in base.items() if name not in ("CHECKPOINT_DIR", "EPOCHS")},
                "VARIABLES": {"FLIP": (0.0, 0.5)}, "OUTPUT_DIR": str(tmp_path / "sweep"), "SWEEP_EPOCHS": 1}
    with pytest.raises(UserError, match=message):
        sweep_unet_derain.main(**settings | change)


def test_sweep_trains_for_real(base, tmp_path):
    fixed = {name: value for name, value in base.items() if name not in ("CHECKPOINT_DIR", "EPOCHS")}
    result = sweep_unet_derain.main(BASE=fixed, VARIABLES={"BASE_WIDTH": (2,)}, SWEEP_EPOCHS=1,
                                    OUTPUT_DIR=str(tmp_path / "sweep"))
    assert [row["variable"] for row in result["trials"]] == ["baseline", "BASE_WIDTH"]
    assert derainers.load_trained(tmp_path / "sweep" / "BASE_WIDTH=2" / "run" / "best.pt").model_args["width"] == 2


def test_demo_data_is_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_windshield, "ensure_demo", lambda root: ensure_demo(root, num_train=6, num_val=3))
    folder = demo_windshield.ensure_windshield_demo(tmp_path / "demo", scenes=6, real=2, intensity="medium")
    found, _ = windshield_pairs.find_pairs(folder / "windshield_rainy_v40", folder / "clear")
    assert len(found) == 12 and len(list((folder / "real_rainy").iterdir())) == 2
    assert set(windshield_pairs.intensities(folder / "windshield_rainy_v40", found).values()) == {"medium"}
    read = {name: [np.asarray(Image.open(path)) for path in found[name]] for name in found}
    (rainy, clear), (other, same) = read["000000000001_0"], read["000000000001_1"]
    assert np.array_equal(clear, same) and not np.array_equal(rainy, other)  # one scene behind two panes
    parts, _ = windshield_pairs.split_names(found, (8, 2, 2), 0, "_")
    scenes = [{name[:-2] for name in parts[part]} for part in windshield_pairs.PARTS]
    assert sum(map(len, scenes)) == len(set().union(*scenes)) == 6  # no scene is in two parts
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    demo_windshield.ensure_windshield_demo(tmp_path / "demo", scenes=6, real=2, intensity="medium")
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    demo_windshield.ensure_windshield_demo(tmp_path / "demo", scenes=5, real=2, intensity="medium")
    assert len(list((folder / "clear").iterdir())) == 10 and not list((tmp_path / "demo").glob(".building-*"))
    (folder / MARKER).unlink()
    with pytest.raises(UserError, match="will not be replaced"):
        demo_windshield.ensure_windshield_demo(tmp_path / "demo", scenes=6, real=2)


def test_the_notebook_runs_from_top_to_bottom(base):
    """In this process's Python, on the small pairs; what differs from the notebook's demo is one cell more."""
    notebook = nbformat.read(ROOT / "train_unet_derain.ipynb", as_version=4)
    headings = [cell.source.splitlines()[0] for cell in notebook.cells if cell.cell_type == "markdown"]
    assert [h for h in headings if h.startswith("## ")] == [f"## Section {i}: {title}" for i, title in enumerate(
        ("Mount Drive & Setup", "Configuration", "Import Libraries", "Dataset & DataLoader", "U-Net Model Architecture",
         "Loss Functions & Metrics", "Training Loop", "Visualization Utilities", "Train Model",
         "Evaluate on Real Images"), start=1)]
    at = next(i for i, cell in enumerate(notebook.cells) if "configuration" in cell.metadata.get("tags", []))
    assert "DEMO = True" in notebook.cells[at].source
    changes = base | {"EPOCHS": 1}
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(
        f"SETTINGS.update({changes!r})\nfrom utils.demo import windshield\n"
        "windshield.ensure_windshield_demo = lambda *given: None  # the small pairs are there, drawing takes minutes"))
    assert all(not cell.get("outputs") for cell in notebook.cells)  # none is committed
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "gain: " in text and "rainy input" in text
    assert (Path(base["CHECKPOINT_DIR"]) / "best.pt").is_file()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4
