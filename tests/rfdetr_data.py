"""A small data set in Roboflow's layout, with polygons, RLE, a crowd, an image without objects and a dummy parent."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as rle

CLASSES = ("cells", "blood_vessel", "glomerulus")


def write_dataset(root, counts=None, masks=True, size=(96, 80), seed=0):
    """Squares of three colours on noise; every fourth image is empty. counts: {split: number of images}."""
    rng = np.random.default_rng(seed)
    for split, count in (counts or {"train": 8, "valid": 4, "test": 2}).items():
        folder = root / split
        folder.mkdir(parents=True)
        images, notes = [], []
        for i in range(1, count + 1):
            pixels = rng.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
            for k in range(i % 4):
                x, y, side = (int(rng.integers(low, high)) for low, high in ((2, 60), (2, 45), (14, 30)))
                pixels[y:y + side, x:x + side] = (200, 60 * k, 20)
                filled = np.zeros((size[1], size[0]), np.uint8)
                filled[y:y + side, x:x + side] = 1
                code = rle.encode(np.asfortranarray(filled))
                shape = ([[x, y, x + side, y, x + side, y + side, x, y + side]] if k % 2 else
                         {"size": [size[1], size[0]], "counts": code["counts"].decode()})
                notes.append({"id": len(notes) + 1, "image_id": i, "category_id": k + 1, "area": float(side * side),
                              "bbox": [x, y, side, side], "iscrowd": 0, "segmentation": shape if masks else []})
            if i == 1:
                notes.append({"id": len(notes) + 1, "image_id": i, "category_id": 1, "area": 100.0, "iscrowd": 1,
                              "bbox": [0, 0, 10, 10], "segmentation": {"size": [size[1], size[0]],
                                                                       "counts": [0, 10, size[0] * size[1] - 10]}})
            Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", quality=95)
            images.append({"id": i, "file_name": f"{i:03d}.jpg", "width": size[0], "height": size[1]})
        categories = [{"id": 0, "name": "tissue", "supercategory": "none"}]
        categories += [{"id": i, "name": name, "supercategory": "tissue"} for i, name in enumerate(CLASSES, 1)]
        (folder / "_annotations.coco.json").write_text(
            json.dumps({"images": images, "annotations": notes, "categories": categories}), encoding="utf-8")
    return root
