"""Numbers about yes/no decisions, against brute force and against cases worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.config import UserError
from utils.evaluation import classification


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    targets = rng.random(200) < 0.4
    return np.round(rng.normal(targets * 1.0, 1.0), 1), targets  # rounding makes ties


def test_auroc_is_the_chance_that_a_yes_scores_above_a_no(sample):
    scores, targets = sample
    pairs = scores[targets][:, None] - scores[~targets][None]
    assert classification.auroc(scores, targets) == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)), abs=1e-12)
    assert np.isnan(classification.auroc([0.1, 0.2], [0, 0]))


def test_roc_curve_and_its_area(sample):
    scores, targets = sample
    alarms, recall, thresholds = classification.roc_curve(scores, targets)
    assert np.trapezoid(recall, alarms) == pytest.approx(classification.auroc(scores, targets), abs=1e-12)
    for i in range(1, len(thresholds), 7):
        at = classification.counts(scores, targets, thresholds[i])
        assert (at["false_alarm_rate"], at["recall"]) == pytest.approx((alarms[i], recall[i]))
    assert (alarms[0], recall[0], alarms[-1], recall[-1]) == (0, 0, 1, 1)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.37])
def test_threshold_keeps_false_alarms_at_the_wanted_rate_and_is_the_lowest_such(sample, rate):
    scores, targets = np.float32(sample[0]), sample[1]
    threshold = classification.threshold_for_false_alarms(scores, targets, rate)
    assert classification.counts(scores, targets, threshold)["false_alarm_rate"] <= rate
    lower = scores[scores < threshold].max()
    assert classification.counts(scores, targets, lower)["false_alarm_rate"] > rate


def test_threshold_above_every_score():
    for scores, targets in (([1, 1, 0.2], [0, 0, 1]), ([3, 1, 2], [0, 0, 1]), ([0.5], [0])):
        threshold = classification.threshold_for_false_alarms(scores, targets, 0.0)
        assert classification.counts(scores, targets, threshold)["false_positive"] == 0


def test_threshold_refuses_a_rate_that_is_none():
    with pytest.raises(UserError, match="FALSE_ALARM_RATE"):
        classification.threshold_for_false_alarms([0.1], [0], 1.0)


def test_counts_by_hand():
    found = classification.counts([0.9, 0.8, 0.3, 0.6, 0.1], [1, 1, 1, 0, 0], 0.5)
    assert found == {"true_positive": 2, "false_positive": 1, "false_negative": 1, "true_negative": 1,
                     "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "false_alarm_rate": 1 / 2}
    assert classification.counts([0.1], [0], 0.5)["recall"] is None


def test_temperature_is_the_likeliest():
    torch.manual_seed(0)
    truth = torch.randn(4000)
    targets = (torch.rand(4000) < torch.sigmoid(truth)).float()
    found = classification.fit_temperature(3.0 * truth, targets)  # three times too sure
    assert found == pytest.approx(3.0, rel=0.1)

    def loss(temperature):
        return F.binary_cross_entropy_with_logits(3.0 * truth / temperature, targets).item()
    assert loss(found) <= min(loss(found * 1.02), loss(found / 1.02))
    without_mistakes = torch.tensor([-5.0, 5.0]).repeat(100), torch.tensor([0.0, 1.0]).repeat(100)
    assert 0.8 < classification.fit_temperature(*without_mistakes) < 1.3
    wrong = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 1.0])
    assert classification.fit_temperature(*wrong) == pytest.approx(20, rel=0.01)


def test_calibration_error_by_hand():
    assert classification.calibration_error([0.95, 0.95, 0.05, 0.05], [1, 1, 0, 0]) == pytest.approx(0.05)
    assert classification.calibration_error([0.95, 0.95], [1, 0]) == pytest.approx(0.45)
