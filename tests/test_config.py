"""Constants: overrides are typed, unknown names are refused, the command line shows user errors as one line."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Optional

import pytest
import torch

from utils import config, processes
from utils.evaluation import comparison

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = {"RATE": 1e-4, "EPOCHS": 3, "NAME": "a", "TURBO": False, "CUTS": (0.5, 0.9), "PLACE": None,
          "DEMO": {"EPOCHS": 1}, "helper": len}


def test_overrides_beat_demo_beats_defaults():
    assert config.resolve(SCRIPT, {}).EPOCHS == 3
    assert config.resolve(SCRIPT, {"demo": True}).EPOCHS == 1
    assert config.resolve(SCRIPT, {"demo": True, "EPOCHS": 7}).EPOCHS == 7
    assert config.resolve(SCRIPT, {}).as_dict().keys() == {"RATE", "EPOCHS", "NAME", "TURBO", "CUTS", "PLACE"}


def test_values_are_converted_only_where_nothing_is_lost():
    cfg = config.resolve(SCRIPT, {"RATE": 1, "NAME": Path("x") / "y", "CUTS": [0.1]})
    assert cfg.RATE == 1.0 and isinstance(cfg.RATE, float) and cfg.NAME == str(Path("x/y")) and cfg.CUTS == (0.1,)
    for name, wrong in (("EPOCHS", 2.5), ("EPOCHS", "2"), ("EPOCHS", True), ("TURBO", 1), ("NAME", 3), ("CUTS", 0.1)):
        with pytest.raises(config.UserError, match=name):
            config.resolve(SCRIPT, {name: wrong})


def test_paths_become_text_also_within_dicts(monkeypatch):
    monkeypatch.setattr(Path, "expanduser", lambda path: Path("home", *path.parts[1:]))
    script = {"MODELS": {}, "PAIRS": (("a", "b"),)}
    cfg = config.resolve(script, {"MODELS": {"a": ("rtdetr", Path("x") / "y"), "b": ["unet", "~/z"]},
                                  "PAIRS": ((Path("q"), "~/r"),)})
    assert cfg.MODELS == {"a": ("rtdetr", str(Path("x/y"))), "b": ["unet", str(Path("home/z"))]}
    assert cfg.PAIRS == (("q", str(Path("home/r"))),) and json.dumps(cfg.as_dict())
    with pytest.raises(config.UserError, match="MODELS = .*holds a control character"):
        config.resolve(script, {"MODELS": {"a": ("rtdetr", "C:\new\table")}})


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(config.UserError, match="EPOCHS"):
        config.resolve(SCRIPT, {"EPOCH": 2})
    with pytest.raises(config.UserError, match="unknown constant"):
        config.resolve(SCRIPT | {"DEMO": {"NOPE": 1}}, {"demo": True})


def test_command_line_parses_by_type_and_ignores_case():
    parse = lambda *argv: config.from_command_line(SCRIPT, argv)  # noqa: E731
    assert parse("--EPOCHS", "4", "--demo") == {"EPOCHS": 4, "demo": True}
    assert parse("--epochs", "4", "--RATE", "1e-3", "--NAME", "12", "--TURBO", "true", "--CUTS", "(0.2,)") == {
        "EPOCHS": 4, "RATE": 1e-3, "NAME": "12", "TURBO": True, "CUTS": (0.2,)}
    assert parse("--PLACE", "./somewhere") == {"PLACE": "./somewhere"}
    with pytest.raises(config.UserError, match="EPOCHS"):
        parse("--EPOCHS", "many")
    with pytest.raises(SystemExit):
        parse("--UNKNOWN", "1")


def test_an_unknown_flag_is_one_line_with_a_suggestion(capsys):
    for flag in ("--BATCHSIZE", "--batch-sizes=4"):
        with pytest.raises(SystemExit) as end:
            config.from_command_line({"BATCH_SIZE": 2, "RATE": 0.1}, [flag])
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"Error: unknown argument {flag.split('=')[0]}; did you mean "
                                                  "--BATCH_SIZE?")


def test_numbers_in_quotes_are_refused():
    for name, value in (("BATCH_SIZE", "4"), ("RATE", "1e-4"), ("TURBO", "False")):
        with pytest.raises(config.UserError, match=f"{name} = '{value}' is text: write it without the quotes"):
            config.resolve({name: value}, {})
    assert config.resolve({"PLACE": "./1"}, {}).PLACE == "./1"


def annotated(**annotations):
    """SCRIPT with annotations, as a module's `globals()` hold them."""
    return SCRIPT | {"__annotations__": annotations}


def test_an_annotation_says_what_a_constant_takes():
    script = annotated(EPOCHS=float, RATE=float | None, NAME=str, PLACE=Optional[str])  # noqa: UP045
    cfg = config.resolve(script, {"RATE": None, "NAME": "4", "PLACE": "a"})
    assert (cfg.RATE, cfg.NAME, cfg.PLACE) == (None, "4", "a")
    for name, wrong in (("EPOCHS", "2"), ("EPOCHS", None), ("EPOCHS", True), ("RATE", True), ("RATE", (1,)),
                        ("NAME", 4), ("PLACE", 4)):
        with pytest.raises(config.UserError, match=f"{name} = .* must be a (float|str)|{name} = '2' is text"):
            config.resolve(script, {name: wrong})
    with pytest.raises(config.UserError, match="RATE = '0.5' is text"):
        config.resolve(script | {"RATE": "0.5"}, {})
    with pytest.raises(config.UserError, match="EPOCHS = None"):  # a default that a person has edited
        config.resolve(script | {"EPOCHS": None}, {})


def test_a_float_constant_keeps_the_whole_number_of_its_default():
    script = annotated(EPOCHS=float, RATE=float | None)
    for overrides, wanted in (({}, 3), ({"EPOCHS": 7}, 7), ({"EPOCHS": 0.5}, 0.5), ({"demo": True}, 1)):
        value = config.resolve(script, overrides).EPOCHS
        assert value == wanted and type(value) is type(wanted)
    assert type(config.resolve(script, {"RATE": 1}).RATE) is float


def test_words_of_a_tuple_that_is_empty_by_default_have_its_types():
    cases = {"CROP_SIZES": (["64", "96"], [64, 96]), "PREFIXES": (["7_", "rain_"], ["7_", "rain_"])}
    for name, (words, expected) in cases.items():
        assert config.from_command_line({name: ()}, [f"--{name}", *words]) == {name: expected}
    known = json.loads(config.TYPES_FILE.read_text(encoding="utf-8"))
    assert all(entry["elements"] for entry in known.values() if entry["types"] == ["tuple"])


def test_the_command_line_and_its_help_follow_the_annotation(capsys):
    script = annotated(EPOCHS=float, RATE=float | None, PLACE=str | None, TURBO=bool | None, CUTS=tuple | None)
    parse = lambda *argv: config.from_command_line(script, argv)  # noqa: E731
    assert parse("--epochs", "0.5", "--rate", "None", "--place", "3", "--turbo", "--cuts", "0.1", "0.2") == {
        "EPOCHS": 0.5, "RATE": None, "PLACE": "3", "TURBO": True, "CUTS": [0.1, 0.2]}
    assert parse("--place", "None", "--turbo", "None", "--cuts", "None") == {"PLACE": None, "TURBO": None, "CUTS": None}
    with pytest.raises(config.UserError, match="--RATE much: not a float or None"):
        parse("--rate", "much")
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "(float or None; default: 0.0001)" in shown and "(default: 'a')" in shown


def test_annotations_are_read_without_being_evaluated():
    for hint in ("float | None", tuple[str, ...], list[int] | None, int | Path):
        with pytest.raises(TypeError, match="RATE"):
            config.resolve(annotated(RATE=hint), {})
    assert config.annotated_types(annotated(helper="print(1)", _RATE=Path, unset=int)) == {}
    on_demand = SCRIPT | {"__annotate__": lambda form: {"RATE": float | None}}  # as from Python 3.14 on
    assert config.resolve(on_demand, {"RATE": None}).RATE is None


def test_a_constant_has_the_same_annotation_in_every_script():
    found = {}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")]):
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"([A-Z][A-Z_0-9]*)(: [^=]+)? = ", line):
                kind = match[2] if match[2] != ": str | None" else None  # a path that one script needs and another not
                found.setdefault(match[1], {}).setdefault(kind, []).append(path.name)
    annotated_somewhere = {name: uses for name, uses in found.items() if set(uses) != {None}}
    assert annotated_somewhere.keys() >= {"PERCENT_DATASET", "RAIN_THRESHOLD", "SOURCE"}
    assert {name: uses for name, uses in annotated_somewhere.items() if len(uses) > 1} == {}


def test_bare_flags_and_dashes():
    script = {"SHOW_IT": False, "HIDE": True, "MAX_SIZE": 3}
    parse = lambda *argv: config.from_command_line(script, argv)  # noqa: E731
    assert parse("--show-it", "--HIDE") == parse("--SHOW_IT", "--hide") == {"SHOW_IT": True, "HIDE": True}
    assert parse("--show_it", "false", "--hide", "False", "--max-size", "4") == {
        "SHOW_IT": False, "HIDE": False, "MAX_SIZE": 4}
    assert parse("--show-it", "--max-size", "4") == {"SHOW_IT": True, "MAX_SIZE": 4}
    with pytest.raises(config.UserError, match="SHOW_IT"):
        config.resolve(script, parse("--show-it", "3"))
    with pytest.raises(SystemExit):
        parse("--max-size")  # only a boolean has a meaning without its value


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("*.py")))
def test_help_lists_every_constant_with_its_comment(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back what from_command_line sets
    module = importlib.import_module(script.removesuffix(".py"))  # one process: an import of torch costs seconds
    with pytest.raises(SystemExit) as end:
        config.from_command_line(vars(module), ["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.isascii()
    source = (ROOT / script).read_text(encoding="utf-8")
    names = [re.split(":| =", line)[0] for line in source.splitlines() if "  # " in line and line[0].isupper()]
    names = [name for name in names if name.isupper()]
    assert names
    written = re.findall(r"^([A-Z][A-Z_0-9]*)(?:: [^=]+)? = ", source, re.MULTILINE)
    assert set(config.constants_of(vars(module))) <= set(written)  # a name in capitals that is imported is not one
    for name in names:
        assert f"--{name} " in shown
    assert "--demo" in shown


def test_user_errors_are_one_line_without_traceback(tmp_path):
    shown = subprocess.run([sys.executable, "Training_RTDETR.py", "--COCO_DIR", str(tmp_path / "none"),
                            "--RTDETR_MODEL_NAME", "", "--OUTPUT_DIR", str(tmp_path)],
                           cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 1
    assert "Traceback" not in shown.stderr
    assert [line for line in shown.stderr.splitlines() if line.startswith("Error: COCO_DIR")]


def test_text_that_the_console_cannot_show_does_not_stop_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from utils import config\nRATE = 1.0\n"
                      "if __name__ == '__main__':\n"
                      "    config.from_command_line(globals())\n"
                      "    print('Gef\\u00e4\\u00df \\u8840\\u7ba1')\n"
                      "    raise config.UserError('no \\u8840')\n", encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, script], env=environment, capture_output=True, timeout=60)
    assert shown.stdout.decode("cp1252").strip() == "Gef\u00e4\u00df ??" and shown.returncode == 1
    assert shown.stderr.decode("cp1252").strip() == "Error: no ?"


def test_errors_from_loader_processes_and_full_gpus_are_one_line_too(capsys):
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    config._show_user_errors(config.UserError, config.UserError(text + "utils.config.UserError: cannot read a.jpg"),
                             None)
    assert capsys.readouterr().err == "Error: cannot read a.jpg\n"
    out_of_memory = type("OutOfMemoryError", (RuntimeError,), {})
    config._show_user_errors(out_of_memory, out_of_memory("CUDA out of memory"), None)
    assert "Lower the batch size" in capsys.readouterr().err


def test_none_only_where_the_annotation_allows_it():
    namespace = {"RATE": 0.5, "THRESHOLD": 0.5, "__annotations__": {"THRESHOLD": float | None}}
    assert config.resolve(namespace, {"THRESHOLD": None}).THRESHOLD is None
    assert config.from_command_line(namespace, ["--threshold", "None"]) == {"THRESHOLD": None}
    with pytest.raises(config.UserError, match="RATE = None"):
        config.resolve(namespace, {"RATE": None})


def test_a_tuple_constant_takes_words_or_a_literal():
    script = {"KEEP": (), "SIZES": (1, 2), "RUN_TEST": False}

    def resolved(*words):
        cfg = config.resolve(script, config.from_command_line(script, list(words)))
        return cfg.KEEP, cfg.SIZES, cfg.RUN_TEST

    assert resolved("--keep", "car", "traffic light") == (("car", "traffic light"), (1, 2), False)
    assert resolved("--keep", "('a', 'b')", "--sizes", "3,4") == (("a", "b"), (3, 4), False)
    assert resolved("--sizes", "3", "4", "--run_test", "1") == ((), (3, 4), True)
    assert resolved("--run_test", "0", "--keep", "car") == (("car",), (1, 2), False)
    with pytest.raises(config.UserError, match="--SIZES x"):
        resolved("--sizes", "x")


def test_the_device_is_named(monkeypatch, capsys):
    monkeypatch.setattr(processes, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert processes.announced_device() == torch.device("cpu")
    assert "is built without CUDA" in capsys.readouterr().out
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    processes.announced_device()
    assert "finds no usable GPU" in capsys.readouterr().out


def test_a_script_with_a_byte_order_mark_still_has_its_comments(tmp_path):
    (tmp_path / "script.py").write_text("\ufeffEPOCHS = 3  # how long\n", encoding="utf-8")
    assert config._comments(tmp_path / "script.py") == {"EPOCHS": "how long"}


@pytest.mark.parametrize(("platform", "device", "there", "message"), [
    ("linux", "cuda", False, "triton-windows"), ("win32", "cpu", False, "C\\+\\+ compiler"),
    ("win32", "cpu", True, None), ("linux", "cpu", False, None)])
def test_compiling_without_a_compiler_is_refused(monkeypatch, platform, device, there, message):
    monkeypatch.setattr(comparison.sys, "platform", platform)
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: there or None)
    monkeypatch.setattr(comparison.shutil, "which", lambda name: there or None)
    with pytest.raises(config.UserError, match=message) if message else nullcontext():
        comparison.require_compiler(torch.device(device))


@pytest.mark.parametrize("name", [path.stem for path in sorted(ROOT.glob("*.py"))])
def test_a_scripts_constants_are_those_that_stand_in_it(name):
    """A capital name that a script imports would become a flag, and an entry of its checkpoints."""
    assigned = {target.id for node in ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body
                if isinstance(node, (ast.Assign, ast.AnnAssign))
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                if isinstance(target, ast.Name)}
    assert config.constants_of(vars(importlib.import_module(name))).keys() <= assigned
