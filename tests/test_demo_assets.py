"""The committed weights of the demo: small, loadable, a detector that is good in clear weather and suffers in rain."""

from pathlib import Path

from rfdetr import evaluate, weights
from rfdetr.datasets import batches, roboflow
from utils import datasets
from utils.datasets import loaders, presets
from utils.demo.coco import ensure_demo
from utils.demo.roboflow import ensure_dataset
from utils.demo.scene import CATEGORIES
from utils.evaluation import rain_report
from utils.evaluation.coco import detection_scores
from utils.integrated_model import RainRobustRTDETR
from utils.networks.derainers import load_trained
from utils.networks.rain_detector import load_rain_detector
from utils.networks.rtdetr import id2label_of, load_rtdetr
from utils.networks.spdnet import load_spdnet

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "demo"


def test_they_are_small_and_load():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 36 * 2**20
    for name in ("spdnet.pt", "spdnet_adapted.pt"):
        model = load_spdnet(ASSETS / name)
        assert (model.n_feats, model.n_resblocks) == (16, 1)
    for name in ("nafnet.pt", "nafnet_adapted.pt"):
        assert load_trained(ASSETS / name).model_args["arch"] == "nafnet"
    for name in ("rtdetr", "rtdetr_rain", "rtdetr_specialist"):
        names = id2label_of(load_rtdetr(str(ASSETS / name))).values()
        assert list(names) == [category["name"] for category in sorted(CATEGORIES, key=lambda c: c["id"])]


def test_the_rain_detector_tells_the_demos_weather(tmp_path):
    root = ensure_demo(tmp_path / "demo", num_train=1, num_val=60)
    rain_detector = load_rain_detector(ASSETS / "rain_detector.pt")
    predicted = rain_report.predict_sets(rain_detector, rain_report.test_sets(
        [root / "coco" / "val2017"], [root / "coco_rain" / "val2017"], ()), "cpu", 16, 0)
    summary = rain_report.summarise(predicted, 0.5)
    assert summary["auroc"] > 0.88 and summary["recall"] > 0.6 and summary["false_alarm_rate"] < 0.15


def test_rain_costs_the_detector_at_least_a_third(tmp_path):
    root = ensure_demo(tmp_path / "demo", num_train=1, num_val=60)
    model = load_rtdetr(str(ASSETS / "rtdetr"))
    found = {}
    for domain, name in (("clean", "coco"), ("rainy", "coco_rain")):
        data = datasets.CocoDetectionDataset(root / name, "val", id2label_of(model), presets.evaluation(160),
                                             constant="COCO_DIR", domain=domain)
        scores, _ = detection_scores(lambda x: model(pixel_values=x), loaders.validation_loader(data, 8, 0),
                                     "cpu")
        found[domain] = scores["mAP"]
    assert found["clean"] > 0.45
    assert found["rainy"] < found["clean"] * 2 / 3
    derainer = RainRobustRTDETR(load_trained(ASSETS / "nafnet_adapted.pt"), model).eval()
    for rainy, share in ((load_rtdetr(str(ASSETS / "rtdetr_specialist")), 2 / 3), (derainer, 1 / 2)):
        loader = loaders.validation_loader(data, 8, 0)
        scores, _ = detection_scores(lambda x, rainy=rainy: rainy(pixel_values=x), loader, "cpu")
        assert scores["mAP"] > found["rainy"] + (found["clean"] - found["rainy"]) * share


def test_rfdetr_finds_the_demos_objects(tmp_path):
    root = ensure_dataset(tmp_path / "dataset", tmp_path / "demo", num_train=1, num_valid=40, num_test=1)
    model, found = weights.load_detector(ASSETS / "rfdetr_tiny.pth")
    assert found["class_names"] == [category["name"] for category in sorted(CATEGORIES, key=lambda c: c["id"])]
    data = roboflow.RoboflowDataset(root, "valid", found["class_rows"], 160, train=False)
    loader = loaders.validation_loader(data, 8, 0, collate=batches.Collate(160))
    assert evaluate.evaluate(model, loader, "cpu")[0]["box/mAP"] > 0.4
