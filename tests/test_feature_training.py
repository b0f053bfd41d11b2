"""Training_FeatureDerain.py: both phases, killed and distributed, and what it refuses."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Killed, dies_after, names_in
from script_processes import killed_at, on_two_processes

import Training_FeatureDerain as Training
from utils import checkpoint, config, feature_derain, freeze
from utils.config import UserError
from utils.datasets import loaders
from utils.networks import distillation
from utils.networks.rtdetr import FEATURE_LEVELS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def base(feature_base):
    return feature_base


def state(folder, phase):
    return torch.load(Path(folder) / f"phase{phase}" / "last.pt")["model"]


def test_both_phases_train_what_they_should_and_write_everything(base, weights, capsys, every_curve):
    results = Training.main(**base | {"PHASE1_EPOCHS": 3})
    first, last = results[1]["history"][0], results[1]["history"][-1]
    assert last["consistency"] < first["consistency"] and last["mask"] < first["mask"]
    assert {"detection", "consistency", "identity", "mask", "score", "rain/mAP", "clean/mAP"} <= set(last)
    assert first["score"] == pytest.approx(0.5 * first["rain/mAP"] + 0.5 * first["clean/mAP"])
    out = Path(base["OUTPUT_DIR"])
    assert names_in(out) == {"phase1", "phase2", "model"}
    assert "| rain/mAP | 0." in (out / "model" / "README.md").read_text(encoding="utf-8")
    for phase in ("phase1", "phase2"):
        assert names_in(out / phase) == {"last.pt", "best.pt", "metrics.json", "curves.png", "tb"}
    start = {f"rtdetr.{name}": value for name, value in checkpoint_of(weights).items()}
    one, two = state(out, 1), state(out, 2)
    norms = {name for name in start if "running_" in name}
    assert all(torch.equal(one[name], value) for name, value in start.items())  # phase 1: the detector has not moved
    assert any(not torch.equal(two[name], value) for name, value in start.items())
    average = torch.load(out / "phase2" / "last.pt")["average"]  # what is validated and kept
    kept = torch.load(out / "phase2" / "best.pt")["model"]
    moved = [name for name in two if not torch.equal(two[name], kept[name])]
    assert moved and all(any(torch.equal(kept[name], value) for value in average) for name in moved)
    assert norms and all(torch.equal(two[name], start[name]) for name in norms)  # BatchNorm stays in phase 2
    shown = capsys.readouterr().out
    assert "RT-DETR: 0 trainable parameters (0% - FROZEN)" in shown and "phase 2" in shown and shown.isascii()


def checkpoint_of(weights):
    return feature_derain.load_rtdetr(str(weights / "rtdetr")).state_dict()


def test_the_better_phase_is_kept(base, monkeypatch):
    """A phase 2 that is worse than phase 1 must not replace its model; phase 2 starts at phase 1's best epoch."""
    scores = iter([0.3, 0.5, 0.4, 0.1])  # three epochs of phase 1, one of phase 2
    seen = []

    def evaluate(model, *args):
        seen.append({name: value.clone() for name, value in model.derain_module.state_dict().items()})
        return {"score": next(scores)}
    monkeypatch.setattr(Training, "evaluate", evaluate)
    results = Training.main(**base | {"PHASE1_EPOCHS": 3, "PHASE2_DERAIN_LR": 0.0, "PHASE2_DETECTOR_LR": 1e-5})
    assert results[1]["best_epoch"] == 2 and results[2]["best_score"] == 0.1
    kept = checkpoint.load(Path(base["OUTPUT_DIR"]) / "model" / "derain.pt")
    for name, value in kept.items():
        assert torch.equal(value, seen[1][name])
        assert torch.equal(value, seen[3][name])  # at rate 0 phase 2 ends where it started
    assert any(not torch.equal(seen[1][name], seen[2][name]) for name in kept)


def test_the_pretrained_detector_is_mixed_into_what_is_kept_and_not_into_the_training(base, weights, tmp_path):
    settings = base | {"PHASE1_EPOCHS": 0, "PHASE2_DETECTOR_LR": 1e-3}
    for name, share in (("plain", 0.0), ("mixed", 0.25)):
        Training.main(**settings | {"OUTPUT_DIR": str(tmp_path / name), "PRETRAINED_SHARE": share})
    plain, trained = state(tmp_path / "plain", 2), state(tmp_path / "mixed", 2)
    assert all(torch.equal(value, trained[name]) for name, value in plain.items())
    start = checkpoint_of(weights)
    own, kept = (feature_derain.load_rtdetr(str(tmp_path / name / "model" / "rtdetr")).state_dict()
                 for name in ("plain", "mixed"))
    assert any(not torch.equal(own[name], value) for name, value in start.items())
    for name, value in start.items():
        if value.is_floating_point():
            torch.testing.assert_close(kept[name], torch.lerp(own[name], value, 0.25))


def test_killed_in_either_phase_resumes_bit_for_bit(base, tmp_path):
    """SIGKILL in phase 1 (in its second epoch), then in phase 2, each in another process."""
    def start(out, die, resume=False):
        cfg = base | {"OUTPUT_DIR": str(tmp_path / out), "CHECKPOINT_STEPS": 1, "RESUME": resume, "BATCH_SIZE": 4}
        return killed_at("Training_FeatureDerain", cfg, die)

    assert start("whole", die=0) == 0
    assert start("killed", die=4) != 0  # two steps an epoch: two epochs of phase 1, one of phase 2
    assert not (tmp_path / "killed" / "phase2").exists()
    assert start("killed", die=3, resume=True) != 0  # the rest of phase 1 is one step
    assert (tmp_path / "killed" / "phase2" / "last.pt").exists()
    assert start("killed", die=0, resume=True) == 0
    for number in (1, 2):
        whole, resumed = state(tmp_path / "whole", number), state(tmp_path / "killed", number)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert start("killed", die=1) != 0  # a new run, killed at once: the old phase 2 must not survive as its own
    assert not (tmp_path / "killed" / "phase2").exists()
    assert (tmp_path / "killed" / "previous_1" / "phase2" / "last.pt").is_file()


def test_a_mistyped_setting_moves_no_earlier_run_aside(base, tmp_path):
    earlier = tmp_path / "out" / "phase1" / "last.pt"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"an earlier run")
    with pytest.raises(UserError, match="EARLY_STOPPING_PATIENCE"):
        Training.main(**base | {"EARLY_STOPPING_PATIENCE": -1, "OUTPUT_DIR": str(tmp_path / "out")})
    assert earlier.read_bytes() == b"an earlier run"


def test_two_processes_equal_one_with_the_double_batch(base, tmp_path):
    one = Training.main(**base | {"BATCH_SIZE": 4, "PHASE1_EPOCHS": 1, "OUTPUT_DIR": str(tmp_path / "one")})
    settings = base | {"PHASE1_EPOCHS": 1, "OUTPUT_DIR": str(tmp_path / "two")}
    printed = on_two_processes("Training_FeatureDerain", settings)
    assert printed.count("epoch 1/1") == 2  # one line per phase, from one process
    a, b = state(tmp_path / "one", 1), state(tmp_path / "two", 1)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=2e-3, atol=2e-4,
                                   msg=lambda text, name=name: f"{name}: {text}")
    metrics = json.loads((tmp_path / "two" / "phase1" / "metrics.json").read_text(encoding="utf-8"))["history"][0]
    for name in ("detection", "consistency", "identity"):  # the ranks see different numbers of rainy images and boxes
        assert metrics[name] == pytest.approx(one[1]["history"][0][name], rel=1e-3)


@pytest.mark.parametrize("level", FEATURE_LEVELS)
def test_without_labels(base, coco, capsys, level):
    for root in ("coco", "coco_rain"):
        for path in (coco / root / "annotations").iterdir():
            path.unlink()
        (coco / root / "annotations").rmdir()
    settings = base | {"PHASE1_EPOCHS": 3, "PHASE1_LR": 2e-3, "DETECTION_WEIGHT": 0.0, "FEATURE_LEVEL": level}
    results = Training.main(**settings)
    assert set(results) == {1} and "phase 2 needs the detection loss" in capsys.readouterr().out
    assert results[1]["history"][-1]["consistency"] < results[1]["history"][0]["consistency"]
    assert results[1]["best_score"] < 0
    model = feature_derain.FeatureDerainRTDETR.from_pretrained(Path(base["OUTPUT_DIR"]) / "model")
    cfg = config.resolve(vars(Training), settings)
    data = Training.build_data(cfg, None, {"consistency": 1.0})[1]["rainy"]
    error = Training.feature_error(model, loaders.validation_loader(data, 4, 0), "cpu", level)
    assert results[1]["best_score"] == pytest.approx(-error, rel=1e-4)  # "best" goes by what is trained on


def test_a_fresh_module_answers_the_teachers_queries_as_the_teacher_and_alone_learns_from_them():
    model = feature_derain.create_feature_derain_rtdetr(str(ROOT / "assets" / "demo" / "rtdetr"))
    model.freeze_detector()
    answers = distillation.Teacher(copy.deepcopy(model.rtdetr))
    clean = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(2))
    batch = {"images": clean, "twins": clean, "domains": ["rainy"] * 2}
    weights = {"queries": 1.0, "positions": 1.0}
    terms = Training.compute_losses(model.train(), batch, weights, None, "backbone", answers)
    assert terms.keys() == set(weights) and all(abs(value.item()) < 1e-5 for value in terms.values())
    for term in weights:
        model.zero_grad(set_to_none=True)
        found = Training.compute_losses(model, batch | {"images": 0.6 * clean}, {term: 1.0}, None, "backbone", answers)
        assert found.keys() == {term} and found[term] > 0
        found[term].backward()
        reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {"derain_module"}


def test_a_teachers_answers_are_learnt_and_a_killed_run_goes_on_bit_for_bit(base, tmp_path, monkeypatch, capsys):
    settings = base | {"PHASE1_EPOCHS": 1, "BATCH_SIZE": 4, "QUERIES_WEIGHT": 1.0, "POSITIONS_WEIGHT": 1.0,
                       "TEACHER_CACHE_GB": 1.0}
    whole = Training.main(**settings | {"OUTPUT_DIR": str(tmp_path / "whole")})
    expected = {"queries", "positions", "detection", "rain/mAP"}
    assert all(expected <= whole[phase]["history"][0].keys() for phase in (1, 2))
    cut = settings | {"OUTPUT_DIR": str(tmp_path / "cut"), "CHECKPOINT_STEPS": 1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "compute_losses", dies_after(3, Training.compute_losses))  # in phase 2
        Training.main(**cut)
    Training.main(**cut | {"RESUME": True})
    for phase in (1, 2):
        one, other = state(tmp_path / "whole", phase), state(tmp_path / "cut", phase)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    capsys.readouterr()
    Training.main(**cut | {"RESUME": True, "QUERIES_WEIGHT": 0.5, "PHASE2_EPOCHS": 2})
    assert "QUERIES_WEIGHT" in capsys.readouterr().out  # counts from here on, and is said


def test_from_clean_photographs_alone_both_phases_learn_from_the_teacher(base, coco, tmp_path):
    for name in ("annotations", "val2017"):
        shutil.rmtree(coco / "coco" / name)
    settings = base | {"COCO_RAIN_DIR": "", "RAIN": "fresh", "PHASE1_EPOCHS": 1, "BATCH_SIZE": 4, "MASK_WEIGHT": 0.0,
                       "DETECTION_WEIGHT": 0.0, "CONSISTENCY_WEIGHT": 0.5, "QUERIES_WEIGHT": 2.0}
    results = Training.main(**settings)
    assert set(results) == {1, 2}
    last = results[2]["history"][0]
    assert last["score"] == pytest.approx(-0.5 * last["rain/consistency"] - 2.0 * last["rain/queries"])
    other = feature_derain.load_rtdetr(base["RTDETR_MODEL_NAME"])
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    for name, change in (("QUERIES_WEIGHT", {"QUERIES_WEIGHT": 1.0}), ("RAIN_KINDS", {"RAIN_KINDS": {"heavy": 1.0}}),
                         ("taught", {"QUERIES_WEIGHT": 0.0}),
                         ("teacher", {"RTDETR_MODEL_NAME": str(tmp_path / "other")})):
        with pytest.raises(UserError, match=f"last.pt.*{name} was"):
            Training.main(**settings | change | {"RESUME": True})


def test_baseline_and_lightweight(base, tmp_path, capsys):
    results = Training.main(**base | {"DERAIN_TYPE": "none", "OUTPUT_DIR": str(tmp_path / "plain")})
    assert set(results) == {2} and "phase 1 is left out" in capsys.readouterr().out
    Training.main(**base | {"DERAIN_TYPE": "lightweight", "OUTPUT_DIR": str(tmp_path / "light"), "PHASE1_EPOCHS": 1,
                            "PHASE2_EPOCHS": 0}, CONSISTENCY_WEIGHT=0.0, IDENTITY_WEIGHT=0.0)
    shown = capsys.readouterr().out
    assert "warning: lightweight has 63 parameters" in shown
    assert "De-rain module: 63 trainable parameters (100%)" in shown


@pytest.mark.parametrize(("change", "message"), [
    ({"DERAIN_TYPE": "heavy"}, "DERAIN_TYPE = 'heavy'"),
    ({"NUM_RESIDUAL_BLOCKS": 0}, "NUM_RESIDUAL_BLOCKS"),
    ({"COCO_RAIN_DIR": "./none"}, "COCO_RAIN_DIR.*make_rain.py"),
    ({"RTDETR_MODEL_NAME": "./none"}, "RTDETR_MODEL_NAME"),
    ({"DETECTION_WEIGHT": 0.0, "CONSISTENCY_WEIGHT": 0.0}, "DETECTION_WEIGHT and CONSISTENCY_WEIGHT"),
    ({"COCO_RATIO": 0.4}, "add up to 1"),
    ({"FEATURE_LEVEL": "decoder"}, "FEATURE_LEVEL = 'decoder'"),
    ({"EMA_DECAY": 1.5}, "EMA_DECAY = 1.5"),
    ({"PRETRAINED_SHARE": 1.0}, "PRETRAINED_SHARE = 1.0"),
    ({"RAIN_SCORE_WEIGHT": -1.0}, "RAIN_SCORE_WEIGHT = -1.0"),
    ({"RAIN_SCORE_WEIGHT": 0.0, "CLEAN_SCORE_WEIGHT": 0.0}, "are both 0"),
    ({"PHASE2_DETECTOR_LR": -1.0}, "PHASE2_DETECTOR_LR = -1.0"),
    ({"SCHEDULE": "linear"}, "SCHEDULE = 'linear'"),
    ({"UNKNOWN_CATEGORIES": "Error"}, "UNKNOWN_CATEGORIES = 'Error'"),
    ({"IMAGE_SIZE": 100}, "IMAGE_SIZE"),
    ({"IMAGE_SIZE": 32}, "IMAGE_SIZE = 32 gives 21 feature positions, .* chooses 40 .* set 64 or more"),
    ({"PHASE1_EPOCHS": -1}, "PHASE1_EPOCHS = -1"),
    ({"PHASE1_EPOCHS": 0, "PHASE2_EPOCHS": 0}, "nothing to train"),
    ({"DERAIN_TYPE": "none", "PHASE2_EPOCHS": 0}, "nothing to train"),
    ({"BATCH_SIZE": -1}, "BATCH_SIZE"),
    ({"NUM_WORKERS": -1}, "^NUM_WORKERS = -1"),
    ({"CONSISTENCY_WEIGHT": -1.0}, "CONSISTENCY_WEIGHT = -1.0"),
])
def test_training_refuses_with_one_clear_line(base, change, message):
    earlier = Path(base["OUTPUT_DIR"]) / "model" / "derain.pt"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    with pytest.raises(UserError, match=message) as error:
        Training.main(**base | change)
    assert "\n" not in str(error.value)
    assert earlier.exists()  # an earlier run is only set aside when a new one begins


def test_fingerprint_of_the_teacher_does_not_follow_the_student(base, monkeypatch):
    """Phase 2 trains the detector; the targets of the feature losses stay those of the pretrained one."""
    marks = []
    plain = Training.compute_losses

    def spy(model, batch, weights, teacher, **others):
        marks.append(freeze.fingerprint(teacher))
        return plain(model, batch, weights, teacher, **others)
    monkeypatch.setattr(Training, "compute_losses", spy)
    Training.main(**base | {"PHASE1_EPOCHS": 1})
    assert len(marks) == 8 and len(set(marks)) == 1
