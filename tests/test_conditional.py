"""The gate: what goes where, bit for bit; gradients; fallbacks; the pipeline on disk; two scripts on eight images."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXACT_KERNELS, small_spdnet, write_coco
from script_processes import on_two_processes

import Eval_conditional
import Training_Conditional
from utils import config, datasets, integrated_model
from utils.boxes import decode
from utils.conditional_model import ConditionalRainRobustRTDETR, load_conditional_model
from utils.config import UserError
from utils.datasets import loaders, presets
from utils.datasets.annotations import read_annotations
from utils.evaluation import gate_intervals, gates, intervals
from utils.evaluation.coco import detect
from utils.evaluation.gates import (
    AlwaysRainy,
    best_threshold,
    gate_scores,
    graded_gate,
    hard_gate,
    mixed_part,
    part_of,
    sweep,
    taking,
)
from utils.feature_derain import FeatureDerainRTDETR
from utils.networks import clamp
from utils.networks.derainers import Derainer
from utils.networks.rain_detector import RainDetector, load_rain_detector, save_rain_detector
from utils.networks.rtdetr import id2label_of, new_rtdetr, rtdetr_of

ROOT = Path(__file__).resolve().parent.parent
LABELS = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])},
          {"class_labels": torch.tensor([1, 0]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.3, 0.3]])},
          {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]


class Darkness(RainDetector):
    """A rain detector that calls dark images rainy: logit = 50 * (0.4 - mean)."""

    def forward(self, images):
        return 50 * (0.4 - images.mean((1, 2, 3))) + 0 * self.head[0].bias.sum()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(3, 3, 64, 96) * torch.tensor([1.0, 0.5, 0.6]).view(3, 1, 1, 1)  # clean, rainy, rainy


@pytest.fixture
def model(small_detector):
    torch.manual_seed(0)
    return ConditionalRainRobustRTDETR(Darkness(), small_spdnet(), copy.deepcopy(small_detector)).eval()


def test_every_wrapper_has_its_detector_as_rtdetr_and_its_weights_under_the_old_names(model, small_detector):
    wrappers = [model, integrated_model.RainRobustRTDETR(small_spdnet(), small_detector),
                FeatureDerainRTDETR(small_detector)]
    for wrapper in wrappers:
        assert rtdetr_of(wrapper) is wrapper.rtdetr and rtdetr_of(wrapper.rtdetr) is wrapper.rtdetr
    assert model.rtdetr is model.detection_module
    assert not any(name.startswith("rtdetr.") for name in model.state_dict())


# ---- routing -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_only_rainy_images_of_a_mixed_batch_pass_spdnet(model, images):
    seen = []
    model.derain_module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs = model(images)
    assert outputs.rain_stats["mask"].tolist() == [False, True, True]
    assert (outputs.rain_stats["num_rainy"], outputs.rain_stats["num_clean"]) == (2, 1)
    assert len(seen) == 1 and torch.equal(seen[0], images[1:] * 255)
    assert torch.equal(outputs.derained[0], images[0])
    always = integrated_model.RainRobustRTDETR(model.derain_module, model.detection_module).eval()(images)
    vanilla = model.detection_module(pixel_values=images)
    torch.testing.assert_close(outputs.logits[1:], always.logits[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.logits[:1], vanilla.logits[:1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_all_clean_batch_equals_vanilla_bit_for_bit(model, images):
    clean = images[:1].expand(3, -1, -1, -1).contiguous()
    calls = []
    model.derain_module.register_forward_pre_hook(lambda *args: calls.append(1))
    outputs, vanilla = model(clean, labels=LABELS), model.detection_module(pixel_values=clean, labels=LABELS)
    assert not calls and outputs.derained is clean
    assert torch.equal(outputs.logits, vanilla.logits) and torch.equal(outputs.pred_boxes, vanilla.pred_boxes)
    assert torch.equal(outputs.loss, vanilla.loss) and outputs.loss_dict.keys() == vanilla.loss_dict.keys()


@torch.no_grad()
def test_an_all_rainy_batch_equals_always_de_raining(model, images):
    always = integrated_model.RainRobustRTDETR(model.derain_module, model.detection_module).eval()(images[1:])
    assert torch.equal(model(images[1:]).logits, always.logits)


@torch.no_grad()
def test_an_empty_batch(model, images):
    outputs = model(images[:0])
    assert outputs.logits.shape == (0, 40, 2) and outputs.pred_boxes.shape == (0, 40, 4)
    assert outputs.rain_stats["num_rainy"] == outputs.rain_stats["num_clean"] == 0
    assert decode(outputs.logits, outputs.pred_boxes, []) == []


@torch.no_grad()
def test_nan_from_spdnet_falls_back_for_that_image_only(model, images):
    def spoil(module, args, output):
        return tuple(torch.cat([o[:1] * float("nan"), o[1:]]) for o in output)
    healthy = model(images).derained
    model.derain_module.register_forward_hook(spoil)
    outputs = model(images)
    assert outputs.rain_stats["num_fallback"] == 1 and outputs.logits.isfinite().all()
    assert torch.equal(outputs.derained[1], images[1])
    torch.testing.assert_close(outputs.derained[2], healthy[2])


def test_nan_is_not_hidden_in_training(model, images):
    model.derain_module.register_forward_hook(lambda module, args, output: tuple(o * float("nan") for o in output))
    assert not model.train()(images).derained.isfinite().all()


# ---- the other branch ----------------------------------------------------------------------------------------------

@pytest.fixture
def two_detectors(small_detector):
    torch.manual_seed(5)
    other = new_rtdetr("tiny", {0: "person", 1: "car"}).eval()
    return ConditionalRainRobustRTDETR(Darkness(), None, copy.deepcopy(small_detector), rainy_detector=other).eval()


@torch.no_grad()
def test_rainy_images_go_to_the_other_detector(two_detectors, images):
    outputs = two_detectors(images)
    clean = two_detectors.detection_module(pixel_values=images[:1])
    rainy = two_detectors.rainy_detector(pixel_values=images[1:])
    assert torch.equal(outputs.logits, torch.cat([clean.logits, rainy.logits]))
    assert torch.equal(outputs.pred_boxes, torch.cat([clean.pred_boxes, rainy.pred_boxes]))
    assert torch.equal(two_detectors(images[:1]).logits, clean.logits)
    assert torch.equal(two_detectors(images[1:]).logits, rainy.logits)
    with pytest.raises(ValueError, match="no common loss"):
        two_detectors(images, labels=LABELS)


def test_detectors_that_do_not_fit_together_are_refused(small_detector):
    for other, message in ((new_rtdetr("tiny", {0: "person", 1: "bus"}), "other classes"),
                           (new_rtdetr("r18", {0: "person", 1: "car"}), "300 queries")):
        with pytest.raises(UserError, match=message):
            ConditionalRainRobustRTDETR(Darkness(), None, small_detector, rainy_detector=other)
    with pytest.raises(UserError, match="GATE"):
        ConditionalRainRobustRTDETR(Darkness(), small_spdnet(), small_detector, gate="gentle")
    with pytest.raises(UserError, match="RAIN_THRESHOLD"):
        ConditionalRainRobustRTDETR(Darkness(), small_spdnet(), small_detector, rain_threshold=7)


# ---- the soft gate -------------------------------------------------------------------------------------------------

def real_gate(small_detector, gate):
    torch.manual_seed(0)
    model = ConditionalRainRobustRTDETR(RainDetector(), small_spdnet(), copy.deepcopy(small_detector), gate=gate)
    with torch.no_grad():  # a fresh SPDNet is near the identity, where the gate makes no difference
        model.derain_module.output3.weight.add_(0.02 * torch.randn_like(model.derain_module.output3.weight))
    model.detection_module.requires_grad_(False)
    return model


def test_soft_gate_mixes_and_its_gradient_reaches_the_rain_detector(small_detector, images):
    model = real_gate(small_detector, "soft").train()
    outputs = model(images, labels=LABELS)
    p = outputs.rain_stats["scores"][:, None, None, None]
    always = clamp.clamp_with_return(integrated_model.derain_unclamped(model.derain_module, images))
    torch.testing.assert_close(outputs.derained, p * always + (1 - p) * images)
    outputs.loss.backward()
    gate = [q.grad for q in model.rain_detector.head.parameters()] + [model.rain_detector.features[0][0].weight.grad]
    assert all(g is not None and g.abs().sum() > 0 for g in gate)
    assert any(q.grad is not None and q.grad.abs().sum() > 0 for q in model.derain_module.parameters())
    assert not model.rain_detector.training  # BatchNorm statistics stay


def test_hard_gate_gives_the_rain_detector_no_gradient(small_detector, images):
    model = real_gate(small_detector, "hard").train()
    model.rain_threshold = 0.0
    model(images, labels=LABELS).loss.backward()
    assert all(q.grad is None for q in model.rain_detector.parameters())


@torch.no_grad()
def test_a_soft_gate_is_hard_in_eval(small_detector, images):
    soft, hard = (real_gate(small_detector, gate).eval() for gate in ("soft", "hard"))
    for threshold in (0.0, 1.0):
        soft.rain_threshold = hard.rain_threshold = threshold
        assert torch.equal(soft(images).logits, hard(images).logits)


# ---- on disk -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("branch", ["spdnet", "detector", "feature"])
@torch.no_grad()
def test_the_whole_pipeline_in_one_folder(small_detector, images, tmp_path, branch):
    torch.manual_seed(2)
    other = copy.deepcopy(small_detector)
    rainy = {"derain_module": small_spdnet()} if branch == "spdnet" else {
        "derain_module": None, "rainy_detector": FeatureDerainRTDETR(other) if branch == "feature" else other}
    model = ConditionalRainRobustRTDETR(RainDetector(), detection_module=copy.deepcopy(small_detector),
                                        rain_threshold=0.3, derain_scale=0.5, **rainy).eval()
    model.save_pretrained(tmp_path / "pipeline")
    again = ConditionalRainRobustRTDETR.from_pretrained(tmp_path / "pipeline")
    assert (again.rain_threshold, again.derain_scale, again.training) == (0.3, 0.5, False)
    after = again.state_dict()
    assert after.keys() == model.state_dict().keys()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    for threshold in (0.0, 1.0):
        model.rain_threshold = again.rain_threshold = threshold
        one, other = again(images).logits, model(images).logits
        torch.testing.assert_close(one, other)
        assert torch.equal(one, other) or not EXACT_KERNELS
    with pytest.raises(UserError, match="PIPELINE_DIR.*conditional.json"):
        ConditionalRainRobustRTDETR.from_pretrained(tmp_path, constant="PIPELINE_DIR")
    for content in ("", "[1]", "{}"):
        (tmp_path / "pipeline" / "conditional.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="PIPELINE_DIR.*damaged"):
            ConditionalRainRobustRTDETR.from_pretrained(tmp_path / "pipeline", constant="PIPELINE_DIR")


def test_the_rain_detectors_own_threshold(small_detector):
    gate = RainDetector()
    gate.operating_threshold.fill_(0.8)
    model = ConditionalRainRobustRTDETR(gate, small_spdnet(), small_detector, rain_threshold=None)
    assert model.rain_threshold == pytest.approx(0.8)


# ---- the report ----------------------------------------------------------------------------------------------------

@pytest.fixture
def files(coco, weights):
    """coco and coco_rain, weights, and coco/rain_detector.pt with random weights."""
    torch.manual_seed(0)
    gate = RainDetector().eval()
    save_rain_detector(gate, coco / "rain_detector.pt")
    return coco


def validation(root, domain, small_detector):
    data = datasets.CocoDetectionDataset(root, "val", id2label_of(small_detector), presets.evaluation(96),
                                         constant="COCO_DIR", domain=domain)
    return loaders.validation_loader(data, 4, 0)


@torch.no_grad()
def test_choosing_per_image_equals_running_the_conditional_model(files, small_detector):
    torch.manual_seed(3)
    model = ConditionalRainRobustRTDETR(Darkness(), small_spdnet(), small_detector).eval()
    with torch.no_grad():
        model.derain_module.output3.weight.add_(0.02 * torch.randn_like(model.derain_module.output3.weight))
    loader = validation(files / "coco_rain", "rainy", small_detector)
    ids = loader.dataset.image_ids
    scores = {"rainy": gate_scores(model.rain_detector, loader, "cpu")}
    model.rain_threshold = float(np.median(list(scores["rainy"].values())))
    always = integrated_model.RainRobustRTDETR(model.derain_module, small_detector).eval()
    found = {"rainy": {name: detect(lambda x, m=m: m(pixel_values=x), loader, "cpu")
                       for name, m in (("vanilla", small_detector), ("adapted", always))}}
    goes = hard_gate(scores, model.rain_threshold)
    whole = detect(model, loader, "cpu")
    sent = [goes("rainy", i) for i in ids]
    assert any(sent) and not all(sent)
    for image_id in ids:
        ours = found["rainy"]["adapted" if goes("rainy", image_id) else "vanilla"][image_id][:10]
        theirs = whole[image_id][:10]
        assert np.allclose(ours[:, :4], theirs[:, :4], atol=0.05)  # boxes
        assert np.allclose(ours[:, 4], theirs[:, 4], atol=1e-4)  # scores
        assert np.array_equal(ours[:, 5], theirs[:, 5])  # labels


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_mix_has_the_wanted_share_and_no_scene_twice(files, small_detector, share):
    clean, rainy = (validation(files / root, domain, small_detector).dataset
                    for root, domain in (("coco", "clean"), ("coco_rain", "rainy")))
    part = mixed_part(clean, rainy, share, 0)
    assert len(part.images) == 8 and sum(domain == "rainy" for domain, _ in part.images) == round(8 * share)
    assert len({image_id for _, image_id in part.images}) == 8
    assert sorted(part.truth.getImgIds()) == list(range(1, 9))
    assert len(part.truth.getAnnIds()) == len(clean.boxes)  # twins: the same boxes on either side


def test_the_mix_of_incomplete_twins(files, small_detector):
    """The rainy file lists its images in another order and lacks two: still no scene twice, still the share."""
    path = files / "coco_rain" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["images"] = content["images"][:1:-1]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [note for note in content["annotations"] if note["image_id"] in kept]
    path.write_text(json.dumps(content), encoding="utf-8")
    clean, rainy = (validation(files / root, domain, small_detector).dataset
                    for root, domain in (("coco", "clean"), ("coco_rain", "rainy")))
    part = mixed_part(clean, rainy, 0.5, 0)
    assert len({image_id for _, image_id in part.images}) == len(part.images) == 8
    assert sum(domain == "rainy" for domain, _ in part.images) == 4


def test_the_mix_of_other_images_keeps_the_share(files, small_detector):
    write_coco(files / "other", ids=range(20, 24), splits=("val",))
    clean = validation(files / "coco", "clean", small_detector).dataset
    other = validation(files / "other", "rainy", small_detector).dataset
    part = mixed_part(clean, other, 0.5, 0)
    assert sum(domain == "rainy" for domain, _ in part.images) == 4 and len(part.images) == 8
    with pytest.raises(UserError, match="RAIN_SHARE"):
        mixed_part(clean, other, 1.5, 0)


def perfect_in_their_domain(files, small_detector):
    """-> clean and rainy data, perfect and no detections of their images, and what is found where vanilla is perfect on
    clean and blind on rainy images, the branch the other way round."""
    clean, rainy = (validation(files / root, domain, small_detector).dataset
                    for root, domain in (("coco", "clean"), ("coco_rain", "rainy")))
    perfect = {i: np.array([[*note["bbox"], 1.0, rainy.label_of[note["category_id"]]]
                            for note in read_annotations(rainy.annotations)["annotations"]
                            if note["image_id"] == i]) for i in rainy.image_ids}
    nothing = {i: np.empty((0, 6)) for i in rainy.image_ids}
    found = {domain: {"vanilla": perfect if domain == "clean" else nothing,
                      "adapted": perfect if domain == "rainy" else nothing} for domain in ("clean", "rainy")}
    return clean, rainy, perfect, nothing, found


@pytest.mark.parametrize("numbers", [{1: 1, 3: 3}, {1: 3, 3: 1}, {1: 7, 3: 9}])
def test_scores_of_a_mix_by_hand(files, small_detector, numbers):
    """Perfect boxes on the rainy half, none on the clean half: only rainy images' objects are found; whatever numbers
    the rainy file gives its categories."""
    path = files / "coco_rain" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for category in content["categories"]:
        category["id"] = numbers[category["id"]]
    for note in content["annotations"]:
        note["category_id"] = numbers[note["category_id"]]
    path.write_text(json.dumps(content), encoding="utf-8")
    clean, rainy, perfect, nothing, found = perfect_in_their_domain(files, small_detector)
    part = mixed_part(clean, rainy, 0.5, 0)
    parts = {"clean": part_of(clean), "rainy": part_of(rainy), "mix": part}
    gate = hard_gate({"clean": dict.fromkeys(clean.image_ids, 0.6),
                      "rainy": dict.fromkeys(rainy.image_ids, 0.7)}, 0.65)
    rows = {row["model"]: row for row in Eval_conditional.score(
        Eval_conditional.strategies(found["clean"], {"rain detector": gate}), parts, found)}
    one, none = pytest.approx(1.0), pytest.approx(0.0)
    for name, clean_map, rainy_map in (("vanilla (never)", one, none), ("always adapted", none, one),
                                       ("conditional adapted", one, one), ("oracle gate, adapted", one, one)):
        assert (rows[name]["clean/mAP"], rows[name]["rainy/mAP"]) == (clean_map, rainy_map), name
    assert rows["oracle gate, adapted"]["mix/mAP"] == one and 0 < rows["always adapted"]["mix/mAP"] < 1
    assert (rows["conditional adapted"]["derained_clean"], rows["conditional adapted"]["derained_rainy"]) == (0, 1)
    rows = sweep(part, found, {"clean": dict.fromkeys(clean.image_ids, 0.6),
                               "rainy": dict.fromkeys(rainy.image_ids, 0.7)}, "vanilla", "adapted",
                 {"gate": 1, "plain": 10, "branch": 100}, steps=21)
    best = [row["threshold"] for row in rows if row["mAP"] == one]
    assert best and min(best) > 0.6 and max(best) <= 0.71
    assert rows[0]["ms"] == 101 and rows[-1]["ms"] == 11


def test_the_best_threshold_by_hand(files, small_detector):
    """Vanilla finds everything on clean images, the branch on rainy ones: the probabilities between 0.6 and 0.7 part
    them. A gate that knows nothing is not believed better than it is."""
    clean, rainy, perfect, nothing, found = perfect_in_their_domain(files, small_detector)
    part = mixed_part(clean, rainy, 0.5, 0)
    scores = {"clean": dict.fromkeys(clean.image_ids, 0.6), "rainy": dict.fromkeys(rainy.image_ids, 0.7)}
    chosen = best_threshold(part, found, scores, "adapted", 0.65)
    assert 0.6 < chosen.threshold <= 0.7 and chosen.score == chosen.as_set == pytest.approx(1.0)
    never, always = (best_threshold(part, found, scores, "adapted", threshold) for threshold in (0.8, 0.0))
    assert chosen.plain == never.plain == never.as_set < 0.9 > always.as_set > 0
    assert part.scores(found, taking("adapted", hard_gate(scores, chosen.threshold)))["mAP"] == pytest.approx(1.0)
    everything = {"clean": {"vanilla": perfect, "adapted": nothing}, "rainy": {"vanilla": perfect, "adapted": nothing}}
    assert best_threshold(part, everything, scores, "adapted", 0.5).threshold > 0.7  # the branch is never to be taken


def test_the_best_threshold_of_few_images(files, small_detector):
    """Too few for two halves that hold objects: the best of all images, and no score is claimed. None without any."""
    clean, rainy = (validation(files / root, domain, small_detector).dataset
                    for root, domain in (("coco", "clean"), ("coco_rain", "rainy")))
    boxes = {note["image_id"]: [[*note["bbox"], 1.0, rainy.label_of[note["category_id"]]]]
             for note in read_annotations(rainy.annotations)["annotations"]}
    image_id = next(iter(boxes))
    perfect, nothing = {image_id: np.array(boxes[image_id])}, {image_id: np.empty((0, 6))}
    found = {"rainy": {"vanilla": nothing, "adapted": perfect}}
    truth = part_of(rainy).truth
    part = gates.Part([("rainy", image_id)], truth, {("rainy", image_id): image_id}, rainy.category_of)
    chosen = best_threshold(part, found, {"rainy": {image_id: 0.7}}, "adapted", 0.5)
    assert chosen == (0.0, None, None, None)
    truth.anns = {}
    truth.imgToAnns.clear()
    assert best_threshold(part, found, {"rainy": {image_id: 0.7}}, "adapted", 0.5) == (None, None, None, None)


def test_half_of_the_images_scored_is_what_coco_scores(files, small_detector):
    """The table of a gate's choice that is put together from two branches equals COCO's own of that choice."""
    clean, rainy = (validation(files / root, domain, small_detector).dataset
                    for root, domain in (("coco", "clean"), ("coco_rain", "rainy")))
    part, rng = mixed_part(clean, rainy, 0.5, 0), np.random.default_rng(0)
    truth = {i: [[*note["bbox"], 0.5, rainy.label_of[note["category_id"]]]
                 for note in read_annotations(rainy.annotations)["annotations"] if note["image_id"] == i]
             for i in rainy.image_ids}

    def noisy():
        return {i: np.array([[*(np.array(box[:4]) + rng.uniform(-3, 3, 4)), rng.uniform(), box[5]]
                             for box in boxes * 3]).reshape(-1, 6) for i, boxes in truth.items()}
    found = {domain: {"vanilla": noisy(), "adapted": noisy()} for domain in ("clean", "rainy")}
    takes = rng.permutation(len(part.images)) % 2 == 0
    goes = dict(zip(part.images, takes, strict=True))
    expected = part.scores(found, taking("adapted", lambda *key: goes[key]))["mAP"]
    order = sorted(part.images, key=lambda key: part.new_ids[key])
    tables = [gates._merged(*pair, np.array([goes[key] for key in order]))
              for pair in zip(*(part.matches(found, lambda *key, name=name: name) for name in ("vanilla", "adapted")),
                              strict=True)]
    assert 0 < expected < 1
    assert intervals.weighted_map(tables, np.ones(len(order))) == pytest.approx(expected, abs=1e-9)


def test_intervals_of_a_comparison(files, small_detector, monkeypatch):
    """Vanilla finds everything on clean images and nothing in rain, the branch the other way round: the gate wins the
    whole gap in every resample. Of half as good a branch the number is COCO's, the interval holds it, and groups of
    images are scored by themselves."""
    clean, rainy, perfect, nothing, found = perfect_in_their_domain(files, small_detector)
    parts = {"clean": part_of(clean), "rainy": part_of(rainy)}
    held = {i for i, boxes in perfect.items() if len(boxes)}
    half = dict(perfect) | {i: nothing[i] for i in sorted(held)[::2]}
    found["clean"]["half"] = found["rainy"]["half"] = half
    choose = {name: (lambda *key, name=name: name) for name in ("vanilla", "half")}
    rows = [("vanilla (never)", "vanilla", choose["vanilla"]), ("always half", "half", choose["half"]),
            ("gate", "adapted", taking("adapted", lambda domain, image_id: domain == "rainy"))]
    groups = {"found": sorted(held)[1::2], "lost": sorted(held)[::2]}
    table = gate_intervals.compared(rows, parts, found, groups, True, 40)
    at = {(row["model"], row["images"]): row for row in table}
    assert len(at) == 3 * 4
    for metric in ("mAP", "AP50"):
        assert at["gate", "rainy"][metric] == pytest.approx((1.0, 1.0, 1.0))
        assert at["gate", "clean"][f"{metric}_gain"] == (0.0, 0.0, 0.0)
        score = at["always half", "rainy"][metric]
        assert score.value == pytest.approx(parts["rainy"].scores(found, choose["half"])[metric])
        assert score.low < score.value < score.high and score.low < 0.9
        found_and_lost = [at["always half", group][metric].value for group in groups]
        assert found_and_lost == pytest.approx([1, 0])
    assert at["gate", "rainy"]["gap"] == pytest.approx((1.0, 1.0, 1.0))
    assert at["always half", "rainy"]["gap"].value == pytest.approx(at["always half", "rainy"]["mAP"].value)
    assert at["gate", "found"]["gap"] is None and at["vanilla (never)", "rainy"]["gap"] is None
    asked, weighted_precisions = [], intervals.weighted_precisions

    def counted(*given):
        asked.append(given)
        return weighted_precisions(*given)
    with monkeypatch.context() as patch:
        patch.setattr(intervals, "weighted_precisions", counted)
        again = [("again", "half", choose["half"]), ("once more", "half", choose["half"])]
        more = gate_intervals.compared([*rows, *again], parts, found, {}, True, 1)
    assert len(asked) == 2 * (2 + 3)  # resamples; two choices of clean images, three of rainy ones
    assert [row["mAP"] for row in more if row["model"] == "again"] == [
        row["mAP"] for row in more if row["model"] == "always half"]
    alone = gate_intervals.compared(rows, parts, found, {}, False, 0)
    assert all(row["gap"] is None and row["mAP"].low is None for row in alone)
    shown = gate_intervals.text(table)
    assert shown.isascii() and "1.0000 (1.0000 to 1.0000)" in shown
    json.dumps(gate_intervals.as_numbers(table))


def test_a_graded_gate_takes_more_the_surer_it_is(small_detector):
    scores = {"clean": {1: 0.0, 2: 0.12}, "rainy": {1: 0.13, 2: 0.5, 3: 0.88, 4: 1.0}}
    choose = graded_gate(scores, ["1/4", "2/4", "3/4", "whole"])
    assert [choose("clean", i) for i in (1, 2)] == ["vanilla", "vanilla"]
    assert [choose("rainy", i) for i in (1, 2, 3, 4)] == ["1/4", "2/4", "whole", "whole"]
    other = copy.deepcopy(small_detector)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor += 1
    before = {name: value.clone() for name, value in small_detector.state_dict().items()}
    steps = Eval_conditional.graded(small_detector, "adapter", other, 4)
    assert list(steps) == ["adapter 1/4", "adapter 2/4", "adapter 3/4", "adapter"] and steps["adapter"] is other
    for name, value in steps["adapter 3/4"].state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[name] + 0.75)
        else:
            assert torch.equal(value, before[name])
    assert all(torch.equal(value, before[name]) for name, value in small_detector.state_dict().items())


def test_a_specialist_of_another_architecture_has_no_graded_gate(small_detector, capsys):
    specialist = new_rtdetr("r18", id2label_of(small_detector))
    branches = {"vanilla": small_detector, "fine-tuned": specialist}
    assert Eval_conditional.steps_of(branches, 4) == {} and "RAINY_DETECTOR_NAME" in capsys.readouterr().out
    assert Eval_conditional.steps_of(branches | {"adapter": small_detector}, 2).keys() == {"adapter"}


def test_images_that_spdnet_spoils_are_counted_and_detected_on_as_they_are(files, small_detector):
    spdnet = small_spdnet()
    spdnet.register_forward_hook(lambda module, args, output: tuple(
        torch.cat([o[:1] * float("nan"), o[1:]]) for o in output))
    always = ConditionalRainRobustRTDETR(AlwaysRainy(), spdnet, small_detector).eval()
    loaders_of = {"rainy": validation(files / "coco_rain", "rainy", small_detector)}
    found, fallbacks = Eval_conditional.detect_everything({"vanilla": small_detector, "adapted": always}, loaders_of,
                                                          "cpu")
    assert fallbacks == {"vanilla": 0, "adapted": 2}  # the first image of each of two batches
    first = loaders_of["rainy"].dataset.image_ids[0]
    assert np.allclose(found["rainy"]["adapted"][first], found["rainy"]["vanilla"][first], atol=1e-3)


# ---- scripts -------------------------------------------------------------------------------------------------------

@pytest.fixture
def base(files):
    return {"COCO_DIR": str(files / "coco"), "COCO_RAIN_DIR": str(files / "coco_rain"), "IMAGE_SIZE": 96,
            "PERCENT_DATASET": 100, "RTDETR_MODEL_NAME": str(files / "rtdetr"), "DATALOADER_WORKERS": 0,
            "SPDNET_MODEL_PATH": str(files / "spdnet.pt"), "RAIN_DETECTOR_PATH": str(files / "rain_detector.pt"),
            "OUTPUT_DIR": str(files / "out")}


TRAINING = {"NUM_EPOCHS": 2, "BATCH_SIZE": 2, "GRADIENT_ACCUMULATION_STEPS": 2, "WARMUP_STEPS": 0}


def test_training_moves_spdnet_and_gate_and_not_the_detector(base, files, capsys):
    result = Training_Conditional.main(**base, **TRAINING)
    assert f"--SOFT_PIPELINE_DIR {(files / 'out' / 'pipeline').as_posix()}\n" in capsys.readouterr().out
    assert result["history"][-1]["features"] < result["history"][0]["features"]
    assert {"detection", "gate", "gate_right", "clean/derained", "rainy/mAP"} <= set(result["history"][0])
    before = load_conditional_model(base["RAIN_DETECTOR_PATH"], base["RTDETR_MODEL_NAME"], base["SPDNET_MODEL_PATH"])
    after = ConditionalRainRobustRTDETR.from_pretrained(files / "out" / "pipeline")
    best = result["history"][result["best_epoch"] - 1]
    card = (files / "out" / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert f"| rainy/mAP | {best['rainy/mAP']:.4f} |" in card
    trained = after.state_dict()
    same = {name: torch.equal(value, trained[name]) for name, value in before.state_dict().items()}
    assert all(equal for name, equal in same.items() if name.startswith("detection_module"))
    assert not same["rain_detector.head.0.weight"] and not same["derain_module.output3.weight"]
    assert same["rain_detector.features.0.1.running_mean"]


def test_training_behind_a_hard_gate_leaves_the_gate_alone(base, files):
    result = Training_Conditional.main(**base, **TRAINING | {"NUM_EPOCHS": 1}, GATE="hard", RAIN_THRESHOLD=1.0)
    assert "gate" not in result["history"][0]  # and no image was de-rained: the step has nothing to learn, yet runs
    assert result["history"][0]["clean/derained"] == 0
    more = Training_Conditional.main(**base, **TRAINING | {"NUM_EPOCHS": 1}, GATE="hard", RAIN_THRESHOLD=0.0)
    assert more["history"][0]["clean/derained"] == 1
    for name, value in {"GATE": "soft", "RAIN_THRESHOLD": 0.9, "DERAIN_SCALE": 0.5}.items():
        settings = {"GATE": "hard", "RAIN_THRESHOLD": 0.0, "RESUME": True} | {name: value}
        with pytest.raises(UserError, match=f"{name} was .*without RESUME = True"):
            Training_Conditional.main(**base, **TRAINING | {"NUM_EPOCHS": 1} | settings)
    before = load_rain_detector(base["RAIN_DETECTOR_PATH"]).state_dict()
    after = ConditionalRainRobustRTDETR.from_pretrained(files / "out" / "pipeline").rain_detector.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_two_processes_also_where_a_rank_de_rains_nothing(base, files):
    """A hard gate that lets nothing through: every rank needs a gradient all the same."""
    settings = base | TRAINING | {"NUM_EPOCHS": 1, "GATE": "hard", "RAIN_THRESHOLD": 1.0}
    printed = on_two_processes("Training_Conditional", settings)
    assert printed.count("epoch 1/1") == 1 and (files / "out" / "pipeline" / "conditional.json").is_file()


@pytest.mark.parametrize(("change", "message"), [
    ({"GATE": "gentle"}, "GATE"),
    ({"RAIN_DETECTOR_PATH": "./none.pt"}, "RAIN_DETECTOR_PATH.*Training_RainDetector"),
    ({"SPDNET_MODEL_PATH": "./none.pt"}, "SPDNET_MODEL_PATH"),
    ({"DETECTION_WEIGHT": 0.0, "FEATURE_WEIGHT": 0.0, "GATE_WEIGHT": 0.0}, "every loss weight is 0"),
    ({"RAIN_SCORE_WEIGHT": 2.0}, "RAIN_SCORE_WEIGHT"),
    ({"DERAIN_SCALE": 0.0}, "DERAIN_SCALE"),
    ({"RAIN_DETECTOR_LEARNING_RATE": -1.0}, "RAIN_DETECTOR_LEARNING_RATE = -1.0"),
    ({"LEARNING_RATE": -1.0}, "LEARNING_RATE = -1.0"),
    ({"GATE_WEIGHT": -5.0}, "GATE_WEIGHT = -5.0"),
    ({"WARMUP_STEPS": -3}, "WARMUP_STEPS = -3"),
])
def test_training_refuses_with_one_clear_line(base, change, message):
    with pytest.raises(UserError, match=message) as error:
        Training_Conditional.main(**base | TRAINING | change)
    assert "\n" not in str(error.value)


def test_evaluation_shows_every_row(base, files, small_detector, capsys, monkeypatch):
    asked = {}
    monkeypatch.setattr(Eval_conditional, "best_threshold", lambda part, found, scores, name, as_set, **more:
                        asked.update({name: scores}) or best_threshold(part, found, scores, name, as_set, **more))
    pipeline = load_conditional_model(base["RAIN_DETECTOR_PATH"], base["RTDETR_MODEL_NAME"], base["SPDNET_MODEL_PATH"])
    pipeline.save_pretrained(files / "hard")
    with torch.no_grad():
        pipeline.rain_detector.head[0].weight.zero_()
        pipeline.rain_detector.head[0].bias.fill_(1.0)
    pipeline.save_pretrained(files / "pipeline")
    FeatureDerainRTDETR(copy.deepcopy(small_detector)).save_pretrained(files / "feature")
    (files / "adaptation").mkdir()
    integrated_model.write_derainer(Derainer("nafnet", width=4, encoder=(1,), middle=1, decoder=(1,)),
                                    files / "adaptation" / "nafnet.pt")
    results = Eval_conditional.main(**base | {"OUTPUT_DIR": str(files / "eval")},
                                    ORIGINAL_SPDNET_PATH=base["SPDNET_MODEL_PATH"],
                                    DERAIN_MODEL_PATH=str(files / "adaptation" / "nafnet.pt"),
                                    SOFT_PIPELINE_DIR=str(files / "pipeline"), HARD_PIPELINE_DIR=str(files / "hard"),
                                    RAINY_DETECTOR_NAME=base["RTDETR_MODEL_NAME"],
                                    FEATURE_MODEL_DIR=str(files / "feature"), PICTURES=1, RESAMPLES=3,
                                    PREFIXES=("0",))
    torch.save({"model_args": {"derain_scale": 0.5}}, files / "adaptation" / "best.pt")  # half size
    models = Eval_conditional.build_models(config.resolve(vars(Eval_conditional), base | {
        "DERAIN_MODEL_PATH": str(files / "adaptation" / "nafnet.pt"), "ORIGINAL_SPDNET_PATH": ""}), "cpu")
    assert models.branches["derainer"].derain_scale == 0.5
    rows = {row["model"]: row for row in results["scores"]}
    assert results["thresholds"].keys() == {row["branch"] for row in results["scores"]} - {"vanilla"}
    says = {name: {p for part in scores.values() for p in part.values()} for name, scores in asked.items()}
    # a pipeline's threshold is that of its own gate
    assert says["soft-trained"].isdisjoint(says["adapted"]) and says["hard-trained"] == says["adapted"]
    assert set(rows) == {"vanilla (never)", "graded gate, fine-tuned"} | {
        f"{what} {branch}" for what in ("always", "conditional", "oracle gate,")
        for branch in ("original", "adapted", "derainer", "fine-tuned", "feature", "soft-trained", "hard-trained")}
    assert len(results["false_alarms"]) == results["rain_detector"]["false_positive"]
    assert len(results["missed"]) == results["rain_detector"]["false_negative"]
    assert results["sweep"][-1]["derained"] == 0 and results["sweep"][0]["derained"] == 1
    assert {(row["model"], row["images"]) for row in results["intervals"]} == {
        (model, images) for model in rows for images in ("clean", "rainy", "0*")}
    shown = capsys.readouterr().out
    assert shown.isascii() and "95% interval" in shown and "times as fast" in shown and "called rainy" in shown
    assert {"results.json", "report.html", "threshold_sweep.png", "rain_roc.png", "detections.png"} <= {
        path.name for path in (files / "eval").iterdir()}
    json.loads((files / "eval" / "results.json").read_text(encoding="utf-8"))


def test_evaluation_needs_no_spdnet(base, files, capsys):
    """A specialist alone behind the gate: its speed, sweep and pictures stand where the adapted SPDNet's would."""
    other = new_rtdetr("tiny", {0: "person", 1: "car"})
    other.save_pretrained(files / "specialist")
    (files / "specialist" / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}')
    results = Eval_conditional.main(**base | {"OUTPUT_DIR": str(files / "eval"), "SPDNET_MODEL_PATH": ""},
                                    ORIGINAL_SPDNET_PATH="", RAINY_DETECTOR_NAME=str(files / "specialist"), PICTURES=1,
                                    GATE_STEPS=0)
    assert [row["model"] for row in results["scores"]] == [
        "vanilla (never)", "always fine-tuned", "conditional fine-tuned", "oracle gate, fine-tuned"]
    always = next(row for row in results["scores"] if row["model"] == "always fine-tuned")
    assert results["sweep"][0]["mAP"] == pytest.approx(always["mix/mAP"])
    shown = capsys.readouterr().out
    assert "always fine-tuned" in shown.rpartition("clean image, batch 1")[2]
    assert "RAINY_DETECTOR_NAME was trained at IMAGE_SIZE = 64, IMAGE_SIZE is 96" in shown
    assert (files / "eval" / "detections.png").is_file()


def test_a_demos_note_tells_what_is_not_there_from_what_is_empty(base, capsys):
    cfg = config.resolve(vars(Eval_conditional), base | {
        "ORIGINAL_SPDNET_PATH": "", "DERAIN_MODEL_PATH": "", "ADAPTER_PATH": ""})
    Eval_conditional.build_models(cfg, "cpu", missing=["ADAPTER_PATH"])
    shown = capsys.readouterr().out
    assert "ADAPTER_PATH is not there" in shown and "DERAIN_MODEL_PATH is empty" in shown


def test_evaluation_without_the_optional_models_says_so(base, files, capsys):
    own = Eval_conditional.main(**base | {"OUTPUT_DIR": str(files / "eval")}, ORIGINAL_SPDNET_PATH="",
                                RAIN_THRESHOLD=None, PICTURES=1)
    assert own["rain_detector"]["threshold"] == load_rain_detector(
        base["RAIN_DETECTOR_PATH"]).operating_threshold.item()
    capsys.readouterr()
    results = Eval_conditional.main(**base | {"OUTPUT_DIR": str(files / "eval")}, ORIGINAL_SPDNET_PATH="",
                                    RAIN_THRESHOLD=1.0, PICTURES=1)
    rows = {row["model"]: row for row in results["scores"]}
    assert not results["false_alarms"]
    assert rows["conditional adapted"]["clean/mAP"] == rows["vanilla (never)"]["clean/mAP"]
    assert capsys.readouterr().out.count("is empty, so the") == 7
    for change, message in (({"SPDNET_MODEL_PATH": "./none.pt"}, "SPDNET_MODEL_PATH"),
                            ({"RAIN_DETECTOR_PATH": "./none.pt"}, "RAIN_DETECTOR_PATH"),
                            ({"COCO_RAIN_DIR": "./none"}, "COCO_RAIN_DIR"),
                            ({"RAIN_THRESHOLD": 7}, "RAIN_THRESHOLD"),
                            ({"SOFT_PIPELINE_DIR": "./none"}, "SOFT_PIPELINE_DIR"),
                            ({"DERAIN_MODEL_PATH": "./none.pt"}, "DERAIN_MODEL_PATH"),
                            ({"SPDNET_MODEL_PATH": ""}, "RAINY_DETECTOR_NAME.* are empty"),
                            ({"SPDNET_MODEL_PATH": "", "SOFT_PIPELINE_DIR": "./it"}, "RAINY_DETECTOR_NAME.* are empty"),
                            ({"ORIGINAL_SPDNET_PATH": "./none.pt"}, 'ORIGINAL_SPDNET_PATH.*"" leaves its rows out'),
                            ({"RESAMPLES": -1}, "RESAMPLES"), ({"PREFIXES": ("none_",)}, "PREFIXES"),
                            ({"RAIN_SHARE": -1.0}, "RAIN_SHARE")):
        with pytest.raises(UserError, match=message):
            Eval_conditional.main(**base | {"ORIGINAL_SPDNET_PATH": ""} | change)
