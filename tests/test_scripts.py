"""Every script for real, on eight small images: trains, writes its files, resumes, runs on two processes, refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import names_in
from PIL import Image
from script_processes import killed_at, on_two_processes, with_spawned_loaders

import Eval_SPDNet_Adaptation
import Training_RTDETR
import Training_SPDNet
import Training_SPDNet_Adaptation as Adaptation
from utils import config, integrated_model, system
from utils.config import UserError
from utils.evaluation import before_after
from utils.networks.derainers import Derainer, load_derainer
from utils.networks.rtdetr import id2label_of, load_rtdetr
from utils.networks.spdnet import load_spdnet
from utils.networks.unet import new_unet

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def base(coco, weights):
    """Constants that point the adaptation at the small data and weights."""
    return {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "PERCENT_DATASET": 100,
            "IMAGE_SIZE": 96, "SPDNET_MODEL_PATH": str(weights / "spdnet.pt"),
            "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "OUTPUT_DIR": str(coco / "out"), "NUM_EPOCHS": 2,
            "BATCH_SIZE": 2, "GRADIENT_ACCUMULATION_STEPS": 2, "WARMUP_STEPS": 0, "DATALOADER_WORKERS": 0,
            "LEARNING_RATE": 2e-4, "ACTIVATION_CHECKPOINTING": False}


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


def test_adaptation_lowers_its_loss_and_writes_everything(base, capsys, every_curve):
    result = Adaptation.main(**base, FEATURE_WEIGHT=5.0, RECONSTRUCTION_WEIGHT=1.0, IDENTITY_WEIGHT=1.0)
    first, last = result["history"][0], result["history"][-1]
    assert last["features"] < first["features"]
    assert {"detection", "features", "reconstruction", "identity", "clamped", "rain/mAP", "images_per_s"} <= set(last)
    out = Path(base["OUTPUT_DIR"])
    names = names_in(out)
    assert names == {"spdnet_adapted.pt", "last.pt", "best.pt", "metrics.json", "curves.png", "tb", "before_after.png"}
    adapted = load_spdnet(out / "spdnet_adapted.pt")
    start = load_spdnet(base["SPDNET_MODEL_PATH"])
    assert not torch.equal(adapted.output3.weight, start.output3.weight)
    average, model = (torch.load(out / "last.pt")[key] for key in ("average", "model"))
    assert len(average) == len(list(start.parameters()))
    assert not any(torch.equal(model["derain_module.output3.weight"], value) for value in average)
    shown = capsys.readouterr().out
    assert "RT-DETR: 0 trainable parameters (0% - FROZEN)" in shown and shown.isascii()
    table = shown[shown.rindex("on rainy validation images"):]
    assert all(name in table for name in (before_after.VANILLA, before_after.ORIGINAL, before_after.ADAPTED))
    assert f"{result['history'][result['best_epoch'] - 1]['rain/mAP']:.4f}" in table and "before_after.png" in table
    with Image.open(out / "before_after.png") as page:
        assert page.width > 5 * 240 and page.height > 4 * 240  # five columns, PICTURES scenes


@pytest.mark.parametrize("name", ["unet", "nafnet"])
def test_another_derainer_is_adapted_and_read_by_every_script(base, tmp_path, capsys, name):
    start = new_unet("unet", width=4) if name == "unet" else Derainer("nafnet", width=8, middle=1)
    with torch.no_grad():
        for parameter in start.parameters():  # a new one is the identity
            parameter += 0.02 * torch.randn_like(parameter)
    integrated_model.write_derainer(start, tmp_path / "start.pt")
    settings = base | {"DERAINER": name, "DERAIN_MODEL_PATH": str(tmp_path / "start.pt"), "SPDNET_MODEL_PATH": "none"}
    Adaptation.main(**settings)
    out = Path(base["OUTPUT_DIR"])
    assert "derainer_adapted.pt" in names_in(out) and "spdnet_adapted.pt" not in names_in(out)
    adapted = load_derainer(name, out / "derainer_adapted.pt")
    moved = {key for key, value in adapted.state_dict().items() if not torch.equal(value, start.state_dict()[key])}
    norms = {f"{prefix}.{own}" for prefix, module in start.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
             for own in module.state_dict()}
    assert bool(norms) == (name == "unet") and moved == start.state_dict().keys() - norms
    label = integrated_model.DERAINERS[name]
    shown = capsys.readouterr().out
    assert f"Adapted {label} + RT-DETR" in shown and f"--DERAINER {name} " in shown and "--DERAIN_MODEL_PATH" in shown
    used = vars(Eval_SPDNet_Adaptation)
    results = Eval_SPDNet_Adaptation.main(**{key: value for key, value in settings.items() if key in used} | {
        "ADAPTED_MODEL_PATH": str(out / "derainer_adapted.pt"), "OUTPUT_DIR": str(tmp_path / "eval"), "PICTURES": 1})
    assert list(results["gap_won_back"]) == [f"Original {label} + RT-DETR", f"Adapted {label} + RT-DETR"]
    with pytest.raises(UserError, match="DERAINER was '"):
        Adaptation.main(**base | {"RESUME": True})
    other = "nafnet" if name == "unet" else "unet"
    with pytest.raises(UserError, match=f"DERAIN_MODEL_PATH = .*ARCH = '{name}', not '{other}'"):
        Adaptation.main(**settings | {"DERAINER": other})
    with pytest.raises(UserError, match="DERAINER = 'prenet': choose one of spdnet, unet, nafnet"):
        Adaptation.main(**settings | {"DERAINER": "prenet"})


def test_baselines_change_nothing_of_the_training(base):
    """Weights, optimizer and randomness are equal, bit for bit, with and without them."""
    found = []
    for baselines in (True, False):
        Adaptation.main(**base | {"NUM_EPOCHS": 1}, BASELINES=baselines, PICTURES=0)
        found.append(torch.load(Path(base["OUTPUT_DIR"]) / "last.pt"))
    a, b = found
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert torch.equal(a["torch_rng"], b["torch_rng"]) and a["history"][0]["loss"] == b["history"][0]["loss"]


def test_scenes_of_the_page_follow_a_rule():
    class Data:
        ends = np.cumsum([0, 1, 3, 12, 10, 0, 5, 4])  # so many objects has each image

        def __len__(self):
            return len(self.ends) - 1
    assert before_after.scenes(Data(), 2) == [1, 5] and before_after.scenes(Data(), 9) == [1, 3, 5, 6]
    Data.ends = np.array([0, 1, 2, 3])
    assert before_after.scenes(Data(), 2) == [0, 1]
    assert before_after.gain(0.45, 0.4) == "+12.5%" and before_after.gain(0.45, 0.0) == ""


def test_adaptation_killed_for_real_resumes_bit_for_bit(base, tmp_path):
    """SIGKILL in the middle of an epoch, in another process."""
    def start(out, die, resume=False):
        cfg = base | {"OUTPUT_DIR": str(tmp_path / out), "CHECKPOINT_STEPS": 1, "RESUME": resume, "FEATURE_WEIGHT": 5.0,
                      "BASELINES": False, "PICTURES": 0}
        return killed_at("Training_SPDNet_Adaptation", cfg, die)

    assert start("whole", die=0) == 0
    assert start("killed", die=4) != 0
    assert not list((tmp_path / "killed").glob(f".*{system.TEMPORARY}"))
    assert start("killed", die=0, resume=True) == 0
    whole, resumed = (torch.load(tmp_path / out / "last.pt")["model"] for out in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_processes_equal_one_with_the_double_batch(base, tmp_path):
    settings = base | {"GRADIENT_ACCUMULATION_STEPS": 1, "NUM_EPOCHS": 1, "FEATURE_WEIGHT": 5.0, "BASELINES": False}
    one = Adaptation.main(**settings | {"BATCH_SIZE": 4, "OUTPUT_DIR": str(tmp_path / "one")})
    printed = on_two_processes("Training_SPDNet_Adaptation", settings | {"OUTPUT_DIR": str(tmp_path / "two")})
    assert printed.count("epoch 1/1") == 1  # one process reports
    a, b = (torch.load(tmp_path / out / "last.pt") for out in ("one", "two"))
    assert a["step"] == b["step"] == 2
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value, rtol=2e-3, atol=2e-4,
                                   msg=lambda text, name=name: f"{name}: {text}")
    assert b["history"][0]["rain/mAP"] == pytest.approx(one["history"][0]["rain/mAP"], abs=1e-3)
    for name in ("features", "detection"):  # the ranks see different numbers of boxes
        assert b["history"][0][name] == pytest.approx(one["history"][0][name], rel=1e-3)
    assert printed.count("adapted SPDNet") == 1


def test_adaptation_without_labels(base, coco):
    for root in ("coco", "coco_rain"):
        for path in (coco / root / "annotations").iterdir():
            path.unlink()
        (coco / root / "annotations").rmdir()
    result = Adaptation.main(**base, DETECTION_WEIGHT=0.0, FEATURE_WEIGHT=1.0)
    assert result["history"][-1]["features"] < result["history"][0]["features"]
    assert result["best_score"] < 0 and "rain/consistency" in result["history"][0]
    with pytest.raises(UserError, match="FEATURE_WEIGHT, QUERIES_WEIGHT"):
        Adaptation.main(**base, DETECTION_WEIGHT=0.0, FEATURE_WEIGHT=0.0, RECONSTRUCTION_WEIGHT=1.0)
    taught = base | {"RTDETR_MODEL_NAME": str(ROOT / "assets/demo/rtdetr"), "DETECTION_WEIGHT": 0.0,
                     "FEATURE_WEIGHT": 0.0, "QUERIES_WEIGHT": 1.0, "POSITIONS_WEIGHT": 1.0, "NUM_EPOCHS": 1}
    result = Adaptation.main(**taught)
    (best,) = result["history"]
    assert result["best_score"] == best["rain/agreement"] == -best["rain/queries"] - best["rain/positions"]
    with pytest.raises(UserError, match="POSITIONS_WEIGHT was 1.0, is now 2.0"):
        Adaptation.main(**taught | {"POSITIONS_WEIGHT": 2.0, "RESUME": True})


def test_adaptation_learns_the_answers_on_clean_twins_besides(base):
    result = Adaptation.main(**base | {"QUERIES_WEIGHT": 1.0, "NUM_EPOCHS": 1, "PICTURES": 0, "BASELINES": False})
    assert {"queries", "features", "detection", "rain/mAP"} <= set(result["history"][0])


@pytest.mark.parametrize(("change", "message"), [
    ({"FP16": True}, "FP16 = True: SPDNet"),
    ({"COCO_RAIN_DIR": "./none"}, "COCO_RAIN_DIR.*make_rain.py"),
    ({"SPDNET_MODEL_PATH": "./none.pt"}, "SPDNET_MODEL_PATH.*Training_SPDNet.py"),
    ({"RTDETR_MODEL_NAME": "./none"}, "RTDETR_MODEL_NAME"),
    ({"DETECTION_WEIGHT": 0.0, "FEATURE_WEIGHT": 0.0}, "every loss weight is 0"),
    ({"COCO_RATIO": 0.5}, "add up to 1"),
    ({"FEATURE_LEVEL": "decoder"}, "FEATURE_LEVEL"),
    ({"PRECISION": "fp16"}, "PRECISION"),
    ({"IMAGE_SIZE": 100}, "IMAGE_SIZE = 100.*multiple of 32, such as 96"),
    ({"IMAGE_SIZE": 32}, "IMAGE_SIZE = 32 gives 21 feature positions"),
    ({"PERCENT_DATASET": 0}, "PERCENT_DATASET"),
    ({"BATCH_SIZE": -1}, "BATCH_SIZE"),
    ({"EVAL_BATCH_SIZE": 0}, "EVAL_BATCH_SIZE"),
    ({"GRADIENT_ACCUMULATION_STEPS": 0}, "GRADIENT_ACCUMULATION_STEPS"),
    ({"NUM_EPOCHS": 0}, "NUM_EPOCHS"),
    ({"CHECKPOINT_STEPS": 0}, "CHECKPOINT_STEPS"),
    ({"DATALOADER_WORKERS": -1}, "DATALOADER_WORKERS"),
    ({"LEARNING_RATE": -1.0}, "LEARNING_RATE = -1.0"),
    ({"FEATURE_WEIGHT": -1.0}, "FEATURE_WEIGHT = -1.0"),
])
def test_adaptation_refuses_with_one_clear_line(base, change, message):
    with pytest.raises(UserError, match=message) as error:
        Adaptation.main(**base | change)
    assert "\n" not in str(error.value)
    assert not (Path(base["OUTPUT_DIR"]) / "last.pt").exists()


def test_plain_detection_loss_needs_no_twins(base):
    result = Adaptation.main(**base | {"NUM_EPOCHS": 1, "ACTIVATION_CHECKPOINTING": True}, FEATURE_WEIGHT=0.0,
                             DERAIN_SCALE=0.5, PRECISION="bf16")
    assert set(result["history"][0]) >= {"detection", "clamped"} and "features" not in result["history"][0]


def test_evaluation_reports_all_rows(base, weights, coco, capsys):
    out = coco / "eval"
    settings = without(base, "NUM_EPOCHS", "BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS", "WARMUP_STEPS", "LEARNING_RATE",
                       "ACTIVATION_CHECKPOINTING")
    results = Eval_SPDNet_Adaptation.main(**settings | {
        "OUTPUT_DIR": str(out), "ADAPTED_MODEL_PATH": str(weights / "spdnet.pt"), "PREFIXES": ("00000000000",)})
    rows = {(r["model"], r["images"]): r for r in results["scores"]}
    assert len(rows) == 9
    original, adapted = (rows[f"{name} SPDNet + RT-DETR", "rainy"] for name in ("Original", "Adapted"))
    assert original["mAP"] == adapted["mAP"] and original["AP50"] == adapted["AP50"]  # the same weights here
    assert set(results["gap_won_back"]) == {"Original SPDNet + RT-DETR", "Adapted SPDNet + RT-DETR"}
    shown = capsys.readouterr().out
    for part in ("Vanilla RT-DETR mAP:", "Original SPDNet + RT-DETR:", "Adapted SPDNet + RT-DETR:", "AP_small"):
        assert part in shown
    assert {p.name for p in out.iterdir()} == {"results.json", "report.html", "detections.png", "latency_map.png"}
    written = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert written["results"]["milliseconds_per_image"]["Vanilla RT-DETR"]["batch 1"] > 0
    details = written["results"]["details"]
    assert details["rainy"].keys() == details["clean"].keys() == set(written["results"]["milliseconds_per_image"])
    assert details["rainy"]["Adapted SPDNet + RT-DETR"]["AP50"] == adapted["AP50"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('class="slider"') == 6 and "{{" not in page  # three scenes, two de-rainers
    assert Image.open(out / "detections.png").width > 300
    with pytest.raises(UserError, match="ADAPTED_MODEL_PATH.*Training_SPDNet_Adaptation"):
        Eval_SPDNet_Adaptation.main(**settings | {"ADAPTED_MODEL_PATH": "./none.pt"})
    torch.save({"model_args": {"derain_scale": 0.5}}, weights / "best.pt")
    with pytest.raises(UserError, match="DERAIN_SCALE = 1.0, but .* was trained with 0.5"):
        Eval_SPDNet_Adaptation.main(**settings | {"ADAPTED_MODEL_PATH": str(weights / "spdnet.pt")})
    (weights / "best.pt").unlink()
    with pytest.raises(UserError, match="PREFIXES"):
        Eval_SPDNet_Adaptation.main(**settings | {"ADAPTED_MODEL_PATH": str(weights / "spdnet.pt"),
                                                  "PREFIXES": ("fog_",)})


@pytest.fixture
def spdnet_base(coco):
    """Constants that point Training_SPDNet.py at the small pairs."""
    return {"RAINY_DIR": str(coco / "coco_rain" / "train2017"), "CLEAN_DIR": str(coco / "coco" / "train2017"),
            "VAL_RAINY_DIR": str(coco / "coco_rain" / "val2017"), "VAL_CLEAN_DIR": str(coco / "coco" / "val2017"),
            "VAL_IMAGES": 3, "PATCH_SIZE": 48, "SPDNET_N_FEATS": 8, "SPDNET_N_RESBLOCKS": 1, "NUM_EPOCHS": 3,
            "BATCH_SIZE": 4, "DATALOADER_WORKERS": 0, "OUTPUT_DIR": str(coco / "out")}


def test_spdnet_training_lowers_its_loss_and_goes_on_from_its_own_weights(spdnet_base, coco, capsys):
    result = Training_SPDNet.main(**spdnet_base)
    assert result["history"][-1]["mse"] < result["history"][0]["mse"]
    assert load_spdnet(coco / "out" / "spdnet_best.pt").n_feats == 8
    more = Training_SPDNet.main(**spdnet_base | {"NUM_EPOCHS": 1, "OUTPUT_DIR": str(coco / "more"),
                                                 "SPDNET_MODEL_PATH": str(coco / "out" / "spdnet_best.pt")})
    assert more["history"][0]["mse"] < result["history"][0]["mse"]
    shown = capsys.readouterr().out
    assert "PSNR (Y)" in shown and "trained on as well" not in shown


def test_spdnet_training_at_half_size_says_so_afterwards(spdnet_base, coco):
    Training_SPDNet.main(**spdnet_base | {"NUM_EPOCHS": 1, "IMAGE_SCALE": 0.5})
    note = integrated_model.pretraining_note(coco / "out" / "spdnet_best.pt", 1.0)
    assert "IMAGE_SCALE = 0.5" in note and note.endswith("here it is 1.0")
    assert integrated_model.pretraining_note(coco / "out" / "spdnet_best.pt", 0.5) is None
    assert integrated_model.pretraining_note(coco / "nothing" / "spdnet_best.pt", 0.5) is None


def test_validation_pairs_among_the_training_pairs_are_noted(spdnet_base, coco, capsys):
    Training_SPDNet.build_loaders(config.resolve(vars(Training_SPDNet), spdnet_base | {
        "RAINY_DIR": str(coco / "coco_rain"), "CLEAN_DIR": str(coco / "coco")}))
    assert "note: 3 of 3 validation pairs are trained on as well" in capsys.readouterr().out
    Training_SPDNet.build_loaders(config.resolve(vars(Training_SPDNet), spdnet_base | {
        "RAIN": "fresh", "RAINY_DIR": str(coco / "nowhere"), "CLEAN_DIR": str(coco / "coco")}))
    shown = capsys.readouterr().out
    assert "note: 3 of 3 validation pairs are trained on as well" in shown and "no rain in them" not in shown


@pytest.mark.parametrize(("change", "message"), [
    ({"IMAGE_SCALE": 0.0}, "IMAGE_SCALE"), ({"INITIALISATION": "zeros"}, "INITIALISATION"),
    ({"SPDNET_N_FEATS": 4}, "SPDNET_N_FEATS = .*SPDNET_N_RESBLOCKS = "),
    ({"SPDNET_N_FEATS": 7}, "SPDNET_N_FEATS = .*SPDNET_N_RESBLOCKS = "),
    ({"SPDNET_N_RESBLOCKS": 0}, "SPDNET_N_FEATS = .*SPDNET_N_RESBLOCKS = ")])
def test_spdnet_training_refuses_with_one_clear_line(spdnet_base, change, message):
    with pytest.raises(UserError, match=message):
        Training_SPDNet.main(**spdnet_base | change)


def test_detector_training(coco, weights):
    settings = {"COCO_DIR": str(coco / "coco"), "IMAGE_SIZE": 96, "RTDETR_MODEL_NAME": "", "ARCHITECTURE": "tiny",
                "NUM_EPOCHS": 2, "BATCH_SIZE": 4, "WARMUP_STEPS": 0, "DATALOADER_WORKERS": 0, "LEARNING_RATE": 1e-3,
                "BACKBONE_LEARNING_RATE": 1e-3, "OUTPUT_DIR": str(coco / "out")}
    result = Training_RTDETR.main(**settings)
    assert result["history"][-1]["detection"] < result["history"][0]["detection"]
    # what it wrote is a detector for the other scripts, and a start for another run, here on rain as well
    more = Training_RTDETR.main(**settings | {
        "RTDETR_MODEL_NAME": str(coco / "out" / "detector"), "OUTPUT_DIR": str(coco / "more"), "NUM_EPOCHS": 1,
        "COCO_RAIN_DIR": str(coco / "coco_rain"), "COCO_RATIO": 0.5, "RAIN_RATIO": 0.5})
    assert more["history"][0]["detection"] < result["history"][0]["detection"]
    scores = more["history"][0]
    assert scores["val/mAP"] == pytest.approx(0.5 * scores["clean/mAP"] + 0.5 * scores["rainy/mAP"])
    assert "rainy/mAP" not in result["history"][0]
    card = (coco / "more" / "detector" / "README.md").read_text(encoding="utf-8")  # of the best epoch
    assert f"| rainy/mAP | {scores['rainy/mAP']:.4f} |" in card and "8 training images" in card
    assert "trained on clean and rainy images" in card and "50% clean and 50% rainy" in card
    assert "trained on clean images" in (coco / "out" / "detector" / "README.md").read_text(encoding="utf-8")
    # data with a class that the detector does not know: new heads
    for path in (coco / "coco" / "annotations").iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace('"car"', '"rickshaw"'), encoding="utf-8")
    Training_RTDETR.main(**settings | {"RTDETR_MODEL_NAME": str(coco / "out" / "detector"), "NUM_EPOCHS": 1,
                                       "OUTPUT_DIR": str(coco / "new")})
    assert id2label_of(load_rtdetr(str(coco / "new" / "detector"))) == {0: "person", 1: "rickshaw"}
    with pytest.raises(UserError, match="ARCHITECTURE"):
        Training_RTDETR.main(**settings | {"ARCHITECTURE": "r19"})
    with pytest.raises(UserError, match="AUGMENTATION"):
        Training_RTDETR.main(**settings | {"AUGMENTATION": "all"})


def test_loader_processes_start_by_spawn_as_on_windows(base):
    with_spawned_loaders("Training_SPDNet_Adaptation", base | {"DATALOADER_WORKERS": 1, "NUM_EPOCHS": 1,
                                                               "BASELINES": False,
                                                               "PICTURES": 0})
    assert (Path(base["OUTPUT_DIR"]) / "spdnet_adapted.pt").is_file()
