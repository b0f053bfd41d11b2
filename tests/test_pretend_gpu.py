"""Every script "on the GPU" of a machine that has none: it runs, computes what the CPU computes, and hardly ever waits.

BUDGET is a table to keep: a step that waits more often than before, or launches far more operations, fails. Counts are
those of the small runs here; what a real GPU does beyond that, tests/pretend_cuda.py lists.
"""

import pytest
from gpu_runs import outcome, prepare, reason_to_skip, report
from script_processes import finished, started

BUDGET = {  # training: (waits in a step, operations launched in it, waits in a validation)
    "spdnet": (1, 4420, 3),               # losses | one pair at a time
    "adaptation": (2, 6420, 1),           # matching, losses | detections of a batch
    "rtdetr": (4, 2970, 1),               # besides: transformers' finite check and denoising queries
    "adapter": (4, 4010, 1),              # as rtdetr
    "rain_detector": (1, 770, 1),
    "conditional": (3, 7090, 5),          # besides: the gate | gate, fallbacks, detections; two domains
    "feature": (2, 2870, 2),
    "unet": (1, 470, 1),
    "stage1": (3, 4920, 2),               # besides: transformers' sizes of the feature maps
    "stage2": (1, 490, 3),                # cached features | masks of a batch
    "stage2_uncached": (3, 1890, 3),      # besides | masks of a batch
    "single_stage": (4, 5550, 3),         # besides: the masks' own matching
}
GROWTH = 1.1                              # launches may grow so much: versions of torch differ
OTHERS = ("eval_adaptation", "eval_conditional", "eval_feature", "eval_unet", "eval_baselines", "eval_robustness",
          "detect_images",
          "detect_feature", "detect_video", "export", "validate_setup")
HALF = {"rtdetr": {"PRECISION": "bf16", "FAST": ("tf32", "channels_last")}, "unet": {"PRECISION": "fp16"},
        "stage1": {"NO_AMP": False}, "conditional": {"PRECISION": "bf16"}}
FULL = {"stage1": {"NO_AMP": True}, "stage2": {"NO_AMP": True, "CHECKPOINT": "./assets/demo/rfdetr_tiny.pth"},
        "stage2_uncached": {"NO_AMP": True}, "single_stage": {"NO_AMP": True}}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder where scripts are started; what earlier tests wrote stays in runs/."""
    folder = tmp_path_factory.mktemp("gpu")
    if reason := reason_to_skip(folder):
        pytest.skip(reason)
    prepare(folder)
    outcome(folder, "windshield", "cpu")
    return folder


@pytest.fixture(scope="module")
def trained(work):
    """-> function: name of a training -> its outcome on the GPU in float32; each runs once."""
    found = {}

    def run(name):
        if name not in found:
            found[name] = outcome(work, name, "cuda", **FULL.get(name, {}))
        return found[name]
    return run


@pytest.mark.parametrize("name", BUDGET)
def test_a_training_equals_the_cpu_and_keeps_to_its_budget(work, trained, name):
    found, (waits, launches, validation) = trained(name), BUDGET[name]
    assert "device: Pretend GPU" in found["printed"] or "cuda (Pretend GPU)" in found["printed"]
    assert "BATCH_SIZE = 1 fits" in found["printed"] or "--batch 1 fits" in found["printed"]
    assert "40.3 GB were estimated" in found["printed"]
    assert found["waits"] <= waits, found["table"]
    assert found["validation"] <= validation, found["validation_table"]
    assert launches / 2 < found["launches"] <= GROWTH * launches
    on_cpu = outcome(work, name, "cpu", where=f"{name}_cpu", **FULL.get(name, {}))
    assert on_cpu["validation_bytes"] <= on_cpu["training_bytes"]
    expected = on_cpu["history"]
    assert len(expected) == len(found["history"]) > 0
    for record, own in zip(expected, found["history"], strict=True):
        assert record.keys() == own.keys()
        for key, value in record.items():
            assert own[key] == pytest.approx(value, rel=2e-3, abs=0.03 if "/" in key or key == "score" else 1e-4), key


@pytest.mark.parametrize("name", HALF)
def test_half_precision_trains_beside_float32(work, trained, name):
    found = outcome(work, name, "cuda", where=f"{name}_half", **HALF[name])
    assert found["waits"] <= BUDGET[name][0] + ("fp16" in HALF[name].values()), found["table"]  # the scaler asks once
    loss = found["history"][0]["loss"]
    full = trained(name)["history"][0]["loss"]
    assert loss == pytest.approx(full, rel=0.1) and loss != full


def test_a_run_goes_on_on_the_other_device(work, trained):
    trained("unet")
    for epochs, device in ((2, "cpu"), (3, "cuda")):
        found = outcome(work, "unet", device, EPOCHS=epochs, RESUME=True)
        assert f"at epoch {epochs}, batch 1" in found["printed"] and len(found["history"]) == epochs


@pytest.mark.parametrize("name", OTHERS)
def test_what_trains_nothing_runs(work, trained, name):
    needs = {"eval_conditional": ("conditional", "feature", "adapter"), "eval_feature": ("feature",),
             "eval_unet": ("unet",), "detect_feature": ("feature",), "export": ("feature",)}
    for need in needs.get(name, ()):
        trained(need)
    changes = {"eval_adaptation": {"ADAPTED_MODEL_PATH": "./assets/demo/spdnet_adapted.pt"},
               "eval_feature": {"LIGHTWEIGHT_MODEL_NAME": ""},
               "export": {"RTDETR_MODEL_NAME": "", "RAINY_DETECTOR_NAME": "", "RAIN_DETECTOR_PATH": ""}}
    outcome(work, name, "cuda", **changes.get(name, {}))


def test_the_report_on_a_gpu_is_written(work):
    finished(started(report, work), work / "report.txt")
    page = (work / "report.md").read_text(encoding="utf-8")
    parity, speed, exported, trainings = page.split("\n## ")[1:]
    assert "failed" not in parity + speed + trainings
    for line in parity.splitlines()[4:]:
        name, float32, bf16 = (cell.strip() for cell in line.strip("| ").split("|"))
        assert float(float32) < 1e-5 and float(float32) < float(bf16) < 0.1, name
    assert trainings.count("| Training_RainDetector |") == 1 and "40.3" in trainings
