"""An initialisation of SPDNet near the identity, for training from scratch."""

import torch
import torch.nn as nn

from utils.networks.spdnet import SPDNet


@torch.no_grad()
def init_near_identity(model: SPDNet, scale: float = 1 / 64, quiet: float = 0.003) -> SPDNet:
    """Weights for training from scratch: at the start every stage's image is nearly the input. Returns `model`.

    SPDNet has no skip from input to output, so from the default initialisation it first spends thousands of steps on
    learning to copy the image. Here the first three channels of every full-resolution map carry the RGB values times
    `scale` (convolutions with a single tap), and whatever else is added to these three is damped by `quiet`: small,
    not zero, so that gradients pass from the first step. All other channels keep the default initialisation and are
    free to learn features. `scale` brings 0..255 to about 0..4 inside: the prior attention multiplies features with
    features, and at 255 a step of Adam would change its weight maps by tens.

    Train it with a learning rate of about 1e-4 and a warm-up of 100 steps. Adam's first steps move all weights alike,
    and through some 25 layers that multiplies the image: without warm-up, or at 5e-4, the copy is lost at first.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            module.reset_parameters()

    def damp(conv: nn.Conv2d, outputs: slice = slice(0, 3)) -> None:
        weight = conv.weight.transpose(0, 1) if isinstance(conv, nn.ConvTranspose2d) else conv.weight
        weight[outputs] *= quiet
        conv.bias[outputs] = 0

    def carry(conv: nn.Conv2d, gain: float = 1.0) -> None:
        damp(conv)
        for channel in range(3):
            conv.weight[channel, channel, 1, 1] = gain

    model.conv_init1.conv.weight *= scale   # the features beside the carriers live on the same scale
    carry(model.conv_init1.conv, scale)
    for convd in (model.conv_init2, model.ag1, model.ag2, model.ag2_en, model.ag_en):
        carry(convd.conv)                   # of a concatenation, the first map's carriers: the latest stage's
    for output in (model.output1, model.output2, model.output3):
        carry(output, 1 / scale)
    for branch in (model.res_extra1, model.res_extra2, model.res_extra3):
        branch.conv_init1.conv.weight *= scale
    for sub in (model.sub1, model.sub2, model.sub3):
        for gamma in (sub.prior.gamma1, sub.prior.gamma2):
            damp(gamma, slice(0, 2))
            gamma.bias[0] = 1               # weight maps (1, 0): the feature passes, the gated one waits
        carry(sub.fuse_res.conv)
        damp(sub.fuse12.up.conv2d)
        damp(sub.fuse12.rb.module_body[2])
        for group in (sub.branch1_1, sub.branch1_2, sub.branch1_3):
            *blocks, last = group.module_body
            damp(last)
            for block in blocks:
                damp(block.module_body[2])
    return model
