"""validate_setup.py: what it finds, its exit code, and the command that it ends with."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_rfdetr_data import _set, edit, write_dataset

import train_detector_stage1
import validate_setup
from rfdetr import config as sizes
from rfdetr import setup_checks as rfdetr_checks
from utils import config
from utils.config import UserError
from utils.demo import roboflow as demo_roboflow
from utils.next_command import pasted
from utils.training import setup_checks

ROOT = Path(__file__).resolve().parent.parent


def checked(capsys, root, **overrides):
    """-> exit code and the lines that were printed."""
    arguments = {"DATASET_DIR": str(root), "PRETRAIN_WEIGHTS": "none", "RUNS_DIR": str(root)} | overrides
    code = validate_setup.main(**arguments)
    return code, capsys.readouterr().out.splitlines()


def having(lines, *words):
    return [line for line in lines if all(word in line for word in words)]


def test_the_command_line_may_be_empty():
    assert validate_setup.from_command_line([]) == {}
    found = validate_setup.from_command_line(["--experiment", "spdnet", "--IMAGE_SIZE=320"])
    assert found == {"EXPERIMENT": "spdnet", "IMAGE_SIZE": 320}


def test_a_good_data_set_is_ready_and_the_next_command_runs_stage_1_on_it(tmp_path, capsys):
    code, lines = checked(capsys, write_dataset(tmp_path))
    assert code == 0 and not having(lines, "[FAIL]")
    assert having(lines, "[ok]", "train: 3 images (1 without objects), 3 objects: cat 1, dog 2")
    assert having(lines, "[ok]", "valid: all 3 masks can be decoded") and having(lines, "[ok]", "torch 2.")
    assert having(lines, "[ok]", "no test/") and having(lines, "'pets'", "left out")
    assert lines[-2].startswith("Ready: 0 problem(s)")
    assert lines[-1].startswith("python train_detector_stage1.py --size nano --epochs 1 --batch ")
    assert f"--dataset_dir {pasted(tmp_path)}" in lines[-1] and "--pretrain_weights none" in lines[-1]
    assert all(line.isascii() for line in lines if str(tmp_path) not in line)


def pop_masks(content):
    for note in content["annotations"]:
        del note["segmentation"]


@pytest.mark.parametrize("split, change, words", [
    ("train", _set("images", 0, file_name="gone.png"), ("[FAIL]", "gone.png (missing)")),
    ("train", _set("images", 2, width=39), ("[FAIL]", "3.png", "is 40x40")),
    ("valid", _set("annotations", 1, segmentation={"size": [48, 64], "counts": "zz"}),
     ("[FAIL]", "valid: 1 mask(s)", "annotation 2 of 1.png")),
    ("valid", lambda content: content["categories"].append({"id": 9, "name": "horse"}), ()),
    ("valid", lambda content: (content["categories"].append({"id": 9, "name": "horse"}),
                               content["annotations"][0].update(category_id=9)), ("[FAIL]", "annotates 'horse'")),
    ("valid", lambda content: content["categories"].pop(1) and content["annotations"].pop(0),
     ("[warn]", "valid: its categories lack cat")),
    ("valid", lambda content: content["annotations"].pop(0), ("[warn]", "valid: no object of cat")),
    ("train", lambda content: content.update(annotations=[]), ("[FAIL]", "train: 3 images (3 without objects)")),
    ("train", pop_masks, ("[warn]", "train: No segmentation masks found in COCO annotations")),
    ("train", _set("annotations", 0, segmentation=[]), ("[warn]", "1 of 3 objects have no mask")),
    ("train", _set("annotations", 0, bbox=[-9, 0, 30, 20]), ("[warn]", "1 box(es) reached out of their image")),
    ("train", _set("annotations", 0, bbox=[3, 3, 0, 20]), ("[warn]", "1 box(es) thinner")),
    ("valid", lambda content: content["annotations"].append(content["annotations"][0] | {"id": 99}),
     ("[warn]", "valid", "1 object(s) stand there twice")),
    ("train", lambda content: content["images"].pop(2), ("[warn]", "1 image(s) that the annotation file does not")),
])
def test_a_flaw_of_the_data_set_is_named_and_only_a_fatal_one_fails(tmp_path, capsys, split, change, words):
    edit(write_dataset(tmp_path), change, split)
    code, lines = checked(capsys, tmp_path)
    assert code == int("[FAIL]" in words) and bool(having(lines, "[FAIL]")) == ("[FAIL]" in words)
    assert not words or having(lines, *words)
    assert lines[-1].startswith("python validate_setup.py" if code else "python train_detector_stage1.py")


@pytest.mark.parametrize("change, words", [
    (lambda content: content.update(annotations=[]), "test: 3 images (3 without objects), 0 objects"),
    (lambda content: content.update(images=[], annotations=[]), "lists no images"),
    (_set("images", 0, file_name="gone.png"), "gone.png (missing)"),
    (_set("annotations", 0, segmentation={"size": [1, 1], "counts": "1"}), "test: 1 mask(s) cannot be decoded"),
    (lambda content: content.pop("categories"), "has no categories"),
])
def test_flaws_of_the_optional_test_split_are_warnings(tmp_path, capsys, change, words):
    edit(write_dataset(tmp_path, splits=("train", "valid", "test")), change, "test")
    code, lines = checked(capsys, tmp_path)
    assert code == 0 and not having(lines, "[FAIL]")
    assert having(lines, "[warn]", words, "only --run_test 1 reads test/")


def test_corrupt_json_a_wrong_folder_and_no_data_set_at_all(tmp_path, capsys):
    write_dataset(tmp_path / "d")
    (tmp_path / "d" / "valid" / "_annotations.coco.json").write_text("{", encoding="utf-8")
    code, lines = checked(capsys, tmp_path / "d")
    assert code == 1 and having(lines, "[FAIL]", "valid/_annotations.coco.json is not readable JSON")
    write_dataset(tmp_path / "e", splits=("train", "val"))
    code, lines = checked(capsys, tmp_path / "e")
    assert code == 1 and having(lines, "[FAIL]", "must be called valid")
    code, lines = checked(capsys, tmp_path / "nowhere", RUNS_DIR=str(tmp_path))
    assert code == 1 and having(lines, "[FAIL]", "nowhere does not exist")
    assert lines[-1].startswith(f"python -m tools.make_demo_dataset --out {pasted(tmp_path / 'nowhere')} ")


# ---- weights -------------------------------------------------------------------------------------------------------

class Store(http.server.BaseHTTPRequestHandler):
    asked = []

    def do_HEAD(self):
        self.asked.append(("HEAD", self.path))
        self.send_response(200 if self.path == "/nano.pth" else 404)
        self.send_header("Content-Length", str(120 * 2**20))
        self.end_headers()

    def do_GET(self):
        self.asked.append(("GET", self.path))
        self.send_response(500)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def store(monkeypatch, tmp_path):
    """A server that answers for /nano.pth, as the place of the published weights; -> function that sets the file."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RAINSIGHT_CACHE", str(tmp_path / "cache"))
    Store.asked.clear()

    def publish(name, port=server.server_address[1]):
        one = sizes.Published("nano.pth", f"http://127.0.0.1:{port}/{name}", "5d41402abc4b2a76b9719d911017c592")
        monkeypatch.setitem(sizes.PUBLISHED, "nano", one)
    yield publish
    server.shutdown()
    server.server_close()


def weights_line(capsys, **overrides):
    found = validate_setup.Findings()
    cfg = config.resolve(vars(validate_setup), {"TIMEOUT": 2.0} | overrides)
    rfdetr_checks.check_weights(found, cfg)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_reachable_weights_are_asked_for_but_not_downloaded(store, capsys):
    store("nano.pth")
    line = weights_line(capsys)
    assert line.startswith("[ok]") and "120 MB" in line and Store.asked == [("HEAD", "/nano.pth")]


@pytest.mark.parametrize("name, port", [("gone.pth", None), ("nano.pth", 9)])
def test_unreachable_weights_say_what_to_do(store, tmp_path, capsys, name, port):
    store(name, port) if port else store(name)
    line = weights_line(capsys)
    assert line.startswith("[FAIL]") and "cannot be reached" in line and "--pretrain_weights none" in line
    assert (tmp_path / "cache" / "nano.pth").as_posix() in line


def test_cached_weights_need_no_network_unless_they_are_damaged(store, tmp_path, capsys):
    store("nano.pth", 9)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "nano.pth").write_bytes(b"hello")
    assert weights_line(capsys).startswith("[ok]")
    (tmp_path / "cache" / "nano.pth").write_bytes(b"hell")
    line = weights_line(capsys)
    assert line.startswith("[FAIL]") and "damaged" in line and not Store.asked


def test_weights_that_training_refuses(capsys, tmp_path):
    """By the same code: of another size, with too few rows, not there."""
    tiny = str(ROOT / "assets" / "demo" / "rfdetr_tiny.pth")
    assert weights_line(capsys, PRETRAIN_WEIGHTS=tiny, SIZE="tiny").startswith("[ok]")
    line = weights_line(capsys, PRETRAIN_WEIGHTS=tiny)
    assert line.startswith("[FAIL]") and "RF-DETR nano" in line and "--size" in line
    with pytest.raises(UserError, match="RF-DETR nano"):
        train_detector_stage1.main(DATASET_DIR=str(write_dataset(tmp_path / "d")), RUNS_DIR=str(tmp_path / "runs"),
                                   PRETRAIN_WEIGHTS=tiny)
    found, cfg = validate_setup.Findings(), config.resolve(vars(validate_setup), {
        "PRETRAIN_WEIGHTS": tiny, "SIZE": "tiny"})
    rfdetr_checks.check_weights(found, cfg, [f"class {i}" for i in range(99)])
    assert found.failed and "99 classes" in capsys.readouterr().out


def test_other_weights(tmp_path, capsys):
    assert weights_line(capsys, PRETRAIN_WEIGHTS="none").startswith("[ok]")
    assert "nobody has published" in weights_line(capsys, SIZE="tiny")
    missing = weights_line(capsys, PRETRAIN_WEIGHTS=str(tmp_path / "gone.pth"))
    assert missing.startswith("[FAIL]") and "gone.pth" in missing


# ---- the machine ---------------------------------------------------------------------------------------------------

def test_packages_are_compared_with_the_requirements(tmp_path, capsys):
    path = tmp_path / "requirements.txt"
    path.write_text("# a comment\ntorch>=2.6  # with a reason\nnumpy>=99.1\nno-such-package>=1\ntqdm\n"
                    "opencv-python-headless>=0\n", encoding="utf-8")
    found = validate_setup.Findings()
    assert not setup_checks.check_packages(found, path)
    lines = capsys.readouterr().out.splitlines()
    assert found.failed == 2 and having(lines, "[FAIL]", "numpy", "older than 99.1")
    assert having(lines, "[FAIL]", "no-such-package is missing") and having(lines, "[ok]", "torch 2.", "tqdm 4.")
    path.write_text("torch>=2.6\nnumpy>=99.1\n", encoding="utf-8")
    assert setup_checks.check_packages(found, path)  # too old is worth a try, missing is not
    assert setup_checks._numbers("2.14.1+cu130") == (2, 14, 1) > setup_checks._numbers("2.9")


def test_an_optional_package_that_is_missing_only_warns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(setup_checks, "_DISPENSABLE", {"no-such-package": "nobody needs it"})
    (tmp_path / "requirements.txt").write_text("no-such-package>=1\n", encoding="utf-8")
    found = validate_setup.Findings()
    assert setup_checks.check_packages(found, tmp_path / "requirements.txt")
    assert (found.failed, found.warned) == (0, 1)
    assert having(capsys.readouterr().out.splitlines(), "[warn]", "no-such-package is missing: nobody needs it")


def test_a_full_disk_fails_before_training_starts(tmp_path, capsys, monkeypatch):
    cfg = config.resolve(vars(validate_setup), {"RUNS_DIR": str(tmp_path / "not" / "yet")})
    assert rfdetr_checks.COSTS[cfg.SIZE][0] == 30.5  # million parameters: 122 MB, 11 times that are 1.34 GB
    for free, level in ((0.3, "[FAIL]"), (1.3, "[FAIL]"), (2, "[warn]"), (50, "[ok]")):
        monkeypatch.setattr(setup_checks.shutil, "disk_usage", lambda path, free=free: type("", (), {
            "free": free * 2**30}))
        setup_checks.check_disk(validate_setup.Findings(), cfg.RUNS_DIR, "--runs_dir", cfg.SIZE, 0.122)
        assert capsys.readouterr().out.startswith(level)


def test_suggested_batches_grow_with_the_memory_and_shrink_with_the_model():
    assert set(rfdetr_checks.COSTS) == set(sizes.SIZES)
    for size in rfdetr_checks.COSTS:
        batches = [rfdetr_checks.suggest_batch(size, memory)[0] for memory in (4, 8, 16, 24, 80)]
        for one, next_one in zip(batches, batches[1:], strict=False):
            assert one[False] <= next_one[False] <= 16 and one[True] <= one[False] and 16 % one[True] == 0
    assert rfdetr_checks.suggest_batch("nano", 4) == ({False: 4, True: 2}, True)  # 4 to 8 fit 4 GB
    assert rfdetr_checks.suggest_batch("large", 4) == ({False: 1, True: 1}, False)
    assert rfdetr_checks.suggest_batch("nano", 80)[0] == {False: 16, True: 16}
    assert rfdetr_checks.suggest_batch("base", None) == ({False: 2, True: 2}, True)


def test_a_segmentation_size_is_looked_at_and_goes_on_with_the_single_stage(tmp_path, capsys):
    code, lines = checked(capsys, write_dataset(tmp_path), SIZE="seg_nano")
    assert code == 0 and having(lines, "[ok]", "suggested for seg_nano")
    assert lines[-1].startswith("python train_seg_single_stage.py --seg_head official --seg_lr 1e-4 --size seg_nano ")


def test_an_unknown_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="--size huge: choose one of nano"):
        validate_setup.main(SIZE="huge")


# ---- the program ---------------------------------------------------------------------------------------------------

def test_the_demo_needs_no_network_and_points_at_the_demo(tmp_path, capsys, monkeypatch):
    made = []

    def small(root):
        made.append(root)
        return write_dataset(Path(root))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_roboflow, "ensure_dataset", small)
    assert validate_setup.main(demo=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert made == ["./demo/dataset"] and lines[-1] == "python train_detector_stage1.py --demo"
    assert validate_setup.main(demo=True, DATASET_DIR="typo", PRETRAIN_WEIGHTS="none") == 0
    lines = capsys.readouterr().out.splitlines()
    assert made[-1] == "typo" and having(lines, "[ok]", "--demo", "in typo")
    assert lines[-1] == "python train_detector_stage1.py --demo --dataset_dir typo --pretrain_weights none"
    assert validate_setup.main(demo=True, DATASET_DIR="typo", PRETRAIN_WEIGHTS="nix") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("python validate_setup.py --demo --dataset_dir")


def test_without_torch_it_still_speaks_and_exits_with_1(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('DLL load failed')\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, str(ROOT / "validate_setup.py"), "--dataset_dir", str(tmp_path / "gone")],
                          capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "[FAIL] ImportError: DLL load failed" in done.stdout and "[ok]   Python" in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("python -m tools.make_demo_dataset")
