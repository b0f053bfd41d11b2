"""rfdetr/run_report.py: commands that can be pasted, whatever the paths and names are."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from rfdetr import run_report


@pytest.mark.parametrize("rows", [91, 3])
def test_the_next_command_survives_blanks_and_braces(rows):
    cfg = SimpleNamespace(SIZE="nano", DATASET_DIR="./my {data}", RUNS_DIR="my runs")
    text = run_report.next_command(cfg, Path("my runs") / "{1}", ["car", "traffic light"], rows)
    *first, stage2 = [shlex.split(line) for line in text.splitlines()[1:]]
    used = "checkpoint_mydata.pth" if rows == 91 else "checkpoint_best_regular.pth"
    assert stage2[:12] == ["python", "train_seg_stage2.py", "--size", "nano", "--stage1_run", "my runs/{1}",
                           "--checkpoint", f"my runs/{{1}}/{used}", "--dataset_dir", "my {data}",
                           "--runs_dir", "my runs"]
    cfg.RUNS_DIR = "./runs"  # which stage 2 takes by itself
    assert "runs_dir" not in run_report.next_command(cfg, Path("my runs") / "{1}", ["car", "traffic light"], rows)
    assert first == ([["python", "shrink_head.py", "--in_ckpt", "my runs/{1}/checkpoint_best_regular.pth", "--out_ckpt",
                       "my runs/{1}/checkpoint_mydata.pth", "--keep", "car", "traffic light"]] if rows == 91 else [])
