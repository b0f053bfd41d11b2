"""FAST: what is allowed, and that it changes neither what a network computes nor its files."""

import copy

import pytest
import torch
from torch import nn

from utils import fast
from utils.config import UserError


@pytest.mark.parametrize("value", ["tf32", ("turbo",), ("compile",), {"tf32": 1}, None])
def test_what_training_does_not_know_is_refused(value):
    with pytest.raises(UserError, match="FAST = .*tf32, channels_last"):
        fast.require("FAST", value, fast.TRAINING)


def test_a_network_computes_the_same_and_keeps_its_names(capsys):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3)).eval()
    images = torch.rand(2, 3, 9, 11)
    quick, precision = copy.deepcopy(plain), torch.get_float32_matmul_precision()
    fast.switch_on(tuple(fast.TRAINING), torch.device("cpu"), quick)
    assert quick[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(quick(images), plain(images), rtol=1e-5, atol=1e-6)
    assert "tf32 without effect" in capsys.readouterr().out and torch.get_float32_matmul_precision() == precision
    fast.switch_on(("compile",), torch.device("cpu"), quick)
    assert type(quick) is nn.Sequential and quick.state_dict().keys() == plain.state_dict().keys()
    fast.switch_on((), torch.device("cpu"), plain)
    assert not capsys.readouterr().out
