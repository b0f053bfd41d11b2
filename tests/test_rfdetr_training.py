"""What of RF-DETR trains and at which cost: --freeze_backbone, --gradient_checkpointing."""

from pathlib import Path

import pytest
import torch
from rfdetr_data import write_dataset

import train_detector_stage1
import train_seg_single_stage
from rfdetr import main as training
from rfdetr.model import RFDETR
from utils import freeze
from utils.config import UserError
from utils.memory import peak_bytes

SMALL = {"SIZE": "tiny", "RESOLUTION": 64, "EPOCHS": 1, "BATCH": 4, "ACCUM": 1, "WORKERS": 0, "MULTI_SCALE": False,
         "WARMUP_STEPS": 1, "PRETRAIN_WEIGHTS": "none"}
VIT = "backbone.0.encoder."


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return str(write_dataset(tmp_path_factory.mktemp("rfdetr") / "dataset"))


def batch_of(side=64, images=2, seed=0):
    """Images and labels with one object each, masks included."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, side // 4:side // 2, side // 4:side // 2] = True
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.375, 0.375, 0.25, 0.25]]), "masks": mask}
    return {"images": torch.rand(images, 3, side, side, generator=generator), "labels": [label] * images}


def step(model, seed=0):
    """Losses and gradients of one batch of the single stage."""
    torch.manual_seed(seed)
    model.zero_grad()
    losses = train_seg_single_stage.compute_losses(model, batch_of())
    sum(value for value in losses.values() if value.requires_grad).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- freeze_backbone -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", [train_detector_stage1, train_seg_single_stage])
def test_a_frozen_backbone_stays_bit_for_bit_and_is_resumed(script, dataset, tmp_path, capsys):
    result = script.main(**SMALL, DATASET_DIR=dataset, RUNS_DIR=str(tmp_path), FREEZE_BACKBONE=True)
    printed, folder = capsys.readouterr().out, Path(result["run_dir"])
    last = torch.load(folder / "last.pt")
    torch.manual_seed(0)  # the run's seed: its network begins so
    before = RFDETR(**last["args"]).state_dict()
    moved = {name for name, value in last["model"].items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(VIT) for name in moved)
    assert {"backbone", "transformer", "class_embed"} <= {name.split(".")[0] for name in moved}  # backbone: projector
    model = RFDETR(**last["args"])
    free = sum(p.numel() for name, p in model.named_parameters() if "backbone.backbone." not in name)
    assert f"Trainable parameters: {free:,} " in printed
    assert sum(len(group["params"]) for group in last["optimizer"]["param_groups"]) == sum(
        "backbone.backbone." not in name for name, _ in model.named_parameters())
    if script is train_seg_single_stage:
        return
    resumed = script.main(RESUME=str(folder), EPOCHS=2)
    after = torch.load(Path(resumed["run_dir"]) / "last.pt")
    assert after["epoch"] == 2 and all(torch.equal(after["model"][name], value) for name, value in before.items()
                                       if name.startswith(VIT))
    with pytest.raises(UserError, match="--freeze_backbone False"):
        script.main(RESUME=str(folder), EPOCHS=3, FREEZE_BACKBONE=False)


def test_no_backward_goes_through_a_frozen_backbone():
    model = RFDETR("tiny", 4, 64, mask_head="nano")
    freeze.freeze(model.vit)
    model.train()
    assert model.detector.training and not any(module.training for module in model.vit.modules())
    seen = []
    model.vit.register_forward_hook(lambda module, given, found: seen.extend(found.feature_maps))
    _, gradients = step(model)
    assert seen and not any(feature.requires_grad for feature in seen)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() <= trained and not any("backbone.backbone." in name for name in trained)
    grouped = {id(p) for group in training.parameter_groups(model, 1e-4, 1e-4, 0.8, 1e-4) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


# ---- gradient_checkpointing ------------------------------------------------------------------------------------------

def with_randomness(model):
    """The model with dropout in its ViT's attention and whole paths dropped: what must be drawn alike twice."""
    for block in model.vit.encoder.layer:
        block.attention.attention_dropout = 0.2
        block.drop_path = DropPath(0.3)
    return model


class DropPath(torch.nn.Module):
    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1) >= self.share) / (1 - self.share)


@pytest.mark.parametrize("random", [False, True])
def test_checkpointed_blocks_have_the_same_losses_and_gradients(random):
    models = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = RFDETR("tiny", 4, 64, mask_head="nano").train()
        if random:
            with_randomness(model)
        if checkpointed:
            model.checkpoint_blocks()
        models.append(step(model))
    (losses, gradients), (again, others) = models
    assert losses.keys() == again.keys() and gradients.keys() == others.keys()
    assert any("backbone.backbone." in name for name in gradients)
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value)
    for name, value in gradients.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-6)
    if random:  # the randomness is there at all
        torch.manual_seed(0)
        model = with_randomness(RFDETR("tiny", 4, 64, mask_head="nano").train())
        assert not torch.equal(step(model, seed=1)[0]["loss_ce"], losses["loss_ce"])


def test_checkpointed_blocks_keep_less_and_the_estimate_knows_it():
    peaks = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = RFDETR("tiny", 4, 160).train()
        if checkpointed:
            model.checkpoint_blocks()
        batch = batch_of(160)
        peaks.append(peak_bytes(lambda model=model, batch=batch: sum(
            value for value in train_detector_stage1.compute_losses(model, batch).values()
            if value.requires_grad).backward()))
    assert peaks[1] < 0.8 * peaks[0]
