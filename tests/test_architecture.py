"""The shape of the project: which module may import which, what imports no torch, what an import runs, how long a
function may be.

Each rule is a function of a folder, which is tried on the project and on a small one with a planted violation.
"""

import ast
import graphlib
import importlib
import io
import os
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 60  # a function has fewer lines of code


class Floor(NamedTuple):
    modules: tuple   # names, or the name of a package with all that is in it
    below: tuple     # floors that it may import; its own is always allowed


MODELS = ("utils.integrated_model", "utils.feature_derain", "utils.conditional_model")  # paths that users import
GROUND = ("utils.processes", "utils.checkpoint", "utils.freeze", "utils.report", "utils.visualize", "utils.boxes",
          "utils.fast", "utils.images", "utils.losses", "utils.memory", "utils.transfer")
FLOORS = {  # from the ground up
    "base": Floor(("utils.config", "utils.system", "utils.threads", "utils.download", "utils.next_command"),
                  ()),  # without torch
    "ground": Floor(GROUND, ("base",)),
    "weather": Floor(("utils.weather",), ("base",)),
    "demo": Floor(("utils.demo",), ("base", "weather")),
    "networks": Floor(("utils.networks",), ("base", "ground")),
    "models": Floor(MODELS, ("base", "ground", "networks")),
    "datasets": Floor(("utils.datasets",), ("base", "ground", "weather")),
    "training": Floor(("utils.training",), ("base", "ground", "networks", "datasets")),
    "evaluation": Floor(("utils.evaluation",), ("base", "ground", "networks", "datasets")),
    "inference": Floor(("utils.inference",), ("base", "ground", "networks", "models", "datasets")),
    "rfdetr": Floor(("rfdetr",), ("base", "ground", "networks", "datasets", "training", "evaluation")),
    "scripts": Floor((), ("base", "ground", "weather", "demo", "networks", "models", "datasets", "training",
                          "evaluation", "inference", "rfdetr")),  # *.py in the root
    "tools": Floor(("tools", "benchmarks"), ("base", "ground", "weather", "demo", "networks", "models", "datasets",
                                             "training", "evaluation", "inference", "rfdetr", "scripts")),
}
EXCEPTIONS = {  # (module, what it imports): why
    ("rfdetr.detr", "train_detector_stage1"): "RFDETR.train(...) runs that script, with its constants as defaults",
}
TORCH_FREE = ("base", "weather", "demo")  # drawing workers are spawned: each would load torch for seconds


# --- imports ----------------------------------------------------------------------

def modules_below(root):
    """-> {dotted name: path} of the scripts in the root and of utils, rfdetr, tools and benchmarks."""
    paths = [*root.glob("*.py"), *(path for folder in ("utils", "rfdetr", "tools", "benchmarks")
                                   for path in (root / folder).rglob("*.py"))]
    names = {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports_of(name, path, modules):
    """-> the project's modules that this one imports anywhere in its file, functions included.

    A package counts where one of its own names is imported, not on the way to a module in it.
    """
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            source = ".".join(filter(None, [package if node.level else "", node.module]))
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in modules else source)
    return {target for target in found if target in modules and target != name}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8-sig"), str(path))


def floor_of(name):
    """-> the floor of a module; None for one that the table does not know."""
    for floor, (members, _) in FLOORS.items():
        if any(name == member or name.startswith(member + ".") for member in members):
            return floor
    return "scripts" if "." not in name and name != "utils" else None


def wrong_arrows(root):
    """-> ["module imports module", ...] that go from a floor to one it may not import, or have no floor."""
    modules, wrong = modules_below(root), []
    for name, path in sorted(modules.items()):
        floor = floor_of(name)
        if floor is None and name != "utils":
            wrong.append(f"{name} has no floor: add it to FLOORS, or move it into a room")
            continue
        for target in sorted(imports_of(name, path, modules)):
            allowed = floor and floor_of(target) in (floor, *FLOORS[floor].below)
            if not allowed and (name, target) not in EXCEPTIONS:
                wrong.append(f"{name} ({floor}) imports {target} ({floor_of(target)})")
    return wrong


def circle(root):
    """-> the modules of an import circle, or []."""
    modules = modules_below(root)
    try:
        graphlib.TopologicalSorter({name: imports_of(name, path, modules)
                                    for name, path in modules.items()}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_arrows_point_down():
    assert wrong_arrows(ROOT) == []


def test_there_is_no_import_circle():
    assert circle(ROOT) == []


def test_exceptions_are_still_needed():
    modules = modules_below(ROOT)
    assert [pair for pair in EXCEPTIONS if pair[1] not in imports_of(pair[0], modules[pair[0]], modules)] == []


def missing_names(root):
    """-> ["file:line module.name", ...] of names that a module takes from another one which does not have them."""
    modules, missing = modules_below(root), []
    for name, path in sorted(modules.items()):
        tree, imported = parsed(path), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in modules}
            elif isinstance(node, ast.ImportFrom):
                imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
                             if f"{node.module}.{alias.name}" in modules}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
                target = importlib.import_module(imported[node.value.id])
                if not hasattr(target, node.attr):
                    missing.append(f"{name}:{node.lineno} {target.__name__}.{node.attr}")
    return missing


def test_names_that_are_taken_from_other_modules_exist():
    assert missing_names(ROOT) == []


# --- what an import does ------------------------------------------------------------

def with_torch(root):
    """-> the first module of the floors TORCH_FREE whose import loads torch, or "", tried in one new process."""
    names = sorted(name for name in modules_below(root) if floor_of(name) in TORCH_FREE)
    code = ("import importlib, sys\n"
            "for name in sys.argv[1:]:\n"
            "    importlib.import_module(name)\n"
            "    if 'torch' in sys.modules:\n"
            "        sys.exit(name)\n")
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=root, capture_output=True, text=True, timeout=120)
    return done.stderr.strip()


def running_statements(root):
    """-> ["file:line", ...] of top-level statements of scripts that do something when the script is imported."""
    found = []
    for name, path in sorted(modules_below(root).items()):
        if floor_of(name) not in ("scripts", "tools"):
            continue
        for number, node in enumerate(parsed(path).body):
            docstring = number == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            defines = isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef,
                                        ast.AsyncFunctionDef, ast.ClassDef))
            if not (docstring or guarded or defines):
                found.append(f"{path.name}:{node.lineno}")
    return found


def test_weather_demo_system_and_config_load_no_torch():
    assert with_torch(ROOT) == ""


def test_importing_a_script_runs_nothing(tmp_path):
    assert running_statements(ROOT) == []
    names = sorted(name for name in modules_below(ROOT) if floor_of(name) == "scripts")
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=300)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", []), done.stderr


# --- length -------------------------------------------------------------------------

def lines_of_code(function, code):
    """-> lines of a function that hold code: without its docstring, without comments and blank lines.

    code: the numbers of the file's lines that hold a token.
    """
    lines = {line for line in code if function.lineno <= line <= function.end_lineno}
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines)


def tokens_of(path):
    """-> ({line of code}, {line: comment}) of a file."""
    blank = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code, comments = set(), {}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8-sig")).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string
        elif token.type not in blank:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code, comments


def long_functions(root):
    """-> {"module.function": lines of code} of functions that are too long without a reason: a comment "# long: ..."
    in the line above the function or in the first line of its body."""
    found = {}
    for name, path in modules_below(root).items():
        code, comments = tokens_of(path)
        for node in ast.walk(parsed(path)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            beside = [comments.get(line, "") for line in range(first - 1, node.body[0].lineno + 1)]
            if not any(comment.startswith("# long: ") for comment in beside):
                length = lines_of_code(node, code)
                if length >= LONGEST:
                    found[f"{name}.{node.name}"] = length
    return found


def test_no_function_is_too_long():
    assert long_functions(ROOT) == {}


# --- the rules themselves -------------------------------------------------------------

@pytest.fixture
def project(tmp_path):
    """A function that writes files, {path: text}, and returns the root of the small project that they are."""
    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, encoding="utf-8")
        return tmp_path
    return write


@pytest.mark.parametrize(("path", "text", "message"), [
    ("utils/networks/net.py", "from utils.training import loop", "utils.networks.net (networks) imports"),
    ("utils/networks/net.py", "def f():\n    import utils.training.loop", "utils.networks.net (networks) imports"),
    ("utils/networks/net.py", "from ..training.loop import fit", "utils.networks.net (networks) imports"),
    ("utils/boxes.py", "from utils.training.loop import fit", "utils.boxes (ground) imports"),
    ("utils/config.py", "import utils.boxes as b", "utils.config (base) imports"),
    ("utils/weather/rain.py", "from utils import boxes", "utils.weather.rain (weather) imports"),
    ("utils/demo/__init__.py", "from utils.training import loop", "utils.demo (demo) imports"),
    ("utils/training/loop.py", "from rfdetr import detr", "utils.training.loop (training) imports"),
    ("rfdetr/detr.py", "import train", "rfdetr.detr (rfdetr) imports train (scripts)"),
    ("train.py", "from tools import draw", "train (scripts) imports tools.draw (tools)"),
    ("utils/misc.py", "", "utils.misc has no floor"),
])
def test_a_wrong_arrow_is_found(project, path, text, message):
    plain = {"utils/__init__.py": "", "utils/config.py": "import json", "utils/boxes.py": "from utils import config",
             "utils/training/__init__.py": "", "utils/training/loop.py": "from utils.boxes import x",
             "rfdetr/detr.py": "from utils.training import loop", "tools/draw.py": "import train",
             "train.py": "from utils.training.loop import fit"}
    assert wrong_arrows(project(plain)) == []
    wrong = wrong_arrows(project({path: text}))
    assert len(wrong) == 1 and wrong[0].startswith(message)


def test_a_circle_is_found(project):
    root = project({"utils/datasets/__init__.py": "from utils.datasets.coco import Coco",
                    "utils/datasets/coco.py": "from utils.datasets import pairs", "utils/datasets/pairs.py": ""})
    assert circle(root) == []
    found = circle(project({"utils/datasets/pairs.py": "def f():\n    from utils import datasets"}))
    assert set(found) == {"utils.datasets", "utils.datasets.coco", "utils.datasets.pairs"}


def test_torch_is_found_where_it_must_not_be(project):
    files = {"torch.py": "", "utils/boxes.py": "import torch", "utils/config.py": "", "utils/weather/rain.py": ""}
    assert with_torch(project(files)) == ""
    assert with_torch(project({"utils/demo/clip.py": "from utils import boxes"})) == "utils.demo.clip"


def test_a_script_that_runs_on_import_is_found(project):
    quiet = '"""Train."""\nimport os\nX: int = 1\ndef main(): ...\nif __name__ == "__main__":\n    main()\n'
    assert running_statements(project({"train.py": quiet})) == []
    assert running_statements(project({"train.py": quiet + "main()\n", "utils/a.py": "print()"})) == ["train.py:7"]


def test_a_long_function_is_found_unless_it_says_why(project):
    body = '    """' + "\n    words" * 70 + '"""\n' + "    # comment\n\n    x = 1\n" * (LONGEST - 2)
    assert long_functions(project({"utils/a.py": f"def f():\n{body}"})) == {}
    assert long_functions(project({"utils/a.py": f"def f():\n{body}    y = 2\n"})) == {"utils.a.f": LONGEST}
    for text in (f"# long: a table\ndef f():\n{body}    y = 2\n", f"def f():\n    # long: a table\n{body}    y = 2\n"):
        assert long_functions(project({"utils/a.py": text})) == {}
    nested = "class A:\n    def f(self):\n" + "        x = 1\n" * LONGEST
    assert long_functions(project({"utils/a.py": nested})) == {"utils.a.f": LONGEST + 1}
