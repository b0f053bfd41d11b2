"""The pages hold what they promise: links lead somewhere, commands name scripts that exist and flags that they have."""

import ast
import re
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
from PIL import Image

from tools import readme_pictures
from utils import config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [path for folder in (".", "tools", "benchmarks") for path in sorted((ROOT / folder).glob("[!_]*.py"))]
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
SCRIPT = re.compile(r"(?P<called>python3? +(?:-m +)?)?(?P<target>(?<![\w./-])(?:tools|benchmarks)\.\w+"
                    r"|(?<![\w./-])(?:\w+/)*\w+\.py)(?=\s|$)")
FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*)")
OF_OTHER_PROGRAMS = {"nproc-per-node", "nproc_per_node", "nnodes", "node-rank", "master-addr", "master-port",
                      "index-url", "local-dir", "logdir", "onnx", "durations", "saveEngine", "fp16", "minShapes",
                      "optShapes", "maxShapes"}


def slug(heading):
    """-> the anchor that GitHub gives a heading."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", lambda found: found[1] or "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(page):
    """-> the anchors of a page's headings; equal headings get -1, -2, ..."""
    found, seen = set(), {}
    for heading in re.findall(r"^#+ +(.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        name = slug(heading)
        found.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return found


def lines_of(text):
    """-> the lines of a text without their indentation, continued ones joined."""
    return [line.strip() for line in re.sub(r" [\\`]\n\s*", " ", text).splitlines()]


def code_of(page):
    """-> the pieces of code on a page, a line each: lines of blocks (continued ones joined) and inline code."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for block in FENCED.findall(text):
        lines += lines_of(block)[1:-1]
    return lines + [" ".join(piece.split()) for piece in INLINE.findall(FENCED.sub("", text))]


def commands(line):
    """-> [(script file relative to ROOT, its flags), ...] of a line of code; a file's name alone is no command."""
    found = list(SCRIPT.finditer(line))
    for one, following in zip_longest(found, found[1:]):
        rest = re.split(r" #|;|&&", line[one.end():following.start() if following else None])[0]
        flags = FLAG.findall(rest)
        if (one["called"] or flags) and not one["target"].endswith(".NAME"):  # a placeholder
            target = one["target"]
            yield (target if target.endswith(".py") else target.replace(".", "/") + ".py"), flags


@cache
def flags_of(script):
    """-> every spelling of the flags of a script's constants, read from its source without importing it."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    targets = [target for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))
               for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    constants = {name for name in names if name.isupper() and not name.startswith("_")}
    return {"help"} | {spelling for name in constants
                       for spelling in (name, name.lower(), name.lower().replace("_", "-"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_lead_somewhere(page):
    broken = []
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_scripts_and_their_flags(page):
    wrong = []
    for line in code_of(page):
        for script, flags in commands(line):
            if not (ROOT / script).is_file():
                wrong.append(f"{script}: no such file ({line})")
            else:
                wrong += [f"{script} --{flag}" for flag in flags if flag not in flags_of(script)]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_without_a_command_are_known_to_some_script(page):
    known = OF_OTHER_PROGRAMS.union(*(flags_of(path.relative_to(ROOT).as_posix())
                                      for folder in (".", "tools", "benchmarks")
                                      for path in (ROOT / folder).glob("*.py")))
    assert not {flag for line in code_of(page) for flag in FLAG.findall(line)} - known


def test_commands_are_found_in_every_form():
    assert list(commands("python a.py --demo        python -m tools.b --SEEDS \"(0,)\" && python c.py # --not")) == [
        ("a.py", ["demo"]), ("tools/b.py", ["SEEDS"]), ("c.py", [])]
    assert list(commands("torchrun --nproc-per-node 2 a.py --batch 4")) == [("a.py", ["batch"])]
    assert list(commands("utils/config.py")) == []
    assert slug("SPDNet: speed and memory") == "spdnet-speed-and-memory"


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: page.name)
def test_commands_are_the_same_words_in_bash_and_powershell(page):
    """Outside of quotes (and <placeholders>) nothing that a shell reads as more than text; no empty word, which the
    PowerShell of Windows drops."""
    wrong = []
    lines = code_of(page) if page.suffix == ".md" else lines_of(
        ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))))
    for line in lines:
        if line.startswith("python ") and "&&" not in line:
            command = re.sub(r"<[^>]*>", "", line.split(" #")[0])
            quoted = re.findall(r"\"[^\"]*\"|'[^']*'", command)
            bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", command)
            if not re.fullmatch(r"[\w ./:+=-]*", bare) or any(re.search(r"[$`!]", word) or len(word) == 2
                                                               for word in quoted):
                wrong.append(line)
    assert not wrong


def test_results_stay_short():
    assert len((ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_readme_holds_the_command_that_continuous_integration_runs():
    lines = re.findall(r"^pip install .*python -m pytest.*$", (ROOT / "README.md").read_text(encoding="utf-8"),
                       re.MULTILINE)
    assert lines and lines[0].endswith("&& python -m pytest")  # .ci/run takes the first one, for bash


def test_the_readme_pictures_say_which_demo_makes_missing_weights(tmp_path):
    with pytest.raises(config.UserError, match="UNET_PATH.*train_unet_derain.py --demo"):
        readme_pictures.main(UNET_PATH=str(tmp_path / "none.pt"), OUT=str(tmp_path / "strip.jpg"))


def test_the_readme_pictures_stand_below_their_captions():
    strip = readme_pictures.page([[("one", Image.new("RGB", (8, 8), "red"))] * 3] * 2, side=16)
    assert strip.getpixel((8, strip.height - 8)) == strip.getpixel((strip.width - 8, strip.height - 8)) == (255, 0, 0)
    assert strip.width > 3 * 16 and strip.height > 2 * 16
