"""The waiting of OpenMP's threads is set before torch is loaded, unless the user has set it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import threads

ROOT = Path(__file__).resolve().parent.parent


def imports_of(script):
    """-> the modules that a script imports, in order."""
    return [name for node in ast.parse(script.read_text(encoding="utf-8")).body
            for name in ([one.name for one in node.names] if isinstance(node, ast.Import) else
                         [node.module] if isinstance(node, ast.ImportFrom) else [])]


@pytest.mark.parametrize("script", [path for path in ROOT.glob("*.py") if "torch" in imports_of(path)],
                         ids=lambda path: path.stem)
def test_scripts_set_it_before_they_load_torch(script):
    if script.stem == "shrink_head":
        pytest.skip("computes nothing that uses threads")
    loaded = [name for name in imports_of(script) if name.split(".")[0] not in sys.stdlib_module_names]
    assert loaded[0] == "utils.threads"


@pytest.mark.parametrize(("given", "found"), [({"GOMP_SPINCOUNT": "7"}, "7 None"),
                                              ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")])
def test_the_users_own_setting_stays(given, found):
    code = ("import sys, os, utils.threads; assert 'torch' not in sys.modules; "
            "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))")
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=inherited | given, capture_output=True, text=True)
    assert done.stdout.strip() == found, done.stderr


@pytest.mark.parametrize(("busy", "spins"), [(0.9, threads.NO_SPIN), (0.1, threads.LONG_SPIN)])
def test_threads_sleep_on_a_busy_machine(monkeypatch, busy, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    source = (ROOT / "utils" / "threads.py").read_text(encoding="utf-8")
    code = source.replace("if not any(", f"busy_share = lambda: {busy}\nif not any(")
    exec(compile(code, "threads", "exec"), {})
    assert os.environ["GOMP_SPINCOUNT"] == spins


def test_the_share_of_busy_time(monkeypatch):
    looks = iter(((100, 1000), (190, 1100)))
    monkeypatch.setattr(threads, "_ticks", lambda: next(looks))
    assert threads.busy_share(0.0) == pytest.approx(0.9)

    def missing():
        raise FileNotFoundError("/proc/stat")
    monkeypatch.setattr(threads, "_ticks", missing)
    assert threads.busy_share(0.0) == 0.0
