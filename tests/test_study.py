"""The user study: what the page holds, what it does in a real browser, and what is computed from the answers."""

import base64
import io
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack

import browser
import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from test_derain_baselines import pixels, settings, wet, write  # noqa: F401 (settings is a fixture)

import Eval_derain_baselines as script
from tools import study_results
from utils import config
from utils.config import UserError
from utils.evaluation import preferences, study

METHODS = ("rainy input", "Uber-Net", "Restorer", "Fremdes <Netz> & Co")


def scenes(count=3, methods=METHODS[:3], size=(90, 60)):
    """{scene: {method: picture}}: each of one colour, which tells scene and method apart."""
    return {f"scene {i}": {method: Image.new("RGB", size, colour(i, k)) for k, method in enumerate(methods)}
            for i in range(count)}


def colour(scene, method):
    return 40 * scene + 30, 60 * method + 40, 100


def content_of(path):
    """-> what the page holds, its key read as the page does."""
    text = path.read_text(encoding="utf-8")
    found = json.loads(text.split('<script type="application/json" id="study">')[1].split("</script>")[0])
    return found | {"key": json.loads(base64.b64decode(found["key"]))}


def picture_of(uri):
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


# ---- the page --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count, methods, most", [(5, 4, 60), (12, 4, 60), (12, 10, 60), (1, 3, 60), (12, 2, 7)])
def test_every_pair_is_shown_equally_often(count, methods, most):
    found = study.comparisons(count, methods, most)
    pairs = methods * (methods - 1) // 2
    times = Counter((one, other) for _, one, other in found)
    assert set(times) == set(itertools.combinations(range(methods), 2))
    assert set(times.values()) == {min(count, most // pairs)} and len(found) == len(set(found)) <= most
    per_scene = [Counter(scene for scene, _, _ in found)[scene] for scene in range(count)]
    assert max(per_scene) - min(per_scene) <= 1


def test_the_page_holds_the_right_pictures_and_shows_no_name(tmp_path):
    held = study.write_page(tmp_path / "study.html", scenes(3, METHODS), METHODS[0], 60)
    content, text = content_of(tmp_path / "study.html"), (tmp_path / "study.html").read_text(encoding="utf-8")
    key = content["key"]
    assert held == {"study": content["study"], "comparisons": 18, "scenes": 3, "methods": 4,
                    "bytes": (tmp_path / "study.html").stat().st_size}
    for uri, (scene, method) in zip(content["pictures"], key["pictures"], strict=True):
        found = picture_of(uri)
        assert found.size == (90, 60) and np.abs(np.asarray(found, int) - colour(scene, method)).max() <= 3
    for rainy, one, other in content["comparisons"]:
        assert key["pictures"][rainy][1] == 0 and one != other
        assert len({key["pictures"][picture][0] for picture in (rainy, one, other)}) == 1
    assert key["methods"] == list(METHODS) and not [name for name in METHODS[1:] if name in text]
    assert "http:" not in text and "https:" not in text and "{{" not in text
    methods = [method for _, method in key["pictures"]]
    assert methods != sorted(methods) and len(methods) == 12  # their order says nothing


def test_a_study_is_known_by_its_content(tmp_path):
    def name(*args):
        return study.write_page(tmp_path / "study.html", *args)["study"]
    same = name(scenes(), METHODS[0], 60)
    assert name(scenes(), METHODS[0], 60) == same
    assert len({same, name(scenes(), METHODS[0], 6), name(scenes(2), METHODS[0], 60),
                name(scenes(size=(60, 90)), METHODS[0], 60)}) == 4


def test_studies_that_cannot_be():
    with pytest.raises(UserError, match="STUDY_PAIRS.*6"):
        study.require_pairs(METHODS, 5)
    study.require_pairs(METHODS, 6)
    with pytest.raises(UserError, match="MODELS"):
        study.require_pairs(METHODS[:1], 60)


def test_the_script_writes_the_study(settings, tmp_path, capsys):  # noqa: F811
    found = script.main(**settings, STUDY=True, STUDY_SCENES=3, STUDY_SIDE=32)["study"]
    content = content_of(tmp_path / "out" / "study.html")
    assert found["comparisons"] == 18 and found["methods"] == 4 and found["scenes"] == 3
    assert content["key"]["methods"] == ["rainy input", "U-Net", "PRN", "Theirs"]
    assert "study.html" in capsys.readouterr().out
    number = content["key"]["pictures"].index([1, 3])
    theirs, original = picture_of(content["pictures"][number]), Image.open(tmp_path / "others" / "1.png")
    assert theirs.size == (32, 27)
    original = np.asarray(original.resize((32, 27), Image.Resampling.LANCZOS), int)
    assert np.abs(np.asarray(theirs, int) - original).mean() < 5


def test_the_study_of_photographs_and_what_it_refuses(settings, tmp_path):  # noqa: F811
    for n in range(2):
        write(tmp_path / "real" / f"{n}.jpg", wet(pixels(n)))
    alone = settings | {"TEST_SETS": (), "STUDY": True}
    assert script.main(**alone, REAL_DIR=str(tmp_path / "real"))["study"]["scenes"] == 2
    with pytest.raises(UserError, match="STUDY_PAIRS"):
        script.main(**settings, STUDY=True, STUDY_PAIRS=5)
    with pytest.raises(UserError, match="TEST_SETS.*REAL_DIR"):
        script.main(**alone, LABELED_RAIN_DIR=str(tmp_path))
    write(tmp_path / "others" / "1.png", pixels(0, 20, 20))
    with pytest.raises(UserError, match="1.png has another size"):
        script.main(**alone, REAL_DIR=str(tmp_path / "real"))


def test_the_flag_is_a_short_one():
    assert config.from_command_line(vars(script), ["--demo", "--study"]) == {"demo": True, "STUDY": True}


# ---- a real browser --------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(browser.PROGRAM is None or os.name != "posix", reason="there is no Chromium")


@pytest.fixture
def tab(tmp_path):
    """A browser without a page yet; tmp_path/study.html has six comparisons."""
    study.write_page(tmp_path / "study.html", scenes(2, size=(600, 400)), METHODS[0], 60)
    with ExitStack() as stack:
        try:
            found = stack.enter_context(browser.page(tmp_path))
        except browser.NotStarted as error:
            pytest.skip(str(error))
        yield found


@pytest.fixture
def opened(tab, tmp_path):
    tab.size(1280, 800)
    tab.open(tmp_path / "study.html")
    return tab


def ready(tab, number):
    """Until comparison `number` is shown, and can be answered."""
    tab.wait(f"document.querySelector('#count').textContent === '{number} of 6' && "
             "document.querySelector('#trial').getAttribute('aria-busy') === 'false'")
    tab.wait("performance.now() - shown > 350")


def colours(tab):
    """-> colours of the rainy, left and right picture as the browser shows them."""
    return tab.value("""[...document.querySelectorAll('#trial img')].map((image) => {
        const canvas = document.createElement('canvas');
        canvas.width = canvas.height = 1;
        canvas.getContext('2d').drawImage(image, 5, 5, 1, 1, 0, 0, 1, 1);
        return [...canvas.getContext('2d').getImageData(0, 0, 1, 1).data.slice(0, 3)];
    })""")


def shown_as(tab):
    """-> (scene, left method, right method) by their names, of what the browser shows."""
    (red, green, _), *sides = colours(tab)
    assert abs(green - 40) <= 3
    methods = [METHODS[round((side[1] - 40) / 60)] for side in sides]
    return f"scene {round((red - 30) / 40)}", *methods


def saved(folder):
    """-> the contents of all files that the page has saved, once they are complete."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        files = sorted((folder / "downloads").glob("*"))
        if files and all(path.suffix == ".json" and path.stat().st_size for path in files):
            return files
        time.sleep(0.05)
    raise TimeoutError(files)


def reload(tab):
    """As a participant does. About one time in forty Chromium gives a reloaded file's page an empty storage; what was
    stored is there again at the next reload."""
    session = tab.value("state.session")
    for _ in range(4):
        tab.reload()
        if tab.value("state.session") == session:
            return


@needs_browser
def test_keys_back_reload_and_the_saved_file(opened, tmp_path):
    opened.click("#participant")
    opened.write("Anna B.")
    opened.press("Enter")
    asked, keys = [], ["ArrowLeft", "ArrowRight", "ArrowDown", " ", "ArrowLeft", "ArrowRight"]
    for number, key in enumerate(keys, 1):
        ready(opened, number)
        asked.append(shown_as(opened))
        visible = opened.value("document.body.innerText + document.title + [...document.images].map((i) => i.alt)")
        assert not [name for name in METHODS if name in visible]
        opened.press(key)
        if number == 3:  # back by one with either key, and the answer is given again
            ready(opened, 4)
            opened.press("ArrowUp")
            ready(opened, 3)
            assert opened.value("document.querySelector('[aria-pressed=true]').dataset.choice") == "same"
            opened.press("Backspace")
            ready(opened, 2)
            opened.press("ArrowLeft")  # instead of right; goes on where answers are missing
        if number == 4:
            ready(opened, 5)
            reload(opened)
            assert "4 of 6" in opened.value("document.querySelector('#amount').textContent")
            assert opened.value("document.querySelector('#participant').value") == "Anna B."
            opened.click("#go")
    opened.wait("!document.querySelector('#end').hidden")
    opened.click("#save-end")
    (file,) = saved(tmp_path)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert list(content) == ["format", "study", "session", "participant", "comparisons", "answers"]
    assert content["participant"] == "Anna B." and "Anna_B" in file.name and content["comparisons"] == 6
    assert content["study"] == content_of(tmp_path / "study.html")["study"]
    assert [(answer["image"], answer["left"], answer["right"]) for answer in content["answers"]] == asked
    assert [answer["choice"] for answer in content["answers"]] == ["left", "left", "same", "same", "left", "right"]
    assert all(isinstance(answer["milliseconds"], int) and 300 <= answer["milliseconds"] < 60_000
               for answer in content["answers"])
    assert {tuple(sorted(pair)) for _, *pair in asked} == set(itertools.combinations(sorted(METHODS[:3]), 2))
    assert study_results.main(FILES=(str(file),))["answers"] == 6
    opened.click("#again")  # everything is saved: no question, and a new participant
    opened.wait("!document.querySelector('#start').hidden")
    assert opened.value("state.answers.filter(Boolean).length") == 0
    assert opened.value("state.session") != content["session"]


@needs_browser
def test_a_phone_without_storage(tab, tmp_path):
    tab.call("Page.addScriptToEvaluateOnNewDocument", source="Object.defineProperty(window, 'localStorage', "
             "{get() { throw new DOMException('refused', 'SecurityError'); }})")
    tab.size(360, 640, phone=True)
    tab.open(tmp_path / "study.html")
    assert not tab.value("document.querySelector('#unkept').hidden")

    def fits():
        return tab.value("document.documentElement.scrollWidth <= 360")
    assert fits()
    tab.tap("#go")
    for number, target in enumerate(["#left", "#right", "[data-choice=same]", "#left", "[data-choice=right]"], 1):
        ready(tab, number)
        assert fits() and tab.value("document.documentElement.scrollHeight <= 640")
        boxes = tab.value("['left', 'right'].map((id) => document.getElementById(id).getBoundingClientRect())"
                          ".map(({x, y, width, height}) => [x, y, width, height])")
        assert boxes[0][0] == boxes[1][0] and boxes[0][1] < boxes[1][1]  # one below the other
        assert boxes[0][2:] == boxes[1][2:] and boxes[0][2] > 340 and boxes[0][3] > 150
        tab.tap(target)
    ready(tab, 6)
    tab.size(640, 360, phone=True)
    left, right = (tab.middle(f"#{side}") for side in ("left", "right"))
    assert left[0] < right[0] and left[1] == right[1] and tab.value("document.documentElement.scrollWidth") <= 640
    tab.tap("#save")  # before the end
    answers = json.loads(saved(tmp_path)[0].read_text(encoding="utf-8"))["answers"]
    assert [answer["choice"] for answer in answers] == ["left", "right", "same", "left", "right"]


@needs_browser
def test_the_order_and_the_sides_differ_and_fast_taps_do_not_count(opened):
    orders = opened.value("Array.from({length: 40}, fresh).map(({order, swapped}) => [order, swapped])")
    assert all(sorted(order) == list(range(6)) for order, _ in orders)
    assert len({tuple(order) for order, _ in orders}) > 20
    swapped = [side for _, sides in orders for side in sides]
    assert 0.35 < sum(swapped) / len(swapped) < 0.65  # 240 coins: 5 standard deviations
    opened.click("#go")
    ready(opened, 1)
    opened.value("document.querySelector('#left').click(); document.querySelector('#left').click()")
    ready(opened, 2)
    assert opened.value("state.answers.filter(Boolean).length") == 1
    tapped = "document.querySelector('#left').click(); return state.answers.filter(Boolean).length"
    assert opened.value(f"show(1).then(() => {{ {tapped}; }})") == 1  # as soon as the pictures are there
    ready(opened, 2)
    assert opened.value(f"(() => {{ {tapped}; }})()") == 2


# ---- the numbers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wins, count", [(0, 1), (1, 1), (7, 10), (30, 40), (0, 25), (200, 400)])
def test_wilson_against_scipy(wins, count):
    wanted = binomtest(wins, count).proportion_ci(0.95, "wilson")
    assert preferences.wilson(wins, count) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_by_hand_and_without_trials():
    z = 1.959963984540054  # half of 4: centre 0.5, half width z / (1 + z^2/4) * sqrt(1/16 + z^2/64)
    half = z / (1 + z * z / 4) * math.sqrt(1 / 16 + z * z / 64)
    assert preferences.wilson(2, 4) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)
    assert preferences.wilson(0, 0) == (0, 1)


def test_bradley_terry_of_two_is_the_ratio_of_wins():
    strengths = preferences.bradley_terry([[0, 30], [10, 0]])
    assert math.exp(strengths[0] - strengths[1]) == pytest.approx(3, rel=1e-2)
    exactly = preferences.bradley_terry([[0, 30], [10, 0]], virtual=0)
    assert exactly == pytest.approx([math.log(3) / 2, -math.log(3) / 2])


def test_bradley_terry_against_minorisation():
    """Hunter's MM iteration: s_i = wins of i / sum over j of games_ij / (s_i + s_j)."""
    wins = np.random.default_rng(0).integers(1, 20, (5, 5)).astype(float)
    np.fill_diagonal(wins, 0)
    games, strengths = wins + wins.T, np.ones(5)
    for _ in range(2000):
        strengths = wins.sum(1) / (games / (strengths[:, None] + strengths[None])).sum(1)
    wanted = np.log(strengths) - np.log(strengths).mean()
    assert preferences.bradley_terry(wins, virtual=0) == pytest.approx(wanted, abs=1e-8)


def test_bradley_terry_of_known_strengths_and_of_separated_answers():
    truth = np.log([4, 2, 1, 0.5])
    rates = 1 / (1 + np.exp(truth[None] - truth[:, None]))
    assert preferences.bradley_terry(1000 * rates) == pytest.approx(truth - truth.mean(), abs=1e-3)
    always = preferences.bradley_terry(np.triu(np.full((4, 4), 5.0), 1))
    assert np.isfinite(always).all() and (np.diff(always) < 0).all()
    # nobody compared 0 or 1 with 2 or 3
    apart = preferences.bradley_terry([[0, 3, 0, 0], [3, 0, 0, 0], [0, 0, 0, 2], [0, 0, 4, 0]])
    assert np.isfinite(apart).all() and apart[3] > apart[2]


def test_ranks_and_win_matrix():
    assert preferences.ranks([0.1, 2.0, 0.1, -1]).tolist() == [2, 1, 2, 4]
    assert preferences.win_matrix([(0, 1, 1), (1, 0, 1), (1, 0, 0.5), (2, 0, 0)], 3).tolist() == [
        [0, 1.5, 1], [1.5, 0, 0], [0, 0, 0]]


def test_the_bootstrap_covers_the_truth():
    rng, covered, truth = np.random.default_rng(1), 0, math.log(2)
    for seed in range(30):
        people = [[(0, 1, float(rng.random() < 2 / 3)) for _ in range(20)] for _ in range(6)]
        drawn = preferences.bootstrap_strengths(people, 2, 100, seed)
        low, high = np.quantile(drawn[:, 0] - drawn[:, 1], (0.025, 0.975))
        covered += low < truth < high
    assert covered >= 26


# ---- the tool --------------------------------------------------------------------------------------------------

def answered(session="a1", participant="", choices="llsr", of="0123456789abcdef", **more):
    """A saved file's content; "A" is on the left of "B" in even answers."""
    words = {"l": "left", "r": "right", "s": "same"}
    return {"format": 1, "study": of, "session": session, "participant": participant, "comparisons": 6, "answers": [
        {"image": str(i), "left": "AB"[i % 2], "right": "BA"[i % 2], "choice": words[letter], "milliseconds": 1000 + i}
        for i, letter in enumerate(choices)]} | more


@pytest.fixture
def files(tmp_path):
    def write_all(**contents):
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        return tuple(str(tmp_path / f"{name}.json") for name in contents)
    return write_all


def test_results_of_two_participants(files, tmp_path, capsys):
    names = files(a=answered("a1", "Anna", "llsr"), b=answered("b2", "", "lrl"))
    found = study_results.main(FILES=names, OUT=str(tmp_path / "out.json"), RESAMPLES=200)
    # Anna: A, B, tie, A; the other: A, A, A
    (pair,) = found["pairs"]
    assert (pair["method"], pair["against"], pair["preferred"], pair["same"], pair["other"]) == ("A", "B", 5, 1, 1)
    assert pair["rate"] == pytest.approx(5.5 / 7)
    assert (pair["low"], pair["high"]) == pytest.approx(preferences.wilson(5.5, 7))
    first, second = found["order"]
    assert (first["method"], first["rank"], first["count"]) == ("A", 1, 7)
    assert first["strength"] / second["strength"] == pytest.approx(5.5 / 1.5, rel=0.02)
    assert first["strength_low"] < first["strength"] < first["strength_high"] and first["rank_low"] == 1
    assert (found["participants"], found["answers"], found["asked"], found["median_ms"]) == (2, 7, 12, 1001)
    assert found["left_share"] == pytest.approx(4 / 6)
    saved_too = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    assert saved_too == json.loads(json.dumps(found))
    text = capsys.readouterr().out
    assert text.isascii() and "79%" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "out.json"]


def test_a_folder_and_words_without_a_flag(files, tmp_path):
    files(a=answered("a1"), b=answered("b2"))
    assert study_results.main(FILES=(str(tmp_path),), RESAMPLES=100)["participants"] == 2
    assert study_results.from_words(["a.json", "b.json", "--OUT", "c.json"]) == {
        "FILES": ["a.json", "b.json"], "OUT": "c.json"}
    assert study_results.from_words(["--OUT", "c.json"]) == {"OUT": "c.json"}
    assert sys.excepthook is not sys.__excepthook__


def broken(**more):
    return answered() | {"answers": [answered()["answers"][0] | more]}


@pytest.mark.parametrize("content, words", [
    ("{", "cannot read"), ("[" * 100_000, "cannot read"), ([], "no file of a user study"), ({}, "no file of a user"),
    (answered(format=2), "format 2"), (answered(comparisons="6"), "no file of a user study"),
    (answered(choices=""), "no answers"), (broken(choice="both"), "answer 1"), (broken(left="B"), "answer 1"),
    (broken(milliseconds=-1), "answer 1"), (broken(milliseconds=True), "answer 1"),
    (broken(milliseconds=float("nan")), "answer 1"), (broken(image=None), "answer 1"),
    (answered(answers=[1]), "answer 1"),
    (answered(answers=answered()["answers"] + [answered()["answers"][0]]), "answer 5 is there twice"),
    (answered("b2", of="another"), "of study another"), (answered("a1"), "same session"),
    (answered("b2", "anna "), "same participant"),
])
def test_files_that_are_refused(files, content, words):
    names = files(good=answered("a1", "Anna"), bad=content)
    with pytest.raises(UserError, match="bad.json") as error:
        study_results.main(FILES=names)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path, files):
    with pytest.raises(UserError, match="nowhere.json"):
        study_results.main(FILES=(str(tmp_path / "nowhere.json"),))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        study_results.main(FILES=(str(tmp_path / "empty"),))
    with pytest.raises(UserError, match="files"):
        study_results.main()
    (name,) = files(a=answered())
    with pytest.raises(UserError, match="OUT"):
        study_results.main(FILES=(name,), OUT=name)
    with pytest.raises(UserError, match="RESAMPLES"):
        study_results.main(FILES=(name,), RESAMPLES=5)
