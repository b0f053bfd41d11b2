"""SPDNet's speed and memory: ours against a plain module-by-module NCHW version with the same weights.

Run: PYTHONPATH=. python benchmarks/spdnet.py [--size 256] [--rounds 5] [--compile]
All variants run in turn in one process and their medians are compared, so that the ratios survive a noisy machine.
The plain version reproduces the published code's numbers bit by bit (tests/test_spdnet.py).
"""

import argparse
import copy
import functools
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils.spdnet import SPDNet, init_near_identity

# --- the plain version --------------------------------------------------------------------------------------------
# What one writes first: NCHW, one nn.Module call per operation, wavelets as strided convolutions, torch.cat before
# every convolution of several maps. It reads the same module tree, so it shares its parameters with ours.


class PlainSPDNet:
    """SPDNet's forward and backward as plain NCHW PyTorch on the parameters of an `SPDNet`."""

    def __init__(self, net: SPDNet):
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

    def convd(self, module, x):
        return self.relu(module.conv(self.pad(x)))

    def block(self, rb, x):
        y = self.relu(rb.module_body[0](x))
        y = self.relu(rb.module_body[2](y))
        b, c, _, _ = y.shape
        weights = F.adaptive_avg_pool2d(y, 1).view(b, c)
        weights = torch.sigmoid(rb.se.fc[2](self.relu(rb.se.fc[0](weights)))).view(b, c, 1, 1)
        return y * weights.expand_as(y) + x

    def group(self, rir, x):
        y = x
        for rb in list(rir.module_body)[:-1]:
            y = self.block(rb, y)
        return self.relu(rir.module_body[-1](y) + x)

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
        attention = torch.sigmoid(sub.prior.query_conv(x) * sub.prior.key_conv(prior))
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


# --- measuring ----------------------------------------------------------------------------------------------------


def forward(model, x):
    with torch.no_grad():
        return model(x)


def forward_backward(model, x):
    """Gradients of the parameters and of the image."""
    net = getattr(model, "net", model)
    net.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    sum(output.float().square().mean() for output in model(x)).backward()
    return x.grad


def in_bfloat16(model, x):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return model(x)


def saved_bytes(model, x):
    """Bytes of the distinct tensors that one forward pass keeps for its backward pass, parameters not counted."""
    own, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def note(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is given twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x.clone().requires_grad_())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def medians(variants, step, x, rounds):
    """{name: model} -> {name: median seconds of step(model, x)}, one of each per round, after one round of warm-up."""
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, model in variants.items():
            start = time.perf_counter()
            step(model, x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def psnr(a, b):
    return (10 * torch.log10(255 ** 2 / (a.float() - b.float()).square().mean())).item()


def report_bfloat16(net, x, weights):
    """How far bfloat16 autocast's images and gradient are from float32's."""
    exact, gradient = forward(net, x), forward_backward(net, x).flatten()
    low = functools.partial(in_bfloat16, net)
    low.net = net
    rounded, low_gradient = forward(low, x), forward_backward(low, x).flatten()
    print(f"  {weights} weights: out3, out2, out1 at "
          + ", ".join(f"{psnr(a, b):.1f}" for a, b in zip(rounded, exact, strict=True))
          + f" dB of float32's, input gradient cosine {F.cosine_similarity(gradient, low_gradient, dim=0).item():.4f}")


def benchmark(size, rounds, compiled, device):
    torch.manual_seed(0)
    net = init_near_identity(SPDNet()).to(device)
    x = F.interpolate(torch.rand(1, 3, size // 8, size // 8), (size, size), mode="bicubic").clamp(0, 1).to(device) * 255
    plain = PlainSPDNet(net)
    nhwc = PlainSPDNet(copy.deepcopy(net).to(memory_format=torch.channels_last))
    low = functools.partial(in_bfloat16, net)
    low.net = net
    variants = {"plain": plain, "plain, channels_last weights": nhwc, "ours": net, "ours, bfloat16": low}
    if compiled:
        start = time.perf_counter()
        whole = torch.compile(net)
        forward(whole, x)
        print(f"torch.compile, forward: {time.perf_counter() - start:.0f} s to compile")
        start = time.perf_counter()
        forward_backward(whole, x)
        print(f"torch.compile, forward + backward: {time.perf_counter() - start:.0f} s to compile")
        fast, exact = forward(whole, x)[0], forward(net, x)[0]
        print(f"  relative difference of out3 to eager: {((fast - exact).norm() / exact.norm()).item():.1e}")
        variants["ours, compiled"] = whole

    print(f"{device}, {torch.get_num_threads()} threads, batch 1, {size} x {size}, n_feats 32, n_resblocks 3, "
          f"median of {rounds}")
    for title, step in (("forward", forward), ("forward + backward", forward_backward)):
        seconds = medians(variants, step, x, rounds)
        for name, value in seconds.items():
            print(f"  {title:18}  {name:28} {value * 1e3:8.0f} ms  {seconds['plain'] / value:5.2f} x plain", flush=True)

    print("memory kept for the backward pass")
    sizes = {"ours": saved_bytes(net, x)}
    net.activation_checkpointing = True
    sizes["ours, activation_checkpointing"] = saved_bytes(net, x)
    seconds = medians({"recomputing": net}, forward_backward, x, rounds)["recomputing"]
    net.activation_checkpointing = False
    for name, value in sizes.items():
        print(f"  {name:30} {value / 2**20:8.0f} MiB   {value / sizes['ours']:5.2f} x ours")
    print(f"  forward + backward with it: {seconds * 1e3:.0f} ms")

    print("bfloat16 autocast")
    report_bfloat16(net, x, "near-identity")
    for parameter in net.parameters():  # stands for training: every weight a little off its start
        parameter.data.add_(torch.randn_like(parameter), alpha=2e-3)
    report_bfloat16(net, x, "disturbed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="height and width of the image")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per variant")
    parser.add_argument("--compile", action="store_true", help="also torch.compile (minutes)")
    options = parser.parse_args()
    benchmark(options.size, options.rounds, options.compile, "cpu")
    if torch.cuda.is_available():
        for size in (options.size, 640):
            benchmark(size, options.rounds, options.compile, "cuda")


if __name__ == "__main__":
    main()
