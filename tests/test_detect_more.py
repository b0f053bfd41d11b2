"""detect.py with RF-DETR and exported files, in tiles, with tracks; a folder shared out, killed and gone on with."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import names_in
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from script_processes import on_two_processes, started
from test_detect import picture, results, write_video
from torchvision.ops import box_iou

import app
import detect
import export
from rfdetr import detr, weights
from rfdetr.model import RFDETR
from utils import config
from utils.config import UserError
from utils.demo.scene import render_scene
from utils.inference import exported, tiles
from utils.networks.rain_detector import new_rain_detector, save_rain_detector

ROOT = Path(__file__).resolve().parent.parent
DEMO_RTDETR, DEMO_RFDETR = str(ROOT / "assets/demo/rtdetr"), str(ROOT / "assets/demo/rfdetr_tiny.pth")


@pytest.fixture
def street(tmp_path):
    """A folder of one street scene as the demo's detectors know them, and where results go."""
    folder = tmp_path / "street"
    folder.mkdir()
    Image.fromarray(render_scene(3, (160, 160))[0]).save(folder / "7.png")
    return {"SOURCE": str(folder), "OUTPUT": str(tmp_path / "runs" / "detect")}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """The demo's RF-DETR with a mask head of random weights, and that checkpoint as an exported file."""
    folder = tmp_path_factory.mktemp("masked")
    content = weights.read(DEMO_RFDETR)
    torch.manual_seed(0)
    model = RFDETR("tiny", 6, 160, mask_head="nano")
    known = weights.load_pretrained(model, content)["class_rows"]
    weights.write(weights.checkpoint_content(model, sorted(known), known), folder / "masked.pth", None)
    return folder / "masked.pth"


def boxes_of(folder):
    return [(box["category_id"], *box["bbox"], box["score"]) for box in results(folder)[0]]


# --- what WEIGHTS holds ---------------------------------------------------------------------------------------------

def test_rfdetr_finds_what_its_own_class_finds_and_draws_masks(street, masked):
    found = detect.main(**street, MODEL="rfdetr", WEIGHTS=str(masked), THRESHOLD=0.3)
    ours, images = results(found["folder"])
    (theirs,) = detr.Detector(masked).predict([Path(street["SOURCE"]) / "7.png"], threshold=0.3)
    assert len(ours) == len(theirs) >= 3
    names = {one["id"]: one["name"] for one in images["categories"]}
    assert [names[box["category_id"]] for box in ours] == theirs.class_names
    corners = np.array([box["bbox"] for box in ours])
    corners[:, 2:] += corners[:, :2]
    assert np.allclose(corners, theirs.xyxy, atol=0.02)
    for box, mask in zip(ours, theirs.masks, strict=True):
        assert (rle.decode(box["segmentation"]) == mask).all()
    assert any(mask.any() for mask in theirs.masks)
    truth = COCO()
    truth.dataset = images | {"annotations": [], "info": {}}
    truth.createIndex()
    assert len(truth.loadRes(str(found["folder"] / "detections.json")).anns) == len(ours)
    plain = detect.main(**street, MODEL="rfdetr", WEIGHTS=DEMO_RFDETR, THRESHOLD=0.3)
    assert boxes_of(plain["folder"]) == boxes_of(found["folder"])  # the detector is the same one
    drawn = [np.asarray(Image.open(one["folder"] / "7.png")) for one in (plain, found)]
    assert (drawn[0] != drawn[1]).any()


def test_masks_as_polygons(street, masked):
    found = detect.main(**street, MODEL="rfdetr", WEIGHTS=str(masked), THRESHOLD=0.3, MASKS="polygon")
    codes = detect.main(**street, MODEL="rfdetr", WEIGHTS=str(masked), THRESHOLD=0.3)
    pairs = list(zip(*(results(one["folder"])[0] for one in (found, codes)), strict=True))
    filled = [(one["segmentation"], other["segmentation"]) for one, other in pairs if one["segmentation"]]
    assert filled and all(len(line) >= 6 for lines, _ in filled for line in lines)
    for lines, code in filled:  # a polygon has no holes
        drawn = rle.decode(rle.merge(rle.frPyObjects(lines, *code["size"])))
        assert (drawn >= rle.decode(code)).mean() > 0.98


def test_an_exported_detector_answers_as_its_model(street, masked, tmp_path):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    export.main(RFDETR_PATH=str(masked), RTDETR_MODEL_NAME="", MODEL_NAME="", OUTPUT_DIR=str(tmp_path / "files"),
                FORMATS=("onnx",))
    ours, theirs = (detect.main(**street, MODEL=model, WEIGHTS=str(file), THRESHOLD=0.1) for model, file in (
        ("exported", tmp_path / "files" / "rfdetr.onnx"), ("rfdetr", masked)))
    assert ours["objects"] == theirs["objects"] >= 3
    assert np.allclose(boxes_of(ours["folder"]), boxes_of(theirs["folder"]), atol=0.02)
    for one, other in zip(*(results(found["folder"])[0] for found in (ours, theirs)), strict=True):
        differ = rle.decode(one["segmentation"]) != rle.decode(other["segmentation"])
        assert differ.mean() < 1e-3  # a pixel on the edge


class Stub(torch.nn.Module):
    """A detector that finds one object of the class `label` everywhere, or nothing finite in dark images."""

    def __init__(self, label, breaks=False):
        super().__init__()
        self.label, self.breaks = label, breaks

    def forward(self, images):
        light = images.mean((1, 2, 3))[:, None, None]  # (B, 1, 1)
        row = torch.tensor([3.0 if i == self.label else -9.0 for i in range(2)])
        logits = 0 * light + row.expand(3, 2)  # (B, 3, 2)
        if self.breaks:
            logits = torch.where(light > 0.1, logits, float("nan"))
        return logits, 0 * light + torch.full((3, 4), 0.5)


class Dark(torch.nn.Module):
    """A rain detector: the darker, the more rain."""

    def forward(self, images):
        return 1 - images.mean((1, 2, 3))


@pytest.fixture
def manifest(tmp_path):
    """manifest.json of a pipeline of three small exported files; clean finds persons, rainy cars."""
    files = {}
    for name, module in (("gate", Dark()), ("rainy", Stub(1, breaks=True)), ("clean", Stub(0))):
        outputs = ["probability"] if name == "gate" else ["logits", "pred_boxes"]
        about = {"kind": "rain detector" if name == "gate" else "detector", "model": f"pipeline_{name}",
                 "input": "pixel_values", "outputs": outputs, "image_size": 64,
                 "classes": {"0": "person", "1": "car"}}
        program = torch.export.export(module, (torch.rand(2, 3, 64, 64),), strict=False,
                                      dynamic_shapes=({0: torch.export.Dim("batch")},))
        exported.write_torch_export(program, tmp_path / f"{name}.pt2", about)
        files[f"{name}.pt2"] = about
    parts = {name: f"pipeline_{name}" for name in ("gate", "rainy", "clean")}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files, "pipeline": parts | {"rain_threshold": 0.6}}))
    return tmp_path / "manifest.json"


def test_an_exported_pipeline_has_its_gate(street, manifest, tmp_path, capsys):
    pictures = [np.full((64, 96, 3), level, np.uint8) for level in (200, 200, 80, 80, 80, 80, 80, 80)]
    clip = write_video(tmp_path / "weather.mp4", pictures)
    settings = street | {"SOURCE": str(clip), "MODEL": "exported", "WEIGHTS": str(manifest), "BATCH_SIZE": 3}
    own = settings | {"RAIN_THRESHOLD": None, "RAIN_FRAMES": 1, "RAIN_MARGIN": 0.0}
    found = detect.main(**own)
    boxes, images = results(found["folder"])
    assert [image["branch"] for image in images["images"]] == ["clean"] * 2 + ["rain"] * 6
    assert [box["category_id"] for box in boxes[::3]] == [1] * 2 + [3] * 6 and found["fallbacks"] == 0
    assert found["derained"] == 6 and "images   8, 6 of them in the rain branch" in capsys.readouterr().out
    never = detect.main(**own | {"RAIN_THRESHOLD": 0.9})
    assert {image["branch"] for image in results(never["folder"])[1]["images"]} == {"clean"}
    patient = detect.main(**settings, RAIN_THRESHOLD=0.5)
    assert [one["frame"] for one in patient["switches"]] == [0]  # 0.69 is not sure enough
    black = write_video(tmp_path / "black.mp4", [np.zeros((64, 96, 3), np.uint8)] * 2)
    broken = detect.main(**own | {"SOURCE": str(black)})
    assert broken["fallbacks"] == 2 and {box["category_id"] for box in results(broken["folder"])[0]} == {1}


def test_a_manifests_threshold_holds_unless_another_was_given(street, manifest, tmp_path, capsys):
    Image.fromarray(np.full((64, 96, 3), 115, np.uint8)).save(tmp_path / "dim.png")  # probability 0.55
    settings = street | {"SOURCE": str(tmp_path / "dim.png"), "MODEL": "exported", "WEIGHTS": str(manifest)}
    for given, count, said in (({}, 0, "0.6 on (manifest.json's own"), ({"RAIN_THRESHOLD": 0.5}, 1, "0.5 on (RAIN_TH"),
                               ({"RAIN_THRESHOLD": None}, 0, "0.6 on (manifest.json's own")):
        assert detect.main(**settings, **given)["derained"] == count
        shown = capsys.readouterr().out
        assert shown.count("gate: an image is rainy") == 1 and said in shown
    with pytest.raises(UserError, match="RAIN_THRESHOLD = 7.0"):
        detect.main(**settings, RAIN_THRESHOLD=7.0)


def test_a_manifests_threshold_holds_on_the_page_too_unless_another_was_given(manifest, monkeypatch, capsys):
    def threshold(entry, **given):
        choice = {"MODEL": "exported", "WEIGHTS": str(manifest)} | entry
        cfg = config.resolve(vars(app), {"CHOICES": {"mine": choice}, "MODEL": "mine"} | given)
        own, models = app.Choices(cfg, "cpu").get("mine")
        assert own.RAIN_THRESHOLD == models["exported"].rain_threshold
        return own.RAIN_THRESHOLD
    monkeypatch.setattr(app, "RAIN_THRESHOLD", 0.3)  # as edited: it is that of the other choices as well
    assert threshold({}) == 0.6 and "0.6 on (manifest.json's own" in capsys.readouterr().out
    assert threshold({}, RAIN_THRESHOLD=0.7) == 0.7 and threshold({"RAIN_THRESHOLD": 0.8}, RAIN_THRESHOLD=0.7) == 0.8


def test_wrong_weights_are_one_clear_line(street, tmp_path, masked):
    (tmp_path / "words.onnx").write_text("words")
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    for wrong, text in (({"MODEL": "rfdetr"}, "WEIGHTS is empty"), ({"MODEL": "exported"}, "WEIGHTS is empty"),
                        ({"MODEL": "rfdetr", "WEIGHTS": "none.pth"}, "WEIGHTS = 'none.pth' does not exist"),
                        ({"MODEL": "exported", "WEIGHTS": "none.onnx"}, "none.onnx does not exist"),
                        ({"MODEL": "exported", "WEIGHTS": str(tmp_path / "manifest.json")}, "no pipeline"),
                        ({"MODEL": "rfdetr", "WEIGHTS": str(masked), "COMPARE": True}, "COMPARE"),
                        ({"MODEL": "rfdetr", "WEIGHTS": str(masked), "MASKS": "png"}, "MASKS = 'png'"),
                        ({"MODEL": "rfdetr", "WEIGHTS": str(masked), "TRACK": True}, "TRACK"),
                        ({"MODEL": "rfdetr", "WEIGHTS": str(masked), "RESUME": True}, "RESUME"),
                        ({"MODEL": "rfdetr", "WEIGHTS": str(masked), "TILE": 64}, "TILE = 64, OVERLAP = 128"),
                        ({"MODEL": "rfdetr", "WEIGHTS": str(masked), "CLASS_THRESHOLDS": ("car",)}, "'car'"),
                        ({"MODEL": "rfdetr", "WEIGHTS": str(masked), "CLASS_THRESHOLDS": ("ca=0.1",)}, "class 'ca'"),
                        ({"MODEL": "rfdetr", "WEIGHTS": str(masked), "CLASS_THRESHOLDS": ("car=0.9", "car=0.1")},
                         "twice"),
                        ({"MODEL": "rfdetr", "WEIGHTS": str(masked), "CLASS_THRESHOLDS": ("car=0.9,bus=0.1",)},
                         "of its own")):
        with pytest.raises(UserError, match=text) as caught:
            detect.main(**street | wrong)
        assert "\n" not in str(caught.value)
    assert not Path(street["OUTPUT"]).exists()


# --- thresholds, tiles, tracks, gate ---------------------------------------------------------------------------------

def test_classes_have_thresholds_of_their_own(street):
    settings = street | {"MODEL": "rfdetr", "WEIGHTS": DEMO_RFDETR}
    every = results(detect.main(**settings, THRESHOLD=0.05)["folder"])[0]
    thresholds = ("car = 0.05", "stop sign=1.0")
    found = results(detect.main(**settings, THRESHOLD=0.6, CLASS_THRESHOLDS=thresholds)["folder"])[0]
    car, sign = 3, 13
    expected = [box for box in every if box["category_id"] == car or box["category_id"] != sign and box["score"] >= 0.6]
    assert found == expected
    assert any(box["score"] < 0.6 for box in found) and any(box["category_id"] == sign for box in every)


def crowd(path, side=160, cells=4):
    """A picture of `cells` x `cells` street scenes, and the boxes in it: (n, 4) xyxy."""
    page, boxes = Image.new("RGB", (cells * side, cells * side)), []
    for i in range(cells * cells):
        pixels, objects = render_scene(100 + i, (side, side))
        left, top = side * (i % cells), side * (i // cells)
        page.paste(Image.fromarray(pixels), (left, top))
        for one in objects:
            rows, columns = np.nonzero(one["mask"])
            boxes.append([left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1])
    page.save(path)
    return torch.tensor(boxes, dtype=torch.float32)


def test_tiles_find_small_objects_of_large_images_and_each_once(street, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    truth = crowd(folder / "large.png")
    settings = street | {"SOURCE": str(folder), "MODEL": "vanilla", "RTDETR_MODEL_NAME": DEMO_RTDETR, "IMAGE_SIZE": 160}
    recall = {}
    for tile in (0, 240):
        found = detect.main(**settings, TILE=tile, OVERLAP=80)
        corners = torch.tensor([box["bbox"] for box in results(found["folder"])[0]]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        recall[tile] = (box_iou(truth, corners).amax(1) > 0.5).float().mean().item() if len(corners) else 0.0
        kind = torch.tensor([box["category_id"] for box in results(found["folder"])[0]])
        overlaps = box_iou(corners, corners).fill_diagonal_(0) * (kind[:, None] == kind)
        assert (overlaps > 0.7).sum() == 0  # nothing twice
    assert recall[240] > recall[0] + 0.2, recall


def test_masks_of_tiles_lie_in_the_whole_image(street, tmp_path, masked):
    Image.fromarray(np.tile(render_scene(3, (160, 160))[0], (1, 3, 1))).save(tmp_path / "wide.png")
    found = detect.main(**street | {"SOURCE": str(tmp_path / "wide.png")}, MODEL="rfdetr", WEIGHTS=str(masked),
                        THRESHOLD=0.3, TILE=160, OVERLAP=0)
    boxes, images = results(found["folder"])
    assert len(boxes) >= 9
    for box in boxes:
        x, y, w, h = box["bbox"]
        inside = rle.decode(box["segmentation"])
        assert inside.shape == (160, 480)
        at = np.argwhere(inside)
        assert not len(at) or (at[:, 1].min() >= x - 8 - 0.1 * w and at[:, 1].max() <= x + w + 8 + 0.1 * w)


def test_tracks_are_numbers_in_the_file_and_on_the_picture(street, tmp_path):
    scene = Image.fromarray(render_scene(3, (200, 160))[0])
    clip = write_video(tmp_path / "pan.mp4", [np.asarray(scene.crop((2 * i, 0, 160 + 2 * i, 160))) for i in range(10)])
    settings = street | {"SOURCE": str(clip), "MODEL": "rfdetr", "WEIGHTS": DEMO_RFDETR}
    found = detect.main(**settings, TRACK=True)
    by_number = {}
    for box in results(found["folder"])[0]:
        by_number.setdefault(box.get("track_id"), []).append(box)
    longest = max((boxes for number, boxes in by_number.items() if number), key=len)
    assert len(longest) >= 8 and len({box["category_id"] for box in longest}) == 1
    assert len({box["image_id"] for box in longest}) == len(longest)  # one per frame
    plain = results(detect.main(**settings)["folder"])[0]
    assert not any("track_id" in box for box in plain)
    strong = [{key: value for key, value in box.items() if key != "track_id"} for box in results(found["folder"])[0]
              if box["score"] >= 0.5]
    assert strong == plain


def test_a_video_switches_once_per_change_of_weather(street, tmp_path, monkeypatch):
    from utils.networks.rain_detector import RainDetector
    dark = [0.8 if 10 <= i < 22 or i in (3, 26) else 0.2 for i in range(34)]  # two frames are misjudged
    pictures = [np.full((64, 96, 3), 250 - 200 * one, np.uint8) for one in dark]
    clip = write_video(tmp_path / "weather.mp4", pictures)
    torch.manual_seed(0)
    save_rain_detector(new_rain_detector(""), tmp_path / "rain.pt")
    monkeypatch.setattr(RainDetector, "forward", lambda self, images: 20 * (0.5 - images.mean((1, 2, 3))))
    settings = street | {"SOURCE": str(clip), "RAIN_DETECTOR_PATH": str(tmp_path / "rain.pt"), "IMAGE_SIZE": 64,
                         "RTDETR_MODEL_NAME": DEMO_RTDETR, "RAINY_BRANCH": str(ROOT / "assets/demo/rtdetr_rain")}
    calm = detect.main(**settings, BATCH_SIZE=4)
    assert [(one["frame"], one["branch"]) for one in calm["switches"]] == [(0, "clean"), (14, "rain"), (31, "clean")]
    alone = detect.main(**settings, RAIN_FRAMES=1, RAIN_MARGIN=0.0)
    assert len(alone["switches"]) == 7


# --- folders: shared out, killed, gone on with -----------------------------------------------------------------------

@pytest.fixture
def many(tmp_path):
    """A folder of twelve small images."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(picture(i)).save(folder / f"{i:03d}.jpg")
    return {"SOURCE": str(folder), "OUTPUT": str(tmp_path / "runs" / "detect"), "MODEL": "rfdetr",
            "WEIGHTS": DEMO_RFDETR, "THRESHOLD": 0.01, "BATCH_SIZE": 2}


def equal(found, expected):
    """Detections and images of two runs that put them into other batches, which moves the last digits."""
    assert found[1] == expected[1] and len(found[0]) == len(expected[0])
    for one, other in zip(found[0], expected[0], strict=True):
        assert {k: v for k, v in one.items() if k not in ("bbox", "score")} == {
            k: v for k, v in other.items() if k not in ("bbox", "score")}
        assert [*one["bbox"], one["score"]] == pytest.approx([*other["bbox"], other["score"]], abs=0.02)


def test_a_killed_run_goes_on_and_does_no_image_twice(many, tmp_path, monkeypatch, capsys):
    whole = detect.main(**many | {"OUTPUT": str(tmp_path / "whole")})
    process, out = started(slowly, many), Path(many["OUTPUT"])
    while sum(len(path.read_bytes().splitlines()) for path in out.glob(".done.*")) < 5:
        assert process.is_alive()
        time.sleep(0.02)
    with pytest.raises(UserError, match="is being written by process"):
        detect.main(**many, RESUME=True)
    process.kill()
    process.join(60)
    (journal,) = out.glob(".done.*")
    with open(journal, "ab") as file:
        file.write(b'{"image": {"file_na')  # what a kill in the middle of a line leaves
    with pytest.raises(UserError, match="THRESHOLD = 0.01, now it is 0.2"):
        detect.main(**many | {"THRESHOLD": 0.2}, RESUME=True)
    seen, detect_frames = [], detect.detect_frames
    monkeypatch.setattr(detect, "detect_frames", lambda cfg, models, frames, *rest: (
        seen.extend(frame.name for frame in frames), detect_frames(cfg, models, frames, *rest))[1])
    done = [json.loads(line)["image"]["file_name"] for line in journal.read_bytes().splitlines()[1:-1]]
    found = detect.main(**many, RESUME=True)
    assert found["folder"] == out and found["images"] == len(seen) == 12 - len(done) > 0
    assert set(seen) | set(done) == {f"{i:03d}.jpg" for i in range(12)} and not set(seen) & set(done)
    equal(results(out), results(whole["folder"]))
    assert names_in(out) == names_in(whole["folder"]) and not list(out.glob(".*"))
    with pytest.raises(UserError, match="RESUME.*is finished"):
        detect.main(**many, RESUME=True)


def slowly(constants):
    """A run that takes its time, so that it can be killed in the middle."""
    whole = detect.detect_frames
    detect.detect_frames = lambda *args: (time.sleep(0.3), whole(*args))[1]
    detect.main(**constants)


def interrupted_at(number, draw=detect.pictures.draw):
    """-> detect.pictures.draw that stands for Ctrl+C in its `number`-th call."""
    drawn = []

    def interrupted(*args):
        drawn.append(1)
        if len(drawn) == number:
            raise KeyboardInterrupt
        return draw(*args)
    return interrupted


def test_after_ctrl_c_a_folder_has_its_files_and_goes_on(many, tmp_path, monkeypatch):
    whole = detect.main(**many | {"OUTPUT": str(tmp_path / "whole")})
    draw = detect.pictures.draw
    monkeypatch.setattr(detect.pictures, "draw", interrupted_at(6))
    stopped = detect.main(**many)
    assert stopped["stopped"] and len(results(stopped["folder"])[1]["images"]) == 5
    monkeypatch.setattr(detect.pictures, "draw", draw)
    rest = detect.main(**many, RESUME=True)
    assert rest["images"] == 7 and rest["folder"] == stopped["folder"]
    equal(results(rest["folder"]), results(whole["folder"]))


def test_what_could_not_be_read_is_tried_again(many):
    broken = Path(many["SOURCE"]) / "005.jpg"
    sound = broken.read_bytes()
    broken.write_bytes(sound[:200])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect.pictures, "draw", interrupted_at(9))
        with pytest.raises(UserError, match=r"1 problem.*005\.jpg"):
            detect.main(**many)
    broken.write_bytes(sound)
    found = detect.main(**many, RESUME=True)
    images = results(found["folder"])[1]["images"]
    assert len(images) == 12 and not any("problem" in image for image in images)


def test_two_processes_share_a_folder_and_merge_what_they_find(many, tmp_path):
    whole = detect.main(**many | {"OUTPUT": str(tmp_path / "whole")})
    Path(many["OUTPUT"]).parent.mkdir()
    printed = on_two_processes("detect", many)
    out = Path(many["OUTPUT"])
    equal(results(out), results(whole["folder"]))
    assert names_in(out) == names_in(whole["folder"])
    assert "images   12" in printed and printed.count("objects  ") == 1
    assert not list(out.glob(".*")) and not out.with_name("detect2").exists()


def test_a_video_and_a_camera_stay_with_one_process(street, tmp_path, monkeypatch):
    clip = write_video(tmp_path / "clip.mp4", [picture(i) for i in range(3)])
    with pytest.raises(UserError, match="RESUME"):
        detect.main(**street | {"SOURCE": str(clip)}, MODEL="rfdetr", WEIGHTS=DEMO_RFDETR, RESUME=True)
    cfg = config.resolve(vars(detect), street)
    monkeypatch.setattr(detect.processes, "accelerator", lambda: type("", (), {"num_processes": 2})())
    source = detect.video.open_source(str(clip))
    with pytest.raises(UserError, match="one process"):
        detect.require_suits(cfg, source)
    source.close()


def test_the_whole_view_is_the_image_itself():
    assert tiles.views(160, 160, 160, 32) == [] and tiles.View(0, 0, 5, 4) == (0, 0, 5, 4)
