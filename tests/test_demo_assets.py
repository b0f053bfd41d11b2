"""The committed weights of the demo: small, loadable, a detector that is good in clear weather and suffers in rain."""

from pathlib import Path

from utils import datasets, demo, detector, evaluation, loaders, presets
from utils.demo_scene import CATEGORIES
from utils.spdnet import load_spdnet

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "demo"


def test_they_are_small_and_load():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 12 * 2**20
    model = load_spdnet(ASSETS / "spdnet.pt")
    assert (model.n_feats, model.n_resblocks) == (16, 1)
    names = detector.id2label_of(detector.load_rtdetr(str(ASSETS / "rtdetr"))).values()
    assert list(names) == [category["name"] for category in sorted(CATEGORIES, key=lambda c: c["id"])]


def test_rain_costs_the_detector_at_least_a_third(tmp_path):
    root = demo.ensure_demo(tmp_path / "demo", num_train=1, num_val=60)
    model = detector.load_rtdetr(str(ASSETS / "rtdetr"))
    found = {}
    for domain, name in (("clean", "coco"), ("rainy", "coco_rain")):
        data = datasets.CocoDetectionDataset(root / name, "val", detector.id2label_of(model), presets.evaluation(160),
                                             constant="COCO_DIR", domain=domain)
        scores, _ = evaluation.detection_scores(lambda x: model(pixel_values=x), loaders.validation_loader(data, 8, 0),
                                                "cpu")
        found[domain] = scores["mAP"]
    assert found["clean"] > 0.45
    assert found["rainy"] < found["clean"] * 2 / 3
