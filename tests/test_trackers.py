"""TRACKERS: TensorBoard's files, a stand-in tracker behind Accelerate's class, a missing package, one that fails."""

import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_engine import run

from utils.config import UserError
from utils.training import trackers


def curve(folder, name):
    """-> [(step, value), ...] of TensorBoard's files."""
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_every_step_and_every_epoch(coco, tmp_path):
    _, result = run(coco, tmp_path / "out", epochs=2, evaluate=lambda model: {"val/score": 0.5}, score="val/score")
    steps = [step for step, _ in curve(tmp_path / "out", "train/learning_rate")]
    assert steps == list(range(1, result["history"][-1]["step"] + 1))
    assert curve(tmp_path / "out", "val/score") == [(1, 0.5), (2, 0.5)]
    assert [step for step, _ in curve(tmp_path / "out", "epoch/mse")] == [1, 2]


class FakeRun:
    """What wandb.init returns."""

    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values, step=None):
        if len(self.logged) == self.fails_at:
            raise ConnectionError("no route to host\nand a page of advice")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True

    fails_at = None


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: Accelerate's own class talks to it."""
    package = types.ModuleType("wandb")
    package.__spec__ = types.SimpleNamespace(origin="stand-in", name="wandb", submodule_search_locations=None)
    package.run, package.given, package.settings = FakeRun(), {}, {}
    package.config = types.SimpleNamespace(update=lambda values, allow_val_change: package.settings.update(values))

    def init(**options):
        if package.refuses:
            raise RuntimeError("api_key not configured")
        package.given = options
        return package.run
    package.init, package.refuses = init, False
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_a_tracker_gets_constants_steps_and_epochs(coco, tmp_path, wandb):
    _, result = run(coco, tmp_path / "night", epochs=2, trackers=("wandb",), evaluate=lambda model: {"val/score": 0.5},
                    score="val/score", constants={"LEARNING_RATE": 1e-2, "DECAY_AT": (0.5, 0.75)})
    assert wandb.given["project"] == "RainSight" and wandb.given["name"] == "night"
    assert wandb.settings == {"LEARNING_RATE": 1e-2, "DECAY_AT": "(0.5, 0.75)"}
    steps = [step for step, values in wandb.run.logged if "train/mse" in values]
    assert steps == list(range(1, result["history"][-1]["step"] + 1))
    epochs = [(step, values["epoch/mse"]) for step, values in wandb.run.logged if "val/score" in values]
    assert epochs == [(record["step"], record["mse"]) for record in result["history"]]
    assert [step for step, _ in wandb.run.logged] == sorted(step for step, _ in wandb.run.logged)  # it drops others
    assert wandb.run.finished and not (tmp_path / "night" / "tb").exists()


def test_a_tracker_that_fails_does_not_end_the_training(coco, tmp_path, wandb, capsys):
    wandb.run.fails_at = 1
    _, result = run(coco, tmp_path / "out", epochs=2, trackers=("tensorboard", "wandb"))
    assert len(result["history"]) == 2 and len(curve(tmp_path / "out", "epoch/mse")) == 2
    assert capsys.readouterr().out.count("note: TRACKERS: wandb failed (no route to host) and is left out") == 1


def test_a_tracker_that_does_not_start_is_one_line_before_the_first_step(coco, tmp_path, wandb):
    wandb.refuses = True

    def losses(model, batch):
        raise AssertionError("a step was done")
    with pytest.raises(UserError, match="wandb does not start .api_key not configured") as error:
        run(coco, tmp_path / "out", losses=losses, trackers=("wandb",))
    assert "\n" not in str(error.value)


def test_a_missing_package_and_an_unknown_name_are_one_line(monkeypatch, tmp_path):
    (tmp_path / "mlflow").mkdir()  # a folder that looks like the package
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(UserError, match="TRACKERS: the package mlflow is missing: pip install mlflow"):
        trackers.require("TRACKERS", ("mlflow",))
    for wrong in ("wandb", ("board",), None, ([],)):
        with pytest.raises(UserError, match="choose some of tensorboard, wandb, mlflow, trackio"):
            trackers.require("TRACKERS", wrong)
    trackers.require("TRACKERS", ())
