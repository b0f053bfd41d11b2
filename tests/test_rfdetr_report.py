"""rfdetr/run_report.py: commands that can be pasted, whatever the paths and names are."""

import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from rfdetr import run_report

WORDS = ["plain-name_1.pth", "D:/data/runs", "my runs/a b", "a&b (1)", "50% {x}", "a;b", "tick`s", "cash$HOME",
         "it's", "wow!", "", "Gef\u00e4\u00df", "a,b", "~/x", "#1"]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_one_word_in_the_shell(word):
    assert shlex.split(run_report.pasted(word)) == [word] == shlex.split(run_report.quoted([word]))
    if shutil.which("bash"):
        done = subprocess.run(["bash", "-c", f"printf %s {run_report.pasted(word)}"], capture_output=True, timeout=30)
        assert done.stdout.decode("utf-8") == word


def test_quotes_only_where_they_are_needed():
    assert run_report.pasted(Path("runs") / "detector_nano_384_1") == "runs/detector_nano_384_1"
    assert run_report.pasted(Path("my runs")) == '"my runs"'
    assert run_report.quoted(["car", "traffic light"]) == '"car" "traffic light"'


@pytest.mark.parametrize("rows", [91, 3])
def test_the_next_command_survives_blanks_and_braces(rows):
    cfg = SimpleNamespace(SIZE="nano", DATASET_DIR="./my {data}")
    text = run_report.next_command(cfg, Path("my runs") / "{1}", ["car", "traffic light"], rows)
    *first, stage2 = [shlex.split(line) for line in text.splitlines()[1:]]
    used = "checkpoint_mydata.pth" if rows == 91 else "checkpoint_best_regular.pth"
    assert stage2[:10] == ["python", "train_seg_stage2.py", "--size", "nano", "--stage1_run", "my runs/{1}",
                           "--checkpoint", f"my runs/{{1}}/{used}", "--dataset_dir", "my {data}"]
    assert first == ([["python", "shrink_head.py", "--in_ckpt", "my runs/{1}/checkpoint_best_regular.pth", "--out_ckpt",
                       "my runs/{1}/checkpoint_mydata.pth", "--keep", "car", "traffic light"]] if rows == 91 else [])
