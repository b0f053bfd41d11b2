"""Numbers from paired comparisons: how often one of two was preferred, and one order of all that were compared.

Sources: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927; Bradley & Terry,
"Rank analysis of incomplete block designs", Biometrika 1952; Hunter, "MM algorithms for generalized Bradley-Terry
models", Annals of Statistics 2004 (when the strengths exist).
"""

import math
from statistics import NormalDist

import numpy as np

VIRTUAL = 0.01  # wins that each method gets against every other one beside the real ones, see `bradley_terry`


def wilson(wins, count, level=0.95):
    """-> (low, high), Wilson's score interval of a rate of `wins` in `count` trials; (0, 1) for none.

    wins may be a fraction: with a tie as half a win the interval is a little too wide, since ties scatter less.
    """
    if not count:
        return 0.0, 1.0
    z, rate = NormalDist().inv_cdf((1 + level) / 2), wins / count
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def win_matrix(answers, count):
    """-> (count, count) array: how often method i was preferred to j; a tie is half a win for both.

    answers: (N, 3) array or list of (i, j, share), share 1 where i was preferred, 0 where j was, 0.5 for a tie.
    """
    wins = np.zeros((count, count))
    answers = np.asarray(answers, float).reshape(-1, 3)
    first, second = answers[:, 0].astype(int), answers[:, 1].astype(int)
    np.add.at(wins, (first, second), answers[:, 2])
    np.add.at(wins, (second, first), 1 - answers[:, 2])
    return wins


def bradley_terry(wins, virtual=VIRTUAL):
    """Strengths s with P(i is preferred to j) = s_i / (s_i + s_j), by maximum likelihood (Newton's method).

    Without a chain of wins from every method to every other one, such as where one is never preferred, no finite
    maximum exists (Hunter 2004, assumption 1). `virtual` wins of every method against every other one make it finite
    always: such a method is then far from the others, and how far says nothing.

    Args:
        wins: (M, M), from `win_matrix`.
    Returns:
        (M,) natural logarithms of the strengths, of mean 0; the difference of two is the logarithm of the odds.
    """
    wins = np.asarray(wins, float)
    others = 1 - np.eye(len(wins))
    wins = wins * others + virtual * others
    games, strengths = wins + wins.T, np.zeros(len(wins))
    for _ in range(500):
        rates = 1 / (1 + np.exp(strengths[None] - strengths[:, None]))  # (M, M): of i against j
        gradient = (wins - games * rates).sum(1)
        curvature = games * rates * (1 - rates)
        # + 1: without it the matrix is singular, as a constant added to all strengths changes nothing
        step = np.linalg.solve(np.diag(curvature.sum(1)) - curvature + 1, gradient)
        step *= min(1, 1 / max(np.abs(step).max(), 1e-300))  # far from the maximum Newton's step is too long
        strengths = strengths + step
        if np.abs(step).max() < 1e-9:
            break
    return strengths - strengths.mean()


def ranks(strengths):
    """(..., M) -> the same shape, 1 for the strongest; equal ones share the better rank."""
    strengths = np.asarray(strengths)
    return 1 + (strengths[..., None, :] > strengths[..., :, None] + 1e-9).sum(-1)


def bootstrap_strengths(participants, count, resamples=1000, seed=0):
    """Strengths of resampled studies: participants are drawn with replacement, then of each one the answers.

    The second drawing makes the intervals useful with a single participant, and a little too wide with many (Davison &
    Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8).

    Args:
        participants: [(N, 3) array as in `win_matrix`, ...], one per participant.
    Returns:
        (resamples, count) as from `bradley_terry`.
    """
    rng, found = np.random.default_rng(seed), []
    participants = [np.asarray(answers, float).reshape(-1, 3) for answers in participants]
    for _ in range(resamples):
        drawn = [participants[i] for i in rng.integers(len(participants), size=len(participants))]
        drawn = [answers[rng.integers(len(answers), size=len(answers))] for answers in drawn]
        found.append(bradley_terry(win_matrix(np.concatenate(drawn), count)))
    return np.array(found)
