"""The training loop: resume is bit-identical, groups are whole, frozen parts are checked, Ctrl+C saves."""

import copy
import dataclasses
import math
import os
import signal
import threading

import pytest
import torch
from conftest import Killed, dies_after, names_in, small_spdnet
from torch import nn

from utils import checkpoint, config, datasets, freeze
from utils.config import UserError
from utils.datasets import loaders, presets
from utils.training import engine, run_state
from utils.training.plan import Plan
from utils.training.schedule import schedule_factor

NAMES = {0: "person", 1: "car"}


class Net(nn.Module):
    """A trainable convolution with dropout and live BatchNorm in front of a frozen one."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.3))
        self.tail = freeze.freeze(nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3)))

    def forward(self, images):
        return self.tail(self.head(images))


def compute_losses(model, batch):
    return {"mse": (model(batch["images"]) - batch["images"]).square().mean()}


def run(coco, out, epochs=3, model=None, losses=compute_losses, batch=2, accumulate=2, **kwargs):
    """kwargs: fields of Plan and arguments of engine.fit."""
    engine.seed_everything(1)
    model = model or Net()
    data = datasets.CocoDetectionDataset(coco / "coco", "train", NAMES, presets.detection(64), constant="COCO_DIR",
                                         domain="clean", seed=1)
    loader = loaders.training_loader(data, batch, 0, seed=1)
    settings = {"epochs": epochs, "learning_rates": {"LEARNING_RATE": 1e-2}, "loss_weights": {"mse": 1.0},
                "accumulate": accumulate, "checkpoint_steps": 1, "warmup_steps": 2, "clip_norm": 1.0}
    functions = {"output_dir": out, "parameters": [{"params": list(model.head.parameters()), "lr": 1e-2}]}
    fields = {field.name for field in dataclasses.fields(Plan)}
    plan = Plan(**settings | {name: value for name, value in kwargs.items() if name in fields})
    functions |= {name: value for name, value in kwargs.items() if name not in fields}
    return model, engine.fit(model, loader, losses, plan, **functions)


@pytest.mark.parametrize("batches_before", [1, 3, 4, 5, 9])
def test_a_killed_run_resumes_bit_for_bit(coco, tmp_path, batches_before):
    whole, result = run(coco, tmp_path / "whole")
    with pytest.raises(Killed):
        run(coco, tmp_path / "killed", losses=dies_after(batches_before, compute_losses))
    resumed, again = run(coco, tmp_path / "killed", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    strip = lambda history: [{k: v for k, v in r.items() if k not in ("time", "images_per_s")} for r in history]  # noqa: E731
    assert strip(result["history"]) == strip(again["history"])


def test_files_and_history(coco, tmp_path, every_curve):
    _, result = run(coco, tmp_path / "out", evaluate=lambda model: {"val/score": 0.5}, score="val/score",
                    sample_images=lambda model: {"picture": torch.rand(3, 8, 8)}, constants={"LEARNING_RATE": 1e-2})
    names = names_in(tmp_path / "out")
    assert names == {"last.pt", "best.pt", "metrics.json", "curves.png", "tb"}
    content = torch.load(tmp_path / "out" / "last.pt")
    for key in ("model", "optimizer", "epoch", "step", "best_score", "torch_rng", "constants", "model_args"):
        assert key in content
    assert content["step"] == 6 and result["best_epoch"] == 1 and len(result["history"]) == 3
    assert set(result["history"][0]["time"]) == {"data", "forward", "backward", "step", "save"}
    assert sum(result["history"][0]["time"].values()) == pytest.approx(1.0)


def test_a_new_start_sets_the_earlier_run_aside(coco, tmp_path):
    run(coco, tmp_path / "out", epochs=1)
    before = (tmp_path / "out" / "last.pt").read_bytes()
    run(coco, tmp_path / "out", epochs=1)
    assert (tmp_path / "out" / "previous_1" / "last.pt").read_bytes() == before


def test_a_clip_norm_of_0_clips_nothing(coco, tmp_path):
    free, huge = (run(coco, tmp_path / str(norm), epochs=1, clip_norm=norm)[0].head[0].weight for norm in (0.0, 1e9))
    assert torch.equal(free, huge)
    assert not torch.equal(free, run(coco, tmp_path / "small", epochs=1, clip_norm=1e-12)[0].head[0].weight)


def test_resume_extends_a_finished_run_and_tells_changed_constants(coco, tmp_path, capsys):
    run(coco, tmp_path / "out", epochs=1, constants={"BATCH_SIZE": 2})
    _, result = run(coco, tmp_path / "out", epochs=2, resume=True, constants={"BATCH_SIZE": 3})
    assert [record["epoch"] for record in result["history"]] == [1, 2]
    assert "BATCH_SIZE was 2, is now 3" in capsys.readouterr().out


def test_early_stopping_and_best_by_score(coco, tmp_path):
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    saved = []
    _, result = run(coco, tmp_path / "out", epochs=5, patience=2, score="val/x",
                    evaluate=lambda model: {"val/x": next(scores)},
                    on_best=lambda model: saved.append(copy.deepcopy(model.state_dict())))
    assert (result["best_epoch"], result["best_score"], len(result["history"]), len(saved)) == (2, 0.5, 4, 2)
    best = torch.load(tmp_path / "out" / "best.pt")["model"]
    assert all(torch.equal(best[name], saved[-1][name]) for name in best)


def test_a_patience_of_0_never_stops(coco, tmp_path):
    _, result = run(coco, tmp_path / "out", epochs=3, patience=0, score="val/x", evaluate=lambda model: {"val/x": 0.0})
    assert len(result["history"]) == 3 and result["stopped"] == "all epochs done"
    with pytest.raises(UserError, match="EARLY_STOPPING_PATIENCE = -1"):
        run(coco, tmp_path / "other", patience=-1)


def test_a_run_that_was_scored_otherwise_or_is_none_of_ours_is_not_resumed(coco, tmp_path):
    run(coco, tmp_path / "out", epochs=1, score="val/x", evaluate=lambda model: {"val/x": 0.5})
    with pytest.raises(UserError, match="was scored by val/x, now it would be by val/y"):
        run(coco, tmp_path / "out", epochs=2, resume=True, score="val/y", evaluate=lambda model: {"val/y": -0.1})
    torch.save({"a": torch.zeros(1)}, tmp_path / "out" / "last.pt")
    with pytest.raises(UserError, match="is not a last.pt of this project"):
        run(coco, tmp_path / "out", epochs=2, resume=True)


def test_a_run_with_other_fixed_constants_or_other_validation_data_is_not_resumed(coco, tmp_path):
    settings = {"epochs": 1, "fixed": ("KIND",), "constants": {"KIND": "a", "FREE": 1}, "validated_on": {"val": [1, 2]}}
    run(coco, tmp_path / "out", **settings)
    with pytest.raises(UserError, match="KIND was 'a', is now 'b'.*RESUME = True"):
        run(coco, tmp_path / "out", **settings | {"constants": {"KIND": "b", "FREE": 2}, "resume": True})
    with pytest.raises(UserError, match="last.pt was validated on other data.*RESUME = True"):
        run(coco, tmp_path / "out", **settings | {"validated_on": {"val": [1, 3]}, "resume": True})
    content = torch.load(tmp_path / "out" / "last.pt")
    torch.save({name: value for name, value in content.items() if name != "validated_on"}, tmp_path / "out" / "last.pt")
    _, result = run(coco, tmp_path / "out", **settings | {
        "validated_on": {"val": [1, 3]}, "constants": {"KIND": "a", "FREE": 2}, "resume": True, "epochs": 2})
    assert len(result["history"]) == 2  # of a file of an earlier version it is not known


def test_a_run_with_other_validation_images_is_not_resumed(coco, tmp_path):
    """Also where the annotations are the same: a rainy twin that was made anew."""
    images = sorted((coco / "coco" / "val2017").iterdir())
    run(coco, tmp_path / "out", epochs=1, validated_images=images)
    assert run(coco, tmp_path / "out", epochs=2, validated_images=images[::-1], resume=True)[1]["stopped"]
    os.utime(images[0], (1, 1))  # as a copy of the data set has it
    run(coco, tmp_path / "out", epochs=2, validated_images=images, resume=True)
    for others in (images[1:], images):
        with pytest.raises(UserError, match="last.pt was validated on other data.*RESUME = True"):
            run(coco, tmp_path / "out", epochs=3, validated_images=others, resume=True)
        images[0].write_bytes(images[0].read_bytes() + b"another")


def test_training_images_that_were_edited_in_place_are_noted(coco, tmp_path, capsys):
    run(coco, tmp_path / "out", epochs=1)
    run(coco, tmp_path / "out", epochs=2, resume=True)
    assert "training images" not in capsys.readouterr().out
    path = next((coco / "coco" / "train2017").iterdir())
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    run(coco, tmp_path / "out", epochs=3, resume=True)
    assert "note: the training images are not those" in capsys.readouterr().out
    content = torch.load(tmp_path / "out" / "last.pt")
    torch.save({name: value for name, value in content.items() if name != "trained_images"}, tmp_path / "out/last.pt")
    os.utime(path, (2, 2))
    run(coco, tmp_path / "out", epochs=3, resume=True)
    assert "training images" not in capsys.readouterr().out  # of an earlier version's run it is not known


def test_a_part_that_was_not_frozen_is_refused_by_its_constant(coco, tmp_path):
    run(coco, tmp_path / "out", epochs=1, constants={"FREEZE_TAIL": False})
    content = torch.load(tmp_path / "out" / "last.pt")
    content["model"]["tail.0.weight"] += 1
    torch.save(content, tmp_path / "out" / "last.pt")
    with pytest.raises(UserError, match="FREEZE_TAIL was False, is now True"):
        run(coco, tmp_path / "out", epochs=2, constants={"FREEZE_TAIL": True}, resume=True)
    with pytest.raises(UserError, match="FREEZE_NORM was 'unknown', is now True"):  # another group for the optimizer
        torch.save(content | {"model": Net().state_dict()}, tmp_path / "out" / "last.pt")
        model = Net()
        model.tail.load_state_dict({name[5:]: value for name, value in torch.load(tmp_path / "out" / "last.pt")[
            "model"].items() if name.startswith("tail.")})
        run(coco, tmp_path / "out", epochs=2, model=model, constants={"FREEZE_NORM": True}, resume=True,
            parameters=[{"params": [model.head[0].weight], "lr": 1e-2}])


def test_a_resumed_run_takes_the_optimizers_settings_of_now(coco, tmp_path, capsys):
    run(coco, tmp_path / "out", epochs=1)
    engine.seed_everything(1)  # the same frozen part
    model = Net()
    groups = [{"params": list(model.head.parameters()), "lr": 1e-2, "weight_decay": 0.5}]
    run(coco, tmp_path / "out", epochs=2, model=model, parameters=groups, batch=4, resume=True)
    assert torch.load(tmp_path / "out" / "last.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    assert "an epoch has 2 batches, it had 4" in capsys.readouterr().out


def test_step_decays_where_a_script_names_no_shares(coco, tmp_path, capsys):
    run(coco, tmp_path / "out", epochs=4, schedule="step", warmup_steps=0)
    last = torch.load(tmp_path / "out" / "last.pt")["optimizer"]["param_groups"][0]["lr"]
    assert last == pytest.approx(1e-2 * 0.5**2)  # the eighth of 8 steps: after 1/2 and 3/4, before 9/10
    for wrong in ((), (2.0,), 0.5):
        with pytest.raises(UserError, match="DECAY_AT"):
            run(coco, tmp_path / "out", schedule="step", milestones=wrong)
    assert "WARMUP_STEPS" not in capsys.readouterr().out
    run(coco, tmp_path / "other", epochs=1, warmup_steps=2)
    assert "note: WARMUP_STEPS = 2 of 2 steps" in capsys.readouterr().out


def test_the_last_smaller_group_is_a_step_with_its_own_mean(coco, tmp_path):
    """8 images, batches of 3, groups of 2: steps over (3, 3) and (2) images."""
    plain = nn.Module()
    plain.head = nn.Conv2d(3, 3, 1)
    model = nn.Sequential()
    model.head = plain.head
    gradients = []

    def losses(model, batch):
        return {"mse": model.head(batch["images"]).mean()}

    hook = model.head.weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    run(coco, tmp_path / "out", epochs=1, model=model, losses=losses, batch=3, clip_norm=0.0)
    hook.remove()
    assert len(gradients) == 3
    last = torch.load(tmp_path / "out" / "last.pt")
    assert last["step"] == 2
    assert gradients[2].norm() > 1.5 * gradients[0].norm()  # a group of one is not divided by two


def test_a_frozen_module_that_changes_stops_the_run_loudly(coco, tmp_path):
    def tampers(model, batch):
        with torch.no_grad():
            model.tail[1].running_mean += 0.1
        return compute_losses(model, batch)
    with pytest.raises(RuntimeError, match="frozen module 'tail' changed"):
        run(coco, tmp_path / "out", losses=tampers, epochs=1)


def test_frozen_buffers_do_not_move(coco, tmp_path):
    engine.seed_everything(1)
    before = freeze.fingerprint(Net().tail)
    model, _ = run(coco, tmp_path / "out", epochs=2)
    assert freeze.fingerprint(model.tail) == before and model.head[1].num_batches_tracked > 0


def test_resuming_with_another_frozen_part_is_refused_at_once(coco, tmp_path):
    run(coco, tmp_path / "out", epochs=1)
    other = Net()
    other.tail[0].weight.data += 1
    with pytest.raises(UserError, match="trained with another frozen tail"):
        run(coco, tmp_path / "out", epochs=2, model=other, resume=True)


def test_resuming_with_another_batch_size_starts_the_epoch_again(coco, tmp_path, capsys):
    with pytest.raises(Killed):
        run(coco, tmp_path / "out", epochs=1, losses=dies_after(3, compute_losses))
    _, result = run(coco, tmp_path / "out", epochs=1, batch=1, resume=True)
    assert "epoch 1 starts again" in capsys.readouterr().out and len(result["history"]) == 1


def test_the_scripts_own_output_is_set_aside_too(coco, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapted.pt").write_text("earlier")
    run(coco, tmp_path / "out", epochs=1, own_files=("adapted.pt",))
    assert (tmp_path / "out" / "previous_1" / "adapted.pt").read_text() == "earlier"


def test_a_resume_that_finds_no_last_pt_replaces_nothing(coco, tmp_path):
    """It starts from the beginning, so what an earlier run has left there makes way as at any start."""
    run(coco, tmp_path / "out", epochs=1, own_files=("adapted.pt",))
    (tmp_path / "out" / "adapted.pt").write_text("earlier")
    (tmp_path / "out" / "last.pt").unlink()
    best = (tmp_path / "out" / "best.pt").read_bytes()
    run(coco, tmp_path / "out", epochs=1, own_files=("adapted.pt",), resume=True)
    assert (tmp_path / "out" / "previous_1" / "best.pt").read_bytes() == best
    assert (tmp_path / "out" / "previous_1" / "adapted.pt").read_text() == "earlier"


def test_a_loss_that_is_not_finite_stops_with_names(coco, tmp_path):
    def explodes(model, batch):
        return {"mse": compute_losses(model, batch)["mse"] * float("nan")}
    with pytest.raises(UserError, match=r"not finite in epoch 1, batch 1 \(mse=nan; images .*jpg.*learning rate"):
        run(coco, tmp_path / "out", losses=explodes)


def test_nothing_to_train_and_bad_settings_are_refused(coco, tmp_path):
    model = Net()
    with pytest.raises(UserError, match="nothing to train"):
        run(coco, tmp_path / "out", model=model, parameters=[{"params": list(model.tail.parameters()), "lr": 1.0}])
    with pytest.raises(UserError, match="PRECISION"):
        run(coco, tmp_path / "out", precision="fp16")
    with pytest.raises(UserError, match="SCHEDULE"):
        run(coco, tmp_path / "out", schedule="linear")
    with pytest.raises(UserError, match="nothing to train: .* learning rate of 0"):
        run(coco, tmp_path / "out", model=model, parameters=[{"params": list(model.head.parameters()), "lr": 0.0}])
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match="SEED = "):
            engine.seed_everything(seed)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        run(coco, tmp_path / "file" / "out")


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
def test_ctrl_c_saves_and_the_run_goes_on_from_there(coco, tmp_path, capsys):
    whole, _ = run(coco, tmp_path / "whole")
    count = 0

    def interrupted(model, batch):
        nonlocal count
        count += 1
        if count == 2:
            signal.raise_signal(signal.SIGINT)
        return compute_losses(model, batch)

    _, result = run(coco, tmp_path / "out", losses=interrupted)
    assert result["stopped"] == "interrupted" and "RESUME = True" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "out" / "last.pt")["step"] == 1
    resumed, result = run(coco, tmp_path / "out", resume=True)
    assert result["stopped"] == "all epochs done"
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_report_that_cannot_be_written_costs_no_epoch(coco, tmp_path, monkeypatch, capsys):
    def locked(*args):
        raise PermissionError("metrics.json is open in another program")
    monkeypatch.setattr(run_state.report, "write_json", locked)
    _, result = run(coco, tmp_path / "out", epochs=2)
    assert result["stopped"] == "all epochs done" and "metrics.json is open" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "out" / "last.pt")["epoch"] == 2


def test_schedules():
    factors = [schedule_factor("cosine", step, 10, 2) for step in range(11)]
    assert factors[:2] == [pytest.approx(1 / 3), pytest.approx(2 / 3)] and factors[2] == 1.0
    assert factors[10] == pytest.approx(0.01) and factors[2:] == sorted(factors[2:], reverse=True)
    assert [schedule_factor("step", s, 8, 0, (0.25, 0.5)) for s in (0, 2, 4, 7)] == [1, 0.5, 0.25, 0.25]
    assert schedule_factor("constant", 5, 8, 0) == 1.0


def test_bf16_trains_float32_weights(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model, result = run(coco, tmp_path / "out", precision="bf16", epochs=2)
    assert "this CPU has no instructions for it" in capsys.readouterr().out
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert result["history"][-1]["mse"] < result["history"][0]["mse"]


def test_spdnet_trains_although_some_tensors_are_never_used():
    model = small_spdnet()
    loss = model(torch.rand(1, 3, 32, 32) * 255)[0].mean()
    loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == set(model.unused_parameters())


def test_bf16_is_refused_where_the_gpu_has_none(monkeypatch):
    for name, answer in (("is_available", True), ("get_device_name", "Tesla T4")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    settings = {"epochs": 1, "learning_rates": {"LEARNING_RATE": 1e-3}, "loss_weights": {"mse": 1.0}}
    with pytest.raises(UserError, match="Tesla T4 has no bf16"):
        Plan(precision="bf16", **settings)
    Plan(precision="float32", **settings)


# ---- the plan ------------------------------------------------------------------------------------------------------

WRONG = {  # a field of Plan: values that it refuses
    "epochs": (0, 1.5, True), "learning_rates": ({"PHASE1_LR": -1.0}, {"PHASE1_LR": math.nan}, {"PHASE1_LR": 0.0}, {}),
    "loss_weights": ({"mse": -1.0}, {"mse": "1"}, {"mse": 0.0}, {}), "weight_decay": (-1e-4, math.inf),
    "batch_size": (-1, 2.0), "eval_batch_size": (0,), "workers": (-1,), "usual_batch": (0,), "accumulate": (0,),
    "clip_norm": (-1.0, None),
    "warmup_steps": (-1,), "schedule": ("linear", "plateau"), "milestones": ((), (2.0,), 0.5, ("1/2",)),
    "plateau_metric": (None,), "plateau_patience": (-1,), "plateau_factor": (1.0, 0.0), "precision": ("fp16", "int8"),
    "precisions": ((), ("int8",)), "fast": ("tf32", ("turbo",), None),
    "ema": (1.0, -0.1), "patience": (-1, None), "trackers": ("wandb", ("board",)), "checkpoint_steps": (0,),
    "resume": ("last", 1), "resume_hint": (None,),
}


def test_every_setting_of_a_plan_has_a_wrong_value_here():
    assert list(WRONG) == [field.name for field in dataclasses.fields(Plan) if field.name != "names"]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_plan_refuses_wrong_values(field, value):
    valid = {"epochs": 1, "learning_rates": {"LEARNING_RATE": 1e-3}, "loss_weights": {"mse": 1.0}, "schedule": "step"}
    changed = dataclasses.replace(Plan(**valid), epochs=2)
    assert changed.epochs == 2 and changed.schedule == "step"
    with pytest.raises(UserError) as error:
        Plan(**valid | {field: value})
    assert "\n" not in str(error.value)


CONSTANTS = {"NUM_EPOCHS": 7, "PASSES": 3, "LEARNING_RATE": 1e-3, "GATE_LR": 1e-4, "A_WEIGHT": 2.0, "B_WEIGHT": 0.0,
             "EMA_DECAY": 0.9, "NUM_WORKERS": 1, "DATALOADER_WORKERS": 4}


def test_a_plan_of_constants_takes_the_usual_ones_and_those_that_are_named():
    cfg = config.Config(**CONSTANTS)
    usual = Plan.of(cfg, loss_weights={"a": "A_WEIGHT", "b": "B_WEIGHT", "c": 0.5})
    assert (usual.epochs, usual.ema, usual.workers, usual.batch_size) == (7, 0.9, 4, 1)
    assert usual.learning_rates == {"LEARNING_RATE": 1e-3} and usual.loss_weights == {"a": 2.0, "c": 0.5}
    named = Plan.of(cfg, epochs="PASSES", workers="--num_workers", learning_rates=("LEARNING_RATE", "GATE_LR"),
                    loss_weights={"a": "A_WEIGHT"}, given={"ema": 0.0, "precisions": ("float32",)})
    assert (named.epochs, named.ema, named.workers, named.precisions) == (3, 0.0, 1, ("float32",))
    assert (named.name_of("epochs"), named.name_of("warmup_steps")) == ("PASSES", "WARMUP_STEPS")
    for mistake in ({"epochs": "EPOCH"}, {"epoch": "NUM_EPOCHS"}, {"given": {"score": "val/x"}}):
        with pytest.raises((AttributeError, TypeError)):
            Plan.of(cfg, loss_weights={"a": "A_WEIGHT"}, **mistake)


@pytest.mark.parametrize(("change", "message"), [
    ({"PASSES": 0}, "PASSES = 0: choose 1 or more"),
    ({"GATE_LR": -1.0}, "GATE_LR = -1.0"),
    ({"LEARNING_RATE": 0.0, "GATE_LR": 0.0}, r"LEARNING_RATE, GATE_LR\) is 0"),
    ({"A_WEIGHT": -2.0}, "A_WEIGHT = -2.0"),
    ({"A_WEIGHT": 0.0}, r"every loss weight is 0 \(A_WEIGHT, B_WEIGHT\)"),
    ({"NUM_WORKERS": -1}, "^--num_workers -1: choose 0 or more"),
    ({"EMA_DECAY": 2.0}, "EMA_DECAY = 2.0"),
])
def test_an_error_names_the_scripts_own_constant(change, message):
    with pytest.raises(UserError, match=message):
        Plan.of(config.Config(**CONSTANTS | change), epochs="PASSES", workers="--num_workers",
                learning_rates=("LEARNING_RATE", "GATE_LR"), loss_weights={"a": "A_WEIGHT", "b": "B_WEIGHT"})
