"""The rain detector: its contract, its data, and its training script on a handful of images."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import mobilenet_v3_small

import Training_RainDetector as Training
from utils import config
from utils.config import UserError
from utils.datasets import rain_or_clean
from utils.datasets.samples import images_below
from utils.evaluation import rain_report
from utils.networks.rain_detector import RainDetector, load_rain_detector, new_rain_detector, save_rain_detector
from utils.weather import kinds, rain

SHARES = {"light": 1.0, "mist": 1.0, "drops": 1.0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return RainDetector().eval()


def photo(size=(96, 64), seed=0):
    """A smooth colourful picture, (H, W, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))


@pytest.fixture
def roots(tmp_path):
    """tmp_path/clean and tmp_path/rainy: 16 images each, equal names."""
    for i in range(16):
        clean = photo(seed=i)
        for name, pixels in (("clean", clean), ("rainy", rain.add_rain(clean, rain.rng_for(0, str(i)), "heavy"))):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{i:04d}.png")
    return tmp_path


# ---- network -----------------------------------------------------------------------------------------------------

def test_any_size_and_its_own_normalisation(model):
    images = torch.rand(3, 3, 100, 140)
    logits = model(images)
    assert logits.shape == (3,)
    small = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (small - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    by_hand = model.head(model.features(normal).mean((2, 3)))[:, 0]
    torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-5)


def test_predict_uses_temperature_and_threshold(model):
    images = torch.rand(4, 3, 64, 64)
    is_rainy, probability = model.predict(images)
    assert is_rainy.dtype == torch.bool and torch.equal(is_rainy, probability >= 0.5)
    hot = RainDetector().eval()
    hot.load_state_dict(model.state_dict())
    hot.temperature.fill_(4.0)
    hot.operating_threshold.fill_(0.9)
    torch.testing.assert_close(hot.predict(images)[1], torch.sigmoid(model(images) / 4))
    assert not hot.predict(images, threshold=None)[0].any()
    assert hot.predict(images, threshold=0.0)[0].all()


def test_probability_is_differentiable(model):
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    model.probability(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_saved_and_loaded(model, tmp_path):
    path = tmp_path / "rain.pt"
    save_rain_detector(model, path)
    again = load_rain_detector(path)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(images), model(images)) and not again.training
    assert set(torch.load(path)) == {"model", "model_args"}
    with pytest.raises(UserError, match="RAIN_DETECTOR_PATH.*Training_RainDetector.py"):
        load_rain_detector(tmp_path / "none.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="RAIN_DETECTOR_PATH.*not a file of Training_RainDetector"):
        load_rain_detector(tmp_path / "other.pt")


def test_backbone_weights_from_a_local_file(tmp_path):
    state = mobilenet_v3_small(weights=None).state_dict()  # the layout of torchvision's download
    torch.save(state, tmp_path / "mobilenet.pth")
    model = new_rain_detector(str(tmp_path / "mobilenet.pth"))
    assert torch.equal(model.features[0][0].weight, state["features.0.0.weight"])
    torch.save({"features.0.0.weight": torch.zeros(1)}, tmp_path / "broken.pth")
    with pytest.raises(UserError, match="BACKBONE_WEIGHTS.*missing"):
        new_rain_detector(str(tmp_path / "broken.pth"))


def test_unreachable_imagenet_weights_are_one_clear_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("<urlopen error [Errno 111] Connection refused>")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match="BACKBONE_WEIGHTS = 'imagenet'.*download.pytorch.org") as error:
        new_rain_detector("imagenet")
    assert "\n" not in str(error.value)


# ---- data --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", kinds.KINDS)
def test_weather_changes_the_image_and_is_repeatable(kind):
    image = photo((160, 120))
    one, two = (kinds.add_weather(image, rain.rng_for(3, "a"), kind) for _ in range(2))
    assert one.shape == image.shape and one.dtype == np.uint8 and np.array_equal(one, two)
    assert np.abs(one.astype(int) - image).mean() > 0.3


def test_mist_has_no_streaks_and_lowers_contrast():
    image = photo((160, 120))
    lost = [rain.add_mist(image, rain.rng_for(s, "m")).std() / image.std() for s in range(8)]
    assert max(lost) < 0.95 and rain.mist_parameters(rain.rng_for(0, "m")).layers == ()


def test_fog_hides_more_than_mist():
    image = photo((160, 120))
    left = {kind: np.mean([kinds.add_weather(image, rain.rng_for(s, "f"), kind).std() for s in range(12)])
            for kind in ("mist", "fog")}
    assert left["fog"] < 0.8 * left["mist"] and rain.fog_parameters(rain.rng_for(0, "f")).layers == ()


def test_a_twin_is_never_on_the_other_side(roots):
    sides = {}
    for name in ("clean", "rainy"):
        for path in images_below([roots / name], "CLEAN_DIRS"):
            sides.setdefault(path.stem, set()).add(rain_or_clean.in_validation(path, 0.3))
    assert all(len(side) == 1 for side in sides.values())
    assert {next(iter(side)) for side in sides.values()} == {True, False}


def test_samples_are_a_function_of_seed_epoch_and_index(roots):
    paths = [images_below([roots / name], "X") for name in ("clean", "rainy")]
    data = rain_or_clean.RainClassificationDataset(*paths, 0.5, SHARES, True, seed=1, side=224)
    assert len(data) == 32
    again = rain_or_clean.RainClassificationDataset(*paths, 0.5, SHARES, True, seed=1, side=224)
    for key in ((0, 3), (0, 20), (2, 31)):
        a, b = data[key], again[key]
        assert torch.equal(a["image"], b["image"]) and a["image"].shape == (3, 224, 224)
    assert not torch.equal(data[0, 20]["image"], data[1, 20]["image"])
    assert [data[i]["domain"] for i in (0, 15, 16, 31)] == ["clean", "clean", "rainy", "rainy"]
    from_disk = {data[0, i]["path"].split("/")[-2] for i in range(16, 32)}
    assert from_disk == {"clean", "rainy"}  # rendered on a clean image, or read from the rainy folder


def test_both_classes_are_augmented_alike(roots):
    """Whatever breaks a shortcut must do so on either side: the same draws on a clean and on a rainy image."""
    paths = [images_below([roots / name], "X") for name in ("clean", "rainy")]
    data = rain_or_clean.RainClassificationDataset(*paths, 0.0, SHARES, True, seed=1, side=224)
    seen = []
    data.augmentation = lambda image: seen.append(image.shape) or image
    for i in range(0, len(data), 5):
        data[0, i]
    assert len(seen) == len(range(0, len(data), 5))
    plain = rain_or_clean.RainClassificationDataset(*paths, 0.0, SHARES, False, seed=1, side=224)
    plain.augmentation = None
    data = rain_or_clean.RainClassificationDataset(*paths, 0.0, SHARES, True, seed=1, side=224)
    changed = [not torch.equal(data[0, i]["image"], plain[0, i]["image"]) for i in range(len(data))]
    assert all(changed)


def test_training_and_validation_share_no_scene(roots, base):
    train, val = Training.build_data(config.resolve(vars(Training), base))
    used, held_out = ({path.stem for path in data.clean + data.rainy} for data in (train, val))
    assert used and held_out and not used & held_out


def test_equal_folder_names_are_told_apart(roots, tmp_path):
    for side in ("a", "b"):
        shutil.copytree(roots / ("clean" if side == "a" else "rainy"), tmp_path / side / "coco" / "val2017")
    sets = rain_report.test_sets([tmp_path / "a/coco/val2017"], [tmp_path / "b/coco/val2017"], ())
    assert sorted(domain for _, domain in sets.values()) == ["clean", "rainy"]
    with pytest.raises(UserError, match="cannot be both"):
        rain_report.test_sets([roots / "clean"], [roots / "clean"], ())


def test_data_errors_name_the_constant(roots, tmp_path):
    with pytest.raises(UserError, match="CLEAN_DIRS.*does not exist"):
        images_below([tmp_path / "none"], "CLEAN_DIRS")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="RAINY_DIRS.*holds no images"):
        images_below([tmp_path / "empty"], "RAINY_DIRS")
    paths = images_below([roots / "clean"], "X")
    with pytest.raises(UserError, match="RENDERED_SHARE"):
        rain_or_clean.RainClassificationDataset(paths, [], 2.0, SHARES, True, 0, 224)
    with pytest.raises(UserError, match="RAIN_KINDS = .*'smog'.*fog, drops"):
        Training.main(CLEAN_DIRS=(str(roots / "clean"),), RAINY_DIRS=(), BACKBONE_WEIGHTS="", RAIN_KINDS={"smog": 1.0},
                      OUTPUT_DIR=str(tmp_path / "out"))
    with pytest.raises(UserError, match="there is no rain to learn"):
        rain_or_clean.RainClassificationDataset(paths, [], 0.0, SHARES, True, 0, 224)


def test_report_splits_by_prefix_and_draws(roots, model, tmp_path):
    (roots / "rainy" / "fog_1.png").write_bytes((roots / "rainy" / "0001.png").read_bytes())
    sets = rain_report.test_sets([roots / "clean"], [roots / "rainy"], ("fog_",))
    assert [(name.split("/")[-1], len(paths), domain) for name, (paths, domain) in sets.items()] == [
        ("clean", 16, "clean"), ("rainy: fog_*", 1, "rainy"), ("rainy: others", 16, "rainy")]
    predicted = rain_report.predict_sets(model, sets, "cpu", 8, 0)
    summary = rain_report.summarise(predicted, 0.5)
    assert summary["true_positive"] + summary["false_negative"] == 17 and len(summary["sets"]) == 3
    assert rain_report.describe(summary).isascii()
    rain_report.write_pictures(predicted, 0.5, tmp_path / "out")
    assert (tmp_path / "out" / "rain_roc.png").is_file() and (tmp_path / "out" / "rain_mistakes.png").is_file()
    with pytest.raises(UserError, match="TEST_PREFIXES.*'snow_'"):
        rain_report.test_sets([roots / "clean"], [roots / "rainy"], ("snow_",))


# ---- the script --------------------------------------------------------------------------------------------------

@pytest.fixture
def base(roots):
    return {"CLEAN_DIRS": (str(roots / "clean"),), "RAINY_DIRS": (str(roots / "rainy"),), "PERCENT_DATASET": 100,
            "VALIDATION_SHARE": 0.3, "BACKBONE_WEIGHTS": "", "NUM_EPOCHS": 2, "BATCH_SIZE": 8, "LEARNING_RATE": 1e-3,
            "WARMUP_STEPS": 0, "DATALOADER_WORKERS": 0, "OUTPUT_DIR": str(roots / "out")}


def test_training_writes_a_calibrated_detector_and_scores_the_test_folders(base, roots, capsys):
    result = Training.main(**base | {"NUM_EPOCHS": 5}, TEST_CLEAN_DIRS=(str(roots / "clean"),),
                           TEST_RAINY_DIRS=(str(roots / "rainy"),))
    assert result["history"][-1]["bce"] < result["history"][0]["bce"]
    trained = load_rain_detector(roots / "out" / "rain_detector_best.pt")
    best = result["history"][result["best_epoch"] - 1]
    assert trained.temperature.item() == pytest.approx(best["val/temperature"])
    assert trained.operating_threshold.item() == pytest.approx(best["val/threshold"])
    written = json.loads((roots / "out" / "test.json").read_text(encoding="utf-8"))["results"]
    assert written["true_positive"] + written["false_negative"] == 16
    shown = capsys.readouterr().out
    assert shown.isascii() and "called rainy" in shown and "AUROC" in shown


def test_a_detector_that_is_no_gate_is_said_to_be_none(capsys):
    Training.note_weak({"val/recall": 0.5})
    assert capsys.readouterr().out == ""
    Training.note_weak({"val/recall": 0.04})
    assert "note: at its threshold it calls 4% of the rainy validation images rainy" in capsys.readouterr().out


def test_training_resumes(base, roots):
    Training.main(**base | {"NUM_EPOCHS": 1, "SCHEDULE": "constant"})
    Training.main(**base | {"OUTPUT_DIR": str(roots / "constant"), "SCHEDULE": "constant"})
    Training.main(**base | {"RESUME": True, "SCHEDULE": "constant"})
    one, two = (torch.load(roots / name / "last.pt")["model"] for name in ("constant", "out"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(("change", "message"), [
    ({"CLEAN_DIRS": ("./none",)}, "CLEAN_DIRS: 'none' does not exist"),
    ({"CLEAN_DIRS": (1,)}, "CLEAN_DIRS holds 1"),
    ({"RAINY_DIRS": (), "RENDERED_SHARE": 0.0}, "no rain to learn"),
    ({"VALIDATION_SHARE": 0.0}, "VALIDATION_SHARE"),
    ({"FALSE_ALARM_RATE": 1.5}, "FALSE_ALARM_RATE"),
    ({"TEST_CLEAN_DIRS": ("./none",)}, "TEST_CLEAN_DIRS and TEST_RAINY_DIRS belong together"),
    ({"BACKBONE_WEIGHTS": "./none.pth"}, "none.pth"),
])
def test_training_refuses_with_one_clear_line(base, change, message):
    with pytest.raises(UserError, match=message) as error:
        Training.main(**base | change)
    assert "\n" not in str(error.value)


def test_a_broken_image_is_named(base, roots):
    (roots / "clean" / "0003.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="0003.png"):
        Training.main(**base)
