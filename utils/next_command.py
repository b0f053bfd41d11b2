"""Commands to go on with, which scripts print: one line that works when it is pasted into bash or PowerShell."""

import os
import re
from pathlib import Path

from utils import config

OF_ONE_RUN = ("OUTPUT_DIR", "RESUME", "PERCENT_DATASET", "BATCH_SIZE", "EVAL_BATCH_SIZE", "PICTURES",
              "SEED")  # the next script means other things by these: it does not learn, or writes elsewhere
DATA = ("COCO_DIR", "COCO_RAIN_DIR")  # where a run without labels has none, there is nothing to evaluate on


def pasted(path):
    """-> a path (or any text) as one word of a command line for bash and PowerShell, in quotes where it needs them."""
    text = path.as_posix() if isinstance(path, Path) else str(path)
    return text if re.fullmatch(r"[\w./:+-]+", text) else _in_quotes(text)


def quoted(names):
    """-> the names as words of a command line, always in quotes."""
    return " ".join(map(_in_quotes, names))


def _in_quotes(text):
    """Double quotes, which cmd.exe knows too; single ones around what bash or PowerShell would replace in those."""
    return f"'{text}'" if re.search(r'[$`!"]', text) and "'" not in text else f'"{text}"'


def flag(name, value, nullable=False):
    """-> " --NAME value" for config.from_command_line.

    Args:
        value: of a constant; an empty text is written None, where the constant may be None (`nullable`): the PowerShell
            of Windows drops words that are empty.
    """
    if value == "" and isinstance(value, str):
        return f" --{name} None" if nullable else f" --{name}="
    if os.sep == "\\":  # in front of a quote it would hide it from the shell, and in a tuple stands twice
        value = value.replace("\\", "/") if isinstance(value, str) else repr(value).replace("\\\\", "/")
    return f" --{name} {pasted(value)}"


def folder_flag(name, folder, usual):
    """-> `flag` for a folder that is another one than the script's own `usual`, else ""."""
    return "" if Path(folder) == Path(usual) else flag(name, Path(folder).as_posix())


def flags(script, cfg, but=OF_ONE_RUN, **own):
    """-> " --demo --NAME value ..." for a script, which hands on what this run was given.

    What the script compares with as well, and has a constant for that may be None, is left out (None) where it is not
    there and this run knows nothing of it.

    Args:
        script: the module of a script with constants.
        cfg: config.Config of this run. Its constants that the script has as well are handed on, where the script would
            take another value by itself; not those of `but`, nor what is empty here and may not be empty there.
        own: constants that are written in any case.
    Raises:
        UserError: somebody has edited the script, and it would refuse its own constants.
    """
    defaults = config.resolve(vars(script), {"demo": cfg.demo}).as_dict()
    optional = _optional(script)
    given = {name: value for name, value in cfg.as_dict().items()
             if name in defaults and name not in but and value != defaults[name] and (value != "" or name in optional)}
    if not cfg.demo:  # which leaves out by itself what other demos have not made yet
        given |= {name: "" for name in sorted(optional - vars(cfg).keys())
                  if str(defaults[name]).startswith("./") and not Path(defaults[name]).exists()}
    return " --demo" * cfg.demo + "".join(flag(name, value, name in optional) for name, value in (given | own).items())


def _optional(script):
    """-> names of the constants that may be None."""
    return {name for name, types in config.annotated_types(vars(script)).items() if type(None) in types}


def command(script, cfg, but=OF_ONE_RUN, labelled=True, **own):
    """-> "python SCRIPT.py ...", see `flags`; with a comment on what the user has to add, because the script reads it
    and this run cannot give it: what is empty, and without labels DATA."""
    named, optional = {*but, *own}, _optional(script)
    missing = [name for name, default in config.constants_of(vars(script)).items() if isinstance(default, str) and (
        name in DATA and not labelled or name not in optional | named and getattr(cfg, name, None) == "")]
    more = f"     # and with {', '.join(f'--{name}' for name in missing)}, which this run has not" if missing else ""
    return f"python {script.__name__}.py{flags(script, cfg, but if labelled else (*but, *DATA), **own)}{more}"
