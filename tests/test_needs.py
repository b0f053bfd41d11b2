"""The memory that a training is said to need, against that of a real step."""

import importlib
import json
import os

import pytest
import torch
from gpu_runs import SETTINGS, outcome, prepare
from script_processes import started

from tools import golden, memory_table, stand_in_gpu
from utils import datasets, memory
from utils.training import engine, needs
from utils.training.needs import Needs

CASES = {"unet": {}, "adaptation": {}, "rtdetr": {}, "conditional": {}, "stage1": {"MULTI_SCALE": True}}


def measure(folder, name, changes, file):
    """In a process: write what is estimated of a step and what a step on the CPU takes, in bytes, to a file."""
    os.chdir(folder)
    kept = stand_in_gpu.accelerator_without_devices()
    step = golden.STEPS[name]
    known = golden.demo_of(step.script)[1]
    values = golden.constants_of(name, step, folder)
    values |= {key: value for key, value in (SETTINGS | changes).items() if key in known}

    def fit(model, loader, compute_losses, plan, *, parameters, optimizer=torch.optim.AdamW, **others):
        before = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
        with memory_table.as_on_a_gpu():
            found = needs.of_training(model, loader, compute_losses, plan, parameters, optimizer)
        assert torch.equal(before[1], torch.get_rng_state())
        assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        batch = datasets.to_device(needs.fullest_batch(loader, plan), torch.device("cpu"))
        model.train()
        real = memory.peak_bytes(lambda: sum(
            plan.loss_weights.get(loss, 0) * value
            for loss, value in compute_losses(model, batch).items()).backward())
        own = {id(p): p.nbytes for part in (model, *needs._modules_of(compute_losses)) for p in part.parameters()}
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        file.write_text(json.dumps({"needs": found, "step": real / 1e9, "weights": sum(own.values()) / 1e9,
                                    "trained": trained / 1e9, "ema": bool(plan.ema)}), encoding="utf-8")
        raise SystemExit(0)
    engine.fit = fit
    importlib.import_module(step.script).main(**values)
    del kept


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    if not torch.backends.cuda.is_built():
        pytest.skip("PyTorch's CPU build has no autograd for GPUs")
    folder = tmp_path_factory.mktemp("needs")
    prepare(folder)
    outcome(folder, "windshield", "cpu")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_steps_memory_is_known_before_it(work, name):
    file = work / f"{name}.json"
    process = started(measure, work, name, CASES[name], file)
    process.join()
    assert process.exitcode == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    own = Needs(*found["needs"])
    assert own.weights == pytest.approx(found["weights"], rel=0.05)  # and buffers
    assert 0.8 * found["trained"] < own.gradients < 1.001 * found["trained"]  # SPDNet has tensors that are never used
    assert own.optimizer == pytest.approx((3 if found["ema"] else 2) * found["trained"], rel=1e-3)
    # a GPU computes attention and convolutions by other means: not to the last byte
    assert own.gradients + own.activations == pytest.approx(found["step"], rel=0.1)


def test_the_batch_that_fits():
    own = Needs(weights=1.0, optimizer=2.0, gradients=1.0, activations=8.0, images=4)  # 2 GB an image
    assert own.total == 12
    assert own.batch_for(8.1 + 0.7) == 2 and own.batch_for(7.9 + 0.7) == 1
    assert own.batch_for(4.0) == 0
