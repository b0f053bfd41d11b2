"""The card of a trained detector: README.md in Hugging Face's format beside its weights, so that who finds the folder
knows what it is, what it was trained on, how good it was and how to load it.

Only numbers that the training itself has measured stand in it. No licence is given: that depends on the data and the
weights it began with, and is for the person who publishes it (`python -m tools.push_to_hub --LICENSE ...`).
"""

import math
import re
from functools import cached_property
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from utils import report, system
from utils.config import writing

NAME = "README.md"
# constants that say nothing about the model: where and how fast the run was made
_OF_THE_RUN = {"OUTPUT_DIR", "RESUME", "CHECKPOINT_STEPS", "EVAL_BATCH_SIZE", "DATALOADER_WORKERS", "NUM_WORKERS",
               "COMPILE", "CUDA_GRAPHS", "FAST"}
_METRIC = re.compile(r"(?:(.+)/)?(mAP|AP50|AP75|AP_small|AP_medium|AP_large)")  # names that mean COCO's scores


_WRAPPER = """
# in a checkout of RainSight; from the hub: folder = huggingface_hub.snapshot_download("user/name")
import torch
from utils import datasets
from utils.boxes import decode
from {module} import {name}
from utils.images import to_floats

folder, side = "path/of/this/folder", 640  # side: IMAGE_SIZE of the training
model = {name}.from_pretrained(folder)
image = datasets.read_image("street.jpg")
pixels = torch.nn.functional.interpolate(to_floats(image)[None], (side, side), mode="bilinear", antialias=True)
with torch.no_grad():
    outputs = model(pixels)
print({more}decode(outputs.logits, outputs.pred_boxes, [tuple(image.shape[-2:])])[0])
"""


def loading(model, more=""):
    """-> Python code that loads one of this project's models around a detector, and detects.

    Args:
        model: its class, with from_pretrained(folder); more: code of what is printed before the detections, with a
            comma and a blank behind it.
    """
    return _WRAPPER.format(module=model.__module__, name=model.__name__, more=more)


class Card:
    """What a script says about the model that it trains.

    Args:
        title: of the card; about: one or two sentences; library: Hugging Face's name of what loads it, "transformers"
            or "rainsight"; base: the model that the training began with, "" for none.
        data: [line of text, ...] on what it learned from; load: Python code that loads it and detects.
        constants: {name: value} of the script.
    """

    def __init__(self, title, about, *, library, base, data, load, constants):
        self.title, self.about, self.library, self.base, self.data = title, about, library, base, data
        self.load, self.constants, self.metrics = load, constants, {}

    def remembering(self, evaluate):
        """-> `evaluate` for engine.fit, whose latest result the card will state."""
        def remembers(model):
            self.metrics = evaluate(model)
            return self.metrics
        return remembers

    @cached_property
    def _commit(self):
        return report.environment()["commit"]

    def text(self):
        """-> the card: front matter and Markdown."""
        measured = {name: value for name, value in self.metrics.items() if isinstance(value, (int, float))
                    and math.isfinite(value) and not (value < 0 and _METRIC.fullmatch(name))}  # -1: no such object
        parts = [f"---\n{self._front_matter(measured)}\n---\n\n# {self.title}\n\n{self.about}\n",
                 "## Data\n\n" + "".join(f"- {line}\n" for line in self.data)]
        rows = [{"metric": name, "value": f"{measured[name]:.4f}" if name in measured else None}
                for name, value in self.metrics.items() if isinstance(value, (int, float))]
        if rows:
            parts.append("## Metrics\n\nOn the validation images, at the epoch that is kept; AP is COCO's, in [0, 1]."
                         "\n\n" + report.markdown(rows, {"metric": "metric", "value": "value"}))
        rows = [{"constant": f"`{name}`", "value": f"`{_shown(value)}`"} for name, value in self.constants.items()
                if name not in _OF_THE_RUN]
        parts += [f"## How to load\n\n```python\n{self.load.strip()}\n```\n",
                  "## Constants of the training\n\n"
                  + report.markdown(rows, {"constant": "constant", "value": "value"}),
                  f"Trained with RainSight, commit {self._commit or 'unknown'}.\n"]
        return "\n".join(parts)

    def _front_matter(self, measured):
        """-> YAML. Only COCO's scores have a meaning that a hub knows; other metrics are in the table alone."""
        results = [EvalResult(task_type="object-detection", dataset_type="coco-layout", metric_type=found[2],
                              dataset_name=f"{found[1] or 'validation'} images", metric_value=round(measured[name], 4))
                   for name in measured if (found := _METRIC.fullmatch(name))]
        base = {"base_model": self.base} if _on_the_hub(self.base) else {}
        known = {"model_name": self.title, "eval_results": results} if results else {}
        data = ModelCardData(library_name=self.library, pipeline_tag="object-detection",
                             tags=["rt-detr", "bad-weather", "rainsight"], **base, **known)
        return data.to_yaml().strip()

    def write(self, path):
        """Write the card: into a folder as NAME, or to a file's path."""
        path = Path(path)
        path = path / NAME if path.is_dir() else path
        with writing(path), system.written(path) as temporary:
            temporary.write_text(self.text(), encoding="utf-8", errors="backslashreplace")


def _on_the_hub(name):
    """-> whether a model's name is a hub id, and no folder."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name))) and not Path(name).exists()


def _shown(value):
    """-> a constant's value; of a path the last part alone: a card is for others, who have other folders."""
    if isinstance(value, str) and not _on_the_hub(value):
        value = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return repr(value).replace("|", "\\|").replace("`", "'")
