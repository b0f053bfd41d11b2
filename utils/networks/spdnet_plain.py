"""SPDNet in the published order of operations: NCHW, one operation after the other, wavelets as strided convolutions.

It reads an SPDNet's module tree and shares its parameters. utils/networks/spdnet.py computes the same faster, equal to
float32 rounding. Rounding, however, switches a few dozen of the network's 20 million ReLUs, and each of them moves the
input's gradient nearby by up to 0.05 standard deviations; only the published order reproduces that gradient. So SPDNet
uses this one where a gradient with respect to the image is asked for (analyses), and the fast one for training,
inference and everything else. It is also the base line of benchmarks/spdnet.py and the oracle of tests/test_spdnet.py.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class PlainSPDNet:
    """SPDNet's forward as plain NCHW PyTorch on the parameters of an `SPDNet`."""

    def __init__(self, net):
        self.net = net
        self.pad = nn.ReflectionPad2d(1)
        self.relu = nn.ReLU()

    def __call__(self, x):
        """x (B, 3, H, W) in [0, 255] -> (out3, out2, out1)."""
        n = self.net
        x_init = self.convd(n.conv_init2, self.convd(n.conv_init1, x))
        x1 = self.stage(n.sub1, x_init, self.extra(n.res_extra1, x))
        out1 = n.output1(x1)
        x2 = self.stage(n.sub2, self.convd(n.ag1, torch.cat([x1, x_init], 1)), self.extra(n.res_extra2, out1))
        out2 = n.output2(self.convd(n.ag2_en, torch.cat([x2, x1], 1)))
        x3 = self.stage(n.sub3, self.convd(n.ag2, torch.cat([x2, x1, x_init], 1)), self.extra(n.res_extra3, out2))
        out3 = n.output3(self.convd(n.ag_en, torch.cat([x3, x2, x1], 1)))
        return out3, out2, out1

    @staticmethod
    def conv(module, x):  # not by calling the module, whose gradient is our own on some CPUs (see conv3x3.py)
        return F.conv2d(x, module.weight, module.bias, padding=module.padding)

    def convd(self, module, x):
        return self.relu(module.conv(self.pad(x)))

    def block(self, rb, x):
        y = self.relu(self.conv(rb.module_body[0], x))
        y = self.relu(self.conv(rb.module_body[2], y))
        b, c, _, _ = y.shape
        weights = F.adaptive_avg_pool2d(y, 1).view(b, c)
        weights = torch.sigmoid(rb.se.fc[2](self.relu(rb.se.fc[0](weights)))).view(b, c, 1, 1)
        return y * weights.expand_as(y) + x

    def group(self, rir, x):
        y = x
        for rb in list(rir.module_body)[:-1]:
            y = self.block(rb, y)
        return self.relu(self.conv(rir.module_body[-1], y) + x)

    def extra(self, branch, image):
        residue = torch.max(image, 1, keepdim=True)[0] - torch.min(image, 1, keepdim=True)[0]
        features = self.convd(branch.conv_init1, torch.cat([residue, residue, residue], 1))
        return self.group(branch.extra, self.convd(branch.conv_init2, features))

    def gate(self, gamma, feature, attention):
        gated = feature * attention
        maps = gamma(torch.cat([feature, gated], 1))
        return feature * maps[:, 0:1] + gated * maps[:, 1:2]

    def dwt(self, filters, x):
        c = x.shape[1]
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        row = torch.cat([filters.h0_row, filters.h1_row] * c, 0)
        x = F.conv2d(x, row, stride=(1, 2), groups=c)
        column = torch.cat([filters.h0_col, filters.h1_col] * (2 * c), 0)
        y = F.conv2d(x, column, stride=(2, 1), groups=2 * c)
        y = y.reshape(y.shape[0], c, 4, *y.shape[2:])
        return torch.cat([y[:, :, 1], y[:, :, 2], y[:, :, 3], y[:, :, 0]], 1)

    def idwt(self, filters, y):
        b, c4, h, w = y.shape
        c = c4 // 4
        ll, lh, hl, hh = y.reshape(b, c, 4, h, w).unbind(2)
        g0, g1 = filters.g0_col.repeat(c, 1, 1, 1), filters.g1_col.repeat(c, 1, 1, 1)
        low = F.conv_transpose2d(ll, g0, stride=(2, 1), groups=c) + F.conv_transpose2d(lh, g1, stride=(2, 1), groups=c)
        high = F.conv_transpose2d(hl, g0, stride=(2, 1), groups=c) + F.conv_transpose2d(hh, g1, stride=(2, 1), groups=c)
        g0, g1 = filters.g0_row.repeat(c, 1, 1, 1), filters.g1_row.repeat(c, 1, 1, 1)
        return (F.conv_transpose2d(low, g0, stride=(1, 2), groups=c)
                + F.conv_transpose2d(high, g1, stride=(1, 2), groups=c))

    def fuse(self, module, x, y):
        x = self.relu(module.up.conv2d(self.pad(x)))
        x = F.interpolate(x, size=y.shape[2:], mode="nearest")
        return self.relu(self.block(module.rb, x + y))

    def stage(self, sub, x, prior):
        attention = torch.sigmoid(self.conv(sub.prior.query_conv, x) * self.conv(sub.prior.key_conv, prior))
        x, prior = self.gate(sub.prior.gamma1, x, attention), self.gate(sub.prior.gamma2, prior, attention)
        level1 = self.convd(sub.fuse_res, torch.cat([x, prior], 1))
        level2 = self.convd(sub.DWT_2, self.dwt(sub.DWT, level1))
        level3 = self.convd(sub.DWT_3, self.dwt(sub.DWT, level2))
        for k in "123":
            level1 = self.group(getattr(sub, "branch1_" + k), level1)
            level2 = self.group(getattr(sub, "branch2_" + k), level2)
            level3 = self.group(getattr(sub, "branch3_" + k), level3)
        level2 = self.fuse(sub.fuse23, self.idwt(sub.IDWT, self.convd(sub.IDWT_3, level3)), level2)
        return self.fuse(sub.fuse12, self.idwt(sub.IDWT, self.convd(sub.IDWT_2, level2)), level1)
