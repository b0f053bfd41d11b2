"""SPDNet's speed and memory: the fast order of operations against the plain definition with the same weights.

    python -m benchmarks.spdnet

All variants run in turn in one process and their medians are compared, so that the ratios survive a noisy machine.
"forward, inference" is taken before any backward pass: a process that never trains gives memory back to the system and
fetches it again, which is part of what a version costs there.
"plain" is SPDNet.restore (utils/networks/spdnet.py), in the published code's order of operations; "fast" is what
SPDNet's forward does in training and inference (utils/networks/spdnet_fast.py).
"""

import copy
import functools
import statistics
import time

import torch
import torch.nn.functional as F

from utils import config, processes
from utils.networks import conv3x3
from utils.networks.spdnet import SPDNet
from utils.networks.spdnet_init import init_near_identity

IMAGE_SIZE = 256                        # height and width of the image
ROUNDS = 5                              # measurements per variant
COMPILE = False                         # also torch.compile, which takes minutes

# --- measuring ----------------------------------------------------------------------------------------------------


def forward(model, x):
    with torch.no_grad():
        return model(x)


def forward_backward(model, x):
    """-> gradients of the parameters, in one vector. The image needs none, as in training."""
    net = getattr(model, "net", model)
    net.zero_grad(set_to_none=True)
    sum(output.float().square().mean() for output in model(x)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])


def without_own_gradient(model, x):
    """With PyTorch's weight gradient where utils/networks/conv3x3.py has its own; the forward pass decides which."""
    own, conv3x3.slow_weight_gradient = conv3x3.slow_weight_gradient, lambda: False
    try:
        return model(x)
    finally:
        conv3x3.slow_weight_gradient = own


def in_bfloat16(model, x):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return model(x)


def by_way_of(call, net):
    """-> a variant of `net` for forward and forward_backward that is run as call(net, x)."""
    variant = functools.partial(call, net)
    variant.net = net
    return variant


def saved_bytes(model, x):
    """Bytes of the distinct tensors that one forward pass keeps for its backward pass, parameters not counted."""
    own, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def note(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is given twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
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


def report_times(title, variants, step, x, rounds):
    seconds = medians(variants, step, x, rounds)
    for name, value in seconds.items():
        print(f"  {title:20}  {name:28} {value * 1e3:8.0f} ms  {seconds['plain'] / value:5.2f} x plain", flush=True)


def psnr(a, b):
    return (10 * torch.log10(255 ** 2 / (a.float() - b.float()).square().mean())).item()


def report_bfloat16(net, x, weights):
    """How far bfloat16 autocast's images and gradient are from float32's."""
    exact, gradient = forward(net, x), forward_backward(net, x)
    low = by_way_of(in_bfloat16, net)
    rounded, low_gradient = forward(low, x), forward_backward(low, x)
    print(f"  {weights} weights: out3, out2, out1 at "
          + ", ".join(f"{psnr(a, b):.1f}" for a, b in zip(rounded, exact, strict=True))
          + " dB of float32's, parameter gradient cosine "
          + f"{F.cosine_similarity(gradient, low_gradient, dim=0).item():.4f}")


def benchmark(size, rounds, compiled, device):
    torch.manual_seed(0)
    net = init_near_identity(SPDNet()).to(device)
    x = F.interpolate(torch.rand(1, 3, size // 8, size // 8), (size, size), mode="bicubic").clamp(0, 1).to(device) * 255
    plain = by_way_of(SPDNet.restore, net)
    nhwc = by_way_of(SPDNet.restore, copy.deepcopy(net).to(memory_format=torch.channels_last))
    variants = {"plain": plain, "plain, channels_last weights": nhwc, "fast": net}
    has_bfloat16 = not processes.bf16_is_emulated(x.device)
    if has_bfloat16:
        variants["fast, bfloat16"] = by_way_of(in_bfloat16, net)
    if device == "cpu" and conv3x3.slow_weight_gradient():
        variants["fast, PyTorch's gradient"] = by_way_of(without_own_gradient, net)
    if compiled:
        start = time.perf_counter()
        whole = torch.compile(net)
        forward(whole, x)
        print(f"torch.compile, forward: {time.perf_counter() - start:.0f} s to compile")
        fast, exact = forward(whole, x)[0], forward(net, x)[0]
        print(f"  relative difference of out3 to eager: {((fast - exact).norm() / exact.norm()).item():.1e}")
        variants["fast, compiled"] = whole

    print(f"{device}, {torch.get_num_threads()} threads, batch 1, {size} x {size}, n_feats 32, n_resblocks 3, "
          f"median of {rounds}")
    report_times("forward, inference", variants, forward, x, rounds)
    if compiled:
        start = time.perf_counter()
        forward_backward(whole, x)
        print(f"torch.compile, forward + backward: {time.perf_counter() - start:.0f} s to compile")
    for model in variants.values():  # until the allocator keeps its memory: fresh pages cost more than the arithmetic
        for _ in range(2):
            forward_backward(model, x)
    report_times("forward, in training", variants, forward, x, rounds)
    report_times("forward + backward", variants, forward_backward, x, rounds)

    print("memory kept for the backward pass")
    sizes = {"fast": saved_bytes(net, x)}
    net.activation_checkpointing = True
    sizes["fast, activation_checkpointing"] = saved_bytes(net, x)
    seconds = medians({"recomputing": net}, forward_backward, x, rounds)["recomputing"]
    net.activation_checkpointing = False
    for name, value in sizes.items():
        print(f"  {name:30} {value / 2**20:8.0f} MiB   {value / sizes['fast']:5.2f} x fast")
    print(f"  forward + backward with it: {seconds * 1e3:.0f} ms")

    if not has_bfloat16:
        print("no bfloat16: this CPU has no instructions for it")
        return
    print("bfloat16 autocast")
    report_bfloat16(net, x, "near-identity")
    for parameter in net.parameters():  # stands for training: every weight a little off its start
        parameter.data.add_(torch.randn_like(parameter), alpha=2e-3)
    report_bfloat16(net, x, "disturbed")


def main(**overrides):
    cfg = config.resolve(globals(), overrides)
    benchmark(cfg.IMAGE_SIZE, cfg.ROUNDS, cfg.COMPILE, "cpu")
    if torch.cuda.is_available():
        for size in (cfg.IMAGE_SIZE, 640):
            benchmark(size, cfg.ROUNDS, cfg.COMPILE, "cuda")


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
