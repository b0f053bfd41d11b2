"""report.html: what it says, that nothing in it breaks it, and how it behaves in a real browser."""

import json
import os
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from test_detection_details import found, polygon, truth_of

from utils.evaluation import report_page
from utils.evaluation.coco import coco_scores

CLASSES = {1: "cat <b>", 2: "dog & co", 3: "cow"}
LABELS = {0: 1, 1: 2, 2: 3}
FILES = ["one's <i>.jpg", "a&b.jpg"]
LONG = "A_very_long_name_of_a_model_without_any_place_to_break_it_" + "x" * 60


class Data:
    """Two images, of which a detector sees squares of 64."""

    domain, category_of, image_ids, files = "rainy", LABELS, [1, 2], FILES

    def __getitem__(self, index):
        return {"image": torch.full((3, 64, 64), 90 * index + 60, dtype=torch.uint8), "size": (100, 100),
                "path": f"somewhere/{FILES[index]}", "image_id": index + 1, "domain": "rainy",
                "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}

    def __len__(self):
        return 2


def derainer(pixel_values):
    """A detector that sees nothing, behind a de-rainer that makes everything white."""
    count = len(pixel_values)
    return SimpleNamespace(logits=torch.full((count, 5, 3), -9.0), pred_boxes=torch.full((count, 5, 4), 0.5),
                           derained=torch.ones_like(pixel_values))


def vanilla(pixel_values):
    outputs = derainer(pixel_values)
    del outputs.derained
    return outputs


@pytest.fixture
def written(tmp_path):
    """-> (page, path of the file): a detector that finds something, one that finds nothing, masks."""
    truth = truth_of(tmp_path / "a.json", [(1, 1, [0, 0, 20, 20], 0), (1, 2, [50, 50, 40, 40], 0)], names=CLASSES)
    answers = [found(1, 0, [0, 0, 20, 20], 0.9), found(2, 1, [140, 0, 30, 20], 0.8), found(1, 1, [50, 50, 9, 9], 0.3)]
    masked = [one | {"segmentation": rle.frPyObjects(polygon(one["bbox"]), 100, 100)[0]} for one in answers]
    page, data = report_page.Page("Rain & <more>"), Data()
    page.add("finds", data, coco_scores(truth, answers, LABELS, [1, 2]), answers, truth=truth)
    page.add(LONG, data, None, [], truth=truth)
    page.add("masks", data, None, masked, truth=truth, iou_type="segm", images="masks of rainy")
    page.add_sliders({"vanilla": vanilla, "behind <one>": derainer}, data, torch.device("cpu"), CLASSES, count=2)
    page.write(tmp_path, {"COCO_DIR": "C:\\data\\<coco>", "IMAGE_SIZE": 64, "A_LONG_ONE": "y" * 300})
    return page, tmp_path / "report.html"


class Balanced(HTMLParser):
    """Knows which tags are open; what it has seen."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_stands_alone_and_escapes_names(written):
    page, path = written
    text = path.read_text(encoding="utf-8")
    reader = Balanced()
    reader.feed(text)
    assert not reader.open and "{{" not in text and not re.search(r"https?://", text)
    assert all(image["src"].startswith("data:image/jpeg;base64,") and image["alt"] for image in reader.images)
    said = "".join(reader.texts)
    for name in ("cat <b>", "dog & co", "Rain & <more>", "one's <i>.jpg", "behind <one>", "finds", LONG):
        assert name in said, name
    assert "<b>" not in text and "<i>" not in text and "<one>" not in text and "<coco>" not in text
    assert text.count('class="slider"') == 2  # of two images, for the one de-rainer
    assert "nan" not in said.lower() and len(text) < 300_000


def test_the_numbers_of_the_page_are_those_for_results_json(written):
    page, path = written
    numbers = json.loads(json.dumps(page.numbers))
    assert list(numbers) == ["rainy", "masks of rainy"] and list(numbers["rainy"]) == ["finds", LONG]
    assert numbers["rainy"]["finds"]["F1"] == pytest.approx(2 / 3) and numbers["rainy"]["finds"]["threshold"] == 0.9
    assert numbers["masks of rainy"]["masks"]["F1"] == pytest.approx(2 / 3)
    empty = numbers["rainy"][LONG]
    assert empty["threshold"] is None and empty["mAP"] == 0.0 and empty["AP_large"] is None
    text = path.read_text(encoding="utf-8")
    row = re.search(r"<tr><td>finds</td>(.*?)</tr>", text)[1]
    assert re.findall("<td>(.*?)</td>", row)[-5:] == ["0.900", "0.667", "1.000", "0.500", "0.400"]
    row = re.search(f"<tr><td>{LONG}</td>(.*?)</tr>", text)[1]
    assert re.findall("<td>(.*?)</td>", row)[-5:] == ["-", "0.000", "-", "0.000", "-"]


def test_a_page_without_any_class_or_detector(tmp_path):
    truth = truth_of(tmp_path / "a.json", [])
    page = report_page.Page("nothing")
    page.write(tmp_path, {})
    page.add("blind", Data(), None, [], truth=truth)
    page.write(tmp_path, {})
    assert "<td>blind</td><td>-</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_other_ranks_add_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page.processes, "is_main", lambda: False)
    page = report_page.Page("rank 1")
    page.add("blind", Data(), None, [])
    assert page.numbers == {}


def test_the_picture_of_a_mistake_shows_its_place():
    """A white spot in a black image of 200 x 100, which the detector sees as a square."""
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    image[:, 40:60, 45:55] = 255  # in pixels of the original: x 90 to 110, y 40 to 60
    picture = np.asarray(report_page._cut(image, (100, 200), (90, 40, 20, 20), None, "#ff0000")).astype(int)
    assert picture.shape[:2] == (168, 168)
    middle, corner = picture[84, 84], picture[5, 5]
    assert middle.min() > 240 and corner.max() < 15
    red = (picture[..., 0] > 200) & (picture[..., 1] < 60)
    ys, xs = np.nonzero(red)  # the box of 20 pixels in the middle of the 52 that are shown
    assert abs(xs.min() - xs.max()) == pytest.approx(168 * 20 / 52, abs=3) and abs(ys.mean() - 84) < 3
    outside = report_page._cut(image, (100, 200), (500, 500, 20, 20), None, "#ff0000")
    assert max(outside.size) == 168
    mask = rle.encode(np.asfortranarray(np.pad(np.ones((20, 20), np.uint8), ((40, 40), (90, 90)))))
    inside = np.asarray(report_page._cut(image * 0, (100, 200), (90, 40, 20, 20), mask, "#ff0000")).astype(int)
    assert inside[84, 84, 0] > 80 and inside[10, 10, 0] == 0


def test_an_axis_has_its_points_where_they_belong():
    chart = report_page._chart([(0, (0, 0.5, 1), (0, 1, 0.25))], "recall", "precision <x>")
    assert 'points="34.0,170.0 134.0,10.0 234.0,130.0"' in chart and "precision &lt;x&gt;" in chart
    assert "dasharray" not in chart and "dasharray" in report_page._chart([(8, (0,), (0,))], "a", "b")


def test_many_classes_are_listed_by_their_largest_confusions(tmp_path):
    names = {i: f"class {i}" for i in range(1, 31)}
    truth = truth_of(tmp_path / "a.json", [(1, 7, [0, 0, 20, 20], 0), (1, 3, [50, 50, 40, 40], 0)], names=names)
    answers = [found(1, 7, [0, 0, 20, 20], 0.9), found(1, 2, [50, 50, 40, 40], 0.95)]
    page = report_page.Page("many")
    data = Data()
    data.category_of = {i - 1: i for i in names}
    page.add("one", data, None, answers, truth=truth)
    page.write(tmp_path, {})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "class=\"heat\"" not in text
    assert "<tr><td>class 7</td><td>background</td><td>1</td></tr>" in text


# ---- a real browser --------------------------------------------------------------------------------------------

@pytest.mark.skipif(browser.PROGRAM is None or os.name != "posix", reason="there is no Chromium")
def test_a_phone_and_both_colour_schemes(written, tmp_path):
    _, path = written
    try:
        with browser.page(tmp_path) as tab:
            tab.size(360, 740, phone=True)
            tab.open(path)
            tab.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            assert tab.value("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
            assert tab.value("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
            assert tab.value("document.querySelectorAll('svg polyline').length") > 6
            paper = []
            for scheme in ("light", "dark"):
                tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                colours = tab.value("['backgroundColor', 'color'].map((name) => "
                                    "getComputedStyle(document.documentElement)[name])")
                light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
                assert abs(light - dark) > 500, scheme  # of 765
                paper.append(light)
            assert paper[0] > 700 and paper[1] < 100
            for key, width in (("ArrowLeft", 49), ("ArrowRight", 50)):
                tab.value("document.querySelector('.slider input').focus()")
                tab.press(key)
                assert tab.value("getComputedStyle(document.querySelector('.slider .over')).clipPath") in (
                    f"inset(0px calc({100 - width}%) 0px 0px)", f"inset(0px {100 - width}% 0px 0px)")
    except browser.NotStarted as error:
        pytest.skip(str(error))
