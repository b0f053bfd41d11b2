"""rfdetr/weights.py: download, resume and check; load, adapt and export checkpoints; rows of the class head."""

import argparse
import hashlib
import http.server
import pickle
import zipfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import serving

from rfdetr import config, names, weights
from rfdetr.config import COCO_ROWS, Published
from rfdetr.model import RFDETR
from utils import checkpoint, download, processes, system
from utils.config import UserError

CONTENT = bytes(range(256)) * 9000  # 2.2 MB: three chunks


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the class attributes say how badly."""

    cut, ranges, requests, status = None, True, [], 200

    def do_GET(self):
        wanted = self.headers.get("Range")
        type(self).requests.append(wanted)
        if self.status != 200:
            return self.send_error(self.status)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        end = len(CONTENT) if self.cut is None else start + self.cut
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """-> the handler class of a running server that "publishes" CONTENT as size nano."""
    handler = type("Handler", (Server,), {"requests": []})
    with serving(handler, monkeypatch) as address:
        monkeypatch.setitem(config.PUBLISHED, "nano", Published(
            "rf-detr-nano.pth", f"{address}/nano.pth", hashlib.md5(CONTENT).hexdigest()))
        yield handler


# ---- download ----------------------------------------------------------------------------------------------------

def test_download_once_with_a_bar(server, tmp_path, capsys):
    path = weights.fetch("nano", tmp_path / "cache")
    assert path == tmp_path / "cache" / "rf-detr-nano.pth" and path.read_bytes() == CONTENT
    bar = capsys.readouterr().err
    assert "rf-detr-nano.pth: 100%" in bar and bar.isascii()
    assert weights.fetch("nano", tmp_path / "cache") == path
    assert server.requests == [None] and [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_cut_off_download_is_resumed(server, tmp_path):
    server.cut = 1_000_000
    assert weights.fetch("nano", tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000000-", "bytes=2000000-"]


def test_what_an_earlier_run_left_is_resumed(server, tmp_path):
    (tmp_path / "rf-detr-nano.pth.part").write_bytes(CONTENT[:500_000])
    assert weights.fetch("nano", tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=500000-"]


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "rf-detr-nano.pth.part").write_bytes(b"x" * 500_000)
    assert weights.fetch("nano", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("rest", [CONTENT, CONTENT + b"too much"])
def test_a_part_that_is_already_complete_or_too_long(server, tmp_path, rest):
    (tmp_path / "rf-detr-nano.pth.part").write_bytes(rest)
    assert weights.fetch("nano", tmp_path).read_bytes() == CONTENT
    assert server.requests == ([f"bytes={len(rest)}-"] if rest == CONTENT else [f"bytes={len(rest)}-", None])


def test_a_connection_that_brings_nothing_ends_with_one_clear_line(server, tmp_path):
    server.cut = 0
    with pytest.raises(UserError) as error:
        weights.fetch("nano", tmp_path)
    assert len(server.requests) == download.PATIENCE
    text = str(error.value)
    for part in ("rf-detr-nano.pth", "http://127.0.0.1", (tmp_path / "rf-detr-nano.pth").as_posix(),
                 "--pretrain_weights none", "cut off"):
        assert part in text
    assert "\n" not in text


def test_wrong_md5_is_refused_and_deleted(server, tmp_path, monkeypatch):
    published = config.PUBLISHED["nano"]
    monkeypatch.setitem(config.PUBLISHED, "nano", Published(published.file, published.url, "0" * 32))
    with pytest.raises(UserError, match="is broken .MD5 .*--pretrain_weights none"):
        weights.fetch("nano", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_in_the_cache_is_named_and_kept(server, tmp_path):
    (tmp_path / "rf-detr-nano.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the published rf-detr-nano.pth"):
        weights.fetch("nano", tmp_path)
    assert (tmp_path / "rf-detr-nano.pth").read_bytes() == b"something else" and server.requests == []


def test_an_http_error_is_not_tried_again(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match=r"rf-detr-nano.pth from http.*\(Not Found\).*--pretrain_weights none"):
        weights.fetch("nano", tmp_path)
    assert len(server.requests) == 1


def test_unreachable(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(config.PUBLISHED, "nano", Published("rf-detr-nano.pth", "http://127.0.0.1:9/nano.pth", "0"))
    with pytest.raises(UserError, match="cannot get the pretrained weights rf-detr-nano.pth"):
        weights.fetch("nano", tmp_path)


def test_nothing_is_published_for_the_demos_size(tmp_path):
    with pytest.raises(UserError, match="no weights are published for size tiny"):
        weights.fetch("tiny", tmp_path)


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot get the pretrained weights"):
        weights.fetch("nano", tmp_path / "file" / "cache")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RAINSIGHT_CACHE", str(tmp_path))
    assert system.cache_folder() == tmp_path
    monkeypatch.delenv("RAINSIGHT_CACHE")
    assert system.cache_folder() == Path.home() / ".cache" / "rainsight"


# ---- two processes -----------------------------------------------------------------------------------------------

def waiting_rank(folder):
    """The second process: fetch twice without downloading; writes what came of it."""
    processes.accelerator, processes.is_main = lambda: SimpleNamespace(num_processes=2), lambda: False
    weights._complete = None  # this one downloads nothing
    join(folder, 1)
    path = weights.fetch("nano", folder / "first")
    answer = f"{path.name} {path.stat().st_size}"
    try:
        weights.fetch("nano", folder / "second")
    except UserError as error:
        answer += f" then {error}"
    (folder / "answer.txt").write_text(answer, encoding="utf-8")
    torch.distributed.destroy_process_group()


def join(folder, rank):
    torch.distributed.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=2,
                                         timeout=timedelta(seconds=60))


def test_other_processes_wait_for_the_main_one_as_long_as_it_takes(server, tmp_path, monkeypatch):
    groups, new_group = [], torch.distributed.new_group
    monkeypatch.setattr(processes, "accelerator", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(processes, "is_main", lambda: True)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **kwargs: groups.append(kwargs) or new_group(**kwargs))
    other = torch.multiprocessing.get_context("spawn").Process(target=waiting_rank, args=(tmp_path,))
    other.start()
    try:
        join(tmp_path, 0)
        assert weights.fetch("nano", tmp_path / "first").read_bytes() == CONTENT
        server.status = 404
        with pytest.raises(UserError, match="Not Found"):
            weights.fetch("nano", tmp_path / "second")
        other.join(60)
    finally:
        torch.distributed.destroy_process_group()
        other.kill()
    assert (tmp_path / "answer.txt").read_text(encoding="utf-8") == (
        f"rf-detr-nano.pth {len(CONTENT)} then getting rf-detr-nano.pth: the main process failed, see its message")
    assert all(group["backend"] == "gloo" and group["timeout"] >= timedelta(hours=6) for group in groups)
    assert len(groups) == 2


# ---- checkpoints -------------------------------------------------------------------------------------------------

def new(rows=4, resolution=None, mask_head=None, seed=0):
    torch.manual_seed(seed)
    return RFDETR("tiny", rows, resolution, mask_head).eval()


def same(one, other, aside=()):
    """True where two models hold equal tensors, those whose names start with one of `aside` left out."""
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.items() if not name.startswith(tuple(aside)))


@pytest.fixture
def ours(tmp_path):
    """-> path of a checkpoint of a tiny model with a mask head, and that model."""
    model = new(mask_head="nano", seed=1)
    path = tmp_path / "best.pt"
    checkpoint.save(weights.checkpoint_content(model, ["dog", "car"], {"dog": 2, "car": 0}, {"note": 1}), path)
    return path, model


def published_like(model, path):
    """A file as Roboflow publishes them: their names, an argparse.Namespace, only the detector."""
    state = {name: value for name, value in names.published_file(model.state_dict()).items()
             if not name.startswith("mask_head.")}
    torch.save({"model": state, "args": argparse.Namespace(resolution=160, lr=1e-4)}, path)
    return path


def test_load_detector_gives_the_same_model_again(ours):
    path, model = ours
    loaded, info = weights.load_detector(path)
    assert info == {"class_names": ["dog", "car"], "class_rows": {"dog": 2, "car": 0},
                    "args": {"note": 1, "size": "tiny", "num_rows": 4, "resolution": 160, "mask_head": "nano"}}
    assert same(model, loaded) and not loaded.training
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        one, other = model(images), loaded(images)
    assert all(torch.equal(one[key], other[key]) for key in ("logits", "boxes", "pixel_embedding", "query_embedding"))
    assert same(model, weights.load_detector(checkpoint.load(path))[0])  # from the content as well


def test_our_checkpoint_is_read_by_a_plain_load(ours):
    content = torch.load(ours[0])
    assert content["model"]["class_embed.0.weight"].shape[0] == 4
    assert isinstance(content["args"], dict)


def test_load_detector_refuses_a_published_file(tmp_path):
    path = published_like(new(), tmp_path / "coco.pth")
    with pytest.raises(UserError, match="does not say which model it is"):
        weights.load_detector(path)


def test_load_detector_names_what_does_not_fit(ours):
    content = checkpoint.load(ours[0])
    del content["model"]["query_feat.weight"]
    with pytest.raises(UserError, match="1 missing .query_feat.weight"):
        weights.load_detector(content)


def test_load_pretrained_from_a_published_file(tmp_path):
    source = new(rows=91, seed=1)
    path = published_like(source, tmp_path / "coco.pth")
    model = new(rows=91, mask_head="nano", seed=2)
    head = {name: value.clone() for name, value in model.mask_head.state_dict().items()}
    info = weights.load_pretrained(model, path)
    assert same(source, model)
    assert info["class_rows"] == COCO_ROWS and info["loaded"] == len(source.state_dict())
    assert info["left_out"] == [name for name in model.state_dict() if name.startswith("mask_head.")]
    assert all(torch.equal(value, head[name]) for name, value in model.mask_head.state_dict().items())
    assert weights.rows_of(path) == (91, COCO_ROWS)


def test_load_pretrained_takes_the_mask_head_where_there_is_one(ours):
    path, source = ours
    model = new(mask_head="nano", seed=2)
    assert weights.load_pretrained(model, path) == {"class_rows": {"dog": 2, "car": 0}, "left_out": [],
                                                    "loaded": len(source.state_dict())}
    assert same(source, model)
    detector = new(seed=2)
    assert weights.load_pretrained(detector, path)["left_out"] == []
    assert same(detector, source)


def test_class_heads_of_another_size_start_anew(ours):
    path, source = ours
    model = new(rows=7, seed=2)
    before = model.state_dict()["class_embed.0.weight"].clone()
    info = weights.load_pretrained(model, path)
    assert info["class_rows"] == {}
    assert set(info["left_out"]) == {name for name in model.state_dict() if "class_embed" in name}
    assert len(info["left_out"]) == 2 * (1 + 4)
    assert torch.equal(model.state_dict()["class_embed.0.weight"], before)
    assert same(model, source, ("class_embed", "transformer.enc_out_class_embed"))


def test_excluded_tensors_start_anew(ours):
    path, source = ours
    model = new(seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    info = weights.load_pretrained(model, path, exclude=("backbone.0.projector.*", "class_embed.weight"))
    assert "class_embed.0.weight" in info["left_out"] and "class_embed.0.bias" not in info["left_out"]
    assert info["class_rows"] == {} and len(info["left_out"]) > 10
    given = source.state_dict()
    for name, value in model.state_dict().items():
        anew = name.startswith("backbone.0.projector.") or name == "class_embed.0.weight"
        assert torch.equal(value, (before if anew else given)[name]), name


def test_a_pattern_that_matches_nothing_is_refused(ours):
    with pytest.raises(UserError, match="--pretrain_exclude_keys 'backbone.projector.*' matches no tensor"):
        weights.load_pretrained(new(), ours[0], exclude=("backbone.projector.*",))


def test_mismatches_are_named(ours):
    content = checkpoint.load(ours[0])
    content["model"]["unknown"] = content["model"].pop("query_feat.weight")
    content["model"]["bbox_embed.layers.0.weight"] = torch.zeros(3, 3)
    with pytest.raises(UserError) as error:
        weights.load_pretrained(new(), content)
    for part in ("1 missing (query_feat.weight)", "1 unexpected (unknown)", "does not fit RF-DETR tiny",
                 "bbox_embed.layers.0.weight (3, 3) instead of (128, 128)", "--pretrain_exclude_keys"):
        assert part in str(error.value)


def test_other_files_are_refused(tmp_path):
    checkpoint.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pt")
    checkpoint.save([1], tmp_path / "list.pt")
    with pytest.raises(UserError, match="other.pt is not an RF-DETR detector"):
        weights.load_pretrained(new(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="list.pt holds no state dict"):
        weights.rows_of(tmp_path / "list.pt")
    with pytest.raises(UserError, match="weight file .* does not exist"):
        weights.load_detector(tmp_path / "none.pt")


@pytest.mark.parametrize("load", [weights.load_detector, weights.rows_of])
def test_a_checkpoint_with_code_is_refused_without_running_it(ours, tmp_path, load):
    witness = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return Path.touch, (witness,)

    tampered = tmp_path / "tampered.pth"
    with zipfile.ZipFile(ours[0]) as whole, zipfile.ZipFile(tampered, "w") as copy:
        for entry in whole.infolist():
            trap = entry.filename.endswith("data.pkl")
            copy.writestr(entry, pickle.dumps({"model": Code()}, protocol=2) if trap else whole.read(entry))
    with pytest.raises(UserError, match="not a readable checkpoint: (?!.*weights_only)"):
        load(tampered)
    assert not witness.exists()
    torch.load(tampered, weights_only=False)  # the trap works where code is allowed
    assert witness.exists()


# ---- position embeddings -----------------------------------------------------------------------------------------

def test_position_embeddings_become_what_the_backbone_would_have_used(ours):
    path, source = ours
    larger = RFDETR("tiny", 4, 192).eval()
    weights.load_pretrained(larger, path)
    assert larger.state_dict()[weights.POSITIONS].shape == (1, 24 * 24 + 1, 96)
    images = torch.rand(1, 3, 192, 192)
    with torch.no_grad():
        one, other = source(images), larger(images)
    assert torch.allclose(one["features"], other["features"], atol=1e-5)
    assert torch.allclose(one["logits"], other["logits"], atol=1e-4)


def test_position_embeddings_of_no_square_are_left_for_the_error():
    positions = torch.zeros(1, 8, 4)
    assert weights.resize_positions(positions, 26) is positions
    assert weights.resize_positions(torch.zeros(1, 10, 4), 26).shape == (1, 26, 4)


# ---- Roboflow's names --------------------------------------------------------------------------------------------

def test_export_has_roboflows_names_and_our_values(ours, tmp_path):
    path, source = ours
    out = weights.export_roboflow(path, tmp_path / "export" / "roboflow.pth")
    content = torch.load(out)
    state = names.published_file(source.state_dict())
    assert set(content["model"]) == {name for name in state if not name.startswith("mask_head.")}
    assert content["model"]["class_embed.bias"].shape == (4,) and "class_embed.0.bias" not in content["model"]
    assert all(torch.equal(value, state[name]) for name, value in content["model"].items())
    assert content["args"] == {"class_names": ["car", "dog"], "class_rows": {"dog": 2, "car": 0}, "num_classes": 3,
                               "resolution": 160}
    model = new(seed=2)
    weights.load_pretrained(model, out)
    assert same(model, source)


def test_export_never_overwrites_its_input(ours):
    with pytest.raises(UserError, match="never overwritten"):
        weights.export_roboflow(ours[0], ours[0])


# ---- rows --------------------------------------------------------------------------------------------------------

def test_known_classes_keep_their_rows():
    assert weights.assign_rows(["cells", "Car", "motorbike", "person"], 91, COCO_ROWS) \
        == {"cells": 12, "Car": 3, "motorbike": 4, "person": 1}


def test_a_new_head_counts_up_and_leaves_the_last_row_to_the_background():
    assert weights.assign_rows(["a", "b", "c"], 4, {}) == {"a": 0, "b": 1, "c": 2}


def test_free_rows_are_those_of_no_class_then_those_of_absent_ones_then_the_background():
    many = [f"new {i}" for i in range(90)]
    rows = list(weights.assign_rows(["dog", *many], 91, COCO_ROWS).values())
    unused = [row for row in range(1, 91) if row not in COCO_ROWS.values()]
    assert rows[0] == COCO_ROWS["dog"] and rows[1:11] == unused and rows[-1] == 0
    assert sorted(rows) == list(range(91))
    assert weights.assign_rows(["b", "new"], 4, {"a": 0, "b": 1, "c": 2}) == {"b": 1, "new": 0}


def test_two_spellings_of_one_class_get_two_rows():
    assert weights.assign_rows(["tv", "tvmonitor"], 91, COCO_ROWS) == {"tv": 72, "tvmonitor": 12}


def test_more_classes_than_rows():
    with pytest.raises(UserError, match="3 classes, but the weights' class head only 2 rows"):
        weights.assign_rows(["a", "b", "c"], 2, {})
