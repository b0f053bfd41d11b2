"""Publish a trained detector on the Hugging Face hub: what lies in its folder, but hidden files.

    python -m tools.push_to_hub --FOLDER ./outputs_rtdetr/detector --REPO user/name               # shows what would go
    python -m tools.push_to_hub --FOLDER ./outputs_rtdetr/detector --REPO user/name --SEND True

FOLDER is detector/ of Training_RTDETR.py, model/ of Training_FeatureDerain.py, pipeline/ of Training_Conditional.py, or
the file of Training_WeatherAdapter.py (rain.safetensors). It is loaded first: what does not load is not sent. A token
with write access is needed: `hf auth login`, or the environment variable HF_TOKEN.
"""

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from utils import config, feature_derain, report, system
from utils.conditional_model import ConditionalRainRobustRTDETR
from utils.networks import adapter
from utils.networks.rtdetr import load_rtdetr, name_of
from utils.training import model_card

FOLDER = ""              # what to publish, see above
REPO = ""                # where to: user/name or organisation/name; it is made where it does not exist
SEND = False             # False shows what would be sent and checks that it loads; True sends it
PRIVATE = True           # a new repository is private; an existing one stays as it is
LICENSE = ""             # for the card, such as "apache-2.0" or "other"; "" leaves the card as it is
MESSAGE = "Trained with RainSight"  # of the commit


def files_to_send(path):
    """-> {name in the repository: Path}, of a folder or an adapter's file; UserError where there is no card."""
    if path.is_file():
        card = path.with_suffix(".md")
        found = {path.name: path} | ({model_card.NAME: card} if card.is_file() else {})
    else:
        found = {one.relative_to(path).as_posix(): one for one in system.files_in(path)}
        card = path / model_card.NAME
    if model_card.NAME not in found:
        raise config.UserError(f"FOLDER = '{path.as_posix()}' has no card ({card.name}): the training writes it; write "
                               "one by hand for a model from before")
    return found


def load(path):
    """Load what would be sent. -> what it is, in words; UserError where it does not load."""
    if path.is_file():
        if not adapter.is_adapter(path):
            raise config.UserError(f"FOLDER = '{path.as_posix()}' is a file, and no adapter (*{adapter.SUFFIX}): "
                                   "give a folder")
        return f"a weather adapter of rank {adapter.read(path, 'FOLDER')[1]['rank']}"
    if (path / feature_derain.SETTINGS).is_file():
        model = feature_derain.FeatureDerainRTDETR.from_pretrained(path, constant="FOLDER")
        return f"{name_of(model.rtdetr)} that de-rains features, {model.settings['derain_type']}"
    if (path / "conditional.json").is_file():
        ConditionalRainRobustRTDETR.from_pretrained(path, constant="FOLDER")
        return "a pipeline of rain detector, de-rainer and detector"
    detector = load_rtdetr(str(path), constant="FOLDER")
    return f"{name_of(detector)} of {detector.config.num_labels} classes"


def card_text(path, license_name):
    """-> a card, with the licence in its front matter where one is given; UserError where it has no front matter."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise config.UserError(f"FOLDER: {path.as_posix()} cannot be read ({error}): save it as UTF-8") from None
    if not license_name:
        return text
    found = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if not found:
        raise config.UserError(f"LICENSE = '{license_name}': {path.as_posix()} does not begin with a block between two "
                               "lines of ---, into which it would go")
    lines = [line for line in found[1].splitlines() if not line.startswith("license:")]
    return "\n".join(["---", f"license: {license_name}", *lines, "---", ""]) + text[found.end():]


def send(cfg, files):
    """Make the repository and send the files in one commit. -> its address; UserError that says what to do."""
    if not get_token():
        raise config.UserError("there is no Hugging Face token: run hf auth login, or set HF_TOKEN to a token with "
                               "write access (https://huggingface.co/settings/tokens)")
    card = card_text(files[model_card.NAME], cfg.LICENSE).encode("utf-8")
    operations = [CommitOperationAdd(name, card if name == model_card.NAME else path) for name, path in files.items()]
    try:
        api = HfApi()
        address = str(api.create_repo(cfg.REPO, private=cfg.PRIVATE, exist_ok=True))
        api.create_commit(cfg.REPO, operations, commit_message=cfg.MESSAGE)
    except Exception as error:  # huggingface_hub and httpx raise many kinds; all mean that it was not sent
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise config.UserError(f"REPO = '{cfg.REPO}' could not be written: {reason}. Check the connection, the name "
                               "and that the token may write there") from error
    return address


def main(**overrides):
    """Show, and with SEND send; -> {"files": {name: bytes}, "address": str or None}."""
    cfg = config.resolve(globals(), overrides)
    if not cfg.FOLDER or not Path(cfg.FOLDER).exists():
        raise config.UserError(f"FOLDER = '{cfg.FOLDER}' {'is empty' if not cfg.FOLDER else 'does not exist'}: give "
                               "the folder of a trained model, such as ./outputs_rtdetr/detector")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", cfg.REPO, re.ASCII):
        raise config.UserError(f"REPO = '{cfg.REPO}': give user/name")
    path = Path(cfg.FOLDER)
    what = load(path)
    files = files_to_send(path)
    card_text(files[model_card.NAME], cfg.LICENSE)
    sizes = {name: one.stat().st_size for name, one in files.items()}
    print(f"{path.as_posix()} loads: {what}\n")
    print(report.table([{"file": name, "size": f"{size / 1e6:.2f}"} for name, size in sizes.items()],
                       {"file": "file", "size": "MB"}))
    address = send(cfg, files) if cfg.SEND else None
    print(f"\nsent: {address}" if address else
          f"\nnothing was sent: --SEND True sends these files to {cfg.REPO}")
    return {"files": sizes, "address": address}


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
