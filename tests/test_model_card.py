"""Cards of trained models, and what tools.push_to_hub does with them."""

import contextlib
import functools
import http.server
import io
import re
import shutil
import threading
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import small_spdnet
from huggingface_hub import ModelCard

import Training_Conditional
import Training_FeatureDerain
import Training_RTDETR
from tools import push_to_hub
from utils.conditional_model import ConditionalRainRobustRTDETR
from utils.config import UserError
from utils.feature_derain import FeatureDerainRTDETR
from utils.networks import adapter
from utils.networks.rain_detector import RainDetector
from utils.training import model_card

CLASSES = {0: "person", 1: "car"}


def settings(script, **changes):
    """-> constants of a script as config.resolve gives them, as far as its card reads them."""
    values = {name: value for name, value in vars(script).items() if name.isupper() and name != "DEMO"} | changes
    return SimpleNamespace(**values, as_dict=lambda: values)


def a_card(**changes):
    return model_card.Card("A detector", "Detects.", **{
        "library": "transformers", "base": "PekingU/rtdetr_r18vd", "data": ["12 images"], "load": "print(1)",
        "constants": {"SEED": 3}} | changes)


def front_matter(card):
    return ModelCard(card.text()).data


# ---- the card --------------------------------------------------------------------------------------------------

def test_the_hub_reads_the_card_and_every_number_was_measured():
    card = a_card()
    evaluate = card.remembering(lambda model: {"val/mAP": model, "val/AP50": 0.75, "val/AP_large": -1.0,
                                               "clean/mAP": float("nan"), "score": -0.5})
    evaluate(0.25)
    assert evaluate(0.5)["val/mAP"] == 0.5  # the latest counts
    data = front_matter(card)
    assert (data.library_name, data.pipeline_tag, data.base_model, data.license) == (
        "transformers", "object-detection", "PekingU/rtdetr_r18vd", None)
    assert {(one.dataset_name, one.metric_type): one.metric_value for one in data.eval_results} == {
        ("val images", "mAP"): 0.5, ("val images", "AP50"): 0.75}
    text = card.text()
    for line in ("| val/mAP | 0.5000 |", "| val/AP_large | - |", "| clean/mAP | - |", "| score | -0.5000 |"):
        assert line in text
    assert "- 12 images" in text and "```python\nprint(1)\n```" in text and "| `SEED` | `3` |" in text
    assert re.search(r"commit ([0-9a-f]{40}(\+changes)?|unknown)\.", text)


def test_a_card_without_numbers_states_none():
    text = a_card().text()
    assert "Metrics" not in text and "model-index" not in text and front_matter(a_card()).eval_results is None


def test_no_folder_of_the_machine_is_given_away(tmp_path):
    (tmp_path / "start").mkdir()
    text = a_card(base=str(tmp_path / "start"), constants={
        "COCO_DIR": "C:\\Users\\anna\\coco", "OUTPUT_DIR": "/home/anna/out", "RTDETR_MODEL_NAME": "a/b|c"}).text()
    assert "anna" not in text and str(tmp_path) not in text and "base_model" not in text
    assert "| `COCO_DIR` | `'coco'` |" in text and "OUTPUT_DIR" not in text and "b\\|c" in text


def test_a_card_is_written_into_a_folder_or_to_a_file(tmp_path):
    a_card().write(tmp_path)
    a_card().write(tmp_path / "rain.md")
    assert (tmp_path / "README.md").read_bytes() == (tmp_path / "rain.md").read_bytes()
    with pytest.raises(UserError, match="none/rain.md"):
        a_card().write(tmp_path / "none" / "rain.md")


# ---- folders of every kind -------------------------------------------------------------------------------------

@pytest.fixture
def folders(coco, weights, small_detector):
    """-> {kind: path} of models as the trainings write them."""
    found = {"detector": coco / "detector", "feature": coco / "model", "pipeline": coco / "pipeline",
             "adapter": coco / "out" / "rain.safetensors"}
    names = {"RTDETR_MODEL_NAME": str(weights / "rtdetr"), "IMAGE_SIZE": 96}
    Training_RTDETR.save_detector(small_detector, found["detector"], 96, Training_RTDETR.card_of(
        settings(Training_RTDETR, **names), 8, small_detector))
    FeatureDerainRTDETR(small_detector, "lightweight").save_pretrained(found["feature"], image_size=96)
    Training_FeatureDerain.card_of(settings(Training_FeatureDerain, **names), 8, CLASSES).write(found["feature"])
    Training_Conditional.save_pipeline(
        ConditionalRainRobustRTDETR(RainDetector(), small_spdnet(), small_detector), found["pipeline"],
        Training_Conditional.card_of(settings(Training_Conditional, **names), 8, CLASSES))
    found["adapter"].parent.mkdir()
    with contextlib.suppress(ImportError):  # peft is optional
        import Training_WeatherAdapter
        from utils import freeze
        model = adapter.inject(small_detector, 2, 4, ("attention",))
        Training_WeatherAdapter.save_adapter(
            model, found["adapter"], Training_WeatherAdapter.card_of(settings(Training_WeatherAdapter, **names), 8,
                                                                     CLASSES),
            base=freeze.fingerprint(small_detector), rank=2, alpha=4, weather="rain", image_size=96)
    return {kind: path for kind, path in found.items() if path.exists()}


def test_what_the_cards_say_about_loading_works(folders, coco, monkeypatch):
    """Each card's own lines, with the paths of this machine."""
    monkeypatch.chdir(coco)
    shutil.copy(next((coco / "coco" / "val2017").iterdir()), "street.jpg")
    for kind, path in folders.items():
        card = path.with_suffix(".md") if path.is_file() else path / "README.md"
        code = re.search(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)[1]
        for there, here in (("path/of/this/folder", path), ("path/of/the/adapter.safetensors", path),
                            ("path/or/hub-id of the detector", coco / "rtdetr")):
            code = code.replace(there, here.as_posix())
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(code.replace(" 640 ", " 96 ").replace("threshold=0.5", "threshold=0.0"), {})
        assert "person" in shown.getvalue() or "scores" in shown.getvalue(), kind


@pytest.mark.parametrize("kind, words", [("detector", "RT-DETR of 2 classes"), ("feature", "lightweight"),
                                         ("pipeline", "pipeline of rain detector"), ("adapter", "adapter of rank 2")])
def test_a_dry_run_loads_and_lists_what_would_go(folders, kind, words, monkeypatch, capsys):
    if kind not in folders:
        pytest.skip("no peft")
    monkeypatch.setattr(push_to_hub, "HfApi", None)  # nothing may be asked
    (folders["adapter"].parent / "last.pt").write_bytes(b"a run's own")
    (folders["detector"] / ".lock").write_bytes(b"")
    result = push_to_hub.main(FOLDER=str(folders[kind]), REPO="anna/rain-1")
    shown = capsys.readouterr().out
    assert words in shown and "nothing was sent" in shown and shown.isascii() and result["address"] is None
    sent = result["files"]
    assert "README.md" in sent and not {"last.pt", ".lock"} & sent.keys()
    assert {"detector": "model.safetensors", "feature": "rtdetr/model.safetensors", "pipeline": "rtdetr/config.json",
            "adapter": "rain.safetensors"}[kind] in sent


def test_a_card_in_another_code_page_is_one_line(folders):
    card = folders["detector"] / "README.md"
    card.write_bytes("---\nlicense: mit\n---\nf\u00fcr Regen\n".encode("cp1252"))
    with pytest.raises(UserError, match="FOLDER: .*README.md cannot be read .*save it as UTF-8"):
        push_to_hub.main(FOLDER=str(folders["detector"]), REPO="anna/rain-1")


class Hub:
    """Stands in for HfApi: keeps what it is given."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo, **settings):
        self.calls.append(("create", repo, settings))
        return f"https://hub.example/{repo}"

    def create_commit(self, repo, operations, *, commit_message):
        self.calls.append(("commit", repo, {one.path_in_repo: one for one in operations}, commit_message))


def test_sending_makes_one_commit_with_the_licence_in_the_card(folders, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(push_to_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(push_to_hub, "get_token", lambda: "hf_secret")
    result = push_to_hub.main(FOLDER=str(folders["detector"]), REPO="anna/rain-1", SEND=True, LICENSE="apache-2.0")
    (_, repo, how), (_, _, operations, _) = hub.calls
    assert repo == "anna/rain-1" and how == {"private": True, "exist_ok": True}
    assert operations.keys() == result["files"].keys() == {
        path.name for path in folders["detector"].iterdir()}
    card = operations["README.md"].path_or_fileobj.decode("utf-8")
    assert ModelCard(card).data.license == "apache-2.0"
    own = (folders["detector"] / "README.md").read_text(encoding="utf-8")
    assert card.replace("license: apache-2.0\n", "") == own and "license" not in own.split("---")[1]
    assert result["address"] == "https://hub.example/anna/rain-1"
    assert "hf_secret" not in capsys.readouterr().out


def refusing_server():
    """-> a running server on this machine that answers 401 to everything."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_no_token_and_no_network_are_one_line_each(folders, monkeypatch):
    values = {"FOLDER": str(folders["detector"]), "REPO": "anna/rain-1", "SEND": True}
    monkeypatch.setattr(push_to_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        push_to_hub.main(**values)
    monkeypatch.setattr(push_to_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # of conftest.py
    refuses = refusing_server()
    for port in (9, refuses.server_port):  # nobody listens; a hub that does not know the token
        monkeypatch.setattr(push_to_hub, "HfApi", functools.partial(
            huggingface_hub.HfApi, endpoint=f"http://127.0.0.1:{port}", token="hf_x"))
        reason = "401" if port != 9 else "refused"
        with pytest.raises(UserError, match=f"REPO = 'anna/rain-1' could not be written: [^\n]*{reason}[^\n]*Check"):
            push_to_hub.main(**values)
    refuses.shutdown()
    refuses.server_close()


def test_what_cannot_be_sent_is_one_line(folders, tmp_path):
    def refused(words, **values):
        with pytest.raises(UserError, match=words):
            push_to_hub.main(**{"FOLDER": str(folders["detector"]), "REPO": "anna/rain-1"} | values)
    refused("FOLDER = '' is empty", FOLDER="")
    refused("FOLDER = './none' does not exist", FOLDER="./none")
    for name in ("", "anna", "anna/b c", "a/b/c", "../x"):
        refused("REPO = ", REPO=name)
    (tmp_path / "empty").mkdir()
    refused("FOLDER = .*has no config.json", FOLDER=str(tmp_path / "empty"))
    (tmp_path / "weights.pt").write_bytes(b"x")
    refused("no adapter", FOLDER=str(tmp_path / "weights.pt"))
    (folders["detector"] / "README.md").write_text("# no front matter\n", encoding="utf-8")
    refused("LICENSE = 'mit'.*README.md", LICENSE="mit")
    (folders["detector"] / "README.md").unlink()
    refused("has no card", )
    (folders["detector"] / "model.safetensors").write_bytes(b"damaged")
    refused("FOLDER = ")
