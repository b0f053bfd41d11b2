"""Search the U-Net's hyper-parameters one variable at a time: short trainings against a baseline, the better one kept.

For each name of VARIABLES in turn, every other value is trained for SWEEP_EPOCHS with everything else as it is. A value
whose gain (validation PSNR above the rainy input's) beats the best so far by more than MARGIN takes the old one's place
before the next variable. Every constant of train_unet_derain.py may be a variable, and BASE holds those that differ
from its defaults.

    python -m tools.sweep_unet_derain --demo
    python -m tools.sweep_unet_derain --VARIABLES "{'LEARNING_RATE': (5e-05, 0.001), 'DROPOUT': (0.0, 0.3)}"

A variable without effect in its turn (BASE_WIDTH, when an encoder is the ARCH that was kept) is left out with a note.
Every trial is validated on the same pairs: what decides on them is no variable.

Writes OUTPUT_DIR/sweep.json (every trial), sweep.png and a folder per trial. A stopped sweep goes on where it was:
finished trials are read, the one that was cut off is resumed. Results of another sweep that are in the way are moved
into previous_<n>.
"""

import itertools
import json
import string
from pathlib import Path

import train_unet_derain
from utils import checkpoint, config, processes, report, system, visualize
from utils.datasets.samples import digest
from utils.demo.windshield import ensure_windshield_demo
from utils.training.plan import not_negative

# --- what is tried ------------------------------------------------------------------------------------------------
VARIABLES = {  # the plan's list; losses first, because what follows is measured with them
    "SSIM_WEIGHT": (0.1, 0.3), "PERCEPTUAL_WEIGHT": (0.0, 0.3, 0.5), "L1_WEIGHT": (0.5, 2.0),
    "LEARNING_RATE": (5e-5, 1e-3), "BATCH_SIZE": (16, 32), "OPTIMIZER": ("adamw", "sgd"),
    "SCHEDULER": ("cosine", "step"), "RESIDUAL": (False,), "DROPOUT": (0.0, 0.3), "FLIP": (0.3,),
    "COLOR_JITTER": (0.0, 0.2), "RANDOM_CROP": (True,), "ARCH": ("unet", "resnet50", "efficientnet-b0"),
    "BASE_WIDTH": (32,), "IMAGE_SIZE": (512,),
}
BASE = {  # constants of train_unet_derain.py for all trials: the plan's, around which its list lies
    "ARCH": "resnet34", "CROP_SIZES": (), "CROPS_PER_PAIR": 1, "COLOR_JITTER": 0.1, "L1_WEIGHT": 1.0,
    "SSIM_WEIGHT": 0.2, "PERCEPTUAL_WEIGHT": 0.1, "PSNR_WEIGHT": 0.0, "OPTIMIZER": "adam", "BETAS": (0.9, 0.999),
    "SCHEDULER": "plateau", "WARMUP_STEPS": 0, "LEARNING_RATE": 1e-4, "BATCH_SIZE": 8,
}
SWEEP_EPOCHS = 25                       # epochs of a trial; the plan: 20 to 30
MARGIN = 0.05                           # dB that a value must win by; less may be luck

# --- output -------------------------------------------------------------------------------------------------------
OUTPUT_DIR = "./outputs_unet_sweep"

DEMO = {
    "VARIABLES": {"LEARNING_RATE": (5e-4,), "RESIDUAL": (False,)}, "SWEEP_EPOCHS": 1,
    "BASE": {"TRAIN_PAIRS": 300, "VAL_PAIRS": 60, "TEST_PAIRS": 0, "BASE_WIDTH": 8},
    "OUTPUT_DIR": "./demo/outputs_unet_sweep",
}
_FIXED = ("CHECKPOINT_DIR", "EPOCHS", "RESUME", "TARGET_PSNR", "TARGET_SSIM")  # no trial stops before the others
_OF_THE_SPLIT = ("CLEAR_DIR", "RAINY_DIR", "SPLITS_FILE", "TRAIN_PAIRS", "VAL_PAIRS", "TEST_PAIRS",
                 "SEQUENCE_SEPARATOR", "SEED")
_FILES = ("sweep.json", "sweep.png")
_PLAIN = set(string.ascii_letters + string.digits + "._/-")  # what needs no quotes in any shell


def check(cfg):
    """UserError for constants that train_unet_derain.py does not have, and for an empty search."""
    not_negative("MARGIN", cfg.MARGIN)
    if cfg.SWEEP_EPOCHS < 1:
        raise config.UserError(f"SWEEP_EPOCHS = {cfg.SWEEP_EPOCHS}: choose 1 or more")
    fixed = set(_FIXED) & (set(cfg.VARIABLES) | set(cfg.BASE))
    if fixed:
        raise config.UserError(f"VARIABLES and BASE cannot hold {', '.join(sorted(fixed))}: the sweep sets them")
    moving = [name for name in _OF_THE_SPLIT if name in cfg.VARIABLES
              and not (name == "SEED" and cfg.BASE.get("SPLITS_FILE"))]
    if moving:
        raise config.UserError(f"VARIABLES cannot hold {', '.join(moving)}: each value would be validated on other "
                               "pairs. Put it into BASE" + (", or name a SPLITS_FILE there, which fixes the pairs"
                                                            if moving == ["SEED"] else ""))
    if not any(cfg.VARIABLES.values()):
        raise config.UserError("VARIABLES is empty: there is nothing to search")
    known = config.constants_of(vars(train_unet_derain))
    if unknown := [name for name in (*cfg.VARIABLES, *cfg.BASE) if name not in known]:
        raise config.UserError(f"VARIABLES and BASE hold {system.listed([repr(name) for name in unknown])}: "
                               "train_unet_derain.py has no such constant (names in capitals, in quotes)")
    for name, values in cfg.VARIABLES.items():
        if not isinstance(values, (tuple, list)):
            raise config.UserError(f"VARIABLES['{name}'] = {values!r}: give a tuple of values, such as ({values!r},)")
        for value in values:
            train_settings(cfg, {name: value})
        reasons = [idle(cfg, changes).get(name) for changes in states_before(cfg, name)]
        if all(reasons):
            raise config.UserError(f"VARIABLES holds {name}, which has no effect with {reasons[0]}: put another value "
                                   "of that into BASE or before it into VARIABLES, or leave it out")
    before = defaults_of(cfg)
    if all(value == before[name] for name, values in cfg.VARIABLES.items() for value in values):
        raise config.UserError("VARIABLES holds only the values that training has anyway: there is nothing to search")


def defaults_of(cfg):
    """-> {constant: value} of the baseline."""
    return vars(config.resolve(vars(train_unet_derain), {"demo": cfg.demo} | cfg.BASE))


def idle(cfg, changes):
    """-> {constant: reason} of those that have no effect where `changes` were kept."""
    return train_unet_derain.without_effect(config.Config(**defaults_of(cfg) | changes))


def states_before(cfg, name):
    """-> the changes that may have been kept when it is a variable's turn: those of variables before it on which the
    effect of others depends."""
    earlier = {one: cfg.VARIABLES[one] for one in itertools.takewhile(lambda one: one != name, cfg.VARIABLES)
               if one in ("ARCH", "PERCEPTUAL_WEIGHT", "SCHEDULER", "OPTIMIZER", "CROP_SIZES")}
    for values in itertools.product(*((None, *values) for values in earlier.values())):
        yield {one: value for one, value in zip(earlier, values, strict=True) if value is not None}


def data_of(cfg):
    """-> a digest of the names and sizes of the pairs, so that a trial on other pairs is not taken for one on these."""
    settings, found = defaults_of(cfg), []
    for name in ("RAINY_DIR", "CLEAR_DIR"):
        folder = settings[name]
        if problem := system.absent(folder, folder=True):
            raise config.UserError(f"{name} = '{folder}' {problem}: set it in BASE")
        found += [[path.relative_to(folder).as_posix(), path.stat().st_size] for path in system.images_in(folder)]
    return digest(json.dumps(found)).hex()


def train_settings(cfg, changes):
    """-> the overrides of a trial, with names and types checked by the training script's own rules."""
    settings = {"demo": cfg.demo} | cfg.BASE | changes | {"TARGET_PSNR": 0.0, "TARGET_SSIM": 0.0}
    constants = config.resolve(vars(train_unet_derain), settings)
    train_unet_derain.check(constants)
    train_unet_derain.build_plan(constants)
    return settings


def folder_of(cfg, changes):
    """-> the trial's folder, named after what differs from the baseline."""
    name = ",".join(f"{key}={value}" for key, value in sorted(changes.items())) or "baseline"
    return Path(cfg.OUTPUT_DIR) / "".join(c if c.isalnum() or c in "=,.-_" else "_" for c in name)


def run_trial(cfg, changes):
    """-> {"changes", "gain", "val/psnr", "val/ssim", "val/loss", "best_epoch", "images_per_s"} of one training.

    A finished trial is read from its folder if it ran with the same settings, one that was cut off is resumed, and
    what ran with other settings is moved aside.
    """
    folder = folder_of(cfg, changes)
    wanted = json.loads(json.dumps({"settings": train_settings(cfg, changes), "epochs": cfg.SWEEP_EPOCHS,
                                    "pairs": data_of(cfg)}))
    done = read_json(folder / "trial.json")
    if done and done["wanted"] == wanted:
        return done["result"]
    begun = read_json(folder / "wanted.json")
    if begun != wanted:
        report.output_folder(folder, ("wanted.json", "trial.json", "run"))
    report.write_json(folder / "wanted.json", wanted)
    trained = train_unet_derain.main(**train_settings(cfg, changes), EPOCHS=cfg.SWEEP_EPOCHS,
                                     CHECKPOINT_DIR=str(folder / "run"), RESUME=begun == wanted)
    if trained["stopped"] == "interrupted":
        raise KeyboardInterrupt
    best = trained["history"][trained["best_epoch"] - 1]
    gain = best["val/psnr"] - trained["rainy_input"]["val/psnr"]
    result = {"changes": changes, "best_epoch": trained["best_epoch"], "gain": gain} | {
        name: best[name] for name in ("val/psnr", "val/ssim", "val/loss", "images_per_s")}
    report.write_json(folder / "trial.json", {"wanted": wanted, "result": result})
    return result


def read_json(path):
    """-> a file's content, None where there is none or it is cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def search(cfg):
    """One variable at a time; -> (rows of all trials in order, the best changes)."""
    rows, kept = [], {}
    best = run_trial(cfg, {})
    rows.append({"variable": "baseline", "value": "", "kept": "yes"} | best)
    defaults = defaults_of(cfg)
    for name, values in cfg.VARIABLES.items():
        before, winner = dict(kept), None
        if reason := idle(cfg, kept).get(name):
            processes.say(f"note: {name} is left out: it has no effect with {reason}")
            continue
        for value in values:
            if value == before.get(name, defaults[name]):
                continue
            processes.say(f"\n=== {name} = {value!r} ===")
            row = {"variable": name, "value": repr(value), "kept": ""} | run_trial(cfg, before | {name: value})
            rows.append(row)
            if row["gain"] > best["gain"] + cfg.MARGIN:
                best, winner, kept = row, row, before | {name: value}
        if winner:
            winner["kept"] = "yes"
        write(cfg, rows, kept)
    return rows, kept


def identity(cfg):
    """-> what a sweep is besides its constants."""
    return {"demo": cfg.demo, "pairs": data_of(cfg)}


def keep_other_sweep(cfg):
    """Move the results of a sweep with other constants or on other pairs aside; those of this one are written anew."""
    found, constants = read_json(Path(cfg.OUTPUT_DIR) / "sweep.json"), json.loads(json.dumps(cfg.as_dict()))
    own = identity(cfg)  # in any case: pairs that are not there are found before anything is moved
    try:
        same = (found["constants"] | {"OUTPUT_DIR": constants["OUTPUT_DIR"]} == constants
                and found["results"].items() >= own.items())
    except (TypeError, LookupError, AttributeError):  # none, or something else
        same = False
    if not same:
        report.output_folder(cfg.OUTPUT_DIR, _FILES)


def write(cfg, rows, kept):
    """sweep.json and sweep.png with what is known so far."""
    report.write_results(Path(cfg.OUTPUT_DIR) / "sweep.json", cfg.as_dict(),
                         {"trials": rows, "kept": kept} | identity(cfg))
    visualize.bars({f"{row['variable']} {row['value']}".strip(): row["gain"] for row in rows},
                   Path(cfg.OUTPUT_DIR) / "sweep.png", "gain in PSNR on the validation pairs, dB")


def as_words(value):
    """-> a constant's value as the command line takes it, in PowerShell as well."""
    if isinstance(value, (tuple, list)):
        return f'"{tuple(value)!r}"'
    return f'"{value}"' if isinstance(value, str) and (not value or set(value) - _PLAIN) else str(value)


def main(**overrides):
    """Search; -> {"trials": rows, "kept": {constant: value}}."""
    cfg = config.resolve(globals(), overrides)
    if cfg.demo:
        ensure_windshield_demo()
    check(cfg)
    checkpoint.require_writable(cfg.OUTPUT_DIR)
    keep_other_sweep(cfg)
    rows, kept = search(cfg)
    columns = {"variable": "variable", "value": "value", "gain": "gain (dB)", "val/psnr": "PSNR", "val/ssim": "SSIM",
               "best_epoch": "best epoch", "images_per_s": "images/s", "kept": "kept"}
    processes.say("\n" + report.table(rows, columns))
    flags = "".join(f" --{name} {as_words(value)}" for name, value in (cfg.BASE | kept).items())
    processes.say(f"\nbest: python train_unet_derain.py{' --demo' if cfg.demo else ''}{flags}\n"
                  f"written: {(Path(cfg.OUTPUT_DIR) / 'sweep.json').as_posix()}, sweep.png")
    return {"trials": rows, "kept": kept}


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
