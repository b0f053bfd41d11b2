"""The waiting of OpenMP's threads is set before torch is loaded, unless the user has set it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("given", "found"), [({}, "1000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"),
                                              ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")])
def test_the_users_own_setting_stays(given, found):
    code = ("import sys, os, utils.threads; assert 'torch' not in sys.modules; "
            "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))")
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=inherited | given, capture_output=True, text=True)
    assert done.stdout.strip() == found, done.stderr
