"""validate_setup.py --experiment: what it finds in the data of each training, the command, and the page."""

import json
import shlex
import shutil

import pytest
from PIL import Image
from test_rfdetr_data import write_dataset
from test_validate_setup import checked, having

import train_diffusion_refiner
import train_unet_derain
import Training_FeatureDerain
import Training_SPDNet_Adaptation
import validate_setup
from utils.config import UserError
from utils.datasets import audit, image_check
from utils.datasets.layouts import find_split
from utils.training import setup_checks

WEIGHTS = {"spdnet": "./assets/demo/spdnet.pt", "detector": "./assets/demo/rtdetr"}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(validate_setup.Path(validate_setup.__file__).parent)


def looked_at(capsys, experiment, **constants):
    """-> exit code, printed lines."""
    code = validate_setup.main(EXPERIMENT=experiment, **constants)
    return code, capsys.readouterr().out.splitlines()


def of_coco(coco, **more):
    return {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "PERCENT_DATASET": 100,
            "RTDETR_MODEL_NAME": WEIGHTS["detector"], "IMAGE_SIZE": 64 * 2, "UNKNOWN_CATEGORIES": "ignore",
            "OUTPUT_DIR": str(coco / "out")} | more


@pytest.mark.parametrize(("experiment", "script"), [("spdnet", "Training_SPDNet_Adaptation.py"),
                                                    ("feature", "Training_FeatureDerain.py")])
def test_good_data_of_a_detection_training_end_in_its_command(coco, capsys, experiment, script):
    more = {"SPDNET_MODEL_PATH": WEIGHTS["spdnet"]} if experiment == "spdnet" else {}
    code, lines = looked_at(capsys, experiment, **of_coco(coco, **more))
    assert code == 0, lines
    content = json.loads((coco / "coco/annotations/instances_train2017.json").read_text(encoding="utf-8"))
    assert having(lines, "[ok]", f"COCO_DIR, train: {len(content['images'])} images")
    assert having(lines, "[ok]", "the training can open its data") and having(lines, "RTDETR_MODEL_NAME")
    assert lines[-1].startswith(f"python {script} --COCO_DIR ") and "--PERCENT_DATASET 100" in lines[-1]


@pytest.mark.parametrize("experiment", ["spdnet", "feature"])
def test_fresh_rain_needs_no_rainy_training_images(coco, capsys, experiment):
    more = {"SPDNET_MODEL_PATH": WEIGHTS["spdnet"]} if experiment == "spdnet" else {}
    shutil.rmtree(coco / "coco_rain" / "train2017")
    (coco / "coco_rain" / "annotations" / "instances_train2017.json").unlink()
    code, lines = looked_at(capsys, experiment, **of_coco(coco, **more, RAIN="fresh"))
    assert code == 0 and having(lines, "[ok]", "COCO_RAIN_DIR, val: 8 images")
    code, lines = looked_at(capsys, experiment, **of_coco(coco, **more, RAIN="fresh", COCO_RAIN_DIR=""))
    assert code == 0 and having(lines, "[ok]", "COCO_RAIN_DIR is empty: all weather is drawn")
    code, lines = looked_at(capsys, experiment, **of_coco(coco, **more, RAIN="auto", COCO_RAIN_DIR=""))
    assert code == 0 and having(lines, "[ok]", "COCO_RAIN_DIR is empty: all weather is drawn")
    code, lines = looked_at(capsys, experiment, **of_coco(coco, **more, RAIN="files", COCO_RAIN_DIR=""))
    assert code == 1 and having(lines, "[FAIL]", "COCO_RAIN_DIR is empty")


def test_what_would_stop_or_spoil_the_training_is_named(coco, capsys):
    rain = coco / "coco_rain"
    first = sorted((rain / "train2017").iterdir())[0]
    held_out = sorted((rain / "val2017").iterdir())[0]
    shutil.copyfile(first, held_out)  # trained and scored on
    code, lines = looked_at(capsys, "spdnet", **of_coco(coco, SPDNET_MODEL_PATH="./none.pt", RTDETR_MODEL_NAME="./no"))
    assert code == 1 and having(lines, "[FAIL]", "SPDNET_MODEL_PATH") and having(lines, "[FAIL]", "RTDETR_MODEL_NAME")
    assert having(lines, "[warn]", "COCO_RAIN_DIR, val: 1 of", held_out.name)
    assert lines[-1].startswith("python validate_setup.py --experiment spdnet --COCO_DIR ")
    file = rain / "annotations/instances_train2017.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["images"][0]["file_name"] = "stray.jpg"
    file.write_text(json.dumps(content), encoding="utf-8")
    code, lines = looked_at(capsys, "feature", **of_coco(coco))
    assert code == 1 and having(lines, "[FAIL]", "1 train images of COCO_RAIN_DIR", "stray.jpg")
    assert having(lines, "[FAIL]", "stray.jpg (missing)")


def test_constants_that_cannot_be_are_findings_and_unknown_ones_an_error(coco, capsys):
    code, lines = looked_at(capsys, "feature", **of_coco(coco, NUM_WORKERS=-1))
    assert code == 1 and having(lines, "[FAIL]", "NUM_WORKERS = -1")
    for wrong, message in (({"EXPERIMENT": "yolo"}, "choose one of rfdetr, spdnet"),
                           ({"EXPERIMENT": "unet", "COCO_DIR": "x"}, "unknown constant COCO_DIR")):
        with pytest.raises(UserError, match=message):
            validate_setup.main(**wrong)


SCRIPTS = {"spdnet": Training_SPDNet_Adaptation, "feature": Training_FeatureDerain, "unet": train_unet_derain,
           "refiner": train_diffusion_refiner}


@pytest.mark.parametrize(("experiment", "constants"), [
    ("spdnet", {"IMAGE_SIZE": 100}), ("spdnet", {"FP16": True}), ("spdnet", {"FEATURE_LEVEL": "encodr"}),
    ("spdnet", {"DERAINER": "resnet"}), ("spdnet", {"DERAIN_SCALE": 2.0}), ("feature", {"DERAIN_TYPE": "multi"}),
    ("feature", {"NUM_RESIDUAL_BLOCKS": 0}), ("feature", {"REFINE_WIDTH": 2.0}), ("unet", {"BASE_WIDTH": 0}),
    ("unet", {"ARCH": "nafnet", "NAFNET_RAIN_CHANNELS": 2}), ("refiner", {"MODE": "two_steps"}),
])
def test_constants_that_the_training_refuses_are_findings_in_its_words(experiment, constants, capsys, monkeypatch):
    """Before it touches any data: there are none here."""
    for module in (validate_setup, setup_checks):
        for check in ("check_detection_data", "check_pairs", "check_detector"):
            if hasattr(module, check):
                monkeypatch.setattr(module, check, lambda *args: None)
    with pytest.raises(UserError) as refused:
        SCRIPTS[experiment].main(**constants)
    assert next(iter(constants)) in str(refused.value) or "NAFNET_RAIN_CHANNELS" in str(refused.value)
    code, lines = looked_at(capsys, experiment, **constants)
    assert code == 1 and f"[FAIL] {refused.value}" in lines


def test_images_that_are_too_small_for_the_detectors_queries_are_a_finding(coco, capsys):
    code, lines = looked_at(capsys, "feature", **of_coco(coco, IMAGE_SIZE=32))
    assert code == 1 and having(lines, "[FAIL]", "IMAGE_SIZE = 32", "feature positions")


def test_rain_that_cannot_be_drawn_is_found_without_the_detector(coco, capsys):
    code, lines = looked_at(capsys, "feature", **of_coco(coco, RAIN="frsh", RTDETR_MODEL_NAME="./no"))
    assert code == 1 and having(lines, "[FAIL]", "RAIN = 'frsh'")


def test_a_plain_folder_of_images_hears_once_that_it_can_be_trained_without_labels(coco, capsys, tmp_path):
    for name in ("clean", "rain"):
        shutil.copytree(coco / "coco" / "train2017", tmp_path / name)
    plain = of_coco(coco) | {"COCO_DIR": str(tmp_path / "clean"), "COCO_RAIN_DIR": str(tmp_path / "rain")}
    for experiment in ("spdnet", "feature"):
        code, lines = looked_at(capsys, experiment, **plain)
        assert code == 1 and len(having(lines, "[FAIL]", "COCO_DIR", "DETECTION_WEIGHT = 0")) == 1
    code, lines = looked_at(capsys, "feature", DETECTION_WEIGHT=0.0, **plain)
    assert code == 0 and having(lines, "[ok]", "plain folders") and lines[-1].startswith("python Training_Feature")
    more = {"SPDNET_MODEL_PATH": WEIGHTS["spdnet"], "DETECTION_WEIGHT": 0.0, "FEATURE_WEIGHT": 0.0,
            "RECONSTRUCTION_WEIGHT": 1.0}
    code, lines = looked_at(capsys, "spdnet", **plain | more)
    assert code == 1 and having(lines, "[FAIL]", "FEATURE_WEIGHT", "above 0")


def test_the_command_at_the_end_can_be_pasted(coco, capsys):
    (coco / "my coco").mkdir()
    constants = of_coco(coco, COCO_DIR=str(coco / "my coco"), RAIN="fresh", RAIN_KINDS={"fog": 3.0, "drops": 1.0},
                        COCO_RAIN_DIR="")
    code, lines = looked_at(capsys, "feature", **constants)
    words = shlex.split(lines[-1], comments=True)
    assert code == 1 and words[:4] == ["python", "validate_setup.py", "--experiment", "feature"]
    assert validate_setup.from_command_line(words[2:]) == constants | {"EXPERIMENT": "feature", "COCO_RAIN_DIR": None}


@pytest.mark.parametrize("words", [["--experiment", "unet", "--CLEAR_DIR", "./c"], ["--CLEAR_DIR=./c",
                                                                                    "--EXPERIMENT=unet"]])
def test_the_flags_are_those_of_the_experiments_script(words):
    assert validate_setup.from_command_line(words) == {"EXPERIMENT": "unet", "CLEAR_DIR": "./c"}
    assert validate_setup.from_command_line(["--size", "small"]) == {"SIZE": "small"}
    assert validate_setup.from_command_line(["--experiment", "SPDNet", "--COCO_DIR", "c"]) == {"EXPERIMENT": "SPDNet"}
    with pytest.raises(SystemExit):
        validate_setup.from_command_line(["--CLEAR_DIR", "./c"])


def write_pairs(folder, count=8):
    for kind in ("rainy", "clear"):
        (folder / kind).mkdir()
        for i in range(count):
            image = Image.effect_mandelbrot((96, 64), (-2 + i / 10, -1.5, 1, 1.5), 20 + i).convert("RGB")
            image = image.point(lambda value: value // 2) if kind == "rainy" else image
            image.save(folder / kind / f"{i}.png")
    return {"RAINY_DIR": str(folder / "rainy"), "CLEAR_DIR": str(folder / "clear"), "TRAIN_PAIRS": 5, "VAL_PAIRS": 2,
            "TEST_PAIRS": 1, "CROP_SIZES": (32,), "CHECKPOINT_DIR": str(folder / "out")}


def test_pairs_of_the_unet(tmp_path, capsys):
    constants = write_pairs(tmp_path)
    code, lines = looked_at(capsys, "unet", REPORT=str(tmp_path / "page"), **constants)
    assert code == 0 and having(lines, "[ok]", "8 pairs") and having(lines, "[ok]", "pairs: train ", "test 1")
    assert lines[-1].startswith("python train_unet_derain.py --CLEAR_DIR ") and '--CROP_SIZES "(32,)"' in lines[-1]
    page = (tmp_path / "page/report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 8 and "8 pairs" in page
    shutil.copyfile(tmp_path / "rainy/0.png", tmp_path / "rainy/7.png")
    assert having(looked_at(capsys, "unet", **constants)[1], "[warn]", "twice or more", "0.png and 7.png")
    (tmp_path / "clear/3.png").unlink()
    code, lines = looked_at(capsys, "unet", **constants)
    assert code == 1 and having(lines, "[FAIL]", "3.png has no partner")


def test_the_refiner_asks_for_its_derainer_first(tmp_path, capsys):
    constants = {name: value for name, value in write_pairs(tmp_path).items() if name in ("RAINY_DIR", "CLEAR_DIR")}
    code, lines = looked_at(capsys, "refiner", DERAIN_MODEL_PATH=str(tmp_path / "none.pt"),
                            OUTPUT_DIR=str(tmp_path / "out"), **constants)
    assert code == 1 and having(lines, "[FAIL]", "DERAIN_MODEL_PATH")
    assert lines[-1].startswith("python train_unet_derain.py --RAINY_DIR ") and "--CLEAR_DIR " in lines[-1]


def test_the_page_shows_odd_images_first_and_needs_no_network(coco, capsys, tmp_path):
    file = coco / "coco/annotations/instances_train2017.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["images"][0]["file_name"], name = content["images"][0]["file_name"], "<b>&amp"
    content["categories"][0]["name"] += name
    file.write_text(json.dumps(content), encoding="utf-8")
    validate_setup.main(EXPERIMENT="feature", REPORT=str(tmp_path / "deep/page"), **of_coco(coco))
    page = (tmp_path / "deep/page/report.html").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page.replace("https://huggingface.co", "")
    assert 'name="viewport"' in page and "default-src 'none'" in page and "<b>&amp" not in page
    section = page[page.index("<h2>COCO_DIR, train"):page.index("<h2>COCO_DIR, val")]
    assert section.index("Worth a look") < section.index("Some of the others")
    assert section.count("<svg") == 2 and "data:image/jpeg;base64," in section


def test_the_audit_counts_and_ranks(coco, tmp_path):
    split = find_split(coco / "coco", "train", "COCO_DIR")
    file = split.file
    content = json.loads(file.read_text(encoding="utf-8"))
    image = content["images"][0]
    note = {"id": 9001, "image_id": image["id"], "category_id": content["categories"][0]["id"], "area": 4}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != content["images"][1]["id"]]
    content["annotations"] += [note | {"bbox": [2, 2, 2, 2]}, note | {"id": 9002, "bbox": [5, 5, 0.3, 9]}]
    file.write_text(json.dumps(content), encoding="utf-8")
    one = audit.of_split(split, image["width"], "train")
    assert sum(one.counts.values()) == len(one.sizes) == sum(len(image.boxes) for image in one.images)
    assert one.images[0].reasons[0] == "boxes: 1 thinner than a pixel"
    assert one.images[0].reasons[1].startswith("tiny: ") and "below 8 pixels" in one.images[0].reasons[1]
    assert one.images[1].reasons == ["empty: no object"] and one.empty >= 1
    last = one.images[-1]
    same = {last.path: one.images[0].path}
    audit.mark_shared(one, one, same)
    assert one.odd[0] is last and one.odd[0].reasons[0].startswith("same: as ")
    assert any("thinner" in note for note in one.notes)


def test_the_same_bytes_are_found_whatever_the_name(tmp_path):
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one"), ("d", b"longer")):
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in "abcd"]
    assert image_check.same_content(paths[2:], paths[:2]) == {tmp_path / "c": tmp_path / "a"}
    assert image_check.same_content([tmp_path / "missing"], paths) == {}


def test_rfdetr_has_the_page_as_well(tmp_path, capsys):
    code, lines = checked(capsys, write_dataset(tmp_path), REPORT=str(tmp_path / "page"))
    assert code == 0 and having(lines, "report: ")
    page = (tmp_path / "page/report.html").read_text(encoding="utf-8")
    assert "<h2>train</h2>" in page and "cat" in page and "1 without objects" in page


def test_a_batch_that_does_not_fit_leads_to_the_automatic_one(capsys):
    found = validate_setup.Findings()
    whole, crops = (validate_setup.config.resolve(vars(train_unet_derain), {"IMAGE_SIZE": 512, "CROP_SIZES": sizes})
                    for sizes in ((), (96, 128)))
    one = validate_setup._EXPERIMENTS["unet"]
    assert validate_setup.check_fit(found, whole, one, 24.0) == {
        "BATCH_SIZE": 0, "PRECISION": "auto"}
    assert validate_setup.check_fit(found, whole, one, 80.0) == {} and found.warned == 1
    assert validate_setup.check_fit(found, crops, one, 4.0) == {} and found.warned == 1
    assert "at 128 pixels takes about 2.7 GB" in capsys.readouterr().out
