"""One detector out of several that were trained from the same start, with other seeds or settings: the mean of their
weights, which costs at inference what one of them does, and often bears other images better than any of them
(Wortsman et al., "Model soups", ICML 2022).

    python -m tools.average_detectors --DETECTORS "('./seed_0/detector', './seed_1/detector')" --OUT ./average

Only detectors that went the same way at first can be averaged: evaluate the result as any other, in rain and on clean
images (Eval_conditional.py --RAINY_DETECTOR_NAME ./average).
"""

from pathlib import Path

from transformers import RTDetrImageProcessor

from utils import checkpoint, config, freeze, report
from utils.networks.rtdetr import id2label_of, interpolated, load_rtdetr, same_shapes, trained_size
from utils.training import model_card

DETECTORS = ("./outputs_rtdetr/detector", "./outputs_rtdetr_1/detector")  # folders written by Training_RTDETR.py
OUT = "./outputs_rtdetr_average"        # folder of the new one


def average(names):
    """-> the mean of several detectors, their weights and buffers.

    Args:
        names: folders or hub ids.
    Raises:
        UserError: fewer than two, one that is another's copy, or other shapes or classes than the first one's.
    """
    if len(names) < 2:
        raise config.UserError(f"DETECTORS = {tuple(names)!r}: give two or more folders to average")
    mean, seen = None, {}
    for number, name in enumerate(names, 1):
        detector = load_rtdetr(str(name), constant="DETECTORS")
        digest = freeze.fingerprint(detector)
        if digest in seen:
            raise config.UserError(f"DETECTORS: '{name}' holds the same weights as '{seen[digest]}': leave one out")
        seen[digest] = name
        if mean is not None and not (same_shapes(mean, detector) and id2label_of(mean) == id2label_of(detector)):
            raise config.UserError(f"DETECTORS: '{name}' has other layers or classes than '{names[0]}': only detectors "
                                   "that were trained from the same one can be averaged")
        mean = detector if mean is None else interpolated(mean, detector, 1 / number)
    return mean


def card_of(cfg, detector):
    """-> model_card.Card; without scores, as nothing is measured here."""
    code = ('from transformers import AutoModelForObjectDetection\n\n'
            'model = AutoModelForObjectDetection.from_pretrained("path/of/this/folder").eval()')
    return model_card.Card(
        f"Mean of {len(cfg.DETECTORS)} detectors", "An object detector whose weights are the mean of others'.",
        library="transformers", base="", constants=cfg.as_dict(), load=code,
        data=[f"the data of {', '.join(map(str, cfg.DETECTORS))}",
              f"classes: {', '.join(id2label_of(detector).values())}"])


def main(**overrides):
    """Write the mean; -> its folder."""
    cfg = config.resolve(globals(), overrides)
    out = Path(cfg.OUT)
    report.require_new("OUT", cfg.OUT)
    detector = average(cfg.DETECTORS)
    sides = {side for name in cfg.DETECTORS if (side := trained_size(name))}
    if len(sides) > 1:
        print(f"note: the detectors were trained at different sizes ({', '.join(map(str, sorted(sides)))}); the new "
              "one says the largest")

    def save(folder):
        detector.save_pretrained(folder)
        card_of(cfg, detector).write(folder)
        if sides:
            size = {"height": max(sides), "width": max(sides)}
            RTDetrImageProcessor(size=size, do_normalize=False).save_pretrained(folder)
    checkpoint.replace_folder(save, out)
    print(f"{out.as_posix()}: the mean of {len(cfg.DETECTORS)} detectors")
    return out


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
