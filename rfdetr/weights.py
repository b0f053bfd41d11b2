"""Weights of RF-DETR: the published COCO files, our checkpoints, and which row of the class head is which class.

Our checkpoints are {"model": published names (rfdetr.names), "args": {"size", "num_rows", "resolution", "mask_head"},
"class_names": [...], "class_rows": {name: row}}. Published files are downloaded on first use to ~/.cache/rainsight
(RAINSIGHT_CACHE overrides), resumed when cut off, checked against their MD5 sum, and read without unpickling code.
"""

import fnmatch
import http.client
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from rfdetr import names
from rfdetr.config import COCO_HEAD_ROWS, COCO_ROWS, PUBLISHED, settings
from rfdetr.model import RFDETR
from rfdetr.models.segmentation import MaskHeadNano
from utils import checkpoint, download, processes, system
from utils.config import UserError
from utils.datasets.annotations import plain_name

ENTRIES = ("model", "args", "class_names", "class_rows")  # of a checkpoint of ours; a run's own files have more
MODEL_ARGS = ("size", "num_rows", "resolution", "mask_head")
POSITIONS = "backbone.0.encoder.encoder.embeddings.position_embeddings"
_PATCHES = "backbone.0.encoder.encoder.embeddings.patch_embeddings.projection.weight"
CLASS_HEADS = ("class_embed.*", "transformer.enc_out_class_embed.*")
_ADVICE = "Is it of another --size? What shall start anew can be named with --pretrain_exclude_keys"


# ---- download ------------------------------------------------------------------------------------------------------

def fetch(size, cache_dir=None):
    """The published COCO weights of a size, downloaded where they are not there yet.

    Under torchrun the main process downloads while the others wait for it.

    Args:
        size: a key of config.PUBLISHED; cache_dir: folder, None for `cache.cache_folder()`.
    Returns:
        Path of the file; its MD5 sum is right.
    Raises:
        UserError: nothing is published for that size, not reachable, not the published file, not writable.
    """
    if size not in PUBLISHED:
        raise UserError(f"no weights are published for size {size}: use --pretrain_weights none or a checkpoint of "
                        "your own")
    published = PUBLISHED[size]
    path = Path(cache_dir or system.cache_folder()) / published.file
    processes.main_first(lambda: _complete(path, published), f"getting {published.file}")
    return path


def _complete(path, published):
    """Make `path` the published file."""
    if path.is_file():
        if (found := download.md5(path)) != published.md5:
            raise UserError(f"{path.as_posix()} is not the published {published.file} (MD5 {found}, expected "
                            f"{published.md5}): delete it and run again, or put the file of {published.url} there")
        return
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download.resumed(published.url, part, published.file, published.md5)
        if (found := download.md5(part)) != published.md5:
            part.unlink()
            raise UserError(f"{published.file} from {published.url} is broken (MD5 {found}, expected {published.md5}) "
                            "and was deleted: run again; if that repeats, something on the way changes the file. "
                            f"Put the right one at {path.as_posix()}, or use --pretrain_weights none")
        system.replace(part, path)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors, as is a full disk
        raise UserError(f"cannot get the pretrained weights {published.file} from {published.url} "
                        f"({download.reason(error)}). Put that file at {path.as_posix()} (what has arrived is kept and "
                        "resumed), or start without pretrained weights: --pretrain_weights none") from error


# ---- checkpoints ---------------------------------------------------------------------------------------------------

def description(model, class_names, class_rows, args=None):
    """What a checkpoint of ours says beside its weights.

    Args:
        model: RFDETR; class_names: list in the data set's order; class_rows: {name: row};
        args: further plain values for "args"; the model's own are always there.
    """
    return {"args": dict(args or {}) | model.model_args, "class_names": list(class_names),
            "class_rows": {str(name): int(row) for name, row in class_rows.items()}}


def checkpoint_content(model, class_names, class_rows, args=None):
    """What a checkpoint of ours holds, ready for utils.checkpoint.save; the arguments are those of `description`."""
    return {"model": model.state_dict()} | description(model, class_names, class_rows, args)


def content_of(source):
    """What a checkpoint holds.

    Args:
        source: path of a checkpoint, or its content.
    Returns:
        dict with a state dict under "model", its name for messages.
    Raises:
        UserError: no such file, broken, or without a state dict.
    """
    if isinstance(source, (str, Path)):
        content, what = checkpoint.load(source), Path(source).as_posix()
    else:
        content, what = source, "the given weights"
    if isinstance(content, dict) and content and all(torch.is_tensor(value) for value in content.values()):
        content = {"model": content}
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise checkpoint.CheckpointError(
            f"{what} holds no state dict under 'model': give a checkpoint of train_detector_stage1.py, "
            "train_seg_stage2.py or a published COCO file")
    return content, what


class Checkpoint(NamedTuple):
    """A detector's checkpoint that was read."""

    state: dict  # {published name: Tensor}
    rest: dict   # the other entries: "args", "class_names", "class_rows", ...
    name: str    # what messages call it


def require_source(choice, name):
    """UserError where weights to start from are neither "coco", "none" nor a file; name: what the user calls them."""
    if choice.lower() not in ("coco", "none") and (problem := system.absent(choice)):
        raise UserError(f"{name}: weight file {Path(choice).as_posix()} {problem}; choose coco (the published "
                        "weights), none (from scratch) or a checkpoint's file")


def read(source):
    """-> Checkpoint of a path or of a file's content; a Checkpoint is given back, so that nothing is read twice.

    Raises:
        UserError: no such file, broken, or not a detector.
    """
    if isinstance(source, Checkpoint):
        return source
    content, name = content_of(source)
    state = names.with_our_heads(content["model"])
    if "class_embed.0.weight" not in state:
        raise checkpoint.CheckpointError(f"{name} is not an RF-DETR detector: it has no class_embed")
    return Checkpoint(state, {key: value for key, value in content.items() if key != "model"}, name)


def _known_rows(state, rest, what):
    """-> (rows of the class head, {class name: row})."""
    rows = state["class_embed.0.weight"].shape[0]
    if isinstance(rest.get("class_rows"), dict):
        known = rest["class_rows"]
        if not all(type(row) is int and 0 <= row < rows for row in known.values()):
            raise checkpoint.CheckpointError(f"{what}: its class_rows ({system.listed(map(str, known.items()))}) "
                                             f"name rows that its class head of {rows} rows lacks: it is damaged")
        return rows, {str(name): row for name, row in known.items()}
    return rows, dict(COCO_ROWS) if rows == COCO_HEAD_ROWS else {}


def rows_of(source):
    """-> (rows of a checkpoint's class head, {class name: row} that it knows).

    Args:
        source: path, content or Checkpoint. A file without "class_rows" but with COCO's 91 rows knows COCO's classes.
    """
    state, rest, what = read(source)
    return _known_rows(state, rest, what)


def model_args_of(source):
    """-> what one of our checkpoints says of its model: {"size", "num_rows", perhaps "resolution", "mask_head"}.

    Args:
        source: path, content or Checkpoint.
    Raises:
        UserError: no such file, broken, or a published file (which does not say its size).
    """
    _, rest, what = read(source)
    args = rest.get("args")
    if not (isinstance(args, dict) and {"size", "num_rows"} <= set(args)):
        raise checkpoint.CheckpointError(
            f"{what} does not say which model it is: 'args' has no size and num_rows. It is not a checkpoint of ours; "
            "a published COCO file goes into train_detector_stage1.py or shrink_head.py first")
    return args


def size_of(state, source):
    """-> the published size that a state dict belongs to, by its shapes; UserError where it is none of them."""
    positions = state.get(POSITIONS)
    fitting = {}
    if positions is not None:
        side = math.isqrt(positions.shape[1] - 1)  # patches per side; the one more is the class token
        fitting = {size: abs(side - settings(size)["grid"]) for size in PUBLISHED if _fits(state, size)}
    if not fitting:
        raise UserError(f"{source} fits none of the sizes {', '.join(PUBLISHED)}")
    return min(fitting, key=fitting.get)  # medium and large_2026, and some of the seg sizes, differ in the grid alone


def _fits(state, size):
    """Whether a state dict has the shapes of a size, that of the position embeddings, which are resized, aside."""
    own = settings(size)
    patches, queries = state.get(_PATCHES), state.get("query_feat.weight")
    layers = {found[1] for name in state if (found := re.match(r"transformer\.decoder\.layers\.(\d+)\.", name))}
    return (patches is not None and (own["hidden"], own["patch"]) == (patches.shape[0], patches.shape[-1])
            and own["decoder_layers"] == len(layers)
            and (queries is None or len(queries) == own["queries"] * own["groups"]))


def require_size(source, size):
    """UserError where a file that does not say its size has the shapes of another published one; a note where only its
    position embeddings are another one's, as the two may differ in windows and resolution, which no shape tells."""
    state, rest, what = read(source)
    if isinstance(rest.get("args"), dict) and "size" in rest["args"]:
        return  # load_pretrained names what does not fit
    if _fits(state, size):
        if size in PUBLISHED and POSITIONS in state and (likely := size_of(state, what)) != size:
            processes.say(f"note: {what} has as many patches as {likely}, not {size}: unless it was trained at another "
                          f"resolution, --size {likely} is its own")
        return
    try:
        found = size_of(state, what)
    except UserError:
        return
    raise UserError(f"--size {size}, but by its shapes {what} holds an RF-DETR of size {found}: give --size {found} or "
                    "other weights")


def head_of(source):
    """-> the kind of a checkpoint's mask head, "full", "nano" or "official", by its weights; None without one."""
    state = read(source).state
    if "mask_head.query_features_proj.weight" in state:
        return "official"
    stem = state.get("mask_head.stem_half.weight")
    return None if stem is None else "nano" if len(stem) == MaskHeadNano.stem // 2 else "full"


def _require_head(model, source, anew):
    """UserError where a checkpoint's mask head is of another kind than the model's and shall not start anew."""
    theirs, wanted = head_of(source), model.model_args["mask_head"]
    if theirs and wanted and theirs != wanted and "mask_head.*" not in anew:
        flag = "--seg_head official" if theirs == "official" else "--seg_head ours"
        raise checkpoint.CheckpointError(
            f"{source.name} holds a mask head of the kind {theirs!r}, this model has {wanted!r}: "
            + (f"give train_seg_single_stage.py {flag}" if "official" in (theirs, wanted) else "give its own --size")
            + ", or start with a new head: --pretrain_exclude_keys \"mask_head.*\"")


def load_detector(source, device="cpu"):
    """A model from one of our checkpoints, mask head included.

    Args:
        source: path, content or Checkpoint.
    Returns:
        RFDETR in eval mode on `device`, and {"args", "class_names", "class_rows"}.
    Raises:
        UserError: of `model_args_of`.
    """
    source = read(source)
    state, rest, what = source
    args = model_args_of(source)
    model = RFDETR(**{key: args[key] for key in MODEL_ARGS if key in args})
    checkpoint.load_into(model, state, what, f"RF-DETR {args['size']}", _ADVICE)
    _, rows = _known_rows(state, rest, what)
    info = {"args": dict(args) | model.model_args, "class_rows": rows,
            "class_names": list(rest.get("class_names") or sorted(rows, key=rows.get))}
    return model.to(device).eval(), info


def load_pretrained(model, source, exclude=()):
    """Take over weights as far as they fit.

    Position embeddings of another resolution are interpolated, as the backbone itself would do it. Class heads of
    another number of rows start anew, as does a mask head that the source does not have; its own one is left behind
    where the model has none. Everything else must fit.

    Args:
        model: RFDETR; changed in place.
        source: path, content or Checkpoint, of a published COCO file or of ours.
        exclude: patterns (fnmatch) of published names that start anew, e.g. ("backbone.0.projector.*",).
    Returns:
        {"class_rows": {name: row} that the loaded head knows ({} where it starts anew), "loaded": number of tensors,
        "left_out": names of the model's tensors that start anew}.
    Raises:
        UserError: names or shapes that do not fit (all kinds are named), a pattern that matches nothing.
    """
    source = read(source)
    state, rest, what = source
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    own = model.state_dict()
    for pattern in exclude:
        if not fnmatch.filter(own, _ours(pattern)):
            raise UserError(f"--pretrain_exclude_keys '{pattern}' matches no tensor of RF-DETR "
                            f"{model.model_args['size']}; names look like {POSITIONS}")
    rows, known = _known_rows(state, rest, what)
    anew = [_ours(pattern) for pattern in exclude]
    if rows != model.model_args["num_rows"]:
        anew += CLASS_HEADS
    if not any(name.startswith("mask_head.") for name in state):
        anew.append("mask_head.*")
    _require_head(model, source, anew)
    left_out = [name for name in own if any(fnmatch.fnmatchcase(name, pattern) for pattern in anew)]
    unwanted = set(left_out)
    given = {name: value for name, value in state.items()
             if name not in unwanted
             and not (name.startswith("mask_head.") and (model.mask_head is None or "mask_head.*" in anew))}
    if POSITIONS in given:
        given[POSITIONS] = resize_positions(given[POSITIONS], own[POSITIONS].shape[1])
    checkpoint.load_into(model, given, what, f"RF-DETR {model.model_args['size']}", _ADVICE, kept=left_out)
    return {"class_rows": {} if "class_embed.0.weight" in unwanted else known, "loaded": len(given),
            "left_out": left_out}


def _ours(pattern):
    """-> the pattern, with Roboflow's name of the class head made ours."""
    return re.sub(r"^class_embed\.(?=weight$|bias$)", "class_embed.0.", pattern)


def resize_positions(positions, tokens):
    """(1, 1 + n*n, D) position embeddings, class token first -> (1, `tokens`, D), `tokens` = 1 + m*m.

    Bicubic with antialiasing, as the backbone interpolates them for an image of another size.
    """
    if positions.shape[1] == tokens:
        return positions
    before, after = math.isqrt(positions.shape[1] - 1), math.isqrt(tokens - 1)
    if before**2 + 1 != positions.shape[1] or after**2 + 1 != tokens:
        return positions  # no square grids: left for the comparison of shapes to name
    grid = positions[:, 1:].float().unflatten(1, (before, before)).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = torch.nn.functional.interpolate(grid, size=(after, after), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions)], 1)  # (1, 1 + m*m, D)


def write(content, path, earlier):
    """Write a checkpoint. `earlier`, what stands at `path` (of checkpoint.require_replaceable), moves into previous_<n>
    where it is another one, and a line says so."""
    path = Path(path)
    if earlier is not None and not checkpoint.equal(earlier, content):
        place = checkpoint.keep_earlier(path.parent, [path.name], "checkpoint") / path.name
        known = earlier.get("class_names") or earlier["args"].get("class_names") or ["?"]
        processes.say(f"note: {path.as_posix()} held another checkpoint ({system.listed(known)}): moved to "
                      f"{place.as_posix()}")
    checkpoint.save(content, path)


def export_roboflow(path_in, path_out):
    """Write the detector of one of our checkpoints with Roboflow's key names, for their package.

    Their class head is "class_embed.weight"; a mask head of ours has no counterpart there and is left out,
    one of their form is kept. Their package takes the class head's size from the file; its class ids are our rows,
    which "args" names.

    Returns:
        Path of the new file; an earlier one of its kind moves aside, and nothing else is replaced:
        {"model", "args": {"class_names", "class_rows", "num_classes", "resolution"}}.
    """
    source = read(path_in)
    state, rest, what = source
    path_out = Path(path_out)
    if path_out.exists() and Path(path_in).exists() and path_out.samefile(path_in):
        raise UserError(f"{path_out.as_posix()} is the input file, which is never overwritten: choose another name")
    earlier = checkpoint.require_replaceable(path_out, ("model", "args"), "export_roboflow")
    rows, known = _known_rows(state, rest, what)
    args = rest.get("args") if isinstance(rest.get("args"), dict) else {}
    official = head_of(source) == "official"
    detector = {name.replace("mask_head.", "segmentation_head.", 1): value for name, value in state.items()
                if official or not name.startswith("mask_head.")}
    write({"model": names.published_file(detector), "args": {
        "class_names": sorted(known, key=known.get), "class_rows": known, "num_classes": rows - 1,
        **({"resolution": args["resolution"]} if "resolution" in args else {})}}, path_out, earlier)
    return path_out


# ---- rows of the class head ----------------------------------------------------------------------------------------

def assign_rows(class_names, num_rows, known_rows):
    """Which row of the class head a data set's classes train on.

    A class that `known_rows` knows by name keeps that row. The others take free rows: first those that no known class
    uses, then those of known classes that the data set does not have. The background's row comes last of all: row 0
    of COCO's head, else the last row, which is why a head of N + 1 rows gives N new classes the rows 0..N-1.

    Args:
        class_names: distinct names; num_rows: rows of the head; known_rows: {name: row}, {} for a new head.
    Returns:
        {name: row}, in the order of class_names, rows distinct.
    Raises:
        UserError: more classes than rows.
    """
    if len(class_names) > num_rows:
        raise UserError(f"the data set has {len(class_names)} classes, but the weights' class head only {num_rows} "
                        f"rows: start from weights with a larger one (COCO's have {COCO_HEAD_ROWS}), or from "
                        "--pretrain_weights none")
    row_of = {}
    for name, row in known_rows.items():
        row_of.setdefault(plain_name(name), row)
    chosen, taken = {}, set()
    for name in class_names:
        row = known_rows.get(name, row_of.get(plain_name(name)))
        if row is not None and row not in taken:
            chosen[name] = row
            taken.add(row)
    background = 0 if num_rows == COCO_HEAD_ROWS and known_rows else num_rows - 1
    used = set(known_rows.values())
    free = sorted(set(range(num_rows)) - taken, key=lambda row: (row == background, row in used, row))
    return {name: chosen[name] if name in chosen else free.pop(0) for name in class_names}
