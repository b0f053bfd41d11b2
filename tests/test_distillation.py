"""The teacher that sees the clean twin: equal detectors differ in nothing, answers are kept, the trainings use it."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Killed, dies_after, names_in
from safetensors.torch import load_file

import Training_RTDETR as Training
from utils import config, datasets, freeze
from utils.config import UserError
from utils.datasets import loaders, presets
from utils.networks import distillation
from utils.networks.rtdetr import load_rtdetr, new_rtdetr

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def detector():
    return load_rtdetr(str(ROOT / "assets" / "demo" / "rtdetr"))  # a new one would choose its queries by rounding


@pytest.fixture
def settings(coco, weights):
    """Constants that point the training at eight small images."""
    return {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "IMAGE_SIZE": 96, "BATCH_SIZE": 4,
            "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "OUTPUT_DIR": str(coco / "out"), "NUM_EPOCHS": 2,
            "COCO_RATIO": 0.0, "RAIN_RATIO": 1.0, "RAIN": "fresh", "QUERIES_WEIGHT": 1.0, "POSITIONS_WEIGHT": 1.0,
            "FEATURES_WEIGHT": 1.0, "AUGMENTATION": "mirror", "WARMUP_STEPS": 0, "DATALOADER_WORKERS": 0,
            "EMA_DECAY": 0.5}


def images(number=2):
    return torch.rand(number, 3, 160, 160, generator=torch.Generator().manual_seed(number))


def labels(number=2):
    return [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * number


def test_with_the_teachers_queries_an_equal_student_says_what_the_teacher_says(detector):
    teacher, student = distillation.Teacher(copy.deepcopy(detector)), distillation.Student(copy.deepcopy(detector))
    answer = teacher(images())
    expected = detector(images())
    torch.testing.assert_close(answer.logits[:, -1], expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(answer.boxes[:, -1], expected.pred_boxes, rtol=0, atol=1e-5)
    outputs, terms = student.eval()(images(), labels(), answer)
    assert outputs.loss > 0 and terms.keys() == set(distillation.TERMS)
    assert all(abs(value.item()) < 1e-5 for value in terms.values()), terms


def test_the_students_second_pass_uses_the_teachers_queries(detector, monkeypatch):
    """Of an image that looks different, the decoder's answer to the teacher's queries differs and has its order."""
    teacher, student = distillation.Teacher(copy.deepcopy(detector)), distillation.Student(detector).eval()
    seen = {}
    monkeypatch.setattr(distillation, "query_loss", lambda logits, *rest: seen.update(logits=logits) or 0.0)
    answer = teacher(images())
    with torch.no_grad():
        student(images(), None, answer, ("queries",))
        same = seen["logits"]
        student(0.5 * images(), None, answer, ("queries",))
    torch.testing.assert_close(same, answer.logits, rtol=0, atol=1e-5)
    assert (seen["logits"] - answer.logits).abs().max() > 1e-3
    shuffled = answer._replace(queries=answer.queries.flip(1), references=answer.references.flip(1))
    with torch.no_grad():
        student(images(), None, shuffled, ("queries",))
    torch.testing.assert_close(seen["logits"], answer.logits.flip(2), rtol=0, atol=1e-4)


def test_without_labels_the_decoder_runs_once_and_learns_the_same(detector):
    teacher, student = distillation.Teacher(copy.deepcopy(detector)), distillation.Student(detector)
    answer, terms, runs, gradients = teacher(images()), ("queries",), [], []
    student.rtdetr.model.decoder.register_forward_hook(lambda *_: runs.append(1))
    for forward in (lambda: student(0.7 * images(), None, answer, terms),
                    lambda: distillation.compared(detector, lambda: detector(0.7 * images()), answer, terms)):
        student.zero_grad(set_to_none=True)
        forward()[1]["queries"].backward()
        gradients.append({name: value.grad for name, value in detector.named_parameters() if value.grad is not None})
        runs.append(0)
    assert runs == [1, 0, 1, 1, 0] and gradients[0].keys() == gradients[1].keys() != set()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_reach_the_student_and_nothing_else(detector):
    teacher, student = distillation.Teacher(copy.deepcopy(detector)), distillation.Student(copy.deepcopy(detector))
    freeze.unfreeze(student.rtdetr)
    digest = freeze.fingerprint(teacher)
    for term in distillation.TERMS:
        student.zero_grad(set_to_none=True)
        _, terms = student.train()(0.7 * images(), None, teacher(images()), (term,))
        assert terms.keys() == {term} and terms[term] > 0
        terms[term].backward()
        reached = {name.split(".")[2] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
        assert "backbone" in reached and ("decoder" in reached) == (term == "queries"), (term, reached)
        assert ("enc_score_head" in reached) == (term == "positions")
    assert freeze.fingerprint(teacher) == digest and all(p.grad is None for p in teacher.parameters())


def test_terms_by_hand():
    """One query, one class: entropy above its least value, weighted; L1 and GIoU of a box half as wide."""
    logit = torch.tensor([[[[0.0]]]])  # score 0.5
    wanted = torch.tensor([[[[4.0]]]])
    box, wider = torch.tensor([[[[0.5, 0.5, 0.2, 0.2]]]]), torch.tensor([[[[0.5, 0.5, 0.4, 0.2]]]])
    p = torch.sigmoid(torch.tensor(4.0)).item()
    entropy = -(p * torch.tensor(0.5).log() + (1 - p) * torch.tensor(0.5).log()).item()
    least = -(p * torch.tensor(p).log() + (1 - p) * torch.tensor(1 - p).log()).item()
    weight = p + (0.5 - p) ** 2 * (1 - p)
    expected = weight * (entropy - least) + p * (5 * 0.2 + 2 * (1 - 0.5))
    found = distillation.query_loss(logit, wider, distillation.Answer(None, None, wanted, box, None, None, None))
    assert found.item() == pytest.approx(expected, rel=1e-4)  # scores below 1 in all count as 1
    features = torch.tensor([[[1.0, 1.0], [3.0, 3.0]]])
    answer = distillation.Answer(None, None, None, None, torch.tensor([[[20.0], [-20.0]]]), None, features)
    assert distillation.feature_loss(features + torch.tensor([[[1.0], [9.0]]]), answer).item() == pytest.approx(
        1 / 5, rel=1e-4)  # the second position holds no object; mean square of the features: 5


def test_losses_of_two_ranks_average_to_that_of_the_whole_batch(detector, monkeypatch):
    """Images in which the teacher sees more count more, whichever rank has them."""
    answer = distillation.Teacher(copy.deepcopy(detector))(torch.cat([images(1), 0.2 * images(1)]))
    other = distillation.Teacher(copy.deepcopy(detector))(torch.cat([0.7 * images(1), images(1)]))

    def losses(part, other):
        return torch.stack([distillation.query_loss(other.logits, other.boxes, part), distillation.position_loss(
            other.position_logits, other.position_boxes, part), distillation.feature_loss(other.features, part)])
    counts = []
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "count_over_ranks", lambda count, *args, **least: counts.append(count) or count)
        whole = losses(answer, other)
    assert len(counts) == 3 and min(counts) > 1e-6
    halves = []
    for i in range(2):
        shares = iter([count / 2 for count in counts])
        monkeypatch.setattr(distillation, "count_over_ranks", lambda count, *args, of=shares, **least: next(of))
        halves.append(losses(*(distillation.Answer(*(part[i:i + 1] for part in one)) for one in (answer, other))))
    torch.testing.assert_close(sum(halves) / 2, whole)


def test_a_rank_by_itself_does_not_wait_for_the_others(detector, monkeypatch):
    """In a validation ranks have different numbers of images: one that asked the others would wait for ever."""
    teacher, student = distillation.Teacher(copy.deepcopy(detector)), distillation.Student(copy.deepcopy(detector))
    expected = student.eval()(0.7 * images(), None, teacher(images()))[1]
    monkeypatch.setattr(distillation, "count_over_ranks", lambda *_, **__: pytest.fail("asked the other ranks"))
    alone = student(0.7 * images(), None, teacher(images()), over_ranks=False)[1]
    assert alone.keys() == set(distillation.TERMS)
    for term, value in expected.items():
        torch.testing.assert_close(alone[term], value)


def test_kept_answers_equal_live_ones(detector):
    live, kept = (distillation.Teacher(copy.deepcopy(detector), gigabytes) for gigabytes in (0, 1.0))
    asked = []
    kept.live = lambda images, of=kept.live: asked.append(len(images)) or of(images)
    for digests in (["a", "b"], ["a", "b"], ["a", "c"]):
        batch = images() if "c" not in digests else torch.cat([images()[:1], images(1)])
        for found, expected in zip(kept(batch, digests), live(batch, digests), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert asked == [1, 1, 1]
    full = distillation.Teacher(copy.deepcopy(detector), 1e-9)
    assert torch.equal(full(images(), ["a", "b"]).logits, full(images(), ["a", "b"]).logits) and not full._known


def test_digests_tell_images_apart(coco):
    data = datasets.clean_rainy_mixture(str(coco / "coco"), str(coco / "coco_rain"), {0: "person", 1: "car"},
                                        presets.adaptation(96), coco_ratio=0.0, rain_ratio=1.0, percent=100, seed=0,
                                        twins=True, unknown="ignore")
    batch, other = (datasets.collate_with_digests([data[epoch, i] for i in range(4)]) for epoch in (0, 3))
    assert len(set(batch["twin_digests"])) == 4
    for i in range(4):  # mirrored in one of the epochs, or not
        same = torch.equal(batch["twins"][i], other["twins"][i])
        assert same == (batch["twin_digests"][i] == other["twin_digests"][i])
    both = {name for one in (batch, other) for name in one["twin_digests"]}
    assert len(both) > 4


@pytest.mark.parametrize("augmentation", ["mirror", "full"])
def test_image_and_twin_pass_augmentation_alike(coco, augmentation):
    """A clean image is its own twin, so whatever is done to the one must have been done to the other."""
    preset = {"mirror": presets.adaptation, "full": presets.detection}[augmentation](96)
    data = datasets.clean_rainy_mixture(str(coco / "coco"), "", {0: "person", 1: "car"}, preset, coco_ratio=1.0,
                                        rain_ratio=0.0, percent=100, seed=0, twins=True, unknown="ignore")
    samples = [data[epoch, i] for epoch in range(3) for i in range(4)]
    assert all(torch.equal(sample["image"], sample["twin"]) for sample in samples)


def test_training_with_a_teacher_goes_on_bit_for_bit(settings, tmp_path, monkeypatch):
    settings = settings | {"TEACHER_CACHE_GB": 1.0}
    result = Training.main(**settings | {"OUTPUT_DIR": str(tmp_path / "whole")})
    assert {"queries", "positions", "features", "detection"} <= result["history"][0].keys()
    cut = settings | {"OUTPUT_DIR": str(tmp_path / "cut"), "CHECKPOINT_STEPS": 1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "compute_losses", dies_after(3, Training.compute_losses))
        Training.main(**cut)
    Training.main(**cut | {"RESUME": True})
    whole, again = (load_file(tmp_path / name / "detector" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert "model.backbone.model.embedder.embedder.0.convolution.weight" in whole  # loads as any other detector
    load_rtdetr(str(tmp_path / "cut" / "detector"))
    with pytest.raises(UserError, match="taught was True, is now False"):
        Training.main(**cut | {"RESUME": True, "QUERIES_WEIGHT": 0, "POSITIONS_WEIGHT": 0, "FEATURES_WEIGHT": 0})


def test_mosaics_switch_the_cache_off_and_nothing_trains_on_a_random_frozen_stem(settings, tmp_path, capsys):
    settings = settings | {"TEACHER_CACHE_GB": 1.0, "MOSAIC_RATIO": 0.5, "CLOSE_MOSAIC": 1, "NUM_EPOCHS": 2}
    result = Training.main(**settings, FREEZE_AT=1)
    assert "TEACHER_CACHE_GB has no effect" in capsys.readouterr().out and "queries" in result["history"][1]
    Training.build_loaders(config.resolve(vars(Training), settings | {"MOSAIC_RATIO": 0.0, "AUGMENTATION": "full"}),
                           {0: "person", 1: "car"})
    assert "TEACHER_CACHE_GB has no effect beside AUGMENTATION = 'full'" in capsys.readouterr().out
    with pytest.raises(UserError, match="FREEZE_AT was 1, is now 2"):
        Training.main(**settings, FREEZE_AT=2, RESUME=True)
    with pytest.raises(UserError, match="FREEZE_AT = 1: RTDETR_MODEL_NAME is empty"):
        Training.main(**settings | {"RTDETR_MODEL_NAME": ""}, FREEZE_AT=1)


def test_without_any_object_in_the_training_images(settings):
    file = Path(settings["COCO_DIR"]) / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"annotations": []}), encoding="utf-8")
    with pytest.raises(UserError, match="no object of the detector's classes"):
        Training.main(**settings)
    assert Training.main(**settings | {"DETECTION_WEIGHT": 0.0, "NUM_EPOCHS": 1})["history"]


def test_without_labels_and_with_a_frozen_backbone(settings, capsys):
    result = Training.main(**settings | {"DETECTION_WEIGHT": 0.0, "NUM_EPOCHS": 1, "BACKBONE_LEARNING_RATE": 0.0})
    assert "detection" not in result["history"][0] and "detector" in names_in(Path(settings["OUTPUT_DIR"]))
    before, after = (load_file(Path(folder) / "model.safetensors") for folder
                     in (settings["RTDETR_MODEL_NAME"], f"{settings['OUTPUT_DIR']}/detector"))
    changed = {name.split(".")[1] for name, value in after.items() if not torch.equal(value, before[name])}
    assert "backbone" not in changed and {"encoder", "decoder"} <= changed


def test_a_specialist_is_chosen_by_drawn_weather_where_there_is_no_rainy_folder(settings, capsys):
    drawn = settings | {"COCO_RAIN_DIR": "", "RAIN_KINDS": {"fog": 1.0}, "NUM_EPOCHS": 1}
    result = Training.main(**drawn)
    assert "val/mAP" in result["history"][0] and "validation images is drawn, once" in capsys.readouterr().out
    with pytest.raises(UserError, match="RAIN_KINDS was"):
        Training.main(**drawn | {"RESUME": True, "RAIN_KINDS": {"mist": 1.0}})


def test_teachers_that_cannot_teach(settings, tmp_path, capsys):
    other = new_rtdetr("tiny", {0: "person", 1: "car"})
    other.config.num_queries = other.model.config.num_queries = 30
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="TEACHER_NAME: the teacher's"):
        Training.main(**settings | {"TEACHER_NAME": str(tmp_path / "other")})
    with pytest.raises(UserError, match="TEACHER_NAME = .*none' does not exist"):
        Training.main(**settings | {"TEACHER_NAME": str(tmp_path / "none")})
    with pytest.raises(UserError, match="COCO_RAIN_DIR is empty"):
        Training.main(**settings | {"COCO_RAIN_DIR": "", "RAIN": "files"})
    with pytest.raises(UserError, match="TEACHER_NAME is empty, and a detector from scratch"):
        Training.main(**settings | {"RTDETR_MODEL_NAME": "", "ARCHITECTURE": "tiny"})
    with pytest.raises(UserError, match="every loss weight is 0"):
        Training.main(**settings | {name: 0.0 for name in ("DETECTION_WEIGHT", "QUERIES_WEIGHT", "POSITIONS_WEIGHT",
                                                           "FEATURES_WEIGHT")})


# ---- plain photographs -----------------------------------------------------------------------------------------------

@pytest.fixture
def photographs(settings):
    """The same constants, of two plain folders of images without annotations."""
    for name in ("COCO_DIR", "COCO_RAIN_DIR"):
        shutil.rmtree(Path(settings[name]) / "annotations")
        shutil.rmtree(Path(settings[name]) / "val2017")
    return settings | {"DETECTION_WEIGHT": 0.0}


def test_a_specialist_learns_from_clean_photographs_alone(photographs, tmp_path, monkeypatch):
    """Rain is drawn: anew in every epoch to train on, once on the tenth that is validated."""
    photographs = photographs | {"COCO_RAIN_DIR": "", "OUTPUT_DIR": str(tmp_path / "whole"), "TEACHER_CACHE_GB": 1.0}
    shutil.rmtree(tmp_path / "coco_rain")
    result = Training.main(**photographs)
    last = result["history"][-1]
    assert last["rain/agreement"] == pytest.approx(-sum(last[f"rain/{term}"] for term in distillation.TERMS))
    assert "val/mAP" not in last and result["best_score"] == max(one["rain/agreement"] for one in result["history"]) < 0
    cut = photographs | {"OUTPUT_DIR": str(tmp_path / "cut"), "CHECKPOINT_STEPS": 1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "agreement", dies_after(1, Training.agreement))  # in the second validation
        Training.main(**cut)
    again = Training.main(**cut | {"RESUME": True})
    assert [one["rain/agreement"] for one in again["history"]] == [one["rain/agreement"] for one in result["history"]]
    whole, resumed = (load_file(tmp_path / name / "detector" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    for change in ({"QUERIES_WEIGHT": 2.0}, {"RAIN_KINDS": {"heavy": 1.0}}):
        with pytest.raises(UserError, match=f"last.pt.*{next(iter(change))} was"):
            Training.main(**cut | change | {"RESUME": True})
    other = load_rtdetr(photographs["RTDETR_MODEL_NAME"])
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="last.pt.*teacher was"):
        Training.main(**cut | {"TEACHER_NAME": str(tmp_path / "other"), "RESUME": True})


def test_a_specialist_learns_from_pairs_of_folders(photographs, capsys):
    result = Training.main(**photographs | {"RAIN": "files", "NUM_EPOCHS": 1, "MOSAIC_RATIO": 0.5, "CLOSE_MOSAIC": 0})
    assert result["best_score"] < 0 and "rain/agreement" in capsys.readouterr().out
    assert (Path(photographs["OUTPUT_DIR"]) / "detector" / "README.md").is_file()


def test_the_agreement_does_not_depend_on_the_batch(photographs, detector):
    """An equal student agrees wholly where there is no rain; another counts the same in batches of any size."""
    _, val = datasets.unlabelled_pairs(photographs["COCO_DIR"], photographs["COCO_RAIN_DIR"], presets.evaluation(160),
                                       presets.evaluation(160), percent=100, seed=0)
    val.pairs = [(rainy, clean) for clean in sorted(Path(photographs["COCO_DIR"]).rglob("*.jpg"))[:3]
                 for rainy in [Path(photographs["COCO_RAIN_DIR"]) / "train2017" / clean.name]]
    student, teacher = distillation.Student(detector).eval(), distillation.Teacher(detector)
    weights = {"queries": 2.0, "features": 0.5}

    def found(size):
        return Training.agreement_without_labels(student, loaders.validation_loader(val, size, 0), "cpu", teacher,
                                                 weights)
    one, several = found(1), found(3)
    assert one["rain/agreement"] < -1e-3 and one == pytest.approx(several, rel=1e-4)
    assert one["rain/agreement"] == pytest.approx(-2.0 * one["rain/queries"] - 0.5 * one["rain/features"])
    val.pairs = [(clean, clean) for _, clean in val.pairs]
    assert all(abs(value) < 1e-4 for value in found(3).values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"COCO_RATIO": 1.0, "RAIN_RATIO": 0.0}, "COCO_RATIO = 1.0: without annotations"),
    ({"COCO_RAIN_DIR": "", "RAIN": "files"}, "COCO_RAIN_DIR is empty.*RAIN = 'fresh'"),
    ({"COCO_RAIN_DIR": "./nowhere"}, "COCO_RAIN_DIR = 'nowhere' does not exist.*RAIN = 'fresh'"),
    ({"COCO_RAIN_DIR": "", "PERCENT_DATASET": 1}, "COCO_DIR = .* too few images for a split.*PERCENT_DATASET"),
    ({"RTDETR_MODEL_NAME": ""}, "RTDETR_MODEL_NAME is empty.*annotations"),
    ({"DETECTION_WEIGHT": 1.0}, "COCO_DIR = .*annotations"),
    ({"QUERIES_WEIGHT": 0.0, "POSITIONS_WEIGHT": 0.0, "FEATURES_WEIGHT": 0.0}, "every loss weight is 0")])
def test_what_plain_photographs_cannot_be_used_for(photographs, changes, message):
    with pytest.raises(UserError, match=message) as error:
        Training.main(**photographs | changes)
    assert "\n" not in str(error.value)
