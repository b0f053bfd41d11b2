"""utils/next_command.py: commands that can be pasted, whatever the paths, names and constants are."""

import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import Eval_conditional
import Eval_FeatureDerain
import Training_Conditional
import Training_FeatureDerain
import Training_SPDNet_Adaptation
import Training_WeatherAdapter
from utils import config, next_command

WORDS = ["plain-name_1.pth", "D:/data/runs", "my runs/a b", "a&b (1)", "50% {x}", "a;b", "tick`s", "cash$HOME",
         "it's", "wow!", "", "Gef\u00e4\u00df", "a,b", "~/x", "#1"]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_one_word_in_the_shell(word):
    assert shlex.split(next_command.pasted(word)) == [word] == shlex.split(next_command.quoted([word]))
    if shutil.which("bash"):
        done = subprocess.run(["bash", "-c", f"printf %s {next_command.pasted(word)}"], capture_output=True, timeout=30)
        assert done.stdout.decode("utf-8") == word


def test_quotes_only_where_they_are_needed():
    assert next_command.pasted(Path("runs") / "detector_nano_384_1") == "runs/detector_nano_384_1"
    assert next_command.pasted(Path("my runs")) == '"my runs"'
    assert next_command.quoted(["car", "traffic light"]) == '"car" "traffic light"'


def script(**constants):
    """-> a module with constants, as the next script."""
    module = ModuleType("Eval_it")
    vars(module).update({"WHERE": "./a", "SIDE": 640, "SHARE": 0.5, "KINDS": {"light": 1.0}, "PARTS": ("a", "b"),
                         "OUTPUT_DIR": "./eval", "THERE": "./none", "DEMO": {"SIDE": 160, "WHERE": "./demo/a"},
                         "__annotations__": {"SHARE": float | None, "THERE": str | None}} | constants)
    return module


def back(line, module):
    """-> Config of a script that is started with a printed line."""
    words = shlex.split(line)
    assert words[:2] == ["python", "Eval_it.py"]
    return config.resolve(vars(module), config.from_command_line(vars(module), words[2:]))


@pytest.mark.parametrize("demo", [False, True])
@pytest.mark.parametrize("given", [
    {}, {"WHERE": "my data/a&b", "SIDE": 320}, {"SHARE": None, "THERE": ""}, {"SHARE": 1e-9, "THERE": "it's"},
    {"KINDS": {"drops and rain": 1.0, "fog": 3}, "PARTS": ("one",)}, {"PARTS": ("a b", "c"), "SIDE": -1}, {"PARTS": ()},
])
def test_a_pasted_line_has_the_values_of_this_run(given, demo):
    module = script()
    run = config.Config(demo=demo, OUTPUT_DIR="./elsewhere", UNKNOWN=1, **given)
    line = next_command.command(module, run, SIDE=given.get("SIDE", 640))
    got, usual = back(line, module), config.resolve(vars(module), {"demo": demo})
    assert got.demo == demo and got.OUTPUT_DIR == "./eval" and "UNKNOWN" not in line and "./elsewhere" not in line
    for name, value in {"SIDE": 640, "WHERE": usual.WHERE, "KINDS": usual.KINDS, "PARTS": usual.PARTS, **given}.items():
        assert getattr(got, name) == value
    assert got.THERE == given.get("THERE", "./none" if demo else "")  # not there, and this run knows nothing of it
    assert '""' not in line and "''" not in line  # older PowerShell drops empty words


def test_only_what_the_next_script_would_take_otherwise_is_written(tmp_path):
    module = script(THERE=str(tmp_path))
    run = config.resolve(vars(module), {"SIDE": 320, "OUTPUT_DIR": "x"})
    assert next_command.command(module, run) == "python Eval_it.py --SIDE 320"
    assert next_command.command(module, run, but=()) == "python Eval_it.py --SIDE 320 --OUTPUT_DIR x"
    run = config.resolve(vars(module), {"SIDE": 160, "demo": True})
    assert next_command.command(module, run, WHERE="b") == "python Eval_it.py --demo --WHERE b"


@pytest.mark.parametrize(("training", "evaluation"), [
    (Training_Conditional, Eval_conditional), (Training_FeatureDerain, Eval_FeatureDerain),
    (Training_SPDNet_Adaptation, Training_SPDNet_Adaptation.Eval_SPDNet_Adaptation),
    (Training_WeatherAdapter, Eval_conditional), (Training_WeatherAdapter, Training_WeatherAdapter.detect),
])
def test_the_trainings_hand_on_nothing_by_themselves_but_what_was_changed(training, evaluation):
    assert next_command.flags(evaluation, config.resolve(vars(training), {"demo": True})) == " --demo"
    shared = {"COCO_DIR": "my coco", "COCO_RAIN_DIR": "my rain", "RTDETR_MODEL_NAME": "a b/c", "IMAGE_SIZE": 320,
              "UNKNOWN_CATEGORIES": "ignore", "DERAIN_SCALE": 0.25, "RAIN_DETECTOR_PATH": "r.pt",
              "RAIN_THRESHOLD": None}
    run = config.resolve(vars(training), {name: value for name, value in shared.items() if hasattr(training, name)})
    words = shlex.split(next_command.flags(evaluation, run))
    got = config.resolve(vars(evaluation), config.from_command_line(vars(evaluation), words))
    handed_on = [name for name in shared if hasattr(training, name) and hasattr(evaluation, name)]
    assert {name: getattr(got, name) for name in handed_on} == {name: shared[name] for name in handed_on}
    assert "RTDETR_MODEL_NAME" in handed_on and "IMAGE_SIZE" in handed_on
    run.COCO_RAIN_DIR = ""
    line = next_command.command(evaluation, run)
    words = shlex.split(line.partition("#")[0])[2:]
    config.resolve(vars(evaluation), config.from_command_line(vars(evaluation), words))  # refuses nothing
    assert ("# and with --COCO_RAIN_DIR" in line) == hasattr(evaluation, "COCO_RAIN_DIR")
    line = next_command.command(evaluation, run, labelled=False)
    assert "my coco" not in line and line.endswith(", which this run has not") == hasattr(evaluation, "COCO_DIR")
    assert (got.OUTPUT_DIR if hasattr(got, "OUTPUT_DIR") else got.OUTPUT) != run.OUTPUT_DIR
