"""Script constants: type-checked overrides from Python and from the command line.

A script keeps its UPPER_CASE constants at module level, each with its reason in a trailing comment, and a `DEMO`
dict with the values that differ for `--demo`. `resolve` turns them, plus overrides, into one object; nothing is
registered anywhere and nothing happens on import.

A constant takes values of its default's type, as utils/constant_types.json has it: the default at the top of a script
is what people edit, so it cannot say itself whether it is right. Where a type says too little, an annotation does:

    RAIN_THRESHOLD: float | None = 0.5  # a number, or None
    PERCENT_DATASET: float = 10         # fractions as well; a whole number stays one
    SOURCE: str = "0"                   # text even where it looks like a number, else refused as a slip
    REAL_DIR: str | None = "./real"     # "" (or None) for none; empty text is refused where the default has some

    cfg = config.resolve(globals(), {"BATCH_SIZE": 4})         # from Python: main(BATCH_SIZE=4)
    main(**config.from_command_line(globals()))                # from the shell: --BATCH_SIZE 4, --demo, --help
"""

import argparse
import ast
import contextlib
import difflib
import functools
import io
import json
import sys
import tokenize
import types
import typing
from pathlib import Path, PurePath
from types import SimpleNamespace

CONSTANT_TYPES = (bool, int, float, str, tuple, list, dict, type(None))
_SLIPS = (PurePath, set, frozenset, bytes, complex)  # what a person writes and no constant is: converted, or refused
TYPES_FILE = Path(__file__).with_name("constant_types.json")  # python -m tools.constant_types
_PATHS = ("_DIR", "_DIRS", "_PATH", "_FILE")  # endings of constants that name files and folders
ANYTHING = (object,)  # what a constant without annotation takes whose default is None


class UserError(Exception):
    """Something that the user can fix (a path, a constant, a broken file); shown as one line without a traceback."""


@contextlib.contextmanager
def writing(path):
    """Within, what keeps `path` from being written becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {Path(path).as_posix()}: {error.strerror or error}: free disk space, or close "
                        "or move away what is in the way") from error


class MissingConstant(UserError, AttributeError):
    """A constant that a script uses and that is not at its top any more."""


class Config(SimpleNamespace):
    """The resolved constants as attributes, plus `demo` (bool) and `usual_batch` {"BATCH_SIZE": of the script as it
    came} and `given` (names that were overridden: on the command line, or by the caller). `as_dict()` goes into
    checkpoints and reports."""

    def __getattr__(self, name):
        if name.isupper():
            raise MissingConstant(f"the constant {name} is missing at the top of the script: was it renamed or "
                                  "deleted?")
        raise AttributeError(name)

    def as_dict(self):
        """-> {name: value} of the constants alone, JSON-serialisable as long as the script's constants are."""
        return {name: value for name, value in vars(self).items() if name.isupper()}


def constants_of(namespace):
    """-> {name: default} of a script's UPPER_CASE constants in the order they were written (DEMO is not one)."""
    return {
        name: value
        for name, value in namespace.items()
        if name.isupper() and not name.startswith("_") and name != "DEMO"
        and isinstance(value, CONSTANT_TYPES + _SLIPS)
    }


@functools.cache
def _known_types():
    """-> {constant: (types, types of its elements)} of TYPES_FILE."""
    classes = {kind.__name__: kind for kind in CONSTANT_TYPES}
    return {name: tuple(tuple(classes[kind] for kind in entry[key]) for key in ("types", "elements"))
            for name, entry in _types_file().items()}


@functools.cache
def _types_file():
    return json.loads(TYPES_FILE.read_text(encoding="utf-8"))


def _usual_batches(namespace, values, use_demo):
    """-> {"BATCH_SIZE" or "BATCH": the script's own batch, or its demo's, whatever was edited}: what 0 goes by."""
    script, demo = Path(namespace.get("__file__") or "").stem, namespace.get("DEMO") if use_demo else None
    return {name: (demo or {}).get(name) or entry["usual"].get(script) or values[name] or 1
            for name, entry in _types_file().items() if "usual" in entry and name in values}


def annotated_types(namespace):
    """-> {name: types, a tuple of classes} of the constants that have an annotation.

    Raises:
        TypeError: an annotation that is no class of CONSTANT_TYPES and no union of them, such as `tuple[str, ...]`, or
            text (`from __future__ import annotations`), which is not evaluated.
    """
    annotations = namespace.get("__annotations__")
    if annotations is None and "__annotate__" in namespace:  # from Python 3.14 on they are computed on demand
        annotations = namespace["__annotate__"](1)           # annotationlib.Format.VALUE
    found = {}
    for name in constants_of(namespace).keys() & (annotations or {}).keys():
        hint = annotations[name]
        union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        members = tuple(type(None) if member is None else member for member in (typing.get_args(hint) or (hint,)))
        if (typing.get_origin(hint) and not union) or not set(members) <= set(CONSTANT_TYPES):
            raise TypeError(f"the annotation of {name} must be a class such as int, or a union such as float | None, "
                            f"not {hint!r}")
        found[name] = members
    return found


def _taken_types(defaults, annotated):
    """-> {name: types, a tuple of classes} of every constant: its annotation's, TYPES_FILE's or its default's."""
    def usual(name, default):
        types = _known_types().get(name, ((), ()))[0]
        own = ANYTHING if default is None else (str,) if isinstance(default, PurePath) else (type(default),)
        return own if not types or own[0] in types else types  # RESUME is a bool, and of some scripts a folder
    return {name: usual(name, default) for name, default in defaults.items()} | annotated


def _words(kinds):
    """-> types for a message: "float or None"."""
    return " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)


def resolve(namespace, overrides):
    """Merge a script's constants, its DEMO dict and overrides.

    Args:
        namespace: the script's `globals()`.
        overrides: {name: value}; the key `demo` (bool) applies the script's DEMO dict before the other overrides.
    Returns:
        Config with every constant as an attribute, `demo`, `usual_batch` and `given`.
    Raises:
        UserError: an unknown name, or a value whose type does not fit the constant's annotation or default.
    """
    overrides = dict(overrides)
    use_demo = bool(overrides.pop("demo", False))
    defaults, annotated = constants_of(namespace), annotated_types(namespace)
    kinds = _taken_types(defaults, annotated)
    if use_demo and "DEMO" not in namespace:
        raise UserError("this script has no demo")
    values = dict(defaults)
    demo = {name: _beside(namespace, value) for name, value in (namespace["DEMO"] if use_demo else {}).items()
            if name not in overrides}
    for source in (demo, overrides):
        for name, value in source.items():
            name = _known(name, values)
            values[name] = _checked(name, value, kinds[name], defaults[name])
    for name, value in values.items():
        text = str in annotated.get(name, _known_types().get(name, ((),))[0])
        if isinstance(value, str) and not text and _is_number(value):
            raise UserError(f"{name} = '{value}' is text: write it without the quotes")
        value = _checked(name, value, kinds[name], defaults[name])  # also the default, which a person may have edited
        value = _with_paths(name, value)
        if name not in annotated and isinstance(value, (tuple, list)):
            _require_elements(name, value, _known_types().get(name, ((), ()))[1])
        values[name] = _not_empty(name, value, kinds[name], defaults[name])
    return Config(demo=use_demo, usual_batch=_usual_batches(namespace, defaults, use_demo),
                  given=frozenset(overrides), **values)


def _beside(namespace, value):
    """-> a DEMO value; where it names a file of this project (./assets/...), that file, whatever folder the script was
    started from, also within a tuple or a dict. UserError where it is missing, before anything is drawn or computed."""
    if isinstance(value, dict):
        return {name: _beside(namespace, one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_beside(namespace, one) for one in value)
    if not isinstance(value, str) or not value.startswith("./assets/") or "__file__" not in namespace:
        return value
    inside = Path(value)
    for root in (Path(), *Path(namespace["__file__"]).resolve().parents[:2]):  # scripts lie in the root or in tools/
        if (root / inside).exists():
            return value if root == Path() else (root / inside).as_posix()
    raise UserError(f"--demo needs {value}, which is missing beside the scripts: it is part of this project, get it "
                    "again (git checkout assets)")


def _with_paths(name, value):
    """-> value with Paths as text, and with the home folder in place of "~/" at the beginning of a text, as a shell
    would have it; also within tuples, lists and dicts."""
    if isinstance(value, dict):
        return {_with_paths(name, key): _with_paths(name, one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_with_paths(name, one) for one in value)
    value = str(value) if isinstance(value, PurePath) else value
    if isinstance(value, str) and any(ord(character) < 32 for character in value):
        raise UserError(f"{name} = {value!r} holds a control character: in a path write / for \\, or r\"...\" with the "
                        "r in front")
    if isinstance(value, str) and value[:2] in ("~/", "~\\"):
        with contextlib.suppress(RuntimeError):  # nobody knows where it is
            return str(Path(value).expanduser())
    return value


def _not_empty(name, value, kinds, default):
    """-> value; UserError for empty text, which as a path would be the current folder, where some is needed.

    Text that may be None is "" then, so that scripts have one word for none.
    """
    if value is None and str in kinds:
        return ""
    texts = [one for one in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(one, str)]
    needed = default != value or name.endswith(_PATHS)
    if needed and not all(text.strip() for text in texts) and not {str, type(None)} <= set(kinds):
        raise UserError(f"{name} = {value!r} {'is' if isinstance(value, str) else 'holds an'} empty text"
                        + (f": leave it out for the default {default!r}" if default != value else ": give a path"))
    return value


def _is_number(text):
    """-> True for a text like "4", "1e-4" or "False", which as a constant's value is a slip."""
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError):
        return isinstance(ast.literal_eval(text), (int, float))
    return False


def _known(name, names):
    if name in names:
        return name
    close = difflib.get_close_matches(name.upper(), names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"unknown constant {name}{hint} (--help lists them all)")


def _checked(name, value, kinds, default):
    """-> value, converted where nothing is lost (int -> float, Path -> str, list <-> tuple).

    A whole number stays an int where the default of a float constant is one: checkpoints keep 10, not 10.0.
    """
    if isinstance(value, PurePath):
        value = str(value)
    if kinds == ANYTHING or (bool in kinds if isinstance(value, bool) else isinstance(value, kinds)):
        return value
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if isinstance(default, float) else value
    for sequence in (tuple, list):
        if sequence in kinds and isinstance(value, (tuple, list)):
            return sequence(value)
    advice = (f"write a comma after a single element: ({value!r},)" if tuple in kinds and isinstance(value, (str, int))
              else "" if value is default else f"default {default!r}")
    raise UserError(f"{name} = {value!r} is a {type(value).__name__}, but {name} must be a {_words(kinds)}"
                    + (f" ({advice})" if advice else ""))


def _require_elements(name, values, kinds):
    """UserError where an element of a tuple or list is of none of the types (if any is known)."""
    for value in values:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if kinds and not (type(value) in kinds or whole and float in kinds):
            raise UserError(f"{name} holds {value!r}, a {type(value).__name__}: each element must be a {_words(kinds)}")


def from_command_line(namespace, argv=None):
    """Parse `--NAME value` flags and `--demo` into overrides for `resolve`.

    Also `--name`, and `--na-me` for NA_ME; a boolean constant's bare flag means true, and it takes 0 and 1; a tuple
    constant takes several words (`--KEEP car "traffic light"`) or one Python literal. `--help` names the type of an
    annotated constant.

    Also makes the running program show a UserError as one line instead of a traceback, with exit code 1, and print
    what the console's code page lacks (in class names and paths) as "?" instead of dying of it.
    """
    sys.excepthook = _show_user_errors
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not without a console, nor in a notebook
            stream.reconfigure(errors="replace")
    constants, annotated = constants_of(namespace), annotated_types(namespace)
    kinds = _taken_types(constants, annotated)
    comments = _comments(namespace.get("__file__"))
    summary = (namespace.get("__doc__") or "").strip()
    parser = argparse.ArgumentParser(
        description=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every flag overrides the constant of that name at the top of the script.",
    )
    if "DEMO" in namespace:
        parser.add_argument("--demo", action="store_true", default=argparse.SUPPRESS,
                            help="small built-in data and weights, no network, a few minutes on a CPU")
    for name, default in constants.items():
        taken = f"{_words(annotated[name])}; " if name in annotated else ""
        text = f"{comments.get(name, '')} ({taken}default: {default!r})".strip().replace("%", "%%")
        small = [name.lower(), name.lower().replace("_", "-")] if name.lower() != "demo" else []
        words = ({"nargs": "?", "const": "true"} if bool in kinds[name] else
                 {"nargs": "+"} if tuple in kinds[name] or list in kinds[name] else {})
        parser.add_argument(*[f"--{spelling}" for spelling in dict.fromkeys([name, *small])], dest=name,
                            metavar="VALUE", default=argparse.SUPPRESS, help=text, **words)
    parser.error = lambda message: parser.exit(2, f"Error: {message} (--help lists all constants)\n")
    found, unknown = parser.parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    if unknown:
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            parser.exit(2, f"Error: {word} belongs to no constant: a flag takes one value, text with spaces in quotes, "
                           "and instead of several files their folder\n")
        close = difflib.get_close_matches(word.lstrip("-").replace("-", "_").upper(), constants, n=1)
        parser.exit(2, f"Error: unknown argument {word}{f'; did you mean --{close[0]}?' if close else ''} "
                       "(--help lists them all)\n")
    return {name: value if name == "demo" else
            _several(name, value, kinds[name], constants[name]) if isinstance(value, list) else
            _parsed(name, value, kinds[name])
            for name, value in vars(found).items()}


def _joined(words):
    """-> command line words, a flag and a negative number after it as one: argparse takes -1e-4 for another flag."""
    found = []
    for word in words:
        negative = word.startswith("-") and _is_number(word)
        if negative and found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _several(name, words, kinds, default):
    """-> the words of a tuple constant's flag: one Python literal of a sequence, None, or one element each."""
    if len(words) == 1:
        if words[0] == "None" and type(None) in kinds:
            return None
        with contextlib.suppress(ValueError, SyntaxError):
            if isinstance(literal := ast.literal_eval(words[0]), (tuple, list)):
                return literal
    elements = _known_types().get(name, ((), ()))[1] or {type(one) for one in default or ()}
    numbers = {int, float} & set(elements)
    return [_parsed(name, word, tuple(numbers) or (str,)) for word in words]


def _parsed(name, text, kinds):
    """-> the flag's text as a value: text where the constant takes text, everything else is a Python literal."""
    if kinds == ANYTHING and text != "None" and not text[:1].isdigit():
        return text
    if type(None) in kinds and text == "None":
        return None
    if str in kinds:
        return text
    if bool in kinds and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if kinds == ANYTHING:
            return text
        wanted = "choose True or False" if kinds == (bool,) else f"not a {_words(kinds)}"
        raise UserError(f"--{name} {text}: {wanted}") from None


def _comments(file):
    """-> {constant: its trailing comment} read from the script's source; {} where the source is not there."""
    if not file or not Path(file).is_file():
        return {}
    source = Path(file).read_text(encoding="utf-8-sig")  # Windows PowerShell writes a BOM
    comments, name = {}, None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.start[1] == 0:
            name = token.string
        elif token.type == tokenize.COMMENT and token.start[1] > 0 and name and name.isupper():
            comments.setdefault(name, token.string.lstrip("# ").strip())
        elif token.type == tokenize.NEWLINE:
            name = None
    return comments


def short_errors_in_notebook():
    """Make a notebook show a UserError as one line instead of a traceback; elsewhere nothing happens."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        shell.set_custom_exc((UserError,), lambda self, kind, error, traceback, tb_offset=None:
                             print(f"Error: {error}", file=sys.stderr))


def _show_user_errors(kind, error, traceback, otherwise=sys.excepthook):  # that of utils/__init__.py, for Ctrl+C
    text = str(error).strip()
    if issubclass(kind, UserError):
        if "Original Traceback" in text:  # from a data loader's process: torch puts the whole traceback into the text
            text = text.splitlines()[-1].split(": ", 1)[-1]
        print(f"Error: {text}", file=sys.stderr)
    elif kind.__name__ == "OutOfMemoryError":
        print("Error: the GPU is out of memory. Lower the batch size (and raise the accumulation steps by the same "
              "factor) or the image size; where the script has them, set ACTIVATION_CHECKPOINTING or "
              "GRADIENT_CHECKPOINTING = True or (GPUs from Ampere on) PRECISION = 'bf16', or leave --no_amp out. "
              f"({text.splitlines()[0] if text else kind.__name__})", file=sys.stderr)
    elif issubclass(kind, MemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        print("Error: the computer's memory is full. Lower the batch size (and raise the accumulation steps by the "
              "same factor), the image size or the number of loader processes, or close other programs. "
              f"({text.splitlines()[0] if text else kind.__name__})", file=sys.stderr)
    else:
        otherwise(kind, error, traceback)
