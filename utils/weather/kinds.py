"""Kinds of weather that trainings draw, chosen by shares: RAIN_KINDS of the scripts."""

import numpy as np

from utils.config import UserError
from utils.weather import rain
from utils.weather.windshield import add_drops

KINDS = ("light", "medium", "heavy", "mist", "fog", "drops", "drops and rain")


def add_weather(image, rng, kind):
    """Weather of one kind on a clean photograph.

    Args:
        image: (H, W, 3) uint8 RGB; rng: numpy Generator; kind: one of KINDS.
    Returns:
        (H, W, 3) uint8.
    """
    if kind == "mist":
        return rain.add_mist(image, rng)
    if kind == "fog":
        return rain.add_fog(image, rng)
    if kind == "drops":  # light ones alone can be next to nothing
        return add_drops(image, rng, ("medium", "heavy")[rng.integers(2)])
    if kind == "drops and rain":
        return add_drops(rain.add_rain(image, rng), rng)
    return rain.add_rain(image, rng, kind)


def draw(image, rng, shares):
    """Weather of a kind that is drawn as well; shares: {kind: number} of any sum. See add_weather."""
    numbers = np.array(list(shares.values()), float)
    return add_weather(image, rng, list(shares)[rng.choice(len(numbers), p=numbers / numbers.sum())])


def require_shares(shares):
    """-> {kind: share} without those of no share; UserError for a RAIN_KINDS by which nothing can be drawn."""
    numbers = list(shares.values()) if isinstance(shares, dict) and shares.keys() <= set(KINDS) else []
    if not (all(isinstance(share, (int, float)) and 0 <= share < float("inf") for share in numbers)
            and sum(numbers) > 0):
        raise UserError(f"RAIN_KINDS = {shares!r}: give shares of some of {', '.join(KINDS)}, such as "
                        "{'medium': 0.5, 'heavy': 0.5}")
    return {kind: share for kind, share in shares.items() if share}
