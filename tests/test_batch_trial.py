"""BATCH_SIZE = 0 and PRECISION = "auto": what is chosen, that the model stays as it is, what a resume keeps."""

import dataclasses

import pytest
import torch
from conftest import Killed, dies_after
from gpu_runs import outcome, prepare, reason_to_skip
from test_engine import compute_losses, run

from utils import config, processes
from utils.config import UserError
from utils.datasets import loaders
from utils.training import batch_trial, plan
from utils.training.plan import Plan, best_precision

CONSTANTS = {"BATCH_SIZE": 0, "GRADIENT_ACCUMULATION_STEPS": 1}


@pytest.mark.parametrize(("effective", "expected"), [(16, [1, 2, 4, 8, 16]), (24, [1, 2, 4, 8]), (3, [1]), (1, [1])])
def test_only_batches_that_the_effective_batch_is_a_multiple_of_are_tried(effective, expected):
    assert batch_trial.powers(effective) == expected


@pytest.mark.parametrize("room", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("guess", [0, 1, 5, 8, 100])
def test_the_largest_that_fits_is_found_from_any_guess(room, guess):
    tried, sizes = [], [1, 2, 4, 8, 16]

    def fits(size):
        tried.append(size)
        return size <= room
    found = batch_trial.largest(sizes, guess, fits)
    assert found == max((size for size in sizes if size <= room), default=0)
    assert len(tried) == len(set(tried))
    if room == guess == 8:
        assert tried == [8, 16]


def auto(coco, folder, **kwargs):
    return run(coco, folder, batch=0, batch_size=0, usual_batch=8, accumulate=1, constants=CONSTANTS, **kwargs)


def test_a_run_on_the_cpu_keeps_the_effective_batch_and_its_numbers_when_resumed(coco, tmp_path, capsys, monkeypatch):
    plain, _ = run(coco, tmp_path / "plain", batch=4, accumulate=2, epochs=2)
    capsys.readouterr()
    chosen, result = auto(coco, tmp_path / "auto", epochs=2)
    assert "BATCH_SIZE = 4, GRADIENT_ACCUMULATION_STEPS = 2: a CPU" in capsys.readouterr().out
    assert result["chosen"] == {"BATCH_SIZE": 4, "GRADIENT_ACCUMULATION_STEPS": 2}
    assert torch.load(tmp_path / "auto" / "last.pt")["constants"] == result["chosen"]
    with pytest.raises(Killed):
        auto(coco, tmp_path / "killed", epochs=2, losses=dies_after(2, compute_losses))
    monkeypatch.setattr(batch_trial, "ON_CPU", 1)  # a new run would choose otherwise
    capsys.readouterr()
    resumed, _ = auto(coco, tmp_path / "killed", epochs=2, resume=True)
    printed = capsys.readouterr().out
    assert "BATCH_SIZE = 4, GRADIENT_ACCUMULATION_STEPS = 2: as the run began" in printed and " was " not in printed
    for name, value in plain.state_dict().items():
        assert torch.equal(value, chosen.state_dict()[name]) and torch.equal(value, resumed.state_dict()[name]), name


def test_a_number_is_taken_as_it_is(coco, tmp_path):
    _, result = run(coco, tmp_path / "out", epochs=1, batch_size=2, constants={"BATCH_SIZE": 2})
    assert "chosen" not in result


class Card(torch.nn.Module):
    def to(self, device):
        return self


@pytest.fixture
def gpu(monkeypatch):
    """-> function: (images that fit, guess or error of the estimate) -> what `_chosen` makes of it, sizes that were
    tried"""
    monkeypatch.setattr(processes, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(batch_trial, "free_gigabytes", lambda device: 10.0)
    settings = Plan(epochs=1, learning_rates={"LR": 1.0}, loss_weights={"a": 1.0}, batch_size=0, usual_batch=4,
                    accumulate=4)

    def choose(room, guess):
        tried = []

        def step_fits(model, loader, compute_losses, plan, device, free):
            tried.append(plan.batch_size)
            return plan.batch_size <= room

        def of_training(*args):
            assert args[3].batch_size == 4
            if isinstance(guess, Exception):
                raise guess
            return type("Needs", (), {"batch_for": lambda self, gigabytes: guess})()
        monkeypatch.setattr(batch_trial, "step_fits", step_fits)
        monkeypatch.setattr(batch_trial.needs, "of_training", of_training)
        size, why = batch_trial._chosen(Card(), None, None, settings, [], None, batch_trial.powers(16))
        return size, why, tried
    return choose


def test_a_gpu_begins_with_the_estimate_and_goes_on_by_trial(gpu):
    assert gpu(room=9, guess=9) == (8, "the most that fit into the 10.0 GB free on this GPU", [8, 16])
    assert gpu(room=2, guess=9)[::2] == (2, [8, 4, 2])
    assert gpu(room=99, guess=ValueError("a network of one's own")) == (
        16, "all images of an optimizer step fit", [4, 8, 16])
    with pytest.raises(UserError, match="^BATCH_SIZE = 0: not even one image fits into the 10.0 GB") as error:
        gpu(room=0, guess=3)
    assert "\n" not in str(error.value)


def test_a_script_chooses_by_real_steps_on_a_gpu_and_trains_as_if_it_had_been_told(tmp_path):
    if reason := reason_to_skip(tmp_path):
        pytest.skip(reason)
    prepare(tmp_path)
    outcome(tmp_path, "windshield", "cpu")
    chosen = outcome(tmp_path, "unet", "cuda", where="chosen", BATCH_SIZE=0, PRECISION="auto")
    # the script's own batch is 16; the pretend GPU's memory never ends
    assert "BATCH_SIZE = 16, GRADIENT_ACCUMULATION_STEPS = 1: all images" in chosen["printed"]
    assert "PRECISION = 'auto': bf16" in chosen["printed"]
    told = outcome(tmp_path, "unet", "cuda", where="told", BATCH_SIZE=16, PRECISION="bf16")
    assert chosen["history"] and chosen["history"] == told["history"]


# ---- the batch that a script's other settings were made for --------------------------------------------------------

def test_the_scripts_own_batch_is_known_whatever_was_edited():
    edited = {"__file__": "/somewhere/Training_RTDETR.py", "BATCH_SIZE": 0, "DEMO": {"BATCH_SIZE": 8}}
    assert config.resolve(edited, {}).usual_batch == {"BATCH_SIZE": 16}
    assert config.resolve(edited, {"demo": True}).usual_batch == {"BATCH_SIZE": 8}
    assert config.resolve({"BATCH_SIZE": 5}, {"BATCH_SIZE": 0}).usual_batch == {"BATCH_SIZE": 5}
    cfg = config.resolve(edited | {"NUM_EPOCHS": 1, "LEARNING_RATE": 1.0, "GRADIENT_ACCUMULATION_STEPS": 2}, {})
    made = Plan.of(cfg, loss_weights={"a": 1.0})
    assert (made.batch_size, made.usual_batch, made.accumulate) == (0, 16, 2)


# ---- precision -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("bf16", "known", "expected"), [
    (True, ("float32", "bf16"), "bf16"), (True, ("float32", "bf16", "fp16"), "bf16"), (True, ("float32",), "float32"),
    (False, ("float32", "bf16", "fp16"), "fp16"), (False, ("float32", "bf16"), "float32"),  # SPDNet: never fp16
])
def test_auto_is_what_gpu_and_network_have_in_common(monkeypatch, bf16, known, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    assert best_precision(known, torch.device("cuda")) == expected


@pytest.mark.parametrize("emulated", [True, False])
def test_auto_on_a_cpu_is_in_the_plan_and_in_the_constants(monkeypatch, capsys, emulated):
    monkeypatch.setattr(plan.processes, "bf16_is_emulated", lambda device: emulated)
    monkeypatch.setattr(plan.processes, "device", lambda: torch.device("cpu"))
    cfg = config.Config(NUM_EPOCHS=1, LEARNING_RATE=1.0, PRECISION="auto")
    expected = "float32" if emulated else "bf16"
    assert Plan.of(cfg, loss_weights={"a": 1.0}).precision == cfg.as_dict()["PRECISION"] == expected
    assert f"PRECISION = 'auto': {expected}" in capsys.readouterr().out
    with pytest.raises(UserError, match="PRECISION = 'half': choose one of auto, float32, bf16"):
        Plan.of(config.Config(NUM_EPOCHS=1, LEARNING_RATE=1.0, PRECISION="half"), loss_weights={"a": 1.0})


# ---- a validation that does not fit --------------------------------------------------------------------------------

def batches(*sizes):
    return [{"images": torch.arange(size), "names": list(range(size))} for size in sizes]


class Loader(list):
    """Takes attributes as a DataLoader does."""


@pytest.mark.parametrize(("room", "calls"), [(8, [8, 5]), (4, [8, 4, 4, 4, 1]), (3, [8, 4, 2, 2, 2, 2, 2, 2, 1])])
def test_a_validation_batch_that_is_too_large_comes_in_halves_said_once(capsys, room, calls):
    loader, sizes = Loader(batches(8, 5)), []

    def work(batch):
        assert not torch.is_grad_enabled()
        sizes.append(len(batch["images"]))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert batch["names"] == batch["images"].tolist()
        return batch["names"]
    whole = [list(range(8)), list(range(5))]
    assert sum(loaders.each(work, loader), []) == sum(whole, [])
    assert sizes == calls
    sizes.clear()
    assert sum(loaders.each(work, loader), []) == sum(whole, []) and max(sizes) <= room  # the next epoch knows
    assert capsys.readouterr().out.count("validation batch of 8 images") == (room < 8)


def test_one_image_that_does_not_fit_is_an_error():
    def work(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        list(loaders.each(work, Loader(batches(2))))


def test_the_plan_that_comes_out_is_checked_as_any_other():
    settings = Plan(epochs=1, learning_rates={"LR": 1.0}, loss_weights={"a": 1.0}, batch_size=4, accumulate=2)
    assert batch_trial.settled(None, None, None, settings, None, None, {}) is settings
    assert batch_trial.numbers(dataclasses.replace(settings, names={"batch_size": "--batch", "accumulate": "--accum"}),
                               {"BATCH": 0, "ACCUM": 4, "EPOCHS": 1}) == {"BATCH": 4, "ACCUM": 2}
