"""The lock of the demo data: one process makes a folder, others wait, and a killed one does not block the next."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.config import UserError
from utils.demo import build_once

ROOT = Path(__file__).resolve().parent.parent
PROCESS = """
import os, sys, time
from pathlib import Path
from utils.demo.build_once import build_once, put_in_place
root, seconds = Path(sys.argv[1]), float(sys.argv[2])
def make(build):
    (build / "part").mkdir(parents=True)
    (build / "part" / "half").write_text("")
    with open(root.parent / "made.txt", "a") as file:
        file.write(f"{os.getpid()}\\n")
    print("making", flush=True)
    time.sleep(seconds)
    put_in_place(build, root, ["part"], "done.json", {})
build_once(root, (root / "done.json").is_file, lambda: None, make)
print("over", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """(seconds to make) -> a process that makes tmp_path/data; killed at the end of the test."""
    started = []

    def one(seconds):
        command = [sys.executable, "-c", PROCESS, str(tmp_path / "data"), str(seconds)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return started[-1]
    yield one
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_process_does_not_block_the_next(tmp_path, start):
    holder = start(600)
    assert holder.stdout.readline() == "making\n"
    waiting = start(0)
    assert "another process draws" in waiting.stdout.readline()
    holder.kill()  # SIGKILL: it cleans nothing up
    output, _ = waiting.communicate(timeout=60)
    assert output.split() == ["making", "over"] and waiting.returncode == 0
    root = tmp_path / "data"
    assert {path.name for path in root.iterdir()} - {".lock"} == {"part", "done.json"}
    assert len((tmp_path / "made.txt").read_text().split()) == 2


def test_of_four_processes_one_makes_it(tmp_path, start):
    processes = [start(1) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len((tmp_path / "made.txt").read_text().split()) == 1
    assert sum("making" in output for output in outputs) == 1
    assert all(output.count("waiting") <= 1 and output.endswith("over\n") for output in outputs)


def test_waiting_is_told_once_and_ends_when_the_data_is_complete(tmp_path, start, capsys):
    holder = start(600)
    assert holder.stdout.readline() == "making\n"
    began = time.monotonic()
    build_once.build_once(tmp_path / "data", lambda: time.monotonic() > began + 1, lambda: None, pytest.fail)
    assert capsys.readouterr().out.count("another process draws") == 1
    assert holder.poll() is None  # the lock is still held


@pytest.mark.parametrize("content", ["", "elsewhere 1 0123abc"])
def test_a_lock_file_that_stayed_behind_means_nothing(tmp_path, content):
    (tmp_path / ".lock").write_text(content, encoding="ascii")
    (tmp_path / ".building-dead").mkdir()
    made = []
    build_once.build_once(tmp_path, lambda: bool(made), lambda: None, made.append)
    assert len(made) == 1 and not (tmp_path / ".building-dead").exists()


def test_the_lock_is_free_after_an_error(tmp_path):
    def failing(build):
        build.mkdir()
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build_once.build_once(tmp_path, lambda: False, lambda: None, failing)
    assert not list(tmp_path.glob(".building-*"))


def test_a_folder_of_others_gets_no_file(tmp_path):
    def refuse():
        raise UserError("not ours")

    with pytest.raises(UserError):
        build_once.build_once(tmp_path / "theirs", lambda: False, refuse, pytest.fail)
    assert not (tmp_path / "theirs").exists()


def test_the_marker_comes_last(tmp_path):
    build = tmp_path / ".building-1"
    (build / "part").mkdir(parents=True)
    (tmp_path / "done.json").write_text("{}")
    build_once.put_in_place(build, tmp_path, ["part"], "done.json", {"size": 1})
    assert json.loads((tmp_path / "done.json").read_text()) == {"size": 1} and (tmp_path / "part").is_dir()
