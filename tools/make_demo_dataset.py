"""Draw a data set to try the RF-DETR commands with: street scenes with boxes and masks in Roboflow's layout.

    python -m tools.make_demo_dataset
    python -m tools.make_demo_dataset --out ./elsewhere

The scenes are those of every script's --demo (160 x 160, five classes of COCO); OUT gets train/ (1200 images), valid/
(150) and test/ (50).
"""


from utils import config
from utils.demo.roboflow import ensure_dataset
from utils.next_command import pasted

OUT = "./dataset"        # where train_detector_stage1.py and the others look by default
DEMO_ROOT = "./demo"     # where the scenes are, or will be drawn


def main(**overrides):
    """Make the data set; -> its path."""
    cfg = config.resolve(globals(), overrides)
    out = ensure_dataset(cfg.OUT, cfg.DEMO_ROOT)
    print(f"{out.as_posix()}: train, valid and test. Next: python validate_setup.py"
          + ("" if cfg.OUT == OUT else f" --dataset_dir {pasted(out)}"))
    return out


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
