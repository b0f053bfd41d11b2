"""Checkpoints are data; frozen means frozen."""

import argparse
import copy
import os
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from utils import checkpoint, config, freeze


class Dangerous:
    def __reduce__(self):
        return (print, ("code ran",))


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def test_saved_files_load_with_a_plain_torch_load(tmp_path):
    checkpoint.save({"model": network().state_dict(), "step": 3, "history": [{"a": 1.0}]}, tmp_path / "a" / "x.pt")
    content = torch.load(tmp_path / "a" / "x.pt")
    assert content["step"] == 3 and content["history"] == [{"a": 1.0}]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.pt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_others_may_read_the_weights_as_the_files_beside_them(tmp_path):
    def write(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
        save_file({"a": torch.ones(1)}, folder / "model.safetensors")
        (folder / "model.safetensors").chmod(0o600)  # as safetensors 0.8 leaves it

    checkpoint.replace_folder(write, tmp_path / "model")
    weights, beside = (tmp_path / "model" / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == beside.stat().st_mode


def test_a_full_disk_keeps_the_old_folder(tmp_path):
    """safetensors has an error of its own for it, which is no OSError."""
    def write(path):
        path.mkdir()
        raise SafetensorError("I/O error: No space left on device")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    with pytest.raises(config.UserError, match="model.*No space left"):
        checkpoint.replace_folder(write, tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    checkpoint.save({"step": 1}, tmp_path / "x.pt")
    with pytest.raises(Exception):  # noqa: B017  (pickling a lambda fails in several ways)
        checkpoint.save({"step": lambda: 0}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt") == {"step": 1}


def test_code_in_a_checkpoint_is_refused_but_a_namespace_is_data(tmp_path, capsys):
    torch.save({"model": Dangerous()}, tmp_path / "bad.pt")
    with pytest.raises(checkpoint.CheckpointError, match="bad.pt"):
        checkpoint.load(tmp_path / "bad.pt")
    assert "code ran" not in capsys.readouterr().out
    torch.save({"model": network().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "args.pt")
    assert checkpoint.load(tmp_path / "args.pt")["args"].lr == 1


def test_wrapped_states_are_found(tmp_path):
    state = network().state_dict()
    for content in (state, {"model": state, "epoch": 1}, {"state_dict": {f"module.{k}": v for k, v in state.items()}}):
        torch.save(content, tmp_path / "x.pt")
        assert checkpoint.load_state(tmp_path / "x.pt").keys() == state.keys()
    torch.save({"epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(checkpoint.CheckpointError, match="no state dict"):
        checkpoint.load_state(tmp_path / "x.pt")


def test_mismatches_name_every_kind_of_key():
    state = network().state_dict()
    state["0.weight"] = torch.zeros(9, 9)
    state["extra"] = state.pop("0.bias")
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.load_into(network(), state, "file.pt")
    for part in ("file.pt", "1 missing (0.bias)", "1 unexpected (extra)", "0.weight (9, 9) instead of (3, 4)"):
        assert part in str(error.value)


def test_named_tensors_may_stay_and_everything_else_must_fit():
    source, model = network(), network()
    state = {name: value for name, value in source.state_dict().items() if name != "0.bias"}
    bias = model[0].bias.detach().clone()
    with pytest.raises(checkpoint.CheckpointError, match=r"file.pt.*tiny.*missing.*0\.bias.*Try another"):
        checkpoint.load_into(model, state, "file.pt", "tiny", "Try another.")
    checkpoint.load_into(model, state, "file.pt", kept=["0.bias"])
    assert torch.equal(model[0].bias, bias) and torch.equal(model[0].weight, source[0].weight)
    with pytest.raises(checkpoint.CheckpointError, match=r"unexpected.*0\.bias"):
        checkpoint.load_into(model, source.state_dict(), "file.pt", kept=["0.bias"])


def test_broken_and_missing_files_are_named(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    for name in ("x.pt", "none.pt"):
        with pytest.raises(checkpoint.CheckpointError, match=name):
            checkpoint.load(tmp_path / name)


def test_unwritable_folder_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(config.UserError, match="cannot write"):
        checkpoint.require_writable(tmp_path / "file" / "out")
    with pytest.raises(config.UserError, match="MB free"):
        checkpoint.require_writable(tmp_path / "out", megabytes=1e12)


@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_frozen_modules_stay_in_eval_and_do_not_move(duplicate):
    parent = nn.Sequential(nn.Linear(4, 4), network())
    freeze.freeze(parent[1])
    parent = duplicate(parent)
    before = freeze.fingerprint(parent[1])
    parent.train()
    assert parent[0].training and not any(m.training for m in parent[1].modules())
    optimizer = torch.optim.SGD([p for p in parent.parameters() if p.requires_grad], lr=1.0)
    parent(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert parent[0].weight.grad is not None and parent[1][0].weight.grad is None
    assert freeze.fingerprint(parent[1]) == before
    assert freeze.frozen_modules(parent).keys() == {"1"}


def test_fingerprint_sees_parameters_and_buffers():
    module = network()
    before = freeze.fingerprint(module)
    module[1].running_mean[0] += 1e-6
    changed = freeze.fingerprint(module)
    module[0].weight.data[0, 0] += 1e-6
    assert len({before, changed, freeze.fingerprint(module)}) == 3


def test_unfreeze_restores_training():
    module = freeze.unfreeze(freeze.freeze(network()))
    module.train()
    assert module.training and all(p.requires_grad for p in module.parameters())
