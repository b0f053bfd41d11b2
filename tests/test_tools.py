"""The ablation tools' bookkeeping: a finished run is not repeated, and its scores do not pass for another's."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import ablation_feature_derain
import ablation_spdnet_adaptation as ablation

from utils.config import UserError


def test_scores_are_made_once_and_refused_under_other_settings(tmp_path):
    made = iter(({"rainy": 0.25}, {"rainy": 0.5}))
    settings = {"PATHS": ("a", "b"), "EPOCHS": 3}
    for _ in range(2):
        assert ablation.once(tmp_path / "scores.json", settings, lambda: next(made)) == {"rainy": 0.25}
    with pytest.raises(UserError, match="scores.json comes from other settings.*OUTPUT_DIR"):
        ablation.once(tmp_path / "scores.json", settings | {"EPOCHS": 4}, lambda: next(made))


@pytest.mark.parametrize("tool", [ablation, ablation_feature_derain])
def test_unknown_variants_and_constants_that_no_script_has(tool):
    with pytest.raises(UserError, match="VARIANTS: heavier is not in"):
        tool.main(VARIANTS=("heavier",))
    script = tool.Adaptation if tool is ablation else tool.Training
    table = tool._LOSSES if tool is ablation else {name: one[1] for name, one in tool._VARIANTS.items()}
    assert all(set(constants) <= set(ablation.demo_constants(script)) for constants in table.values())
