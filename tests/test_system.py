"""Image files of a folder, lists in messages, bytes to floats: what every room takes from the ground floor."""

import subprocess
import sys

import pytest
import torch

from utils import datasets, system
from utils.images import to_bytes, to_floats


def test_images_in_a_folder(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "in/c.webp", "in/.cache/d.png", ".git/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in system.images_in(tmp_path)] == [
        "a.png", "b.JPG", "in/c.webp"]
    assert [path.name for path in system.images_in(tmp_path, below=False)] == ["a.png", "b.JPG"]
    assert system.images_in(tmp_path / "none") == []


def test_linked_folders_are_entered_on_demand(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "set").mkdir()
    try:
        (tmp_path / "set" / "linked").symlink_to(tmp_path / "photos", target_is_directory=True)
    except OSError:
        pytest.skip("this user may not make symbolic links")
    assert system.images_in(tmp_path / "set") == []
    assert system.images_in(tmp_path / "set", links=True) == [tmp_path / "set" / "linked" / "a.png"]


def test_listed():
    assert system.listed([]) == "" and system.listed(range(5)) == "0, 1, 2, 3, 4"
    assert system.listed("abcdefg", 3) == "a, b, c and 4 more"
    assert system.listed({"a": 1, "b": 2}, 1, "; ") == "a and 1 more"
    assert system.listed("ab", separator="; ", total=9) == "a; b and 7 more"


def test_system_needs_no_torch():
    command = "import sys; from utils import system; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout.strip() == "False"


def test_bytes_and_floats():
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    floats = to_floats(every)
    assert floats.dtype == torch.float32 and torch.equal(floats, every.float() / 255)
    assert torch.equal(to_bytes(floats), every)
    assert to_bytes(torch.tensor([-1.0, 0.5, 2.0])).tolist() == [0, 128, 255]
    with pytest.raises(TypeError):
        to_floats(floats)  # they are floats already


def test_key_of_a_data_set():
    assert datasets.epoch_and_index(7) == (0, 7) and datasets.epoch_and_index((3, 7)) == (3, 7)
