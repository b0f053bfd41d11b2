"""Data sets; scripts use the names below as `datasets.NAME`.

Units: images leave a data set as uint8 (a quarter of the traffic between processes) and become float RGB in [0, 1] in
`to_device`; boxes leave as normalised (cx, cy, w, h). A sample is a function of (seed, epoch, index) alone.
"""

from utils.datasets.coco import (
    CocoDetectionDataset,
    Mixture,
    clean_rainy_mixture,
    clean_rainy_validation,
    require_clean_and_rainy,
    require_no_rain,
    say_notes,
)
from utils.datasets.image_pairs import PairedRainDataset, is_unlabelled, unlabelled_pairs, without_annotations
from utils.datasets.samples import (
    collate,
    collate_with_digests,
    epoch_and_index,
    images_by_name,
    read_image,
    sample_randomness,
    seeded_subset,
    to_device,
)

__all__ = [
    "CocoDetectionDataset",
    "Mixture",
    "PairedRainDataset",
    "clean_rainy_mixture",
    "clean_rainy_validation",
    "collate",
    "collate_with_digests",
    "epoch_and_index",
    "images_by_name",
    "is_unlabelled",
    "read_image",
    "require_clean_and_rainy",
    "require_no_rain",
    "sample_randomness",
    "say_notes",
    "seeded_subset",
    "to_device",
    "unlabelled_pairs",
    "without_annotations",
]
