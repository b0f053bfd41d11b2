"""What validate_setup.py looks at before a training of RF-DETR: the data set, the weights, a batch that should fit.

Every check takes `found`, a validate_setup.Findings, and tells it what it has seen, and perhaps `cfg`, the constants of
that script. What other trainings need as well is in utils/training/setup_checks.py.
"""

import urllib.request
from pathlib import Path

from utils import system
from utils.config import UserError
from utils.training.setup_checks import look_at

# torch and what needs it are imported inside functions: validate_setup.py has to speak where they are missing

_EFFECTIVE_BATCH = 16  # batch times accumulation, of the published models
# Millions of parameters, and GB that autograd keeps per image in a stage-1 step: float32, the size's own resolution, 13
# groups of queries, counted with saved_tensors_hooks. Mixed precision needs less, temporaries come on top.
COSTS = {"nano": (30.5, 0.47), "small": (32.1, 0.75), "medium": (33.7, 0.96), "base": (32.2, 0.95),
          "large": (135.6, 2.35), "large_2026": (33.9, 1.21), "tiny": (1.7, 0.03),
          "seg_nano": (32.6, 0.41), "seg_small": (32.8, 0.55), "seg_medium": (34.7, 0.88), "seg_large": (34.9, 1.06),
          "seg_xlarge": (37.0, 1.73), "seg_2xlarge": (37.6, 2.27), "seg_preview": (33.2, 0.81)}


# ---- the data set --------------------------------------------------------------------------------------------------

def check_dataset(found, cfg):
    """Structure and annotations of all splits. -> class names, [] where there is no usable training split."""
    from rfdetr.datasets import roboflow
    from utils.datasets.layouts import has_split
    root = Path(cfg.DATASET_DIR)
    try:
        names, notes = roboflow.class_names_of(root)
    except UserError as error:
        found.fail(str(error))
        return []
    for note in notes:
        found.ok(note)
    found.ok(f"{len(names)} classes to train: {system.listed(names, 20)}")
    data = {}
    for split in roboflow.SPLITS:
        if split == "test" and not has_split(root, "test"):
            found.ok(f"{root.as_posix()}: no test/ or other test images, which are optional (--run_test 1 needs them)")
        else:
            data[split] = check_split(found, root, split, names)
    for split in ("valid", "test"):
        if data.get("train") and data.get(split):
            if note := roboflow.note_on_shared_images(data["train"], data[split], split):
                found.warn(note)
    if cfg.REPORT:
        from rfdetr.config import default_resolution
        look_at(found, [(data[split].annotations, split) for split in data if data[split]],
                default_resolution(cfg.SIZE))
    return names


def check_split(found, root, split, names):
    """One split: JSON, classes, boxes, image files, masks. What is wrong with test/ stops no training: warnings.
    -> RoboflowDataset, None where it cannot be read."""
    from rfdetr.datasets import roboflow
    from utils.datasets import image_check

    def bad(text):
        if split == "test":
            found.warn(f"{text} (only --run_test 1 reads test/)")
        else:
            found.fail(text)

    try:
        place, content = roboflow.read_split(root, split)
        data = roboflow.RoboflowDataset(root, split, {name: row for row, name in enumerate(names)}, 384, train=False,
                                        check=False)
    except UserError as error:
        bad(str(error))
        return None
    listed = {c["name"] for c in content["categories"]} & set(names)
    counts = {name: int((data.labels == row).sum()) for row, name in enumerate(names)}
    empty = int((data.ends[1:] == data.ends[:-1]).sum())
    (found.ok if len(data.labels) else bad)(
        f"{split}: {len(data)} images ({empty} without objects), {len(data.labels)} objects: "
        + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for note in data.notes:
        found.warn(note)
    if len(listed) < len(names):
        found.warn(f"{split}: its categories lack {system.listed(sorted(set(names) - listed))} of train")
    elif absent := [name for name, count in counts.items() if not count]:
        found.warn(f"{split}: no object of {system.listed(absent)}: "
                   + ("nothing to learn from" if split == "train" else "no mAP for that"))
    try:
        image_check.check_images([place.folder / name for name in data.files], split,
                                 [(image["width"], image["height"]) for image in content["images"]])
        found.ok(f"{split}: all image files are there and can be read")
    except UserError as error:
        bad(str(error))
    if place.form == "coco":  # in the other forms several splits may share a folder
        names_on_disk = {path.relative_to(place.folder).as_posix() for path in system.images_in(place.folder)}
        if strays := sorted(names_on_disk - {Path(name).as_posix() for name in data.files}):
            found.warn(f"{split}: {len(strays)} image(s) that the annotation file does not list, such as {strays[0]}")
    check_masks(found, bad, split, content)
    return data


def check_masks(found, bad, split, content):
    """How many objects have a mask, and whether all of those can be decoded; bad: of `check_split`."""
    import numpy as np

    from rfdetr.datasets import mask_codes, roboflow
    images = {image["id"]: image for image in content["images"]}
    objects = [note for note in content["annotations"] if not note.get("iscrowd", 0)]
    with_mask, broken, codes, owners = 0, [], [], []
    for note in objects:
        image = images[note["image_id"]]
        try:
            code = mask_codes.mask_code(note.get("segmentation"), image["height"], image["width"])
            with_mask += code is not None
            if code is not None:
                codes.append(code)
                owners.append((image, note["bbox"]))
        except ValueError as error:
            broken.append(f"annotation {note['id']} of {image['file_name']} ({error})")
    if broken:
        bad(f"{split}: {len(broken)} mask(s) cannot be decoded: {system.listed(broken, 3, '; ')}")
    elif objects and not with_mask:
        found.warn(f"{split}: {roboflow.NO_MASKS}: stage 1 works, stage 2 needs masks")
    elif with_mask < len(objects):
        found.warn(f"{split}: {len(objects) - with_mask} of {len(objects)} objects have no mask; stage 2 leaves them "
                   "out")
    elif objects:
        found.ok(f"{split}: all {with_mask} masks can be decoded")
    corners = np.array([[x, y, x + w, y + h] for _, (x, y, w, h) in owners], float).reshape(-1, 4)
    if elsewhere := mask_codes.masks_elsewhere(codes, [image for image, _ in owners], corners):
        found.warn(f"{split}: {elsewhere} {roboflow.ELSEWHERE}")


# ---- weights and batch ---------------------------------------------------------------------------------------------

def check_weights(found, cfg, names=()):
    """The weights that training starts from: a file, which must fit SIZE and the classes, the cache, or the server."""
    if cfg.PRETRAIN_WEIGHTS.lower() == "none":
        found.ok("weights: from scratch (--pretrain_weights none), which takes many more epochs and images")
        return
    from rfdetr import start, weights
    from rfdetr.config import PUBLISHED, default_resolution
    from utils import download
    if cfg.PRETRAIN_WEIGHTS.lower() != "coco":
        try:
            weights.require_source(cfg.PRETRAIN_WEIGHTS, "--pretrain_weights")
            source = weights.read(cfg.PRETRAIN_WEIGHTS)
            start.with_weights(source, cfg.SIZE, names, default_resolution(cfg.SIZE))
            rows, known = weights.rows_of(source)
            found.ok(f"weights: {Path(cfg.PRETRAIN_WEIGHTS).as_posix()} ({rows} class rows"
                     + (f", knows {system.listed(known, 6)})" if known else ")"))
        except UserError as error:
            text = str(error)
            found.fail(text if text.startswith("--") else f"--pretrain_weights: {text}")
        return
    if cfg.SIZE not in PUBLISHED:
        found.fail(f"nobody has published weights of size {cfg.SIZE}: give --pretrain_weights none or a checkpoint")
        return
    published = PUBLISHED[cfg.SIZE]
    cached = system.cache_folder() / published.file
    if cached.is_file():
        if download.md5(cached) == published.md5:
            found.ok(f"weights: {cached.as_posix()}")
        else:
            found.fail(f"weights: {cached.as_posix()} is damaged (its MD5 sum is wrong): delete it; training loads it "
                       "again")
        return
    try:
        request = urllib.request.Request(published.url, method="HEAD")
        with urllib.request.urlopen(request, timeout=cfg.TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length") or 0) / 2**20
        found.ok(f"weights: {published.url} answers; training downloads {f'{size:.0f} MB' if size else 'it'} once")
    except (OSError, ValueError, OverflowError) as error:  # URLError is an OSError; the last: an endless TIMEOUT
        found.fail(f"weights: {published.url} cannot be reached ({getattr(error, 'reason', error)}). Put that file at "
                   f"{cached.as_posix()}, or train with --pretrain_weights none")


def suggest_batch(size, memory):
    """-> {multi-scale or not: batch, a power of two that should fit}, whether one image fits without multi-scale.

    Args:
        memory: GB of the GPU; None: a CPU, where larger batches gain nothing.
    """
    from rfdetr.config import block_size, default_resolution, detector_config
    from rfdetr.datasets.batches import multi_scale_sizes
    parameters, per_image = COSTS[size]
    own, settings = default_resolution(size), detector_config(size, 2)
    largest = max(multi_scale_sizes(own, block_size(size), False, settings.num_queries,
                                    settings.backbone_config.patch_size))
    # weights, gradients, two moments, average; CUDA itself; a tenth stays free
    if memory is None:
        return {False: 2, True: 2}, True
    room = 0.9 * memory - 0.6 - 5 * 4 * parameters / 1000
    batches = {}
    for multi_scale, side in ((False, own), (True, largest)):
        fits = room / (per_image * (side / own) ** 2)
        batches[multi_scale] = next(batch for batch in (16, 8, 4, 2, 1) if batch <= fits or batch == 1)
    return batches, room >= per_image


def check_batch(found, cfg, memory):
    """-> (batch, accumulation) for the command at the end."""
    batches, fits = suggest_batch(cfg.SIZE, memory)
    accumulation = _EFFECTIVE_BATCH // batches[False]
    text = (f"suggested for {cfg.SIZE} on {f'{memory:.0f} GB' if memory else 'the CPU'}: --batch {batches[False]} "
            f"--accum {accumulation}; with --multi_scale 1 --batch {batches[True]} --accum "
            f"{_EFFECTIVE_BATCH // batches[True]} (an estimate: out of memory? halve batch, double accum)")
    if fits:
        found.ok(text)
    else:
        found.warn(f"{text}; even one image may not fit: try a smaller size")
    return batches[False], accumulation
