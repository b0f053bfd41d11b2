"""The demo scenes in Roboflow's layout: what is in it, made once, never over someone else's data."""

import json
import shutil
from pathlib import Path

import pytest
from test_rfdetr_data import opened, write_dataset

from rfdetr.datasets import roboflow
from tools import make_demo_dataset as tool
from utils.config import UserError
from utils.datasets import layouts
from utils.demo import roboflow as demo_roboflow


@pytest.fixture(scope="module")
def demo_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    return demo_roboflow.ensure_dataset(root / "dataset", root, num_train=6, num_valid=3, num_test=2), root


def test_the_demo_data_set_has_the_layout_and_opens_with_masks(demo_root):
    root, source = demo_root
    names, notes = roboflow.class_names_of(root)
    assert names == ["person", "car", "bus", "traffic light", "stop sign"] and "'street-scenes'" in notes[0]
    rows = {name: row for row, name in enumerate(names)}
    seen = set()
    for split, number in (("train", 6), ("valid", 3), ("test", 2)):
        data = opened(root, split, rows=rows, resolution=160)
        assert len(data) == number == len(list((root / split).glob("*.jpg"))) and data.notes == []
        assert not seen & set(data.files)
        seen |= set(data.files)
        content = json.loads(data.annotations.file.read_text(encoding="utf-8"))
        assert len(data.labels) == len(content["annotations"])
        assert {note["image_id"] for note in content["annotations"]} <= set(data.image_ids)
        for sample in (data[i] for i in range(number)):
            assert sample["masks"].flatten(1).any(1).all() and len(sample["masks"]) == len(sample["labels"])
    first = source / "coco" / "train2017" / "000000000001.jpg"
    assert (root / "train" / first.name).read_bytes() == first.read_bytes()


def test_the_demo_data_set_is_made_once_and_again_after_a_kill(demo_root):
    root, source = demo_root
    numbers = {"num_train": 6, "num_valid": 3, "num_test": 2}
    before = (root / "train" / layouts.ROBOFLOW_FILE).stat().st_mtime_ns
    demo_roboflow.ensure_dataset(root, source, **numbers)
    assert (root / "train" / layouts.ROBOFLOW_FILE).stat().st_mtime_ns == before
    (root / demo_roboflow.MARKER).write_text('{"unfinished": true}')  # as a kill between two renames leaves it
    next((root / "valid").glob("*.jpg")).unlink()
    (root / ".building-leftover").mkdir()
    demo_roboflow.ensure_dataset(root, source, **numbers)
    assert len(list((root / "valid").glob("*.jpg"))) == 3 and (root / demo_roboflow.MARKER).is_file()
    assert {path.name for path in root.glob(".*")} <= {".lock"}


def test_the_demo_never_replaces_a_data_set_of_ones_own(tmp_path, demo_root):
    write_dataset(tmp_path / "mine")
    for split in demo_roboflow.SPLITS:  # a copy of the demo's that somebody cuts down and edits
        shutil.copytree(demo_root[0] / split, tmp_path / "edited" / split)
    next((tmp_path / "edited" / "train").glob("*.jpg")).unlink()
    for name in ("mine", "edited"):
        before = {path: path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()}
        with pytest.raises(UserError, match=f"{name}/train has no demo_dataset.json.*without --demo"):
            demo_roboflow.ensure_dataset(tmp_path / name, demo_root[1], num_train=6, num_valid=3, num_test=2)
        assert {path: path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()} == before


def test_the_tool_makes_it_where_the_scripts_look(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(tool, "ensure_dataset", lambda *args: asked.append(args) or Path(args[0]))
    tool.main()
    assert capsys.readouterr().out.strip().endswith("Next: python validate_setup.py")
    tool.main(OUT=str(tmp_path))
    assert asked == [("./dataset", "./demo"), (str(tmp_path), "./demo")]
    assert f"validate_setup.py --dataset_dir {tmp_path.as_posix()}" in capsys.readouterr().out
