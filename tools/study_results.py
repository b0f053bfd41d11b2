"""What people preferred: win rates and one order of the methods from the files that a user study's page has saved.

    python -m tools.study_results anna.json ben.json
    python -m tools.study_results ./answers --OUT results.json      # all *.json of a folder

The page is study.html of `python Eval_derain_baselines.py --study`. "No difference" counts as half a win for both. A
win rate's interval is Wilson's (95%); it takes answers as independent of each other, which those of one participant
are not quite. Strengths are Bradley and Terry's, their geometric mean 1: a method of strength 2 is preferred to one of
strength 1 in two of three answers. Their intervals, and those of the rank, are 95% bootstrap intervals over
participants and their answers. One that always wins gets a large strength of which only the rank means something.
"""

import itertools
import sys
from pathlib import Path

import numpy as np

from utils import config, report, system
from utils.evaluation import preferences, study

FILES = ()               # JSON files that the page has saved, one per participant, or folders of them
OUT = ""                 # JSON file for the numbers; "" for none
RESAMPLES = 1000         # of the bootstrap

_KEYS = {"format": int, "study": str, "session": str, "participant": str, "comparisons": int, "answers": list}
_ANSWER_KEYS = {"image": str, "left": str, "right": str, "choice": str, "milliseconds": (int, float)}


# ---- files -----------------------------------------------------------------------------------------------------

def files_of(words):
    """-> paths of the saved files; UserError where one does not exist or a folder holds none."""
    found = []
    for word in words:
        path = Path(word)
        if not path.exists():
            raise config.UserError(f"{path.as_posix()} does not exist")
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            raise config.UserError(f"{path.as_posix()} holds no *.json")
        found += inside
    if not found:
        raise config.UserError("give the files that the study's page has saved: python -m tools.study_results a.json "
                               "b.json")
    return found


def problem_of(content):
    """-> what is wrong with the content of a saved file, "" for nothing."""
    def lacks(entry, keys):
        return not isinstance(entry, dict) or any(
            not isinstance(entry.get(key), kinds) or isinstance(entry[key], bool) for key, kinds in keys.items())
    if isinstance(content, dict) and content.get("format", study.FORMAT) != study.FORMAT:
        return f"has the format {content['format']!r}, and {study.FORMAT} is known here"
    if lacks(content, _KEYS):
        return f"is no file of a user study ({', '.join(_KEYS)} are expected)"
    if not content["answers"]:
        return "holds no answers"
    asked = set()
    for number, answer in enumerate(content["answers"], 1):
        if lacks(answer, _ANSWER_KEYS) or answer["choice"] not in study.CHOICES or answer["left"] == answer["right"] \
                or not 0 <= answer["milliseconds"] < 1e12:
            return f"answer {number} is damaged ({', '.join(_ANSWER_KEYS)} are expected)"
        question = (answer["image"], *sorted((answer["left"], answer["right"])))
        if question in asked:
            return f"answer {number} is there twice: {question[1]} and {question[2]} on {question[0]}"
        asked.add(question)
    return ""


def read(paths):
    """-> contents of the saved files, of one study, one per participant.

    Raises:
        UserError: not readable, not of this format, of another study than the first file, a participant twice.
    """
    found, owner = [], {}
    for path in paths:
        name = path.as_posix()
        try:
            content = system.read_json(path)
        except (OSError, ValueError) as error:
            raise config.UserError(f"cannot read {name} ({error}): give the JSON files that the study's page "
                                   "saves") from None
        if problem := problem_of(content):
            raise config.UserError(f"{name}: {problem}")
        if found and content["study"] != found[0]["study"]:
            raise config.UserError(f"{name} is of study {content['study']}, {paths[0].as_posix()} of "
                                   f"{found[0]['study']}: their answers cannot be put together")
        person = content["participant"].strip().casefold()
        for mark in filter(None, (("session", content["session"]), person and ("participant", person))):
            if other := owner.get(mark):
                raise config.UserError(f"{name} and {other} are of the same {mark[0]}, {mark[1]}: keep the one with "
                                       "more answers, or give two people of one name different ones in their files")
            owner[mark] = name
        found.append(content)
    return found


# ---- numbers ---------------------------------------------------------------------------------------------------

def triples(content, methods):
    """-> (N, 3) array of one participant's answers, as `preferences.win_matrix` takes them."""
    share = {"left": 1.0, "right": 0.0, "same": 0.5}
    return np.array([(methods.index(answer["left"]), methods.index(answer["right"]), share[answer["choice"]])
                     for answer in content["answers"]])


def pair_rows(answers, methods):
    """-> [{"method", "against", "count", "preferred", "same", "other", "rate", "low", "high"}, ...], a row per pair
    that was asked for; answers: (N, 3)."""
    rows = []
    for one, other in itertools.combinations(range(len(methods)), 2):
        shares = np.concatenate([answers[(answers[:, 0] == one) & (answers[:, 1] == other), 2],
                                 1 - answers[(answers[:, 0] == other) & (answers[:, 1] == one), 2]])
        if len(shares):
            low, high = preferences.wilson(float(shares.sum()), len(shares))
            rows.append({"method": methods[one], "against": methods[other], "count": len(shares),
                         "preferred": int((shares == 1).sum()), "same": int((shares == 0.5).sum()),
                         "other": int((shares == 0).sum()), "rate": float(shares.mean()), "low": low, "high": high})
    return rows


def order_rows(participants, methods, resamples):
    """-> [{"rank", "method", "strength", "count", and intervals}, ...], the strongest first.

    participants: [(N, 3) array of answers, ...].
    """
    answers = np.concatenate(participants)
    strengths = preferences.bradley_terry(preferences.win_matrix(answers, len(methods)))
    drawn = preferences.bootstrap_strengths(participants, len(methods), resamples)
    bounds = np.quantile(drawn, (0.025, 0.975), axis=0)
    places = np.quantile(preferences.ranks(drawn), (0.025, 0.975), axis=0, method="nearest")
    rank = preferences.ranks(strengths)
    return [{"rank": int(rank[i]), "rank_low": int(places[0, i]), "rank_high": int(places[1, i]), "method": methods[i],
             "strength": float(np.exp(strengths[i])), "strength_low": float(np.exp(bounds[0, i])),
             "strength_high": float(np.exp(bounds[1, i])), "count": int((answers[:, :2] == i).sum())}
            for i in np.argsort(-strengths, kind="stable")]


def summary(contents, resamples=RESAMPLES):
    """-> {"study", "participants", "answers", "asked", "left_share", "median_ms", "pairs": rows, "order": rows}.

    left_share: of the answers that prefer one side, how many prefer the left one (0.5 without a habit); None for none.
    """
    given = [answer for content in contents for answer in content["answers"]]
    # strongest first in both tables, so that most rates are above one half
    methods = sorted({answer[side] for answer in given for side in ("left", "right")})
    order = order_rows([triples(content, methods) for content in contents], methods, resamples)
    methods = [row["method"] for row in order]
    decided = [answer["choice"] == "left" for answer in given if answer["choice"] != "same"]
    return {"study": contents[0]["study"], "participants": len(contents), "answers": len(given),
            "asked": sum(content["comparisons"] for content in contents),
            "left_share": sum(decided) / len(decided) if decided else None,
            "median_ms": float(np.median([answer["milliseconds"] for answer in given])),
            "pairs": pair_rows(np.concatenate([triples(content, methods) for content in contents]), methods),
            "order": order}


def show(found):
    """Print the summary."""
    print(f"study {found['study']}: participants {found['participants']}, answers {found['answers']} of "
          f"{found['asked']}, median {found['median_ms'] / 1000:.1f} s"
          + ("" if found["left_share"] is None else
             f", the left one preferred in {100 * found['left_share']:.0f}% (50% without a habit)"))
    pairs = [row | {"rate": f"{100 * row['rate']:.0f}% ({100 * row['low']:.0f} to {100 * row['high']:.0f})"}
             for row in found["pairs"]]
    print("\n" + report.table(pairs, {"method": "method", "against": "against", "count": "n", "preferred": "preferred",
                                      "same": "no difference", "other": "other preferred",
                                      "rate": "win rate (95%)"}))
    order = [row | {"rank": f"{row['rank']} ({row['rank_low']} to {row['rank_high']})",
                    "strength": "{strength:.3g} ({strength_low:.3g} to {strength_high:.3g})".format(**row)}
             for row in found["order"]]
    print("\n" + report.table(order, {"method": "method", "rank": "rank (95%)", "strength": "strength (95%)",
                                      "count": "n"}))


def main(**overrides):
    """Print the tables; -> what `summary` finds."""
    cfg = config.resolve(globals(), overrides)
    if cfg.RESAMPLES < 100:
        raise config.UserError(f"RESAMPLES = {cfg.RESAMPLES}: choose 100 or more")
    paths = files_of(cfg.FILES)
    if cfg.OUT and Path(cfg.OUT).resolve() in {path.resolve() for path in paths}:
        raise config.UserError(f"OUT = '{cfg.OUT}' is one of the files to read: choose another name")
    contents = read(paths)
    if cfg.OUT:
        if Path(cfg.OUT).is_dir():
            raise config.UserError(f"OUT = '{cfg.OUT}' is a folder: give the name of a file, such as results.json")
        report.output_folder(Path(cfg.OUT).parent, (Path(cfg.OUT).name,))
    found = summary(contents, cfg.RESAMPLES)
    show(found)
    if cfg.OUT:
        report.write_results(cfg.OUT, cfg.as_dict(), found)
        print(f"\nwritten: {Path(cfg.OUT).as_posix()}")
    return found


def from_words(words):
    """-> the overrides of a command line whose first words, up to a flag, are FILES."""
    return config.from_command_line(globals(), ["--FILES", *words] if words and not words[0].startswith("-") else words)


if __name__ == "__main__":
    main(**from_words(sys.argv[1:]))
