"""shrink_head.py: the right rows under the right names in every head, and nothing lost."""

import argparse
import copy
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shrink_head
from rfdetr import weights
from rfdetr.config import COCO_ROWS
from rfdetr.model import RFDETR
from utils import checkpoint, config
from utils.config import UserError

ROOT = Path(__file__).resolve().parent.parent
GROUPS = 13
CLASS_ROWS = {"cells": 0, "car": 3, "blood_vessel": 12}  # two free rows of COCO's and one of its classes


def coco_state(rows=91, width=8, head="class_embed"):
    """A state dict with every class head of a published file and one other weight; row r of head h holds 100 h + r."""
    state = {"query_feat.weight": torch.arange(6.0).reshape(3, 2)}
    for number, name in enumerate([head, *(f"transformer.enc_out_class_embed.{g}" for g in range(GROUPS))]):
        values = 100.0 * number + torch.arange(rows)
        state |= {f"{name}.weight": values[:, None].expand(rows, width).clone(), f"{name}.bias": -values}
    return state


def stage1_content(**changes):
    """What stage 1 writes, with the engine's entries beside it."""
    return {"model": coco_state(head="class_embed.0"), "class_rows": dict(CLASS_ROWS), "class_names": list(CLASS_ROWS),
            "args": {"size": "nano", "num_rows": 91, "resolution": 384, "mask_head": None, "epochs": 3},
            "optimizer": {"state": {}, "param_groups": []}, "torch_rng": torch.get_rng_state(), "step": 7} | changes


@pytest.fixture
def stage1(tmp_path):
    torch.save(stage1_content(), tmp_path / "stage1.pth")
    return tmp_path / "stage1.pth"


def run(source, target, *keep, **more):
    return shrink_head.main(IN_CKPT=str(source), OUT_CKPT=str(target), KEEP=keep, **more)


def rows_of(state, head):
    """-> the old row numbers in a head made by coco_state, from weight and bias alike."""
    weight, bias = state[f"{head}.weight"], state[f"{head}.bias"]
    assert torch.equal(weight[:, 0], weight[:, -1]) and torch.equal(weight[:, 0], -bias)
    return (weight[:, 0] % 100).int().tolist()


# ---- rows ------------------------------------------------------------------------------------------------------

def test_rows_follow_class_rows_in_the_order_of_keep_in_every_head(stage1, tmp_path):
    result = run(stage1, tmp_path / "out.pth", "blood_vessel", "cells", "car")
    loaded = torch.load(tmp_path / "out.pth")  # with a plain torch.load
    assert loaded["model"]["class_embed.0.weight"].shape[0] == 4
    heads = ["class_embed.0", *(f"transformer.enc_out_class_embed.{g}" for g in range(GROUPS))]
    for number, head in enumerate(heads):
        *kept, background = rows_of(loaded["model"], head)
        assert kept == [12, 0, 3]
        assert background not in CLASS_ROWS.values() and background not in COCO_ROWS.values()
        assert loaded["model"][f"{head}.weight"][0, 0] == 100 * number + 12  # of its own group
    assert loaded["class_rows"] == {"blood_vessel": 0, "cells": 1, "car": 2}
    assert loaded["class_names"] == ["blood_vessel", "cells", "car"]
    assert loaded["args"] == stage1_content()["args"] | {"num_rows": 4}
    assert torch.equal(loaded["model"]["query_feat.weight"], coco_state()["query_feat.weight"])
    assert loaded["model"].keys() == stage1_content()["model"].keys() == result["model"].keys()
    assert not {"optimizer", "torch_rng", "step"} & loaded.keys()  # what is not weights stays behind


def test_published_coco_file_goes_by_cocos_names(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "size_of", lambda state, source: "small")  # its shapes have a test of their own
    args = argparse.Namespace(resolution=512, encoder="dinov2_windowed_small")
    torch.save({"model": coco_state(), "args": args}, tmp_path / "coco.pth")
    run(tmp_path / "coco.pth", tmp_path / "out.pth", "Person", "toothbrush", "motorbike")  # VOC's word for COCO's 4
    loaded = torch.load(tmp_path / "out.pth")
    assert rows_of(loaded["model"], "class_embed.0") == [1, 90, 4, 0]  # row 0 is COCO's free one: the background
    assert rows_of(loaded["model"], "transformer.enc_out_class_embed.12") == [1, 90, 4, 0]
    assert "class_embed.weight" not in loaded["model"] and "class_embed.bias" not in loaded["model"]
    assert loaded["args"] == {"size": "small", "num_rows": 4, "resolution": 512, "mask_head": None}


def test_two_spellings_of_one_coco_class_stay_two_classes(tmp_path):
    torch.save(stage1_content(class_rows={"couch": 63, "sofa": 0}), tmp_path / "in.pth")
    result = run(tmp_path / "in.pth", tmp_path / "out.pth", "sofa", "couch")
    assert rows_of(result["model"], "class_embed.0")[:2] == [0, 63]


def test_shrinking_again_keeps_the_background(stage1, tmp_path):
    first = run(stage1, tmp_path / "a.pth", "cells", "car")
    second = run(tmp_path / "a.pth", tmp_path / "b.pth", "car")
    for name in ("class_embed.0.weight", "transformer.enc_out_class_embed.5.bias"):
        assert torch.equal(second["model"][name], first["model"][name][[1, 2]])


@pytest.mark.parametrize(("known", "rows", "expected"), [
    ({"a": 1, "b": 2}, 91, 0),                                    # COCO's free row
    ({"a": 0, "b": 1}, 3, 2),                                     # N + 1 rows: the last one
    ({"a": 0, "car": 3}, 91, 12),                                 # row 0 is taken: the next that no COCO class has
    ({"a": 0, "b": 1}, 2, None),                                  # no row is free
])
def test_background_row(known, rows, expected):
    assert shrink_head.background_row(known, rows) == expected


# ---- new rows --------------------------------------------------------------------------------------------------

def test_unknown_name_is_an_error_that_lists_the_known_ones(stage1, tmp_path):
    with pytest.raises(UserError, match="'glomerulus'.*It knows: cells, car, blood_vessel.*--init_missing"):
        run(stage1, tmp_path / "out.pth", "cells", "glomerulus")
    assert not (tmp_path / "out.pth").exists()


def test_init_missing_makes_seeded_rows_of_low_probability(stage1, tmp_path):
    a, b, c = (run(stage1, tmp_path / f"{i}.pth", "glomerulus", "cells", INIT_MISSING=True, SEED=seed)["model"]
               for i, seed in enumerate((5, 5, 6)))
    for head in ("class_embed.0", "transformer.enc_out_class_embed.12"):
        assert torch.sigmoid(a[f"{head}.bias"][0]).item() == pytest.approx(0.01)
        assert 0 < a[f"{head}.weight"][0].abs().max() < 0.1
        assert torch.equal(a[f"{head}.weight"], b[f"{head}.weight"])
        assert not torch.equal(a[f"{head}.weight"][0], c[f"{head}.weight"][0])
        assert torch.equal(a[f"{head}.weight"][1:], c[f"{head}.weight"][1:])  # the kept rows know no seed


# ---- the user's mistakes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("keep", "message"), [
    ((), "--keep: name the classes"), (("cells", "car", "cells"), "'cells' twice"), (("car", "Car"), "'Car' twice"),
    (("cells", " "), "KEEP = .* holds an empty text"),
])
def test_bad_keep(stage1, tmp_path, keep, message):
    with pytest.raises(UserError, match=message):
        run(stage1, tmp_path / "out.pth", *keep)


def test_the_input_and_foreign_files_are_never_overwritten(stage1, tmp_path):
    before = stage1.read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        run(stage1, tmp_path / "." / "stage1.pth", "cells")
    (tmp_path / "link.pth").hardlink_to(stage1)
    with pytest.raises(UserError, match="never overwritten"):
        run(stage1, tmp_path / "link.pth", "cells")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    torch.save(stage1_content(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("notes.txt", "other.pth", "list.pth"):
        content = (tmp_path / name).read_bytes()
        with pytest.raises(UserError, match="was not written by shrink_head.py"):
            run(stage1, tmp_path / name, "cells")
        assert (tmp_path / name).read_bytes() == content
    run(stage1, tmp_path / "own.pth", "cells")
    assert run(stage1, tmp_path / "own.pth", "car")["class_names"] == ["car"]  # its own file may be written again
    assert stage1.read_bytes() == before


def test_an_earlier_file_of_other_classes_or_weights_is_kept(stage1, tmp_path, capsys):
    target = tmp_path / "mydata.pth"
    for keep in (("cells",), ("cells",), ("car",)):
        run(stage1, target, *keep)
    assert torch.load(target)["class_names"] == ["car"]
    assert torch.load(tmp_path / "previous_1" / "mydata.pth")["class_names"] == ["cells"]
    assert not (tmp_path / "previous_2").exists()  # an equal file is only written again
    assert "previous_1/mydata.pth" in capsys.readouterr().out
    torch.save(stage1_content(model=coco_state(head="class_embed.0") | {"query_feat.weight": torch.ones(3, 2)}), stage1)
    run(stage1, target, "car")
    assert (tmp_path / "previous_2" / "mydata.pth").is_file()


@pytest.mark.parametrize(("content", "message"), [
    ([1], "no state dict under 'model'"), ({"model": {"a": torch.zeros(1)}}, "is not an RF-DETR detector"),
    (stage1_content(class_rows={}, model=coco_state(20, head="class_embed.0")), "which of its 20 rows"),
    (stage1_content(model=coco_state(head="class_embed.0") | {"class_embed.0.bias": torch.zeros(90)}), "do not agree"),
    ({"model": coco_state()}, "fits none of the sizes"),
])
def test_foreign_content_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(UserError, match=message):
        run(tmp_path / "in.pth", tmp_path / "out.pth", "car")


def test_missing_flags_and_files(stage1, tmp_path):
    with pytest.raises(UserError, match="--in_ckpt .*does not exist"):
        run(tmp_path / "nothing.pth", tmp_path / "out.pth", "car")
    with pytest.raises(UserError, match="--out_ckpt is missing"):
        run(stage1, "", "car")
    with pytest.raises(UserError, match="is a folder"):
        run(stage1, tmp_path, "car")


def test_the_command_line(stage1, tmp_path):
    command = [sys.executable, "shrink_head.py", "--in_ckpt", stage1, "--out_ckpt", tmp_path / "mydata.pth", "--keep",
               "cells", "blood_vessel", "kidney stone", "--init_missing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "91 rows -> 4 (3 classes + background) in 14 class heads" in done.stdout
    assert "new, untrained" in done.stdout and "row 12" in done.stdout
    assert f"--checkpoint {(tmp_path / 'mydata.pth').as_posix()} --dataset_dir <folder" in done.stdout
    assert torch.load(tmp_path / "mydata.pth")["class_names"] == ["cells", "blood_vessel", "kidney stone"]


@pytest.mark.parametrize("where", ["checkpoint", "results.json"])
def test_the_next_command_names_the_data_set_and_can_be_pasted_with_blanks(tmp_path, capsys, where):
    run_dir = tmp_path / "my runs" / "detector 1"
    run_dir.mkdir(parents=True)
    constants = {"DATASET_DIR": "./my data", "RUNS_DIR": "./my runs"}
    torch.save(stage1_content(**{"constants": constants} if where == "checkpoint" else {}), run_dir / "best.pt")
    if where == "results.json":
        (run_dir / "results.json").write_text(json.dumps({"constants": constants}), encoding="utf-8")
    run(run_dir / "best.pt", run_dir / "mydata.pth", "car")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: "))
    assert shlex.split(line)[3:] == ["--size", "nano", "--stage1_run", run_dir.as_posix(), "--checkpoint",
                                     (run_dir / "mydata.pth").as_posix(), "--dataset_dir", "my data",
                                     "--runs_dir", "my runs"]


def test_a_foreign_results_file_only_leaves_the_hint_open(tmp_path):
    for text in ("{", "[]", "{}", '{"constants": []}'):
        (tmp_path / "results.json").write_text(text, encoding="utf-8")
        assert shrink_head.constants_of({}, tmp_path) == {}


def test_flags_and_demo_as_on_the_command_line(tmp_path):
    words = ["--in_ckpt", "a.pth", "--out_ckpt", "b.pth", "--keep", "stop sign", "car"]
    given = config.from_command_line(vars(shrink_head), words)
    assert given == {"IN_CKPT": "a.pth", "OUT_CKPT": "b.pth", "KEEP": ["stop sign", "car"]}
    cfg = config.resolve(vars(shrink_head), given | {"demo": True})
    assert cfg.KEEP == ("stop sign", "car") and cfg.INIT_MISSING is False
    assert set(cfg.as_dict()) == {"IN_CKPT", "OUT_CKPT", "KEEP", "INIT_MISSING", "SEED"}


# ---- the detector itself -----------------------------------------------------------------------------------------

def trained_like(model, rows):
    """Give the heads of a fresh model what training gives them: spread weights, and rows that no class uses low."""
    generator = torch.Generator().manual_seed(3)
    state = model.state_dict()
    for name, value in state.items():
        if shrink_head._HEADS.fullmatch(name):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
            if name.endswith("bias"):
                value -= 2
                value[[row for row in range(len(value)) if row not in rows]] = -40
    model.load_state_dict(state)


@torch.no_grad()
def test_scores_of_kept_classes_stay(tmp_path):
    torch.manual_seed(0)
    model = RFDETR("tiny", 91).eval()
    trained_like(model, CLASS_ROWS.values())
    torch.save({"model": model.state_dict(), "args": model.model_args, "class_names": list(CLASS_ROWS),
                "class_rows": CLASS_ROWS}, tmp_path / "full.pth")
    content = run(tmp_path / "full.pth", tmp_path / "small.pth", "blood_vessel", "car", "cells")
    small = RFDETR(**content["args"])
    checkpoint.load_into(small, checkpoint.load_state(tmp_path / "small.pth"), "small.pth")
    side = model.model_args["resolution"]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    before, after = model(images), small.eval()(images)
    assert after["logits"].shape[-1] == 4
    assert before["logits"][..., [12, 3, 0]].std() > 0.1  # the comparison is not one of constants
    torch.testing.assert_close(after["logits"][..., :3], before["logits"][..., [12, 3, 0]], rtol=0, atol=2e-5)
    torch.testing.assert_close(after["boxes"], before["boxes"], rtol=0, atol=1e-5)


def test_size_of_tells_the_published_sizes_by_their_shapes():
    expected = {"nano": 384, "small": 512, "medium": 576, "base": 560, "large": 560, "large_2026": 704}
    for size, resolution in expected.items():
        with torch.device("meta"):
            state = RFDETR(size, 91).state_dict()
        assert weights.size_of(state, "file") == size
        content = {"args": argparse.Namespace(lr=1e-4)}
        args = shrink_head.model_args_of(content, state, "file")
        assert args == {"size": size, "resolution": resolution, "mask_head": None}
    with pytest.raises(UserError, match="mask head"):
        shrink_head.model_args_of({}, copy.copy(state) | {"mask_head.weight": torch.zeros(1)}, "file")


def test_demo(tmp_path, capsys):
    source = ROOT / shrink_head.DEMO["IN_CKPT"]
    if not source.is_file():
        pytest.skip("the demo's detector is not there")
    content = shrink_head.main(demo=True, IN_CKPT=str(source), OUT_CKPT=str(tmp_path / "two.pth"))
    assert content["model"]["class_embed.0.weight"].shape[0] == 3
    assert "(2 classes + background) in 5 class heads" in capsys.readouterr().out  # four query groups
