"""Which loss should SPDNet be adapted with? Every variant over several seeds on the demo world, one table.

    python -m tools.ablation_spdnet_adaptation

Runs Training_SPDNet_Adaptation.py --demo with the loss weights of each variant, then scores the adapted network on
clean images as well. Finished runs are kept in OUTPUT_DIR and not repeated; the table covers all that are there.
"""

import json
import os
import statistics
import time
from pathlib import Path

import Eval_SPDNet_Adaptation as Eval
import Training_SPDNet_Adaptation as Adaptation
from utils import config, integrated_model, processes, report
from utils.demo.coco import ensure_demo
from utils.evaluation.coco import detection_scores
from utils.networks.rtdetr import id2label_of, load_rtdetr, rtdetr_of

_ROOT = Path(__file__).resolve().parent.parent

SEEDS = (0, 1, 2)                       # each run is repeated with these
VARIANTS = ("detection+features", "detection", "features", "detection+encoder", "detection+both levels",
            "detection+features+identity", "detection+features+reconstruction")  # names of _LOSSES below
PERCENT_DATASET: float = 50             # of the demo's 1,200 training images
NUM_EPOCHS = 2                          # of every run
OUTPUT_DIR = "./demo/ablation"          # a folder per run, and results.json

_LOSSES = {
    "detection": {"DETECTION_WEIGHT": 1.0, "FEATURE_WEIGHT": 0.0},
    "detection+features": {"DETECTION_WEIGHT": 1.0, "FEATURE_WEIGHT": 5.0, "FEATURE_LEVEL": "backbone"},
    "features": {"DETECTION_WEIGHT": 0.0, "FEATURE_WEIGHT": 5.0},
    "encoder": {"DETECTION_WEIGHT": 0.0, "FEATURE_WEIGHT": 5.0, "FEATURE_LEVEL": "encoder"},
    "detection+encoder": {"DETECTION_WEIGHT": 1.0, "FEATURE_WEIGHT": 5.0, "FEATURE_LEVEL": "encoder"},
    "detection+both levels": {"DETECTION_WEIGHT": 1.0, "FEATURE_WEIGHT": 5.0, "FEATURE_LEVEL": "both"},
    "detection+features+identity": {"DETECTION_WEIGHT": 1.0, "FEATURE_WEIGHT": 5.0, "IDENTITY_WEIGHT": 5.0},
    "detection+features+reconstruction": {"DETECTION_WEIGHT": 1.0, "FEATURE_WEIGHT": 5.0,
                                          "RECONSTRUCTION_WEIGHT": 5.0},
    "detection+features, fresh": {"DETECTION_WEIGHT": 1.0, "FEATURE_WEIGHT": 5.0, "RAIN": "fresh"},
    "detection+features, full scale": {"DETECTION_WEIGHT": 1.0, "FEATURE_WEIGHT": 5.0, "DERAIN_SCALE": 1.0},
}


def score(spdnet_path, **overrides):
    """-> {"clean", "rainy"}: mAP of SPDNet (None: without) and the demo's detector on the demo's validation scenes."""
    cfg = config.resolve(vars(Eval), {"demo": True} | overrides)
    device = processes.device()
    if spdnet_path is None:
        model = load_rtdetr(cfg.RTDETR_MODEL_NAME, device=device)
    else:
        model = integrated_model.load_integrated_model(spdnet_path, cfg.RTDETR_MODEL_NAME, None, device, True, True,
                                                       cfg.DERAIN_SCALE).eval()
    return scores_of(model, cfg)


def scores_of(model, cfg):
    """-> {"clean", "rainy"}: mAP of a detector or a wrapper of one on the validation scenes of Eval's constants."""
    loaders = Eval.build_loaders(cfg, id2label_of(rtdetr_of(model)))
    return {domain: detection_scores(lambda x: model(pixel_values=x), loaders[domain], processes.device())[0]["mAP"]
            for domain in ("clean", "rainy")}


def once(path, settings, make):
    """-> the scores in the JSON file `path`, made first where it is not there yet; settings: {name: what they hang on}.

    Raises:
        UserError: the file is there, but from other settings.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    if not path.is_file():
        report.write_json(path, {"settings": settings, "scores": make()})
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("settings") != settings:
        raise config.UserError(f"{path.as_posix()} comes from other settings ({found.get('settings')}, now "
                               f"{settings}): choose another OUTPUT_DIR or delete the file")
    return found["scores"]


def require_known(chosen, variants):
    """UserError where VARIANTS names what is not there."""
    if unknown := set(chosen) - variants.keys():
        raise config.UserError(f"VARIANTS: {', '.join(sorted(unknown))} is not in _VARIANTS ({', '.join(variants)})")


def place_of(folder, variant, seed):
    """-> Path of a run's folder."""
    return folder / f"{''.join(c if c.isalnum() else '_' for c in variant)}_{seed}"


def all_runs(cfg, settings_of, run):
    """-> the scores of every variant with every seed, each made once and kept in cfg.OUTPUT_DIR.

    Args:
        settings_of: (variant) -> {name: what its scores hang on}; run: (variant, seed, folder, cfg) -> scores.
    """
    def made(variant, seed):
        place = place_of(Path(cfg.OUTPUT_DIR), variant, seed)
        return once(place / "scores.json", settings_of(variant), lambda: run(variant, seed, place, cfg))
    return [made(variant, seed) for seed in cfg.SEEDS for variant in cfg.VARIANTS]


def rows_of(variants, runs, vanilla):
    """-> rows of the table: vanilla, and mean and spread over seeds of every variant.

    Args:
        runs: [{"variant", "rainy", "clean": mAP, "seconds": of CPU time, where measured}, ...].
        vanilla: {"rainy", "clean": mAP}.
    """
    gap = vanilla["clean"] - vanilla["rainy"]
    rows = [{"variant": "vanilla RT-DETR", "rainy": f"{vanilla['rainy']:.4f}", "clean": f"{vanilla['clean']:.4f}"}]
    for variant in variants:
        rainy, clean = ([r[domain] for r in runs if r["variant"] == variant] for domain in ("rainy", "clean"))
        seconds = [r["seconds"] for r in runs if r["variant"] == variant and "seconds" in r]
        shares = [100 * (value - vanilla["rainy"]) / gap for value in rainy]
        rows.append({"variant": variant, "rainy": spread(rainy), "clean": spread(clean),
                     "gap": f"{statistics.mean(shares):.1f}% ({min(shares):.1f} to {max(shares):.1f})",
                     "seconds": f"{statistics.mean(seconds):.0f} s" if seconds else None})
    return rows


def cpu_seconds(step, repeats=4, warmup=2):
    """-> seconds of CPU time of one call of `step()`, averaged over `repeats` after `warmup` others."""
    for call in range(warmup + repeats):
        if call == warmup:
            begin = time.process_time()
        step()
    return (time.process_time() - begin) / repeats


def demo_constants(script):
    """-> {name: value} of a training script under --demo, without those that each run has of its own."""
    return {name: value for name, value in config.resolve(vars(script), {"demo": True}).as_dict().items()
            if name not in ("SEED", "OUTPUT_DIR", "RESUME", "BASELINES", "PICTURES")}


def run(variant, seed, folder, cfg):
    """Adapt with one variant and score the result."""
    Adaptation.main(demo=True, SEED=seed, OUTPUT_DIR=str(folder), PERCENT_DATASET=cfg.PERCENT_DATASET,
                    NUM_EPOCHS=cfg.NUM_EPOCHS, BASELINES=False, PICTURES=0, **_LOSSES[variant])
    scale = {name: value for name, value in _LOSSES[variant].items() if name == "DERAIN_SCALE"}
    return {"variant": variant, "seed": seed} | score(folder / "spdnet_adapted.pt", **scale)


def main(**overrides):
    """Run what is missing, then print mean and spread over seeds of every variant."""
    cfg = config.resolve(globals(), overrides)
    os.chdir(_ROOT)
    unknown = set(cfg.VARIANTS) - _LOSSES.keys()
    if unknown:
        raise config.UserError(f"VARIANTS: {', '.join(sorted(unknown))} is not in _LOSSES ({', '.join(_LOSSES)})")
    ensure_demo()
    folder = Path(cfg.OUTPUT_DIR)
    vanilla = once(folder / "vanilla.json", {}, lambda: score(None))
    start = config.resolve(vars(Eval), {"demo": True}).SPDNET_MODEL_PATH
    original = once(folder / "original.json", {}, lambda: score(start))
    runs = []
    for seed in cfg.SEEDS:
        for variant in cfg.VARIANTS:
            place = folder / f"{variant.replace('+', '_').replace(', ', '_').replace(' ', '_')}_{seed}"
            settings = demo_constants(Adaptation) | _LOSSES[variant] | {
                "PERCENT_DATASET": cfg.PERCENT_DATASET, "NUM_EPOCHS": cfg.NUM_EPOCHS}
            runs.append(once(place / "scores.json", settings, lambda v=variant, s=seed, p=place: run(v, s, p, cfg)))
    gap = vanilla["clean"] - vanilla["rainy"]
    rows = rows_of(cfg.VARIANTS, runs, vanilla)
    rows.insert(1, {"variant": "original SPDNet", "rainy": f"{original['rainy']:.4f}",
                    "clean": f"{original['clean']:.4f}",
                    "gap": f"{100 * (original['rainy'] - vanilla['rainy']) / gap:.1f}%"})
    print("\n" + report.table(rows, {"variant": "loss", "rainy": "mAP in rain", "gap": "rain gap won back",
                                     "clean": "mAP on clean images through SPDNet"}))
    report.write_results(folder / "results.json", cfg.as_dict(),
                         {"vanilla": vanilla, "original": original, "runs": runs})


def spread(values):
    """-> "mean +- standard deviation"."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} +- {deviation:.4f}"


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
