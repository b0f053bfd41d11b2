"""Write utils/constant_types.json: what kinds of values the constants of the scripts take.

    python -m tools.constant_types

A person edits a constant at the top of a script, and then its default no longer says what it must be: "640px" would
make text of IMAGE_SIZE. utils/config.py compares what stands there with this file. Run it after adding a constant; a
test says when the file is not up to date.
"""

import argparse
import importlib
import json
from pathlib import Path

from utils import config

_ROOT = Path(__file__).resolve().parent.parent
# of tuples that are empty by default
_ELEMENTS = {"CROP_SIZES": "int", "MORE_PAIRS": "tuple", "PREFIXES": "str", "TEST_PREFIXES": "str",
             "RESULTS_DIRS": "str", "FAST": "str", "CLASS_THRESHOLDS": "str", "INT8_KEPT": "str"}
_BATCHES = ("BATCH_SIZE", "BATCH")  # where 0 stands for "by trial", whose effective batch is the script's own


def scripts():
    """-> the modules of the scripts in the root, and of the tool that users edit as well."""
    names = [path.stem for path in sorted(_ROOT.glob("*.py"))] + ["tools.sweep_unet_derain"]
    return [importlib.import_module(name) for name in names]


def table():
    """-> {constant: {"types": names of its types, "elements": those of a tuple's elements, [] where unknown}}, of the
    constants without annotation, which says it itself; of batches {"usual": {script: default}} as well."""
    found = {}
    for module in scripts():
        annotated = config.annotated_types(vars(module))
        for name, default in config.constants_of(vars(module)).items():
            if default is None or name in annotated:
                continue
            entry = found.setdefault(name, {"types": set(), "elements": set()})
            entry["types"].add(type(default).__name__)
            if name in _BATCHES:
                entry.setdefault("usual", {})[module.__name__] = default
            if name in _ELEMENTS:
                entry["elements"].add(_ELEMENTS[name])
            for value in (default, module.DEMO.get(name)):
                if isinstance(value, (tuple, list)):
                    entry["elements"] |= {type(element).__name__ for element in value}
    return {name: {kind: kinds if isinstance(kinds, dict) else sorted(kinds) for kind, kinds in entry.items()}
            for name, entry in sorted(found.items())}


def text():
    """-> the file's content, one constant per line."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in table().items()) + "\n}\n"


def main():
    """Write the file."""
    config.TYPES_FILE.write_text(text(), encoding="utf-8")
    print(f"written: {config.TYPES_FILE.relative_to(_ROOT).as_posix()}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
