"""Mosaics: boxes follow their quarter, samples are functions of their key, the last epochs see whole images."""

from types import SimpleNamespace

import pytest
import torch

from utils import datasets
from utils.config import UserError
from utils.datasets import presets
from utils.datasets.mosaic import Mosaic, joined, with_mosaics
from utils.training import needs


@pytest.fixture
def data(coco):
    return datasets.clean_rainy_mixture(coco / "coco", coco / "coco_rain", {0: "person", 1: "car"},
                                        presets.evaluation(64), coco_ratio=0.5, rain_ratio=0.5, percent=100, seed=0,
                                        twins=True)


def sample(value, boxes, labels):
    return {"image": torch.full((3, 8, 8), value, dtype=torch.uint8), "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64), "image_id": value, "domain": "clean"}


def test_boxes_and_pixels_land_in_their_quarter():
    four = [sample(1, [[0.5, 0.5, 1.0, 1.0]], [0]), sample(2, [[0.2, 0.4, 0.2, 0.6]], [1]), sample(3, [], []),
            sample(4, [[1.0, 1.0, 0.0, 0.0], [0.5, 0.25, 0.5, 0.5]], [1, 0])]
    found = joined(four)
    assert found["image"].dtype == torch.uint8
    assert found["image"][0, ::4, ::4].tolist() == [[1, 2], [3, 4]] and found["image"].shape == (3, 8, 8)
    assert (found["image"][:, :4, 4:] == 2).all() and (found["image"][:, 4:, :4] == 3).all()
    torch.testing.assert_close(found["boxes"], torch.tensor([
        [0.25, 0.25, 0.5, 0.5], [0.6, 0.2, 0.1, 0.3], [1.0, 1.0, 0.0, 0.0], [0.75, 0.625, 0.25, 0.25]]))
    assert found["labels"].tolist() == [0, 1, 1, 0] and found["image_id"] == 1


def test_a_sample_depends_on_its_key_alone_and_twins_follow(data):
    mosaics = Mosaic(data, 1.0, 3, 0)
    assert len(mosaics) == len(data) and mosaics.image_paths() == data.image_paths()
    first, again, later = mosaics[0, 2], mosaics[0, 2], mosaics[1, 2]
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["boxes"], again["boxes"])
    assert not torch.equal(first["image"], later["image"])
    assert first["twin"].shape == (3, 64, 64)
    own = data[0, 2]
    own_boxes = first["boxes"][:len(own["boxes"])]  # its own quarter is the first
    torch.testing.assert_close(own_boxes, own["boxes"] / 2)
    batch = datasets.collate([mosaics[0, i] for i in range(4)])
    assert batch["images"].shape == batch["twins"].shape == (4, 3, 64, 64)


def test_the_share_of_mosaics_and_the_whole_images_of_the_last_epochs(data):
    half = Mosaic(data, 0.5, 20, 0)
    alone = [torch.equal(half[epoch, i]["image"], data[epoch, i]["image"])
             for epoch in range(20) for i in range(len(data))]
    assert 0.35 < sum(alone) / len(alone) < 0.65
    cfg = SimpleNamespace(MOSAIC_RATIO=1.0, CLOSE_MOSAIC=2, NUM_EPOCHS=5, SEED=0)
    mosaics = with_mosaics(data, cfg)
    whole = [all(torch.equal(mosaics[epoch, i]["image"], data[epoch, i]["image"]) for i in range(len(data)))
             for epoch in range(5)]
    assert whole == [False, False, False, True, True]
    cfg.MOSAIC_RATIO = 0.0
    assert with_mosaics(data, cfg) is data


def test_a_run_without_any_mosaic_says_so(data, capsys):
    cfg = SimpleNamespace(MOSAIC_RATIO=0.5, CLOSE_MOSAIC=3, NUM_EPOCHS=3, SEED=0)
    with_mosaics(data, cfg)
    assert "MOSAIC_RATIO = 0.5 has no effect" in capsys.readouterr().out
    cfg.CLOSE_MOSAIC = 2
    with_mosaics(data, cfg)
    assert capsys.readouterr().out == ""


def test_the_memory_of_a_step_is_that_of_a_mosaic_although_the_last_epoch_has_none(data):
    def most(dataset):
        loader = torch.utils.data.DataLoader(dataset, collate_fn=datasets.collate)
        return len(needs.fullest_batch(loader, plan)["labels"][0]["boxes"])
    plan = SimpleNamespace(epochs=3, batch_size=1)
    mosaics = Mosaic(data, 1.0, 2, 0)
    assert most(mosaics) == max(len(mosaics[0, i]["boxes"]) for i in range(len(data))) > most(data)


@pytest.mark.parametrize("wrong", [{"MOSAIC_RATIO": 1.5}, {"MOSAIC_RATIO": float("nan")}, {"CLOSE_MOSAIC": -1},
                                   {"CLOSE_MOSAIC": 1.5}])
def test_useless_values_are_named(data, wrong):
    cfg = SimpleNamespace(**{"MOSAIC_RATIO": 0.5, "CLOSE_MOSAIC": 0, "NUM_EPOCHS": 2, "SEED": 0} | wrong)
    with pytest.raises(UserError, match=f"{next(iter(wrong))} = "):
        with_mosaics(data, cfg)
