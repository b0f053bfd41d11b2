"""tools.get_data against a server on this machine: resumed, checked, no room, not there; nothing else is reachable."""

import hashlib
import http.server
import io
import shutil
import zipfile
from types import SimpleNamespace

import pytest
from conftest import serving

from tools import get_data
from tools.get_data import Archive, Source
from utils import download
from utils.config import UserError


def test_the_first_word_is_the_name():
    assert get_data.with_name(["coco", "--OUT", "x"]) == ["--NAME", "coco", "--OUT", "x"]
    assert get_data.with_name([]) == [] and get_data.with_name(["--help"]) == ["--help"]


def archive():
    """-> bytes of a zip file of several chunks."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("val2017/1.jpg", bytes(range(256)) * 5000)
        content.writestr("val2017/2.jpg", b"two")
    return file.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; the class attributes say how badly."""

    content, cut, asked = archive(), None, []

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        if self.path != "/val2017.zip":
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:start + (self.cut or len(self.content))])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """-> the handler class of a running server; _SOURCES has one data set of it, "small"."""
    handler = type("Handler", (Server,), {"asked": []})

    def publish(md5=None, file="val2017.zip"):
        source = Source("A small set", "yours", "https://example.org", {"val": Archive(
            f"{handler.address}/{file}", "val2017", md5)})
        monkeypatch.setitem(get_data._SOURCES, "small", source)
    handler.publish = publish
    with serving(handler, monkeypatch) as handler.address:
        publish()
        yield handler


def test_a_data_set_is_there_after_one_command_and_is_not_loaded_twice(server, tmp_path, capsys):
    server.publish(md5=hashlib.md5(server.content).hexdigest())
    assert get_data.main(NAME="small", OUT=str(tmp_path)) is True
    assert (tmp_path / "val2017/1.jpg").read_bytes() == bytes(range(256)) * 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val2017"]  # no archive, no part
    printed = capsys.readouterr().out
    assert printed.index("licence: yours") < printed.index("val: ")
    assert get_data.main(NAME="small", OUT=str(tmp_path)) is True and server.asked == [None]
    assert "is there already" in capsys.readouterr().out


def test_a_cut_connection_is_taken_up_in_the_middle(server, tmp_path):
    server.cut = 700_000
    get_data.main(NAME="small", OUT=str(tmp_path))
    assert server.asked[:2] == [None, "bytes=700000-"]
    assert (tmp_path / "val2017/1.jpg").read_bytes() == bytes(range(256)) * 5000


@pytest.mark.parametrize("have", [1000, None])
def test_a_later_run_goes_on_where_an_earlier_one_stopped(server, tmp_path, have):
    (tmp_path / "val2017.zip.part").write_bytes(server.content[:have])  # None: all of it
    get_data.main(NAME="small", OUT=str(tmp_path))
    assert server.asked == [f"bytes={have or len(server.content)}-"]
    assert (tmp_path / "val2017/2.jpg").read_bytes() == b"two"


def refused(tmp_path, message):
    with pytest.raises(UserError, match=message) as error:
        get_data.main(NAME="small", OUT=str(tmp_path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "val2017").exists()


def test_a_wrong_checksum_is_refused_and_the_file_deleted(server, tmp_path):
    server.publish(md5="0" * 32)
    refused(tmp_path, "val2017.zip is damaged .its MD5 sum is .* published is 0000")
    assert list(tmp_path.iterdir()) == []


def test_damage_without_a_checksum_is_found_by_the_archives_own(server, tmp_path):
    whole = bytearray(server.content)
    whole[5000] ^= 255  # inside 1.jpg
    server.content = bytes(whole)
    refused(tmp_path, "val2017.zip is damaged .Bad CRC-32")
    server.content = b"<html>moved</html>" * 100
    refused(tmp_path, "it is no zip file")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_anything_is_written(server, tmp_path, monkeypatch):
    size = len(server.content)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1.9 * size))
    refused(tmp_path, "GB free, .* GB are needed for the archive and what is in it")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2.1 * size))
    assert get_data.main(NAME="small", OUT=str(tmp_path)) is True


def test_a_disk_that_fills_up_on_the_way_keeps_what_has_arrived(server, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, block):
            if self.tell() + len(block) > 1_000_000:
                raise OSError(28, "No space left on device")
            return super().write(block)
    monkeypatch.setattr(download, "CHUNK", 300_000)
    monkeypatch.setattr(download, "open", lambda path, mode: Full(path, mode), raising=False)
    refused(tmp_path, "No space left on device.: run the same again, what has arrived is kept")
    assert (tmp_path / "val2017.zip.part").stat().st_size == 900_000
    monkeypatch.undo()


def test_an_address_that_is_gone_and_a_server_that_is_away(server, tmp_path, monkeypatch):
    server.publish(file="moved.zip")
    refused(tmp_path, "cannot get http://127.0.0.1:.*/moved.zip .Not Found.: .* by other means")
    away = Archive("http://127.0.0.1:9/a.zip", "a")
    monkeypatch.setitem(get_data._SOURCES, "small", Source("", "", "", {"val": away}))
    refused(tmp_path, "cannot get http://127.0.0.1:9/a.zip .*refused")


def test_what_has_no_address_comes_as_instructions(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_hand = [name for name, source in get_data._SOURCES.items() if not source.archives]
    assert {"acdc", "dawn", "rtts", "rain100l", "rain100h", "raindrop"} == set(by_hand)
    for name in by_hand:
        assert get_data.main(NAME=name) is False
        printed = capsys.readouterr().out
        assert "by hand" in printed and f"dataset/{name}" in printed and "https://" in printed and "{" not in printed
        assert printed.isascii()
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"NAME": "imagenet"}, "NAME = 'imagenet': choose one of coco, acdc"), ({}, "NAME = '': choose one of"),
    ({"NAME": "coco", "PARTS": ("test",)}, "coco has no test; it has the parts annotations, val, train"),
    ({"NAME": "dawn", "PARTS": ("val",)}, "dawn has no val; it is not downloaded here"),
])
def test_wrong_constants(changes, message):
    with pytest.raises(UserError, match=message):
        get_data.main(**changes)


def test_cocos_parts_make_its_standard_layout():
    holds = {part: one.holds for part, one in get_data._SOURCES["coco"].archives.items()}
    assert holds == {"annotations": "annotations/instances_val2017.json", "val": "val2017", "train": "train2017"}
