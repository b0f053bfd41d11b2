"""Weather adapters: the detector stays, the fold equals what trained, files belong to one detector, the scripts."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import EXACT_KERNELS, Killed, dies_after, names_in
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

import detect
import Eval_conditional
import Training_WeatherAdapter as Training
from utils import freeze
from utils.conditional_model import load_rainy_detector
from utils.config import UserError
from utils.networks import adapter
from utils.networks.rain_detector import RainDetector, save_rain_detector
from utils.networks.rtdetr import load_rtdetr, new_rtdetr

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def base(coco, weights):
    """Constants that point the training at eight small images."""
    return {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "IMAGE_SIZE": 96, "BATCH_SIZE": 4,
            "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "OUTPUT_DIR": str(coco / "out"), "NUM_EPOCHS": 2,
            "LORA_RANK": 2, "LORA_ALPHA": 4, "WARMUP_STEPS": 0, "DATALOADER_WORKERS": 0, "EMA_DECAY": 0.5}


def shaken(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def images():
    return torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", [("attention",), ("feed_forward",), ("convolutions",), adapter.TARGETS])
def test_a_new_adapter_changes_nothing_and_the_fold_equals_it(tmp_path, targets):
    detector = load_rtdetr(str(ROOT / "assets" / "demo" / "rtdetr"))  # a new one would choose its queries by rounding
    digest = freeze.fingerprint(detector)
    model = adapter.inject(detector, 2, 3, targets, thin=len(targets) > 1)
    with torch.no_grad():
        expected = detector(images())
        assert torch.equal(model.eval()(images()).logits, expected.logits)
        shaken(model)
        adapter.write(model, tmp_path / "rain.safetensors", digest, rank=2, alpha=3)
        folded = adapter.fold(detector, tmp_path / "rain.safetensors", "ADAPTER_PATH")
        own, again = model(images()), folded(images())
    assert (own.logits - expected.logits).abs().max() > 1e-3
    torch.testing.assert_close(again.logits, own.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.pred_boxes, own.pred_boxes, rtol=0, atol=1e-5)
    assert freeze.fingerprint(detector) == digest and freeze.is_frozen(folded)
    kinds = {name.rpartition(".")[2] for name in load_file(tmp_path / "rain.safetensors")}
    assert {"lora_A", "lora_B"} <= kinds and ("weight" in kinds) == (len(targets) > 1)


def relative(detector):
    """-> a detector of the same form whose change an adapter of rank 2 can hold, other running statistics included."""
    generator, other = torch.Generator().manual_seed(3), copy.deepcopy(detector)

    def noise(*shape):
        return torch.randn(shape, generator=generator)
    with torch.no_grad():
        for name, module in other.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean += 0.02 * noise(*module.running_mean.shape)
                module.running_var *= 1 + 0.2 * torch.rand(module.running_var.shape, generator=generator)
            if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)):
                module.weight += 0.02 * noise(*module.weight.shape)
                module.bias += 0.02 * noise(*module.bias.shape)
            elif adapter.target_of(name, module):
                rows, columns = module.weight.flatten(1).shape
                module.weight += 0.01 * (noise(rows, 2) @ noise(2, columns)).view_as(module.weight)
    return other


def test_it_starts_as_the_specialist_that_its_rank_can_hold(tmp_path):
    detector = load_rtdetr(str(ROOT / "assets" / "demo" / "rtdetr"))
    target = relative(detector)
    model = adapter.inject(detector, 3, 5, adapter.TARGETS)  # a rank more than is needed: it may still learn
    spare = {name: p[2:] for name, p in adapter.tensors_of(model).items() if name.endswith(".lora_A")}
    assert adapter.approximate(model, target, "START_NAME") == pytest.approx(1.0, abs=1e-5)
    found = adapter.tensors_of(model)
    assert all(torch.equal(found[name][2:], rest) for name, rest in spare.items())
    with torch.no_grad():
        expected, own = target.eval()(images()), model.eval()(images())
        assert (own.logits - detector(images()).logits).abs().max() > 0.1
    torch.testing.assert_close(own.logits, expected.logits, rtol=1e-3, atol=1e-3)
    adapter.write(model, tmp_path / "rain.safetensors", freeze.fingerprint(detector), rank=3, alpha=5)
    folded = adapter.fold(detector, tmp_path / "rain.safetensors", "START_NAME")
    again = adapter.inject(detector, 2, 2, adapter.TARGETS)  # an adapter's file, with another rank
    assert adapter.approximate(again, folded, "START_NAME") == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images()).logits, own.logits, rtol=1e-3, atol=1e-3)
    with torch.no_grad():  # a change so small that rounding shows: what is spare stays
        for name, module in target.named_modules():
            if adapter.target_of(name, module):
                own = detector.get_submodule(name).weight
                module.weight.copy_(own + 1e-3 * (module.weight - own))
    again = adapter.inject(detector, 4, 4, adapter.TARGETS)
    before = {name: p[2:] for name, p in adapter.tensors_of(again).items() if name.endswith(".lora_A")}
    adapter.approximate(again, target, "START_NAME")
    found = adapter.tensors_of(again)
    assert all(torch.equal(found[name][2:], rest) for name, rest in before.items())
    again = adapter.inject(detector, 4, 4, adapter.TARGETS)
    before = adapter.tensors_of(again)
    adapter.approximate(again, detector, "START_NAME")  # no change at all: as a new one
    for name, value in adapter.tensors_of(again).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


def test_a_rank_too_small_holds_the_largest_part(small_detector):
    target = copy.deepcopy(small_detector)
    layer = next(name for name, m in target.named_modules() if isinstance(m, torch.nn.Linear)
                 and adapter.target_of(name, m) == "attention")
    change = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    with torch.no_grad():
        target.get_submodule(layer).weight[:4, :4] += change
    model = adapter.inject(small_detector, 2, 2, ("attention",))
    assert adapter.approximate(model, target, "START_NAME") == pytest.approx((16 + 9) / (16 + 9 + 4 + 1), abs=1e-4)
    tensors = adapter.tensors_of(model)
    made = adapter.product(tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"])
    torch.testing.assert_close(made[:4, :4], torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0])), rtol=0, atol=1e-3)


@pytest.mark.parametrize("targets", [("attention",), adapter.TARGETS])
def test_without_thin_layers_it_starts_as_well(small_detector, targets):
    """The stem is then one of the low-rank layers."""
    target = copy.deepcopy(small_detector)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(1.1)
    model = adapter.inject(small_detector, 64, 64, targets, thin=False)
    assert 0.5 < adapter.approximate(model, target, "START_NAME") <= 1.0001
    name = next(name for name in adapter.tensors_of(model) if name.endswith(".lora_A")).removesuffix(".lora_A")
    tensors = adapter.tensors_of(model)
    made = adapter.product(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"])
    torch.testing.assert_close(made, 0.1 * small_detector.get_submodule(name).weight, rtol=1e-3, atol=1e-4)


def test_what_no_adapter_can_hold_is_no_start():
    detector = new_rtdetr("tiny", dict(enumerate("abc")), train_backbone_norms=False)
    model = adapter.inject(detector, 2, 2, adapter.TARGETS)
    other, broken = copy.deepcopy(detector), copy.deepcopy(detector)
    with torch.no_grad():
        next(value for name, value in other.named_buffers() if name.endswith("running_mean")).add_(1.0)
        next(broken.parameters()).view(-1)[0] = float("nan")
    for target, message in ((other, "START_NAME: .*never trains .*running_mean"), (broken, "START_NAME: .*finite")):
        with pytest.raises(UserError, match=message):
            adapter.approximate(model, target, "START_NAME")
    assert adapter.approximate(model, detector, "START_NAME") == 1.0


def test_a_training_that_starts_from_a_specialist(base, small_detector, tmp_path, capsys):
    relative(small_detector).save_pretrained(tmp_path / "specialist")
    settings = base | {"NUM_EPOCHS": 1, "LEARNING_RATE": 1e-12}
    Training.main(**settings, START_NAME=str(tmp_path / "specialist"))
    shown = capsys.readouterr().out
    assert "as rank 2 allows: 100.0% of what it changed in these layers" in shown
    Training.main(**settings | {"NUM_EPOCHS": 2, "RESUME": True}, START_NAME=str(tmp_path / "gone"))
    assert "as rank 2 allows" not in capsys.readouterr().out  # last.pt holds what it has become
    path = Path(base["OUTPUT_DIR"]) / "rain.safetensors"
    shutil.copy(path, tmp_path / "first.safetensors")
    Training.main(**settings | {"OUTPUT_DIR": str(tmp_path / "second")}, START_NAME=str(tmp_path / "first.safetensors"))
    folded = [adapter.fold(small_detector, file, "ADAPTER_PATH")
              for file in (tmp_path / "first.safetensors", tmp_path / "second" / "rain.safetensors")]
    one, other = (model.state_dict() for model in folded)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()) + 1e-7)
    assert not all(torch.equal(value, small_detector.state_dict()[name]) for name, value in one.items())
    if EXACT_KERNELS:  # else the last bits decide which queries are chosen
        with torch.no_grad():
            first, second = (model(images()).logits for model in folded)
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    new_rtdetr("tiny", {0: "person"}).save_pretrained(tmp_path / "stranger")
    for name, message in (("stranger", "START_NAME: that detector has other layers or classes"),
                          ("nowhere", "START_NAME = .*nowhere"), ("no.safetensors", "START_NAME = .*does not exist")):
        with pytest.raises(UserError, match=message):
            Training.main(**base, START_NAME=str(tmp_path / name))


def test_of_the_published_size_it_takes_less_than_two_megabytes():
    detector = new_rtdetr("r18", dict(enumerate("abc")), train_backbone_norms=False)
    model = adapter.inject(detector, Training.LORA_RANK, Training.LORA_ALPHA, Training.LORA_TARGETS)
    assert 4 * freeze.count_parameters(model)[1] < 2e6
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(head in name for name in trained for head in ("class_embed", "bbox_embed", "score_head"))


def test_running_statistics_stay_and_scales_train(small_detector):
    model = adapter.inject(small_detector, 2, 2, adapter.TARGETS)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * 2
    model(pixel_values=images(), labels=labels).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and any(m.weight.grad is not None for m in norms)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_training_writes_a_file_that_detects_better_in_its_weather(base, weights, capsys):
    files = {path: path.read_bytes() for path in Path(base["RTDETR_MODEL_NAME"]).iterdir()}
    shutil.rmtree(base["COCO_RAIN_DIR"] + "/train2017")  # fresh rain needs none
    result = Training.main(**base)
    out = Path(base["OUTPUT_DIR"])
    assert {"rain.safetensors", "rain.md", "last.pt", "best.pt", "metrics.json"} <= names_in(out)
    best = result["history"][result["best_epoch"] - 1]
    assert f"| rain/mAP | {best['rain/mAP']:.4f} |" in (out / "rain.md").read_text(encoding="utf-8")
    assert result["history"][1]["detection"] < result["history"][0]["detection"]
    assert all(path.read_bytes() == content for path, content in files.items())
    shown = capsys.readouterr().out
    assert "with rain.safetensors" in shown and "without an adapter" in shown and shown.isascii()
    detector = load_rtdetr(base["RTDETR_MODEL_NAME"])
    folded = load_rainy_detector(str(out / "rain.safetensors"), base=detector)
    with torch.no_grad():
        assert not torch.equal(folded(images()).logits, detector(images()).logits)
    with pytest.raises(UserError, match="RAINY_BRANCH = .*rain.safetensors' is an adapter, which needs"):
        load_rainy_detector(str(out / "rain.safetensors"))
    Training.main(**base | {"NUM_EPOCHS": 1, "ADAPTER_NAME": "mist", "RAIN_KINDS": {"mist": 1.0}})
    assert {"mist.safetensors", "previous_1", "rain.safetensors", "rain.md"} <= names_in(out)  # one base, several
    assert "last.pt" in names_in(out / "previous_1")
    Training.main(**base | {"NUM_EPOCHS": 1})
    assert {"rain.safetensors", "rain.md"} <= names_in(out / "previous_2") and {"rain.md", "mist.md"} <= names_in(out)


@pytest.mark.parametrize("taught", [0.0, 1.0])
def test_a_killed_training_goes_on_bit_for_bit(base, tmp_path, monkeypatch, taught):
    base = base | {"QUERIES_WEIGHT": taught, "POSITIONS_WEIGHT": taught, "TEACHER_CACHE_GB": taught}
    Training.main(**base | {"OUTPUT_DIR": str(tmp_path / "whole")})
    settings = base | {"OUTPUT_DIR": str(tmp_path / "cut"), "CHECKPOINT_STEPS": 1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training.Training_RTDETR, "compute_losses",
                      dies_after(3, Training.Training_RTDETR.compute_losses))
        Training.main(**settings)
    Training.main(**settings | {"RESUME": True})
    whole, cut = (load_file(tmp_path / name / "rain.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    with pytest.raises(UserError, match="LORA_RANK was 2, is now 3"):
        Training.main(**settings | {"RESUME": True, "LORA_RANK": 3})


def test_an_adapter_learns_from_clean_photographs_alone(base, capsys):
    for name in ("annotations", "val2017"):
        shutil.rmtree(Path(base["COCO_DIR"]) / name)
    settings = base | {"COCO_RAIN_DIR": "", "DETECTION_WEIGHT": 0.0, "QUERIES_WEIGHT": 1.0, "NUM_EPOCHS": 1}
    result = Training.main(**settings)
    assert result["best_score"] == result["history"][0]["rain/agreement"] == -result["history"][0]["rain/queries"] < 0
    shown = capsys.readouterr().out
    assert "without an adapter: rain/agreement" in shown and "with rain.safetensors" in shown
    assert "rain/agreement" in (Path(base["OUTPUT_DIR"]) / "rain.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="QUERIES_WEIGHT was 1.0, is now 2.0"):
        Training.main(**settings | {"RESUME": True, "QUERIES_WEIGHT": 2.0})


def test_another_detector_may_be_the_teacher(base, small_detector, tmp_path, capsys):
    taught = base | {"QUERIES_WEIGHT": 1.0, "NUM_EPOCHS": 1}
    own = Training.main(**taught)["history"][0]["queries"]
    teacher = copy.deepcopy(small_detector)
    with torch.no_grad():
        teacher.model.decoder.class_embed[-1].bias.add_(1.0)
    teacher.save_pretrained(tmp_path / "teacher")
    other = Training.main(**taught, TEACHER_NAME=str(tmp_path / "teacher"))["history"][0]["queries"]
    assert other != own
    new_rtdetr("tiny", {0: "person"}).save_pretrained(tmp_path / "stranger")
    with pytest.raises(UserError, match="TEACHER_NAME: the teacher's classes are"):
        Training.main(**taught, TEACHER_NAME=str(tmp_path / "stranger"))
    capsys.readouterr()
    Training.main(**base | {"NUM_EPOCHS": 1}, TEACHER_NAME=str(tmp_path / "teacher"))
    assert "TEACHER_NAME has no effect" in capsys.readouterr().out


def test_an_adapter_of_another_detector_and_files_that_are_none(small_detector, tmp_path):
    digest = freeze.fingerprint(small_detector)
    path = tmp_path / "rain.safetensors"
    adapter.write(adapter.inject(small_detector, 2, 2, adapter.TARGETS), path, digest, rank=2, alpha=2)
    other = copy.deepcopy(small_detector)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(UserError, match="ADAPTER_PATH = .* trained for another detector than RTDETR_MODEL_NAME"):
        adapter.fold(other, path, "ADAPTER_PATH")
    with pytest.raises(UserError, match="ADAPTER_PATH = .*none.safetensors' does not exist"):
        adapter.fold(small_detector, tmp_path / "none.safetensors", "ADAPTER_PATH")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:100])
    for name in ("foreign", "broken"):
        with pytest.raises(UserError, match=f"ADAPTER_PATH = .*{name}.safetensors' is no adapter"):
            adapter.fold(small_detector, tmp_path / f"{name}.safetensors", "ADAPTER_PATH")


@pytest.mark.parametrize(("changes", "message"), [
    ({"LORA_TARGETS": ()}, "LORA_TARGETS"), ({"LORA_TARGETS": ("heads",)}, "LORA_TARGETS"),
    ({"LORA_RANK": 0}, "LORA_RANK"), ({"ADAPTER_NAME": "a/b"}, "ADAPTER_NAME"),
    ({"ADAPTER_NAME": ""}, "ADAPTER_NAME"), ({"RAIN": "hail"}, "RAIN = ")])
def test_constants_that_cannot_be(base, changes, message):
    with pytest.raises(UserError, match=message):
        Training.main(**base | changes)


def test_detect_and_the_evaluation_take_it(base, weights, coco, tmp_path, capsys):
    detector = load_rtdetr(base["RTDETR_MODEL_NAME"])
    path = tmp_path / "rain.safetensors"
    adapter.write(shaken(adapter.inject(detector, 2, 2, adapter.TARGETS)), path, freeze.fingerprint(detector), rank=2,
                  alpha=2, image_size=64)
    torch.manual_seed(0)
    save_rain_detector(RainDetector(), tmp_path / "gate.pt")
    result = detect.main(SOURCE=str(coco / "coco" / "val2017"), OUTPUT=str(tmp_path / "found"), MODEL="conditional",
                         RAINY_BRANCH=str(path), RTDETR_MODEL_NAME=base["RTDETR_MODEL_NAME"], IMAGE_SIZE=96,
                         RAIN_DETECTOR_PATH=str(tmp_path / "gate.pt"), RAIN_THRESHOLD=0.0, THRESHOLD=0.0)
    assert result["images"] == 8 and result["derained"] == 8
    assert "RAINY_BRANCH was trained at IMAGE_SIZE = 64, IMAGE_SIZE is 96" in capsys.readouterr().out
    found = Eval_conditional.main(
        COCO_DIR=base["COCO_DIR"], COCO_RAIN_DIR=base["COCO_RAIN_DIR"], IMAGE_SIZE=96, DATALOADER_WORKERS=0, PICTURES=1,
        RTDETR_MODEL_NAME=base["RTDETR_MODEL_NAME"], RAIN_DETECTOR_PATH=str(tmp_path / "gate.pt"),
        ADAPTER_PATH=str(path), SPDNET_MODEL_PATH=str(weights / "spdnet.pt"), ORIGINAL_SPDNET_PATH="",
        OUTPUT_DIR=str(tmp_path / "eval"))
    assert any("adapter" in str(row) for row in found["scores"])
    assert "ADAPTER_PATH was trained at IMAGE_SIZE = 64, IMAGE_SIZE is 96" in capsys.readouterr().out
