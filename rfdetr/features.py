"""What the frozen detector says about every training image, computed once and kept on disk.

In stage 2 the detector never changes, so its features of an image and of its mirror image are the same in every epoch.
An entry holds, in half precision, the projector's map and the queries that are matched with the image's objects, and,
as they are, the stretched image and the objects' masks. An epoch then costs only the mask head.
Validations need all queries, and are kept in memory: `Remembered`.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from rfdetr import criterion
from rfdetr.datasets.batches import Collate
from utils import checkpoint, datasets, freeze, processes, system
from utils.config import UserError
from utils.datasets import loaders
from utils.datasets.annotations import read_annotations
from utils.images import to_bytes, to_floats

VERSION = 1  # raise it when the same key would hold something else
REMEMBERED_BYTES = 2**30  # limit of `Remembered`: 1,180 validation images of nano at 384


class CachedDataset(torch.utils.data.Dataset):
    """Cached entries of a RoboflowDataset; whatever is missing is computed when this is opened.

    Sample: {"image": (3, S, S) uint8, "boxes": (n, 4), "labels": (n,), "masks": (n, S, S) bool, "features": (D, h, w)
    float16, "queries": (n, D) float16, "query_boxes": (n, 4), "image_id", "size", "domain", "path"}; objects and
    queries in the same order.
    Keys are index or (epoch, index); every second time, by chance of (seed, epoch, index), it is the mirror image.

    Args:
        folder: of all caches; this one lives in a folder of its own, named after the detector's weights, the
            resolution and the annotations, so that a change of any of them starts a new cache.
        model: RFDETR with a frozen detector; data: RoboflowDataset without augmentation, with masks.
        resolution: side of the square input.
    Raises:
        UserError: no room on the disk.
    """

    def __init__(self, folder, model, data, resolution, batch_size, workers):
        self.data, self.seed = data, data.seed
        identity = hashlib.blake2b(digest_size=10)
        for part in (str(VERSION), freeze.fingerprint(model.detector), str(resolution)):
            identity.update(part.encode())
        identity.update(json.dumps(read_annotations(data.annotations)).encode())
        self.folder = Path(folder) / identity.hexdigest()
        digests = [hashlib.blake2b((Path(data.folder) / name).read_bytes(), digest_size=8).hexdigest()
                   for name in data.files]
        self.names = [f"{image_id}_{digest}" for image_id, digest in zip(data.image_ids, digests, strict=True)]
        missing = [i for i in range(len(data)) if not all(self.file(i, mirror).is_file() for mirror in (False, True))]
        processes.accelerator().wait_for_everyone()  # no rank writes while another still looks
        if missing:
            self._fill(model, missing, resolution, batch_size, workers)
        processes.accelerator().wait_for_everyone()

    def image_paths(self):
        """-> paths of all image files that samples come from."""
        return self.data.image_paths()

    def file(self, index, mirror):
        return self.folder / f"{self.names[index]}{'_mirror' if mirror else ''}.safetensors"

    def _fill(self, model, missing, resolution, batch_size, workers):
        settings = model.detector.config
        side = resolution // settings.backbone_config.patch_size * (2 if settings.num_feature_levels == 2 else 1)
        objects = len(self.data.labels) / len(self.data) * (resolution * -(-resolution // 8) + 2 * settings.d_model)
        entry = 3 * resolution**2 + 2 * settings.d_model * side**2 + objects  # image, map, masks and queries: bytes
        checkpoint.require_writable(self.folder, megabytes=2.2 * len(missing) * entry / 2**20 + 50)
        processes.say(f"computing the detector's features of {len(missing)} images once, into "
                      f"{self.folder.as_posix()} (about {2 * len(missing) * entry / 2**20:.0f} MB)")
        loader = loaders.validation_loader(torch.utils.data.Subset(self.data, missing), batch_size, workers,
                                           collate=Collate(resolution))
        model.to(processes.device()).eval()
        accelerator = processes.accelerator()
        mine = iter(missing[accelerator.process_index::accelerator.num_processes])  # the loader's own share and order
        for batch in processes.progress(loader, "features"):
            batch = datasets.to_device(batch, processes.device())
            indices = [next(mine) for _ in batch["images"]]
            for mirror in (False, True):
                if mirror:
                    batch = batch | {"images": batch["images"].flip(-1),
                                     "labels": [_mirrored(label) for label in batch["labels"]]}
                self._write(model, batch, indices, mirror)

    @torch.no_grad()
    def _write(self, model, batch, indices, mirror):
        outputs = model(batch["images"])
        matched = criterion.match(outputs["logits"], outputs["boxes"], batch["labels"])
        for i, (index, (query, target)) in enumerate(zip(indices, matched, strict=True)):
            label = batch["labels"][i]
            query, target = query.to(outputs["queries"].device), target.to(label["masks"].device)
            entry = {
                "image": to_bytes(batch["images"][i]), "features": outputs["features"][i].half(),
                "queries": outputs["queries"][i, query].half(), "query_boxes": outputs["boxes"][i, query],
                "boxes": label["boxes"][target], "labels": label["class_labels"][target],
                "masks": _packed(label["masks"][target]), "size": torch.tensor(batch["sizes"][i])}
            save_tensors({name: value.cpu().contiguous() for name, value in entry.items()}, self.file(index, mirror))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        epoch, index = datasets.epoch_and_index(key)
        with datasets.sample_randomness(self.seed, epoch, index):
            mirror = bool(torch.rand(()) < 0.5)
        path = self.file(index, mirror)
        try:
            entry = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot read the cached features {path.as_posix()}: {error}. Delete that file; the next "
                            "start computes it again.") from error
        side = entry["image"].shape[-1]
        return entry | {"masks": _unpacked(entry["masks"], side), "size": tuple(entry["size"].tolist()),
                        "image_id": self.data.image_ids[index], "domain": "clean",
                        "path": (Path(self.data.folder) / self.data.files[index]).as_posix()}


class Remembered:
    """A model in eval mode whose detector never changes: what that says about a batch of images is computed once.

    Called with images it answers as the model does, to the last bit; a batch is known again by its pixels. What is
    beyond the limit is computed every time.

    Args:
        model: RFDETR with a frozen detector and a mask head; limit: bytes that may be kept.
    """

    def __init__(self, model, limit=REMEMBERED_BYTES):
        self.model, self.room, self.kept, self.full = model, limit, {}, False

    @property
    def mask_head(self):
        return self.model.mask_head

    def see(self, loader):
        """Compute it for the images of a validation loader, as many as may be kept, before the first validation."""
        self.model.to(processes.device()).eval()
        for _ in loaders.each(lambda batch: self(to_floats(batch["images"], processes.device())), loader,
                              "validation features"):
            if self.full:
                break

    def __call__(self, images):
        """images (B, 3, S, S) float RGB in [0, 1] -> "logits", "boxes", "queries", "features" and the embeddings of
        rfdetr.model.RFDETR.forward."""
        key = tuple(images.shape), hashlib.blake2b(images.cpu().contiguous().numpy(), digest_size=16).digest()
        if key in self.kept:
            known = {name: value.to(images.device) for name, value in self.kept[key].items()}
            return known | self.model(images, cached=known)
        outputs = self.model(images)
        known = {name: outputs[name].cpu() for name in ("logits", "boxes", "queries", "features")}
        size = sum(value.nbytes for value in known.values())
        if size <= self.room:
            self.kept[key] = known
            self.room -= size
        else:
            self.full = True
        return outputs


def collate(samples):
    """-> batch as of utils.datasets.collate; labels carry "masks", "features" and "queries" as well."""
    batch = datasets.collate(samples)
    for label, sample in zip(batch["labels"], samples, strict=True):
        label.update({name: sample[name] for name in ("masks", "features", "queries", "query_boxes")})
    return batch


def stacked(labels):
    """Labels of `collate` -> what RFDETR.forward takes as `cached`, float32; images with fewer objects than others get
    zeros as queries and boxes at the end."""
    def padded(name):
        return torch.nn.utils.rnn.pad_sequence([label[name] for label in labels], batch_first=True).float()
    return {"features": torch.stack([label["features"] for label in labels]).float(), "queries": padded("queries"),
            "boxes": padded("query_boxes")}


def save_tensors(tensors, path):
    """Write {name: Tensor} to a safetensors file that appears whole or not at all."""
    try:
        with system.written(path) as temporary:
            safetensors.torch.save_file(tensors, temporary)
            system.give_usual_rights(temporary)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {path.as_posix()}: {error}. Free disk space, give --cache_dir another folder, "
                        "or leave --cache_features out.") from error


def _mirrored(label):
    boxes = label["boxes"].clone()
    boxes[:, 0] = 1 - boxes[:, 0]
    return label | {"boxes": boxes, "masks": label["masks"].flip(-1)}


def _packed(masks):
    """(n, S, S) bool -> (n, S, ceil(S / 8)) uint8 on the CPU, eight pixels a byte."""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=-1, bitorder="little"))


def _unpacked(packed, width):
    """The inverse of `_packed`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=width, bitorder="little").view(bool))
