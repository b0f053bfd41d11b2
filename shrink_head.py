r"""Shrink a detector's class heads to the classes of your data, between the two stages of RF-DETR training.

    python shrink_head.py --demo
    python shrink_head.py --in_ckpt runs/detector_nano_384_1/checkpoint_best_regular.pth \
        --out_ckpt runs/detector_nano_384_1/checkpoint_mydata.pth --keep "cells" "blood_vessel" "glomerulus"

A detector that started from COCO's weights has 91 class rows. The new file has one row per name of --keep, in that
order, and a last one for background, in the class head and in every encoder class head (one per query group). Nothing
else is touched. Rows are found by name: through the checkpoint's `class_rows` (our training writes them), or, in a
published COCO file, through COCO's names. Plain dot products with the same rows: a query's scores for the kept classes
stay what they were. The encoder's proposals are ranked by their best kept class, so objects of the classes that are
left out no longer take queries away.
"""

import math
import re
from pathlib import Path

import torch

from rfdetr import config as rfdetr_config
from rfdetr import model, weights
from utils import checkpoint, config, processes, report, system
from utils.config import UserError
from utils.datasets.annotations import plain_name
from utils.next_command import folder_flag, pasted
from utils.training.plan import usable_seed

IN_CKPT = ""                            # checkpoint of stage 1, or a published COCO file; it is only read
OUT_CKPT = ""                           # the new file; another one of shrink_head.py is moved into previous_<n>
KEEP = ()                               # names of the classes, as in the data set; their order is the new order
INIT_MISSING = False                    # a name that the checkpoint does not know gets a new row; else an error
SEED = 0                                # of new rows

DEMO = {"IN_CKPT": "./assets/demo/rfdetr_tiny.pth", "OUT_CKPT": "./demo/rfdetr_two_classes.pth",
        "KEEP": ("car", "person")}
_ENTRIES = ("model", "args", "class_names", "class_rows", "shrunk_from")  # of a file that this script writes
_NEW_STD = 0.01                         # of a new row's weights
_HEADS = re.compile(r"(class_embed\.0|class_embed|transformer\.enc_out_class_embed\.\d+)\.(weight|bias)")


def class_heads(state, source):
    """-> {head: number of rows} of a state dict: the decoder's class head first, then the encoder's.

    Raises:
        UserError: no RF-DETR heads, a head without weight or bias, or heads that disagree.
    """
    parts = {}
    for name, value in state.items():
        if found := _HEADS.fullmatch(name):
            parts.setdefault(found[1], {})[found[2]] = value.shape[0]
    heads = {head: rows.get("weight") for head, rows in sorted(parts.items())}
    if len(heads) < 2 or sum(head.startswith("class_embed") for head in heads) != 1:
        raise UserError(f"{source} is not an RF-DETR detector: expected class_embed.0 (or class_embed) and "
                        f"transformer.enc_out_class_embed.<group>, found {', '.join(heads) or 'no class head'}")
    sizes = {size for rows in parts.values() for size in rows.values()}
    if len(sizes) != 1 or any(len(rows) != 2 for rows in parts.values()):
        raise UserError(f"{source}: its class heads do not agree "
                        f"({', '.join(f'{head} {rows}' for head, rows in parts.items())}): the file is damaged")
    return heads


def known_rows(content, rows, source):
    """-> ({class name: row}, where the names come from) of a checkpoint's content."""
    known = weights.rows_of(content)[1]
    if not known:
        raise UserError(f"{source} does not say which of its {rows} rows is which class (no 'class_rows'), and it is "
                        f"no COCO file, which has {rfdetr_config.COCO_HEAD_ROWS}: give a checkpoint of "
                        "train_detector_stage1.py or a published COCO file")
    return known, "class_rows" if content.get("class_rows") else "COCO"


def choose_rows(keep, known, rows, init_missing, source):
    """-> [old row, or None for a new one] for every name of `keep` and, last, the background.

    Args:
        keep: class names; known: {name: row} of the checkpoint; rows: how many its heads have.
    Raises:
        UserError: no names, a name twice, or (without `init_missing`) a name that is not known.
    """
    if not keep or not all(name.strip() for name in keep):
        raise UserError('--keep: name the classes to keep, in the data set\'s spelling: --keep "car" "traffic light"')
    by_plain_name = {plain_name(name): row for name, row in known.items()}
    chosen = [known.get(name, by_plain_name.get(plain_name(name))) for name in keep]
    identities = [plain_name(name) if row is None else row for name, row in zip(keep, chosen, strict=True)]
    twice = [name for i, name in enumerate(keep) if identities[i] in identities[:i]]
    if twice:
        raise UserError(f"--keep names {', '.join(repr(name) for name in twice)} twice (capitals do not count)")
    missing = [name for name, row in zip(keep, chosen, strict=True) if row is None]
    if missing and not init_missing:
        raise UserError(f"{source} does not know {', '.join(repr(name) for name in missing)}. It knows: "
                        f"{', '.join(sorted(known, key=known.get))}. Correct the spelling, or add --init_missing for "
                        "new rows (they must be trained before they are of use)")
    return [*chosen, background_row(known, rows)]


def background_row(known, rows):
    """-> the row for the background: one that no class uses, or None where every row is some class's.

    The last one if it is free (a head of N + 1 rows), else row 0 (COCO's free row), else another free one, best one
    that is no COCO class either: such a row never saw an object.
    """
    free = [row for row in range(rows) if row not in known.values()]
    unused = [row for row in free if row not in rfdetr_config.COCO_ROWS.values()]
    order = [rows - 1, 0] if rows != rfdetr_config.COCO_HEAD_ROWS else [0]
    return next((row for row in [*order, *unused, *free] if row in free), None)


def shrink(state, heads, sources, seed=0):
    """Take rows out of every class head.

    Args:
        state: {name: Tensor}; not changed. heads: of `class_heads`.
        sources: the old row of every new row; None makes a new one: small random weights, the bias of probability
            model.PRIOR.
    Returns:
        state dict with heads of len(sources) rows, the decoder's under "class_embed.0".
    """
    generator = torch.Generator().manual_seed(seed)
    result = dict(state)
    for head in heads:
        weight, bias = result.pop(f"{head}.weight"), result.pop(f"{head}.bias")
        new_weight = torch.randn(len(sources), weight.shape[1], generator=generator).mul(_NEW_STD).to(weight)
        new_bias = torch.full((len(sources),), -math.log((1 - model.PRIOR) / model.PRIOR)).to(bias)
        for new, old in enumerate(sources):
            if old is not None:
                new_weight[new], new_bias[new] = weight[old], bias[old]
        head = "class_embed.0" if head == "class_embed" else head
        result[f"{head}.weight"], result[f"{head}.bias"] = new_weight, new_bias
    return result


def model_args_of(content, state, source):
    """-> {"size", "num_rows", "resolution", "mask_head"} as rfdetr.model.RFDETR takes them.

    Our checkpoints hold them in "args"; of a published file, whose "args" is another program's, they are worked out.
    """
    args = content.get("args")
    if isinstance(args, dict) and "size" in args:
        return dict(args)
    if any(name.startswith("mask_head.") for name in state):
        raise UserError(f"{source} has a mask head but no 'args' that describe it: it is not a file of ours")
    size = weights.size_of(state, source)
    resolution = getattr(args, "resolution", None)
    if not isinstance(resolution, int):
        resolution = rfdetr_config.default_resolution(size)
    official = any(name.startswith("segmentation_head.") for name in state)
    return {"size": size, "resolution": resolution, "mask_head": "official" if official else None}


def require_paths(in_ckpt, out_ckpt):
    """UserError unless the first can be read and the second written without losing anything.

    Returns:
        both as Path, and the content of an earlier file at the second, None where there is none.
    """
    for flag, value in (("--in_ckpt", in_ckpt), ("--out_ckpt", out_ckpt)):
        if not value:
            raise UserError(f"{flag} is missing: shrink_head.py --in_ckpt FILE --out_ckpt FILE --keep NAME [NAME ...]")
    source, target = Path(in_ckpt), Path(out_ckpt)
    if problem := system.absent(source):
        raise UserError(f"--in_ckpt {source.as_posix()} {problem}")
    if target.exists() and target.samefile(source):
        raise UserError(f"--out_ckpt {target.as_posix()} is the input file, which is never overwritten: choose another "
                        "name")
    try:
        return source, target, checkpoint.require_replaceable(target, _ENTRIES, "shrink_head.py")
    except UserError as error:
        raise UserError(f"--out_ckpt {error}") from None


def constants_of(content, folder):
    """-> {name: value} of the run that wrote a checkpoint, by its own constants or by results.json in its folder; {}
    where neither says so."""
    try:
        return dict(content.get("constants") or system.read_json(folder / "results.json")["constants"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # a missing or foreign file: a hint is no reason to fail


def next_command(args, source, target, constants):
    """-> the command line of the next training, with the real paths: stage 2, or the single stage of a head that
    stage 2 does not make. args: of `model_args_of`; constants: of `constants_of`."""
    size = args["size"]
    if size == "tiny":  # only in the demo
        return ""
    data = pasted(Path(constants["DATASET_DIR"])) if constants.get("DATASET_DIR") else "<folder of your data set>"
    rest = f"--dataset_dir {data}{folder_flag('runs_dir', constants.get('RUNS_DIR') or './runs', './runs')}"
    if args.get("mask_head") == "official":
        return (f"\nNext: python train_seg_single_stage.py --size {size} --seg_head official --seg_lr 1e-4 "
                f"--pretrain_weights {pasted(target)} {rest}")
    return (f"\nNext: python train_seg_stage2.py --size {size} --stage1_run {pasted(source.parent)} "
            f"--checkpoint {pasted(target)} {rest}")


def main(**overrides):
    """Shrink; -> the new checkpoint's content."""
    cfg = config.resolve(globals(), overrides)
    processes.require_one("shrink_head.py")
    usable_seed("SEED", cfg.SEED)
    source, target, earlier = require_paths(cfg.IN_CKPT, cfg.OUT_CKPT)
    content, name = weights.content_of(source)
    state = content["model"]
    heads = class_heads(state, name)
    rows = next(iter(heads.values()))
    known, origin = known_rows(content, rows, name)
    sources = choose_rows(cfg.KEEP, known, rows, cfg.INIT_MISSING, name)
    args = model_args_of(content, state, name) | {"num_rows": len(sources)}
    result = {
        "model": shrink(state, heads, sources, cfg.SEED), "args": args, "class_names": list(cfg.KEEP),
        "class_rows": {name: row for row, name in enumerate(cfg.KEEP)},
        "shrunk_from": {"file": name, "rows": rows, "sources": sources},
    }
    weights.write(result, target, earlier)
    table = [{"row": new, "class": label, "source": "new, untrained" if old is None else f"row {old}"}
             for new, (label, old) in enumerate(zip([*cfg.KEEP, "background"], sources, strict=True))]
    processes.say(f"{name}: {rows} rows -> {len(sources)} ({len(cfg.KEEP)} classes + background) in {len(heads)} class "
                  f"heads; names from {origin}")
    processes.say(report.table(table, {"class": "class", "row": "new row", "source": "from"}))
    processes.say(f"written: {target.as_posix()} ({target.stat().st_size / 2**20:.1f} MB, was "
                  f"{source.stat().st_size / 2**20:.1f} MB)"
                  + next_command(args, source, target, constants_of(content, source.parent)))
    return result


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
