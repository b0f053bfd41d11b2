"""Evaluate the conditional model: a rain detector decides per image whether RT-DETR sees it de-rained or as it is.

Compares it with never and with always de-raining, with a gate that knows the weather (oracle), with a gate that was
trained together with SPDNet, and with a detector fine-tuned on rain behind the same gate: on clean images, on rainy
ones and on a mix, with the time that each costs.

    python Eval_conditional.py --demo
    python Eval_conditional.py

Writes OUTPUT_DIR/results.json, report.html (curves, confusions, calibration, the worst mistakes), threshold_sweep.png,
rain_roc.png, rain_mistakes.png and detections.png.
"""

from typing import NamedTuple

import utils.threads  # noqa: F401 (before torch)

import numpy as np
import torch
from accelerate.utils import gather_object

from utils import config, datasets, freeze, integrated_model, processes, report, system, visualize
from utils.conditional_model import (
    ConditionalRainRobustRTDETR,
    learnt_sizes,
    load_rainy_detector,
    require_same_outputs,
    require_threshold,
)
from utils.datasets import loaders, presets
from utils.datasets.samples import evenly
from utils.demo.coco import ensure_demo
from utils.evaluation import comparison, gate_intervals, gate_report, gates, rain_report, report_page
from utils.evaluation.coco import detect, entries
from utils.evaluation.gates import (
    AlwaysRainy,
    best_threshold,
    gate_scores,
    graded_gate,
    hard_gate,
    mixed_part,
    part_of,
    taking,
)
from utils.feature_derain import FeatureDerainRTDETR
from utils.networks import adapter
from utils.networks.derainers import load_trained
from utils.networks.rain_detector import load_rain_detector
from utils.networks.rtdetr import (
    id2label_of,
    interpolated,
    load_rtdetr,
    require_queries,
    require_size,
    same_shapes,
)
from utils.networks.spdnet import load_spdnet
from utils.training.plan import whole

# --- data ---------------------------------------------------------------------------------------------------------
COCO_DIR = "./dataset/coco"             # clean images: COCO, YOLO or Pascal VOC, see docs/data.md
COCO_RAIN_DIR = "./dataset/coco_rain"   # rainy images in the same layout: the twin, or real rain with its own labels
PERCENT_DATASET: float = 100            # seeded subset of the validation images, in percent
RAIN_SHARE = 0.5                        # share of rainy images in the mix
IMAGE_SIZE = 640                        # side of the square input, as in training
UNKNOWN_CATEGORIES = "error"            # "ignore" leaves categories out that the detector does not know

# --- models -------------------------------------------------------------------------------------------------------
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # the detector of the training run
RAIN_DETECTOR_PATH = "./rain_detector_pretrained/rain_detector_best.pt"  # from Training_RainDetector.py
RAIN_THRESHOLD: float | None = 0.5      # an image is rainy from this probability on; None: the rain detector's own
SPDNET_MODEL_PATH: str | None = "./outputs_spdnet_adaptation/spdnet_adapted.pt"  # the adapted SPDNet; "" leaves it out
ORIGINAL_SPDNET_PATH: str | None = "./model_spa.pt"  # SPDNet before adaptation; "" leaves its rows out
DERAIN_SCALE = 1.0                      # as in the training of SPDNET_MODEL_PATH
DERAIN_MODEL_PATH: str | None = ""      # a U-Net or NAFNet, adapted or not; "" leaves its rows ("derainer") out
SOFT_PIPELINE_DIR: str | None = ""      # OUTPUT_DIR/pipeline of Training_Conditional.py; "" leaves its rows out
HARD_PIPELINE_DIR: str | None = ""      # the same from a run with GATE = "hard", to compare the two
RAINY_DETECTOR_NAME = ""                # an RT-DETR fine-tuned on rain by Training_RTDETR.py; "" leaves its rows out
FEATURE_MODEL_DIR: str | None = ""      # OUTPUT_DIR/model of Training_FeatureDerain.py; "" leaves its rows out
ADAPTER_PATH: str | None = ""           # rain.safetensors of Training_WeatherAdapter.py; "" leaves its rows out
GATE_STEPS = 4                          # of the graded gate: the surer it is of rain, the more of an adapter or a
                                        # fine-tuned detector is mixed into the weights; 0 or 1 leaves its rows out

# --- evaluation ---------------------------------------------------------------------------------------------------
EVAL_BATCH_SIZE = 4                     # validation batch, and the batch N of the latencies
DATALOADER_WORKERS = 8                  # processes that load images; at most the number of cores is used
PREFIXES = ()                           # also score rainy images by file-name prefix, e.g. ("rain_", "mist_", "fog_")
RESAMPLES = 0                           # of the bootstrap, for 95% intervals of all rows, such as 300; 0: none
PICTURES = 3                            # rainy and as many clean images on the page of detections
SCORE_THRESHOLD = 0.4                   # boxes drawn on it
SEED = 0                                # of the subset and of the mix
OUTPUT_DIR = "./outputs_conditional/eval"

DEMO = {
    "COCO_DIR": "./demo/coco", "COCO_RAIN_DIR": "./demo/coco_rain", "IMAGE_SIZE": 160,
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "RAIN_DETECTOR_PATH": "./assets/demo/rain_detector.pt",
    "SPDNET_MODEL_PATH": "./assets/demo/spdnet_adapted.pt", "ORIGINAL_SPDNET_PATH": "./assets/demo/spdnet.pt",
    "DERAIN_MODEL_PATH": "./assets/demo/nafnet_adapted.pt",
    "RAINY_DETECTOR_NAME": "./assets/demo/rtdetr_specialist", "DERAIN_SCALE": 0.5, "EVAL_BATCH_SIZE": 8,
    "DATALOADER_WORKERS": 0, "OUTPUT_DIR": "./demo/outputs_conditional/eval",
    # rows that appear once Training_Conditional.py --demo and Training_FeatureDerain.py --demo have run
    "SOFT_PIPELINE_DIR": "./demo/outputs_conditional/pipeline",
    "HARD_PIPELINE_DIR": "./demo/outputs_conditional_hard/pipeline",
    "FEATURE_MODEL_DIR": "./demo/outputs_feature_derain/model",
    "ADAPTER_PATH": "./demo/outputs_adapter/rain.safetensors",
}
_FILES = ("results.json", "report.html", "threshold_sweep.png", "rain_roc.png", "rain_mistakes.png", "detections.png")
_RAINY_DETECTORS = {"fine-tuned": "RAINY_DETECTOR_NAME", "feature": "FEATURE_MODEL_DIR"}
_PIPELINES = {"soft-trained": "SOFT_PIPELINE_DIR", "hard-trained": "HARD_PIPELINE_DIR"}
_OPTIONAL = {"original": "ORIGINAL_SPDNET_PATH", "adapted": "SPDNET_MODEL_PATH", "derainer": "DERAIN_MODEL_PATH",
             "adapter": "ADAPTER_PATH", **_RAINY_DETECTORS, **_PIPELINES}  # branches that an empty constant leaves out


def build_loaders(cfg, id2label):
    """-> {"clean", "rainy": validation loader}."""
    datasets.require_clean_and_rainy(cfg.COCO_DIR, cfg.COCO_RAIN_DIR)
    found = datasets.clean_rainy_validation(
        cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, presets.evaluation(cfg.IMAGE_SIZE), domains=gates.DOMAINS,
        percent=cfg.PERCENT_DATASET, seed=cfg.SEED, unknown=cfg.UNKNOWN_CATEGORIES)
    return {domain: loaders.validation_loader(data, cfg.EVAL_BATCH_SIZE, cfg.DATALOADER_WORKERS)
            for domain, data in found.items()}


class Models(NamedTuple):
    """What is compared.

    Branches: "vanilla", and where their constants are set "original" and "adapted" (SPDNet), "derainer" (U-Net or
    NAFNet), "fine-tuned", "feature", "adapter", "soft-trained", "hard-trained" (SPDNets that were trained together with
    a gate).
    All are (pixel_values) -> outputs with logits and pred_boxes; those that de-rain do it with every image and have
    `rain_stats`.
    """

    rain_detector: torch.nn.Module
    branches: dict  # {branch: model}
    pipelines: dict  # {branch: the pipeline that was trained as a whole}
    steps: dict  # {branch: {name: the way from vanilla to it in steps, the last one the branch itself}}


def rainy_detector(cfg, name, vanilla, device):
    """-> the detector of one of _RAINY_DETECTORS, with the outputs of the vanilla one."""
    constant = _OPTIONAL[name]
    value = getattr(cfg, constant)
    model = load_rainy_detector(value, device, constant, vanilla)
    require_same_outputs(vanilla, model, constant)
    if isinstance(model, FeatureDerainRTDETR) != (name == "feature"):  # its rows would be misnamed
        raise config.UserError(f"{constant} = '{value}' belongs in the other of FEATURE_MODEL_DIR (model/ of "
                               "Training_FeatureDerain.py) and RAINY_DETECTOR_NAME (a plain RT-DETR)")
    return model


def trained_pipeline(cfg, name, vanilla, device):
    """-> the pipeline of one of _PIPELINES, which has the vanilla detector in it."""
    constant = _OPTIONAL[name]
    value = getattr(cfg, constant)
    pipeline = ConditionalRainRobustRTDETR.from_pretrained(value, device, constant=constant)
    if pipeline.derain_module is None:
        raise config.UserError(f"{constant} = '{value}' has no SPDNet: not a pipeline of Training_Conditional.py")
    if freeze.fingerprint(pipeline.detection_module) != freeze.fingerprint(vanilla):
        raise config.UserError(f"{constant} = '{value}' was trained with another detector than RTDETR_MODEL_NAME")
    return pipeline


def build_models(cfg, device, missing=()):
    """-> Models, in eval mode on `device`; says which rows are left out.

    Args:
        missing: constants that are empty because what they name in the demo has not been made yet.
    Raises:
        UserError: nothing to put behind the gate; pipelines have one of their own.
    """
    rain_detector = load_rain_detector(cfg.RAIN_DETECTOR_PATH, device)
    vanilla = freeze.freeze(load_rtdetr(cfg.RTDETR_MODEL_NAME, device=device))
    given = {name: getattr(cfg, constant) for name, constant in _OPTIONAL.items() if getattr(cfg, constant)}
    gated = [name for name in _OPTIONAL if name != "original" and name not in _PIPELINES]
    if not given.keys() & set(gated):
        raise config.UserError(f"{', '.join(_OPTIONAL[name] for name in gated)} are empty: there is nothing to put "
                               "behind the gate")

    def behind(derainer, scale=cfg.DERAIN_SCALE):
        return ConditionalRainRobustRTDETR(AlwaysRainy(), derainer, vanilla, derain_scale=scale).to(device).eval()

    branches = {"vanilla": vanilla}
    if "original" in given:
        branches["original"] = behind(load_spdnet(given["original"], constant="ORIGINAL_SPDNET_PATH"))
    if "adapted" in given:
        integrated_model.require_trained_scale(given["adapted"], cfg.DERAIN_SCALE)
        branches["adapted"] = behind(load_spdnet(given["adapted"], constant="SPDNET_MODEL_PATH"))
    if "derainer" in given:
        branches["derainer"] = behind(load_trained(given["derainer"], constant="DERAIN_MODEL_PATH"),
                                      integrated_model.trained_scale(given["derainer"]))
    branches |= {name: rainy_detector(cfg, name, vanilla, device) for name in _RAINY_DETECTORS if name in given}
    if "adapter" in given:
        branches["adapter"] = adapter.fold(vanilla, given["adapter"], "ADAPTER_PATH")
    pipelines = {name: trained_pipeline(cfg, name, vanilla, device) for name in _PIPELINES if name in given}
    branches |= {name: behind(one.derain_module, one.derain_scale) for name, one in pipelines.items()}
    for name, constant in _OPTIONAL.items():
        if name not in given:
            reason = "not there" if constant in missing else "empty"
            processes.say(f"note: {constant} is {reason}, so the {name} rows are left out")
    return Models(rain_detector, branches, pipelines, steps_of(branches, cfg.GATE_STEPS))


def leading(branches):
    """-> name of the branch that pictures, sweep and speed show: the adapted SPDNet where there is one."""
    return next(name for name in ("adapted", *branches) if name in branches and name not in ("vanilla", "original"))


def behind_gate(rain_detector, branches, threshold):
    """-> ConditionalRainRobustRTDETR of the leading branch, in eval mode."""
    branch, vanilla = branches[leading(branches)], branches["vanilla"]
    if isinstance(branch, ConditionalRainRobustRTDETR):
        made = ConditionalRainRobustRTDETR(rain_detector, branch.derain_module, vanilla, threshold,
                                           derain_scale=branch.derain_scale)
    else:
        made = ConditionalRainRobustRTDETR(rain_detector, None, vanilla, threshold, rainy_detector=branch)
    return made.eval()


def steps_of(branches, number):
    """-> `steps` of Models, of branches that a graded gate can mix with vanilla; number: GATE_STEPS."""
    steps = {}
    for name in ("adapter", "fine-tuned"):
        if name not in branches or number < 2:
            continue
        if same_shapes(branches["vanilla"], branches[name]):
            steps[name] = graded(branches["vanilla"], name, branches[name], number)
        else:
            processes.say(f"note: {_OPTIONAL[name]} is built otherwise than RTDETR_MODEL_NAME: their weights cannot be "
                          "mixed, so the graded gate's row is left out")
    return steps


def graded(vanilla, name, branch, number):
    """-> {name of a step: detector}: `number` detectors whose weights lie between vanilla's and the branch's."""
    between = {f"{name} {i}/{number}": freeze.freeze(interpolated(vanilla, branch, i / number))
               for i in range(1, number)}
    return between | {name: branch}


def detect_everything(branches, loaders_of, device):
    """Run every branch on every image.

    Returns:
        {domain: {branch: evaluation.coco.detect's result}}; {branch: number of images that its
        de-rainer answered with NaN or infinity, where vanilla's detections stand instead}.
    """
    found, fallbacks = {domain: {} for domain in loaders_of}, dict.fromkeys(branches, 0)
    for domain, loader in loaders_of.items():
        for name, model in branches.items():
            def predict(images, model=model, name=name):
                outputs = model(pixel_values=images)
                fallbacks[name] += (getattr(outputs, "rain_stats", None) or {}).get("num_fallback", 0)
                return outputs
            found[domain][name] = detect(predict, loader, device, f"{name}, {domain}")
    return found, {name: sum(gather_object([count])) for name, count in fallbacks.items()}


def strategies(branches, decisions, graded_gates=None):
    """-> [(row's name, rainy branch, choose(domain, image_id) -> branch)]: which branch does an image take?

    Args:
        decisions: {"rain detector" and each pipeline that was trained as a whole: goes(domain, image_id)}.
        graded_gates: {branch: choose} of gates that take a part of a branch.
    """
    rows = [("vanilla (never)", "vanilla", taking("vanilla", lambda *key: True))]
    for branch in [name for name in branches if name != "vanilla"]:
        gate = decisions.get(branch, decisions["rain detector"])
        rows += [(f"always {branch}", branch, taking(branch, lambda *key: True)),
                 (f"conditional {branch}", branch, taking(branch, gate)),
                 (f"oracle gate, {branch}", branch, taking(branch, lambda domain, image_id: domain == "rainy"))]
        if branch in (graded_gates or {}):
            rows.append((f"graded gate, {branch}", branch, graded_gates[branch]))
    return rows


def score(rows, parts, found):
    """-> [{"model", "branch", "clean/mAP", ..., "mix/AP75", "derained_clean", "derained_rainy": shares}, ...]."""
    table = []
    for name, branch, choose in processes.progress(rows, "scoring"):
        row = {"model": name, "branch": branch}
        for part_name, part in parts.items():
            scores = part.scores(found, choose)
            row |= {f"{part_name}/{metric}": scores[metric] for metric in gates.COLUMNS}
            if part_name != "mix":
                taken = [choose(*key) for key in part.images]
                row[f"derained_{part_name}"] = float(np.mean([one != "vanilla" for one in taken]))
        table.append(row)
    return table


def intervals_of(cfg, rows, parts, found, groups, twins):
    """-> the table of gate_intervals.compared, empty where neither RESAMPLES nor PREFIXES asks for it."""
    if not (cfg.RESAMPLES or groups):
        return []
    return gate_intervals.compared(rows, {domain: parts[domain] for domain in gates.DOMAINS}, found, groups, twins,
                                   cfg.RESAMPLES, cfg.SEED)


def decisions_of(pipeline, branches, pipelines, loaders_of, device):
    """-> decisions as `strategies` takes them; {branch: {domain: {image_id: probability of rain}}} by the rain detector
    that goes with it: its own where it was trained with one, else that of `pipeline`."""
    def scores_by(rain_detector):
        return {domain: gate_scores(rain_detector, loader, device) for domain, loader in loaders_of.items()}
    scores = scores_by(pipeline.rain_detector)
    decisions = {"rain detector": hard_gate(scores, pipeline.rain_threshold)}
    scores_of = dict.fromkeys(branches, scores)
    for name, trained in pipelines.items():
        scores_of[name] = scores_by(trained.rain_detector)
        decisions[name] = hard_gate(scores_of[name], trained.rain_threshold)
    return decisions, scores_of


def thresholds_of(part, found, scores_of, threshold, pipelines):
    """-> {branch: gates.Chosen as a dict} of the mix, for all branches but vanilla.

    Args:
        scores_of: {branch: probabilities by its own rain detector}; threshold: in use; pipelines: of Models, which have
            thresholds of their own.
    """
    as_set = dict.fromkeys(scores_of, threshold) | {name: one.rain_threshold for name, one in pipelines.items()}
    vanilla = part.matches(found, lambda *key: "vanilla")
    return {name: best_threshold(part, found, scores, name, as_set[name], plain_matches=vanilla)._asdict()
            for name, scores in scores_of.items() if name != "vanilla"}


def report_of(rows, parts, found, data):
    """-> report_page.Page of vanilla and of every branch behind its gate, on clean and on rainy images."""
    page = report_page.Page("Conditional de-raining")
    for domain in ("rainy", "clean"):
        part = parts[domain]
        for name, _, choose in rows:
            if name.startswith(("vanilla", "conditional", "graded")):
                chosen = {image_id: found[domain][choose(domain, image_id)][image_id]
                          for image_id in data[domain].image_ids}
                page.add(name, data[domain], part.scores(found, choose), entries(chosen), truth=part.truth)
    return page


def measure_latency(cfg, rain_detector, branches, device):
    """Milliseconds per image of the parts, and of the whole conditional model on images that it calls clean or rainy.

    Returns:
        {"gate", each branch, "conditional, clean", "conditional, rainy": {"batch 1": ms per image, "batch N": ...}}.
    """
    whole = {}
    for weather, threshold in (("clean", np.inf), ("rainy", -np.inf)):  # the images are noise: decide for the gate
        whole[f"conditional, {weather}"] = pipeline = behind_gate(rain_detector, branches, None)
        pipeline.rain_threshold = threshold
    gate = {"gate": lambda pixel_values: rain_detector.predict(pixel_values)}
    return comparison.milliseconds_per_image(gate | branches | whole, cfg.IMAGE_SIZE, (1, cfg.EVAL_BATCH_SIZE), device)


@torch.no_grad()
def draw_page(cfg, pipeline, loaders_of, device, id2label, path):
    """Page: what came in, with vanilla's detections | what the detector saw, with the pipeline's | ground truth."""
    rows = []
    scale = visualize.enlargement(cfg.IMAGE_SIZE)
    for domain in ("rainy", "clean"):
        for sample in evenly(loaders_of[domain].dataset, cfg.PICTURES):
            batch = datasets.to_device(datasets.collate([sample]), device)
            outputs, vanilla = pipeline(batch["images"]), pipeline.detection_module(pixel_values=batch["images"])
            cells = [visualize.draw_detections(images, result, id2label, cfg.SCORE_THRESHOLD, scale)[0]
                     for images, result in ((batch["images"], vanilla), (outputs.derained, outputs))]
            stats = outputs.rain_stats
            took = "left as it is"
            if stats["mask"][0]:
                took = "de-rained" if pipeline.derain_module else "to the rainy detector"
            cells[1] = visualize.captioned(cells[1], f"{domain}, p = {stats['scores'][0]:.3f}: {took}")
            cells.append(visualize.draw_truth(batch["images"][0], sample, id2label, scale))
            rows.append(cells)
    visualize.grid(rows, ["vanilla RT-DETR", "conditional", "ground truth"], path)


def require_usable(cfg):
    """UserError for numbers with which nothing could be evaluated, before demo data is drawn or a model is loaded."""
    require_size(cfg.IMAGE_SIZE)
    gates.require_rain_share(cfg.RAIN_SHARE)
    require_threshold(cfg.RAIN_THRESHOLD)
    whole(0, "no graded gate")("GATE_STEPS", cfg.GATE_STEPS)
    whole(0, "no intervals")("RESAMPLES", cfg.RESAMPLES)
    integrated_model.require_scale(cfg.DERAIN_SCALE)
    comparison.require_page(cfg)
    if cfg.ORIGINAL_SPDNET_PATH and (problem := system.absent(cfg.ORIGINAL_SPDNET_PATH)):
        raise config.UserError(f"ORIGINAL_SPDNET_PATH = '{cfg.ORIGINAL_SPDNET_PATH}' {problem}: it is SPDNet before "
                               'adaptation (model_spa.pt of github.com/Joyies/SPDNet); "" leaves its rows out')


def main(**overrides):
    """Evaluate; -> {"scores": rows, "rain_detector", "false_alarms", "missed", "fallbacks", "milliseconds_per_image",
    "sweep", "thresholds", "intervals": of gate_intervals, "details": of report_page}."""
    cfg = config.resolve(globals(), overrides)
    require_usable(cfg)
    missing = ()
    if cfg.demo:
        ensure_demo()
        missing = comparison.leave_out_missing(cfg, DEMO, ("SOFT_PIPELINE_DIR", "HARD_PIPELINE_DIR",
                                                           "FEATURE_MODEL_DIR", "ADAPTER_PATH"))
    comparison.note_same(cfg, ("RTDETR_MODEL_NAME", "RAINY_DETECTOR_NAME"),
                         ("SPDNET_MODEL_PATH", "ORIGINAL_SPDNET_PATH"), ("SOFT_PIPELINE_DIR", "HARD_PIPELINE_DIR"))
    device = processes.announced_device()
    rain_detector, branches, pipelines, steps = build_models(cfg, device, missing)
    comparison.note_other_sizes(
        learnt_sizes(cfg, ("RTDETR_MODEL_NAME", *_RAINY_DETECTORS.values(), "ADAPTER_PATH")), cfg.IMAGE_SIZE)
    id2label = id2label_of(branches["vanilla"])
    require_queries(branches["vanilla"], cfg.IMAGE_SIZE)
    loaders_of = build_loaders(cfg, id2label)
    pipeline, branch = behind_gate(rain_detector, branches, cfg.RAIN_THRESHOLD), leading(branches)
    threshold = pipeline.rain_threshold

    data = {domain: loader.dataset for domain, loader in loaders_of.items()}
    twins = comparison.are_twins(data["rainy"], data["clean"])
    groups = comparison.ids_by_prefix(data["rainy"], cfg.PREFIXES)
    parts = {domain: part_of(data[domain]) for domain in gates.DOMAINS}
    parts["mix"] = mixed_part(data["clean"], data["rainy"], cfg.RAIN_SHARE, cfg.SEED)
    folder = report.output_folder(cfg.OUTPUT_DIR, _FILES)  # once all else is found: a typo moves no earlier results
    decisions, scores_of = decisions_of(pipeline, branches, pipelines, loaders_of, device)
    scores = scores_of["vanilla"]
    between = {name: model for part in steps.values() for name, model in part.items()}
    found, fallbacks = detect_everything(branches | between, loaders_of, device)

    graded_gates = {branch: graded_gate(scores, part) for branch, part in steps.items()}
    rows = strategies(branches, decisions, graded_gates)
    table, page = score(rows, parts, found), report_of(rows, parts, found, data)
    sure = intervals_of(cfg, rows, parts, found, groups, twins)
    thresholds = thresholds_of(parts["mix"], found, scores_of, threshold, pipelines)
    latency = measure_latency(cfg, rain_detector, branches, device)
    gate_report.add_cost(table, latency)
    one = {name: values["batch 1"] for name, values in latency.items()}
    sweep = gates.sweep(parts["mix"], found, scores, "vanilla", branch,
                        {"gate": one["gate"], "plain": one["vanilla"], "branch": one[branch]})
    predicted = gate_report.predictions(data, scores)
    gate = rain_report.summarise(predicted, threshold)
    wrong = [gate_report.mistakes(predicted[domain], threshold) for domain in gates.DOMAINS]
    results = {"scores": table, "rain_detector": gate, "false_alarms": wrong[0], "missed": wrong[1],
               "fallbacks": fallbacks, "milliseconds_per_image": latency, "sweep": sweep, "thresholds": thresholds,
               "intervals": gate_intervals.as_numbers(sure), "details": page.numbers}
    if processes.is_main():
        gate_report.print_summary(table, branch, latency, gate, *wrong, fallbacks)
        gate_report.print_thresholds(thresholds)
        if sure:
            print("\n" + gate_intervals.text(sure))
        report.write_results(folder / "results.json", cfg.as_dict(), results)
        visualize.threshold_sweep(sweep, threshold, folder / "threshold_sweep.png")
        rain_report.write_pictures(predicted, threshold, folder)
        draw_page(cfg, pipeline, loaders_of, device, id2label, folder / "detections.png")
        page.add_sliders(branches, data["rainy"], device, id2label, cfg.SCORE_THRESHOLD)
        page.write(folder, cfg.as_dict())
        print(f"\nwritten: {folder.as_posix()}/{', '.join(_FILES)}")
    return results


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
