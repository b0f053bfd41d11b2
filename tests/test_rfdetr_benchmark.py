"""benchmarks/rfdetr.py: its rows run, on the demo's tiny size, and train what they claim to train."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import rfdetr as benchmark


@pytest.mark.parametrize(("row", "trained"), [(benchmark.stage1_row, "class_embed.0.weight"),
                                              (benchmark.stage2_row, "mask_head.")])
def test_a_training_row_is_measured_and_changes_the_weights(row, trained, monkeypatch):
    torch.manual_seed(0)
    built, make = [], benchmark.RFDETR

    def remembered(*args, **kwargs):
        model = make(*args, **kwargs)
        built.append((model, {name: value.clone() for name, value in model.state_dict().items()}))
        return model
    monkeypatch.setattr(benchmark, "RFDETR", remembered)
    wall, processor = row(SimpleNamespace(ROUNDS=1, OBJECTS=2), "tiny", 1)
    assert wall > 0 and processor > 0
    (model, before), = built
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value.cpu(), before[name])]
    assert any(name.startswith(trained) for name in changed)
