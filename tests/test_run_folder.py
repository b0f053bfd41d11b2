"""A folder belongs to one run at a time, and nothing that is not this project's is deleted in it."""

import json
import multiprocessing
import os
import random
import socket
import threading
import time

import pytest
import torch
from script_processes import started

from utils import system
from utils.config import UserError
from utils.datasets import loaders
from utils.training import engine, run_folder
from utils.training.plan import Plan

ROUNDS = int(os.environ.get("RUN_FOLDER_ROUNDS", "3"))  # of killed runs; each takes about three seconds


def hold(folder, claimed, end):
    """In a process of its own: claim, say so, wait."""
    with run_folder.claimed(folder):
        claimed.set()
        end.wait(60)


class Pair(torch.utils.data.Dataset):
    """Eight numbers as a data set of this project."""

    notes = ()

    def __len__(self):
        return 8

    def __getitem__(self, key):
        index = key[1] if isinstance(key, tuple) else key
        return {"image": torch.full((3, 2, 2), index, dtype=torch.uint8), "labels": torch.zeros(0), "image_id": index,
                "boxes": torch.zeros(0, 4), "size": (2, 2), "domain": "clean", "path": str(index)}


def train(folder, run, resume=False, epochs=200):
    """A training of nothing much, whose files say which run wrote them."""
    model = torch.nn.Linear(3, 1)

    def compute_losses(model, batch):
        return {"loss": model(batch["images"].mean((2, 3))).square().mean()}
    plan = Plan(epochs=epochs, learning_rates={"LR": 1e-3}, loss_weights={"loss": 1.0}, checkpoint_steps=1,
                resume=resume)
    return engine.fit(model, loaders.training_loader(Pair(), 2, 0, 0), compute_losses, plan, output_dir=folder,
                      parameters=[{"params": list(model.parameters()), "lr": 1e-3}],
                      evaluate=lambda model: {"run": float(run)}, score="run", constants={"RUN": run})


def keep_training(folder, run):
    """In a process of its own: train until killed; a folder in use ends it with code 3."""
    torch.set_num_threads(1)
    try:
        train(folder, run)
    except UserError as error:
        os._exit(3 if "in use by a run" in str(error) else 4)


def runs_in(folder):
    """-> the runs that the files in a folder say they are of."""
    found = set()
    for name in ("last.pt", "best.pt"):
        if (folder / name).is_file():
            content = torch.load(folder / name)
            found.add(content["constants"]["RUN"])
            found |= {int(record["run"]) for record in content.get("history", ())}
    if (folder / "metrics.json").is_file():
        history = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["history"]
        found |= {int(record["run"]) for record in history}
    return found


def test_a_second_run_is_refused_and_a_killed_one_does_not_block(tmp_path):
    ready, end = multiprocessing.get_context("spawn").Event(), multiprocessing.get_context("spawn").Event()
    holder = started(hold, tmp_path / "out", ready, end)
    assert ready.wait(60)
    with pytest.raises(UserError, match=rf"out is in use by a run .*process {holder.pid} on .*choose another folder"):
        train(tmp_path / "out", 1, epochs=1)
    assert not (tmp_path / "out" / "last.pt").exists()
    holder.kill()
    holder.join()
    assert (tmp_path / "out" / run_folder.OWNER).is_file()  # it could not take its name away
    train(tmp_path / "out", 2, epochs=1)
    assert runs_in(tmp_path / "out") == {2} and not (tmp_path / "out" / run_folder.OWNER).exists()


def test_a_claim_inside_a_claim_is_one(tmp_path):
    with run_folder.claimed(tmp_path / "out"):
        with run_folder.claimed(tmp_path / "out"):
            pass
        assert (tmp_path / "out" / run_folder.OWNER).is_file()
    assert not (tmp_path / "out" / run_folder.OWNER).exists()
    with pytest.raises(UserError, match="cannot write to"):
        (tmp_path / "file").write_text("x")
        with run_folder.claimed(tmp_path / "file"):
            pass


def test_a_run_on_another_machine_is_seen_by_its_signs_of_life(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "BEAT_SECONDS", 0.2)
    owner = tmp_path / run_folder.OWNER
    owner.write_text(json.dumps({"host": "elsewhere", "process": 7}), encoding="utf-8")
    ended = threading.Event()
    threading.Thread(target=run_folder._beat, args=(owner, ended), daemon=True).start()
    with pytest.raises(UserError, match="in use by a run .*process 7 on elsewhere"), run_folder.claimed(tmp_path):
        pass
    assert json.loads(owner.read_text(encoding="utf-8"))["host"] == "elsewhere"
    ended.set()
    time.sleep(0.3)
    with run_folder.claimed(tmp_path):
        assert json.loads(owner.read_text(encoding="utf-8")) == {"host": socket.gethostname(), "process": os.getpid()}
    assert "last written by a run on elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"host": 3, "process": "x"}', "\x00"])
def test_a_damaged_owner_file_blocks_nobody(tmp_path, content):
    (tmp_path / run_folder.OWNER).write_text(content, encoding="utf-8")
    with run_folder.claimed(tmp_path):
        pass


def test_only_this_projects_files_of_dead_processes_are_deleted(tmp_path):
    dead = multiprocessing.get_context("spawn").Process(target=int)
    dead.start()
    dead.join()
    theirs = [".mywork.tmp", f".notes.{dead.pid}.tmp", ".last.pt.tmp", f"last.{dead.pid}{system.TEMPORARY}",
              f".last.pt.{os.getpid()}{system.TEMPORARY}"]
    for name in theirs:
        (tmp_path / name).write_text("a user's, or of a process that lives")
    (tmp_path / f".folder.{dead.pid}{system.TEMPORARY}").mkdir()
    (tmp_path / f".last.pt.{dead.pid}{system.TEMPORARY}").write_text("half")
    with run_folder.claimed(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, run_folder.LOCK,
                                                          f".folder.{dead.pid}{system.TEMPORARY}"}


def test_of_two_runs_in_one_folder_killed_at_random_no_file_is_the_others(tmp_path):
    dice, run = random.Random(0), 0
    out = tmp_path / "out"
    for _ in range(ROUNDS):
        pair = []
        for _ in range(2):
            run += 1
            pair.append(started(keep_training, out, run))
        time.sleep(dice.uniform(0.5, 3))
        for process in dice.sample(pair, 2):
            process.kill()
            process.join()
        assert all(process.exitcode == 3 or process.exitcode < 0 for process in pair)  # refused, or killed
        for folder in (out, *out.glob("previous_*")):
            assert len(runs_in(folder)) <= 1, folder
    assert runs_in(out)
