"""utils/networks/conv3x3.py: the own weight gradient against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from utils.networks import conv3x3
from utils.networks.spdnet import SPDNet


@pytest.fixture
def own_gradient(monkeypatch):
    """Every map takes the own weight gradient, on any CPU."""
    monkeypatch.setattr(conv3x3, "slow_weight_gradient", lambda: True)
    monkeypatch.setattr(conv3x3, "MIN_VALUES", 1)


def gradients(convolution, x, weight, bias):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    output = convolution(*leaves)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view_as(output))
    return output.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_output_and_gradients_are_those_of_conv2d(own_gradient, padding, channels_last):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, 9, 13).double(), torch.randn(5, 8, 3, 3).double(), torch.randn(5).double()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    ours = gradients(lambda x, w, b: conv3x3.conv3x3(x, w, b, padding), x, weight, bias)
    theirs = gradients(lambda x, w, b: F.conv2d(x, w, b, padding=padding), x, weight, bias)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


def test_own_gradient_is_used_only_where_it_helps(own_gradient, monkeypatch):
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3, requires_grad=True)

    def is_own():
        return type(conv3x3.conv3x3(x, weight).grad_fn).__name__ == "_Conv3x3Backward"

    assert is_own()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_own()
    monkeypatch.setattr(conv3x3, "MIN_VALUES", x.numel() + 1)
    assert not is_own()
    monkeypatch.setattr(conv3x3, "MIN_VALUES", 1)
    monkeypatch.setattr(conv3x3, "slow_weight_gradient", lambda: False)
    assert not is_own()


def test_spdnet_trains_alike_with_both(own_gradient, monkeypatch):
    def parameter_gradients():
        torch.manual_seed(0)
        model = SPDNet(8, 1).double()
        model(torch.rand(2, 3, 20, 24, dtype=torch.float64) * 255)[0].mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    own = parameter_gradients()
    monkeypatch.setattr(conv3x3, "slow_weight_gradient", lambda: False)
    for name, expected in parameter_gradients().items():
        torch.testing.assert_close(own[name], expected, msg=name)
