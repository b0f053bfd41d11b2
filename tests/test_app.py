"""app.py: what its page shows is what detect.py writes; bad uploads are one line; the page in a real browser."""

import os
import re
import socket
import sys
import time
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image
from test_detect import damage, picture, read, results, write_video

import app
import detect
from utils import config
from utils.config import UserError
from utils.inference import detectors, video

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the demo's clip and pictures in demo/."""
    folder = tmp_path_factory.mktemp("app")
    app.demo_files(folder / "demo")
    return folder


@pytest.fixture(scope="module")
def choices():
    return app.Choices(config.resolve(vars(app), {"demo": True}), "cpu")


def by_detect(work, name, source, **more):
    """-> (folder, objects of detections.json, entries of images.json) of detect.py with the page's demo constants."""
    entry = config.resolve(vars(app), {"demo": True}).CHOICES[name]
    folder = detect.main(demo=True, SOURCE=str(source), OUTPUT=str(work / "runs" / "detect"), COMPARE=False,
                         SHOW_DERAINED=False, **entry, **more)["folder"]
    return folder, *results(folder)


# ---- images ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["conditional", "conditional, specialist", "rfdetr"])
def test_an_image_gets_what_detect_writes(choices, work, name):
    path = work / "demo" / "app_rain.png"
    found = app.look_at_image(choices, name, path, 0.5)
    folder, boxes, images = by_detect(work, name, path)
    assert [row[1:] for row in found.rows] == [[box["score"], *box["bbox"]] for box in boxes] != []
    names = {entry["id"]: entry["name"] for entry in images["categories"]}
    assert [row[0] for row in found.rows] == [names[box["category_id"]] for box in boxes]
    assert np.array_equal(found.picture, Image.open(folder / path.name))  # PNG loses nothing
    probability = images["images"][0].get("rain_probability")
    assert (f"rain {probability:.2f}, rain branch" in found.line) if probability else "branch" not in found.line
    assert re.search(r"\d+ ms$", found.line) and found.note == "" and "1 person" in found.line
    assert found.derained == (name == "conditional")  # a specialist has no picture to show
    assert found.before.size == found.after.size == Image.open(path).size
    assert np.array_equal(found.before, Image.open(path))
    assert (np.asarray(found.after) != found.picture).any() == found.derained


def test_a_dry_image_is_shown_with_boxes_and_not_as_de_rained(choices, work):
    found = app.look_at_image(choices, "conditional", work / "demo" / "app_dry.png", 0.5)
    assert "clean branch" in found.line and not found.derained and found.after is found.picture


def test_the_threshold_of_the_page_counts_and_nothing_found_says_what_to_do(choices, work):
    path = work / "demo" / "app_rain.png"
    many, few = (app.look_at_image(choices, "vanilla", path, threshold) for threshold in (0.1, 0.8))
    assert len(many.rows) > len(few.rows) > 0 and min(row[1] for row in few.rows) >= 0.8
    none = app.look_at_image(choices, "vanilla", path, 1.0)
    assert none.rows == [] and "lower threshold" in none.note and "no objects" in none.line
    assert none.picture.size == many.picture.size
    with pytest.raises(UserError, match="THRESHOLD = 1.5"):
        app.look_at_image(choices, "vanilla", path, 1.5)
    assert app.look_at_image(choices, "vanilla", path, 0.8).rows == few.rows  # a refusal leaves nothing behind


def test_a_model_is_built_once(choices, work, monkeypatch):
    app.look_at_image(choices, "vanilla", work / "demo" / "app_dry.png", 0.5)
    monkeypatch.setattr(detect, "build_models", None)
    app.look_at_image(choices, "vanilla", work / "demo" / "app_dry.png", 0.5)


# ---- clips -------------------------------------------------------------------------------------------------------

def test_a_clip_gets_the_files_of_detect_and_a_copy_that_plays(choices, work, tmp_path):
    path, out = work / "demo" / "rain_begins.mp4", tmp_path / "out"
    out.mkdir()
    found = app.look_at_clip(choices, "conditional", path, 0.5, out)
    folder, boxes, images = by_detect(work, "conditional", path)
    assert [file.name for file in found.files] == ["rain_begins.mp4", "detections.json", "images.json"]
    assert results(out) == [boxes, images] and boxes
    assert (out / path.name).read_bytes() == (folder / path.name).read_bytes()
    assert found.note == "" and "48 frames" in found.line and "the rain branch" in found.line
    shown, fps = read(found.shown)
    assert (len(shown), shown[0].shape, fps) == (48, (240, 320, 3), 12)
    assert found.shown.read_bytes()[:4] == b"\x1a\x45\xdf\xa3"  # Matroska, of which WebM is a kind
    assert np.abs(shown[5].astype(int) - read(out / path.name)[0][5]).mean() < 8


def test_a_large_clip_is_played_smaller(tmp_path):
    path = write_video(tmp_path / "wide.mp4", [picture(i, (1000, 302)) for i in range(3)])
    shown, _ = read(video.for_browsers(path))
    assert (len(shown), shown[0].shape) == (3, (144, 480, 3))


def test_a_long_clip_and_a_damaged_one_say_so(work, tmp_path):
    few = app.Choices(config.resolve(vars(app), {"demo": True, "MODEL": "vanilla", "MAX_FRAMES": 4}), "cpu")
    path = write_video(tmp_path / "clip.mp4", [picture(i) for i in range(12)])
    out = tmp_path / "out"
    out.mkdir()
    found = app.look_at_clip(few, "vanilla", path, 0.0, out)
    assert "first 4 frames" in found.note and len(results(out)[1]["images"]) == 4
    damage(path, 2, 2)
    found = app.look_at_clip(few, "vanilla", path, 1.0, out)
    assert "clip.mp4 frame 2 cannot be decoded" in found.note and "lower threshold" in found.note


# ---- what is refused ---------------------------------------------------------------------------------------------

def test_uploads_that_are_nothing_are_one_line_with_their_name_alone(choices, tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    (tmp_path / "broken.mp4").write_bytes(bytes(500))
    (tmp_path / "list.m3u8").write_text("#EXTM3U\nhttp://127.0.0.1/a.ts\n")
    for name in ("notes.txt", "broken.jpg", "broken.mp4", "list.m3u8"):
        look = (lambda path: app.look_at_image(choices, "vanilla", path, 0.5)) if name.endswith("jpg") else (
            lambda path: app.look_at_clip(choices, "vanilla", path, 0.5, tmp_path))
        with pytest.raises(UserError) as caught:
            look(str(tmp_path / name))
        line = str(caught.value)
        assert name in line and tmp_path.as_posix() not in line and "\n" not in line


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_playlist_under_the_name_of_a_clip_opens_no_other_file(choices, work, tmp_path, name):
    (tmp_path / name).write_text("ffconcat version 1.0\nfile other.mp4\n")
    (tmp_path / "other.mp4").write_bytes((work / "demo" / "rain_begins.mp4").read_bytes())
    with pytest.raises(UserError, match=f"{name} does not begin as a clip"):
        app.opened(tmp_path / name)


@pytest.mark.parametrize("name, codec", [("a.mp4", "mp4v"), ("a.mov", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v"),
                                         ("a.webm", "VP80"), ("a.mpg", "mpg1"), ("a.wmv", "WMV2")])
def test_every_kind_of_clip_is_taken(tmp_path, name, codec):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / name), cv2.VideoWriter_fourcc(*codec), 25, (64, 48))
    if not writer.isOpened():
        pytest.skip(f"this OpenCV writes no {codec}")
    for i in range(5):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    source = app.opened(tmp_path / name)
    assert sum(frame.image is not None for frame in source) >= 4
    source.close()


def test_a_picture_that_the_page_cannot_show_is_refused_by_name(choices, tmp_path):
    Image.new("RGB", (66_000, 1)).save(tmp_path / "long.png")
    with pytest.raises(UserError, match="long.png is longer"):
        app.look_at_image(choices, "vanilla", tmp_path / "long.png", 0.5)


def test_a_clip_of_unknown_length_says_that_its_end_is_left_out(work, tmp_path, monkeypatch):
    few = app.Choices(config.resolve(vars(app), {"demo": True, "MODEL": "vanilla", "MAX_FRAMES": 4}), "cpu")
    begin = video.Video.__init__

    def without_length(self, *args):
        begin(self, *args)
        self.total = None
    monkeypatch.setattr(video.Video, "__init__", without_length)
    for frames, noted in ((6, True), (3, False)):
        out = Path(app.empty_folder(tmp_path / "out"))
        path = write_video(tmp_path / "c.mp4", [picture(i) for i in range(frames)])
        found = app.look_at_clip(few, "vanilla", path, 0.0, out)
        assert ("first 4 frames" in found.note) == noted


def test_a_file_that_another_program_keeps_open_is_in_nobodys_way(tmp_path, monkeypatch):
    first = Path(app.empty_folder(tmp_path / "clip"))
    (first / "a.mp4").touch()
    assert list(Path(app.empty_folder(tmp_path / "clip")).iterdir()) == [] and not first.exists()
    monkeypatch.setattr(app.shutil, "rmtree", lambda *args, **more: None)  # as on Windows
    (tmp_path / "clip" / "a.mp4").touch()
    assert list(Path(app.empty_folder(tmp_path / "clip")).iterdir()) == []


def test_a_model_that_is_not_there_is_not_offered_and_says_why(tmp_path):
    cfg = config.resolve(vars(app), {"demo": True})
    # a run of the demo may have left its own in ./demo
    absent = {"feature": {"FEATURE_MODEL_DIR": f"{tmp_path}/model"}, "exported": {"WEIGHTS": f"{tmp_path}/a.json"},
              "conditional, adapter": {"RAINY_BRANCH": f"{tmp_path}/rain.safetensors"}}
    choices = app.Choices(config.resolve(vars(app), {"demo": True, "CHOICES": {
        name: entry | absent.get(name, {}) for name, entry in cfg.CHOICES.items()}}), "cpu")
    assert choices.offered == ["conditional", "conditional, specialist", "spdnet", "vanilla", "rfdetr"]
    assert "rain.safetensors' does not exist" in choices.reasons["conditional, adapter"]
    assert re.search("FEATURE_MODEL_DIR.*Training_FeatureDerain.py", choices.reasons["feature"])
    assert re.search("WEIGHTS.*export.py", choices.reasons["exported"])
    with pytest.raises(UserError, match="feature is not offered: FEATURE_MODEL_DIR"):
        choices.get("feature")
    with pytest.raises(UserError, match="no such choice"):
        choices.get("magic")


@pytest.mark.parametrize("entry, word", [
    ({"MODEL": "vanilla", "RTDETR_MODEL_NAME": "./none"}, "RTDETR_MODEL_NAME"),
    ({"MODEL": "spdnet", "DERAIN": "unet"}, "DERAIN_MODEL_PATH"), ({"MODEL": "spdnet", "DERAIN": "unet+refiner"},
                                                                   "REFINER_DIR"),
    ({"MODEL": "conditional", "PIPELINE_DIR": "./none"}, "PIPELINE_DIR"), ({"MODEL": "magic"}, "MODEL = 'magic'"),
    ({"MODEL": "conditional", "RAINY_BRANCH": "./none"}, "RAINY_BRANCH"), ({"MODEL": "rfdetr"}, "WEIGHTS")])
def test_what_is_missing_is_named_by_its_constant(entry, word):
    with pytest.raises(UserError, match=f"MODEL = 'a': .*{word}"):
        app.Choices(config.resolve(vars(app), {"demo": True, "MODEL": "a", "CHOICES": {"a": entry}}), "cpu")


def test_a_hub_id_counts_as_there():
    own = config.resolve(vars(detect), {"MODEL": "vanilla", "RTDETR_MODEL_NAME": "PekingU/rtdetr_r18vd"})
    assert detectors.missing(own) == ""


@pytest.mark.parametrize("values, word", [
    ({"PORT": 0}, "PORT"), ({"MAX_UPLOAD_MB": 0}, "MAX_UPLOAD_MB"), ({"MAX_FRAMES": -1}, "MAX_FRAMES"),
    ({"THRESHOLD": 2.0}, "THRESHOLD"), ({"MODEL": "magic"}, "MODEL"), ({"CHOICES": {}}, "CHOICES"),
    ({"CHOICES": {"a": 3}}, r"CHOICES\['a'\]"), ({"CHOICES": {"a": {"MODELL": "vanilla"}}}, "MODELL"),
    ({"CHOICES": {"a": {"COMPARE": True}}}, "COMPARE"),
    ({"CHOICES": {"a": {"THRESHOLD": 0.1}}}, "THRESHOLD is the page"),
    ({"CHOICES": {1: {"MODEL": "vanilla"}}}, r"CHOICES\[1\]: write names"), ({"CHOICES": {"a": {5: 1}}}, "in quotes"),
    ({"CHOICES": {"a": {"MODEL": "vanilla", "demo": True}}}, "demo is the page")])
def test_wrong_constants_are_refused_by_name(values, word, monkeypatch):
    monkeypatch.setattr(app, "gradio_module", lambda: None)
    with pytest.raises(UserError, match=word):
        app.main(demo=True, **values)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install -r requirements-app.txt"):
        app.main(demo=True)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@pytest.mark.parametrize("host, noted", [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True),
                                         ("192.168.1.5", True), ("somewhere", True)])
def test_an_address_that_others_reach_is_noted(host, noted, monkeypatch, capsys):
    def serving(cfg, choices):
        raise KeyboardInterrupt
    monkeypatch.setattr(app, "gradio_module", lambda: None)
    monkeypatch.setattr(app, "serving", serving)
    with pytest.raises(KeyboardInterrupt):
        app.main(demo=True, MODEL="vanilla", HOST=host)
    printed = capsys.readouterr().out
    assert ("anyone who reaches this machine" in printed) == noted and printed.isascii()
    assert "not offered: feature: FEATURE_MODEL_DIR" in printed


# ---- the page, with Gradio ---------------------------------------------------------------------------------------

@pytest.fixture
def address(work, monkeypatch):
    """The page's address, as `app.py --demo` serves it."""
    pytest.importorskip("gradio", reason="pip install -r requirements-app.txt")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.chdir(work)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    cfg = config.resolve(vars(app), {"demo": True, "PORT": port, "MAX_UPLOAD_MB": 1})
    choices = app.Choices(cfg, "cpu")
    with app.serving(cfg, choices) as url:
        folder = Path(os.environ["GRADIO_TEMP_DIR"]).parent
        yield url
    assert not folder.exists()


def test_the_server_answers_this_machine_alone_and_sends_the_policy(address):
    import httpx
    answer = httpx.get(address, trust_env=False)
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
    assert httpx.get(address, headers={"host": "elsewhere.example"}, trust_env=False).status_code == 400
    settings = httpx.get(f"{address}config", trust_env=False).json()
    assert settings["analytics_enabled"] is False
    large = {"files": ("large.png", bytes(2_000_000))}
    assert httpx.post(f"{address}gradio_api/upload", files=large, trust_env=False).status_code == 413
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    cfg = config.resolve(vars(app), {"demo": True, "PORT": port})
    with pytest.raises(UserError, match=f"PORT = {port}"), app.serving(cfg, app.Choices(cfg, "cpu")):
        pass


def test_a_proxy_and_an_address_of_ipv6_are_in_nobodys_way(work, monkeypatch):
    pytest.importorskip("gradio", reason="pip install -r requirements-app.txt")
    import httpx
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
            port = one.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "elsewhere")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.chdir(work)
    cfg = config.resolve(vars(app), {"demo": True, "PORT": port, "HOST": "::1"})
    with app.serving(cfg, app.Choices(cfg, "cpu")) as url:
        assert url == f"http://[::1]:{port}/" and os.environ["no_proxy"] == "elsewhere"
        assert httpx.get(url, trust_env=False).status_code == 200
        assert httpx.get(url, headers={"host": "elsewhere.example"}, trust_env=False).status_code == 400


@pytest.mark.skipif(browser.PROGRAM is None or os.name != "posix", reason="there is no Chromium")
def test_a_picture_and_a_clip_in_a_real_browser(address, work, tmp_path):
    def choose(path):
        root = tab.call("DOM.getDocument", depth=1)["root"]["nodeId"]
        if tab.value("Boolean(document.querySelector('#file button[aria-label=\"Clear\"]'))"):
            tab.value("document.querySelector('#file button[aria-label=\"Clear\"]').click()")
            tab.wait("document.querySelector('#file input[type=file]')", 120)
            root = tab.call("DOM.getDocument", depth=1)["root"]["nodeId"]
        node = tab.call("DOM.querySelector", nodeId=root, selector="#file input[type=file]")["nodeId"]
        tab.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
        # its name stands there before it is there
        tab.wait(f"document.querySelector('#file a[download=\"{path.name}\"]')", 120)
        tab.click("#detect")

    def toast(words):
        tab.wait(f"[...document.querySelectorAll('.toast-body')].some(one => one.innerText.includes('{words}'))", 120)
        tab.value("document.querySelectorAll('.toast-close').forEach(one => one.click())")

    try:
        with browser.page(tmp_path, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1") as tab:
            tab.size(1300, 1400)
            tab.call("Page.addScriptToEvaluateOnNewDocument", source="window.refused = []; document.addEventListener("
                     "'securitypolicyviolation', event => window.refused.push(event.blockedURI))")
            tab.call("Page.navigate", url=address)
            tab.wait("document.querySelector('#detect')", 120)
            tab.wait("document.querySelector('#file input[type=file]')", 120)
            choose(work / "demo" / "app_rain.png")
            tab.wait("/ ms$/.test(document.querySelector('#line').innerText.trim())", 120)
            tab.wait("document.querySelector('#table td') && document.querySelectorAll('#slider img').length > 1", 120)
            line, table = (tab.value(f"document.querySelector('#{one}').innerText") for one in ("line", "table"))
            found = app.look_at_image(app.Choices(config.resolve(vars(app), {"demo": True}), "cpu"), "conditional",
                                      work / "demo" / "app_rain.png", 0.5)
            assert line.strip().rsplit(",", 1)[0] == found.line.rsplit(",", 1)[0]
            assert found.rows and all(f"{row[0]}\n{row[1]}\n" in table for row in found.rows)
            tab.wait("[...document.querySelectorAll('#slider img, #picture img')]"
                     ".every(one => one.naturalWidth == 320)", 120)
            if os.environ.get("SCREENSHOTS"):  # to look at
                time.sleep(1)
                tab.screenshot(Path(os.environ["SCREENSHOTS"]) / "image.png")
            (tmp_path / "broken.png").write_bytes(bytes(99))
            choose(tmp_path / "broken.png")
            toast("cannot read image broken.png")
            choose(work / "demo" / "rain_begins.mp4")
            tab.wait("document.querySelector('#line').innerText.includes('48 frames')", 120)
            tab.wait("document.querySelector('#clip video')?.videoWidth == 320", 120)
            assert tab.value("document.querySelector('#clip video').duration") == pytest.approx(4, abs=0.2)
            assert not tab.value("document.querySelector('#table')?.offsetHeight")
            files = tab.value("document.querySelector('#files').innerText")
            assert all(name in files for name in ("rain_begins", "detections", "images"))
            if os.environ.get("SCREENSHOTS"):
                time.sleep(1)
                tab.screenshot(Path(os.environ["SCREENSHOTS"]) / "clip.png")
            assert tab.value("window.refused") == []  # Gradio's page names nothing that it would have to be kept from
            asked = tab.value("performance.getEntriesByType('resource').map(one => one.name)")
            assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked)
    except browser.NotStarted as error:
        pytest.skip(str(error))
