"""Random numbers, words and cards from a description: "the number of heads in 20 tosses of a fair coin".

A row is {"prompt": the description, "family": its name, "parameters": those of the family}. The posterior is the stated
distribution, over at most some 200 short texts, so how far a sampler is from it is known exactly.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from amortlm.errors import DataError
from amortlm.types import Row

TAIL = 1e-6  # probability of the rarest outcomes, which are left out
MOST = 1000  # outcomes
# A whole number, a word, or a card: all that any description asks for. One q serves them all.
PATTERN = r"-?[0-9]{1,3}|[A-Z]?[a-z]+|([0-9]+|[a-z]+) of [a-z]+"

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "pink", "brown")
NAMES = ("Anna", "Ben", "Tom", "Lily", "Max", "Sue", "Sam", "Lucy")
WEATHER = ("sunny", "rainy", "cloudy", "windy", "snowy", "foggy")
SUITS = ("clubs", "diamonds", "hearts", "spades")
RANKS = ("2", "3", "4", "5", "6", "7", "8", "9", "10", "jack", "queen", "king", "ace")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

Parameters = Mapping[str, Any]
Weights = dict[Any, float]  # by outcome, ascending where outcomes are numbers


@dataclass(frozen=True)
class Family:
    """draw: random parameters, as JSON. weights: their probabilities, where at most TAIL / 100 is missing. phrasings:
    templates with every parameter, for training; unseen: others, held out. numeric: are its outcomes whole numbers?"""

    draw: Callable[[random.Random], Parameters]
    weights: Callable[..., Weights]
    phrasings: Sequence[str]
    unseen: Sequence[str]
    numeric: bool = True


@dataclass(frozen=True)
class Descriptions:
    """Rows to train on; rows held out, by what is new about them (`GROUPS`)."""

    train: list[Row]
    test: dict[str, list[Row]]


def distribution(row: Row) -> dict[str, float]:
    """Outcome -> log probability (nats) of a row's description, normalised without its rarest outcomes."""
    return _distribution(row["family"], json.dumps(row["parameters"]))


@cache
def _distribution(family: str, parameters: str) -> dict[str, float]:
    weights = without_tail(FAMILIES[family].weights(**json.loads(parameters)))
    total = math.fsum(weights.values())
    return {f" {outcome}": math.log(w / total) for outcome, w in weights.items()}


def without_tail(weights: Weights) -> Weights:
    """All but the rarest outcomes, of probability TAIL together: a log probability of -100 nats would rule the loss."""
    left_out, dropped = 0.0, set()
    for outcome in sorted(weights, key=weights.__getitem__):
        left_out += weights[outcome]
        if left_out > TAIL:
            break
        dropped.add(outcome)
    return {outcome: w for outcome, w in weights.items() if outcome not in dropped}


def log_prob(texts: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """The verifier: each text's log probability (nats) under the description of its row, -inf for other texts."""
    return [distribution(row).get(text, -math.inf) for text, row in zip(texts, rows, strict=True)]


def descriptions(train: int, test: int, seed: object = 0) -> Descriptions:
    """`train` rows and `test` rows of each group, families in turn. No row of a test has the parameters of another row
    of its family. Raises DataError where a family has not so many."""
    rng = random.Random(repr(("dice", seed)))
    taken: set[str] = set()
    groups = {
        "parameters": _rows(test, SEEN, lambda f: f.phrasings, rng, taken, fresh=True),
        "phrasings": _rows(test, SEEN, lambda f: f.unseen, rng, taken, fresh=True),
        "families": _rows(test, HELD_OUT, lambda f: (*f.phrasings, *f.unseen), rng, taken, fresh=True),
    }
    return Descriptions(_rows(train, SEEN, lambda f: f.phrasings, rng, taken), groups)


def _rows(
    count: int,
    names: Sequence[str],
    phrasings: Callable[[Family], Sequence[str]],
    rng: random.Random,
    taken: set[str],
    fresh: bool = False,
) -> list[Row]:
    """Rows with different prompts, and without parameters that are `taken`. fresh: takes those of each row."""
    found: dict[str, Row] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        name = names[len(found) % len(names)]
        row = row_of(name, FAMILIES[name].draw(rng), rng.choice(phrasings(FAMILIES[name])))
        key = json.dumps([name, row["parameters"]])
        if key not in taken and row["prompt"] not in found:
            found[row["prompt"]] = row
            taken |= {key} if fresh else set()
    if len(found) < count:
        raise DataError(f"there are no {count} different descriptions of {', '.join(names)}; ask for fewer")
    return list(found.values())


def row_of(family: str, parameters: Parameters, phrasing: str) -> Row:
    shown = {name: _shown(value) for name, value in parameters.items()}
    return {"prompt": phrasing.format(**shown), "family": family, "parameters": parameters}


def _shown(value: Any) -> str:
    """As it stands in a prompt: .35, "red 30 %, blue 70 %", "hearts and spades"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {percent} %" for name, percent in value.items())
    if isinstance(value, list):
        return " and ".join(filter(None, [", ".join(value[:-1]), value[-1]]))
    return str(value)


# Probabilities


def equal(outcomes: Iterable[Any]) -> Weights:
    listed = list(outcomes)
    return dict.fromkeys(listed, 1 / len(listed))


def until_tail(pmf: Callable[[int], float], first: int = 0) -> Weights:
    """From `first` upwards, until less than TAIL / 100 is left. Raises DataError if that is never so."""
    kept: Weights = {}
    for outcome in range(first, first + MOST):
        kept[outcome] = pmf(outcome)
        if math.fsum(kept.values()) >= 1 - TAIL / 100:
            return kept
    raise DataError(f"the probabilities of {MOST} outcomes sum to {math.fsum(kept.values()):g}, not to 1")


def rounded(cdf: Callable[[float], float], low: int, high: int) -> Weights:
    """Probabilities of low..high for a continuous number that is rounded to the nearest whole one."""
    return {k: cdf(k + 0.5) - cdf(k - 0.5) for k in range(low, high + 1)}


def sum_of_dice(count: int, sides: int) -> Weights:
    ways = {0: 1}
    for _ in range(count):
        longer: dict[int, int] = {}
        for total, n in ways.items():
            for face in range(1, sides + 1):
                longer[total + face] = longer.get(total + face, 0) + n
        ways = longer
    return {total: n / sides**count for total, n in sorted(ways.items())}


def binomial(trials: int, chance: float) -> Weights:
    return {k: math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(trials + 1)}


def poisson(mean: float) -> Weights:
    return until_tail(lambda k: math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)))


def geometric(chance: float) -> Weights:
    return until_tail(lambda k: chance * (1 - chance) ** (k - 1), first=1)


def negative_binomial(successes: int, chance: float) -> Weights:
    return until_tail(lambda k: math.comb(k + successes - 1, k) * chance**successes * (1 - chance) ** k)


def normal(mean: int, sd: int) -> Weights:
    return rounded(lambda x: 0.5 * math.erfc((mean - x) / (sd * math.sqrt(2))), mean - 6 * sd, mean + 6 * sd)


def exponential(mean: float) -> Weights:
    return rounded(lambda x: -math.expm1(-max(0.0, x) / mean), 0, math.ceil(20 * mean))


def triangular(low: int, mode: int, high: int) -> Weights:
    def cdf(x: float) -> float:
        x = min(max(x, low), high)
        if x <= mode:
            return (x - low) ** 2 / ((high - low) * (mode - low)) if mode > low else 0.0
        return 1 - (high - x) ** 2 / ((high - low) * (high - mode))

    return rounded(cdf, low, high)


def stated(chances: Mapping[str, int]) -> Weights:
    return {name: percent / 100 for name, percent in chances.items()}


def cards(lowest: str, suits: Sequence[str]) -> Weights:
    ranks = RANKS[RANKS.index(lowest) :]
    return equal(f"{rank} of {suit}" for suit in suits for rank in ranks)


def between(cycle: Sequence[str], first: str, last: str) -> Weights:
    """Equal for every name from the first to the last, on past the end of the week or year."""
    start = cycle.index(first)
    length = (cycle.index(last) - start) % len(cycle) + 1
    return equal(cycle[(start + i) % len(cycle)] for i in range(length))


# Random parameters


def percentages(rng: random.Random, pool: Sequence[str]) -> Parameters:
    """Two to five names, with whole percentages of at least one that sum to 100."""
    names = rng.sample(pool, rng.randint(2, 5))
    cuts = [0, *sorted(rng.sample(range(1, 100), len(names) - 1)), 100]
    return {"chances": {name: high - low for name, low, high in zip(names, cuts, cuts[1:], strict=False)}}


def ends(rng: random.Random, cycle: Sequence[str]) -> Parameters:
    first, last = rng.sample(cycle, 2)
    return {"first": first, "last": last}


def some_interval(rng: random.Random) -> Parameters:
    low = rng.randint(0, 90)
    return {"low": low, "high": low + rng.randint(2, 100)}


def some_triangle(rng: random.Random) -> Parameters:
    low, width = rng.randint(0, 60), rng.randint(5, 80)
    return {"low": low, "mode": low + rng.randint(0, width), "high": low + width}


def some_cards(rng: random.Random) -> Parameters:
    chosen = rng.sample(SUITS, rng.randint(1, 4))
    return {"lowest": rng.choice(RANKS[:9]), "suits": [suit for suit in SUITS if suit in chosen]}


def some_coin(rng: random.Random) -> Parameters:
    heads = rng.randint(5, 95)
    return {"chances": {"heads": heads, "tails": 100 - heads}}


FAMILIES: dict[str, Family] = {
    "uniform": Family(
        some_interval,
        lambda low, high: equal(range(low, high + 1)),
        (
            "The following is a random integer drawn uniformly between {low} and {high}:",
            "A whole number from {low} to {high}, each equally likely:",
            "She picks a number from {low} to {high} at random. The number is",
        ),
        ("Choose any integer that is at least {low} and at most {high}, all with the same probability:",),
    ),
    "die": Family(
        lambda rng: {"sides": rng.randint(4, 100)},
        lambda sides: equal(range(1, sides + 1)),
        (
            "A fair die with {sides} sides is rolled. It shows",
            "Result of one roll of a fair {sides}-sided die:",
            "The sides of a die are numbered from 1 to {sides}. She rolls it once and gets",
        ),
        ("One throw of a d{sides}, a fair die:",),
    ),
    "dice": Family(
        lambda rng: {"count": rng.randint(2, 5), "sides": rng.choice((4, 6, 8, 10, 12, 20))},
        sum_of_dice,
        (
            "{count} fair dice with {sides} sides each are rolled. The sum of the numbers is",
            "Total of {count}d{sides}:",
            "She rolls a fair {sides}-sided die {count} times and adds up the numbers. The sum is",
        ),
        ("Add the points of {count} fair {sides}-sided dice:",),
    ),
    "binomial": Family(
        lambda rng: {"trials": rng.randint(2, 60), "chance": rng.randint(1, 19) / 20},
        binomial,
        (
            "A random number from the binomial distribution with n = {trials} and p = {chance}:",
            "Each of {trials} trials succeeds with probability {chance}. The number of successes is",
            "A coin that shows heads with probability {chance} is tossed {trials} times. The number of heads is",
        ),
        ("Out of {trials} seeds, each grows with probability {chance}. So many grow:",),
    ),
    "poisson": Family(
        lambda rng: {"mean": rng.randint(1, 40) / 2},
        poisson,
        (
            "A random number from the Poisson distribution with mean {mean}:",
            "Calls come independently, {mean} in an hour on average. The number of calls in this hour is",
            "Draw from Poisson(lambda = {mean}):",
        ),
        ("On average {mean} cars pass in a minute, each at a random time. In this minute so many pass:",),
    ),
    "geometric": Family(
        lambda rng: {"chance": rng.randint(10, 90) / 100},
        geometric,
        (
            "Each trial succeeds with probability {chance}. The number of trials up to the first success is",
            "A random number from the geometric distribution on 1, 2, 3, ... with p = {chance}:",
            "She tries until it works, which it does with probability {chance} each time. Her tries:",
        ),
        ("Tosses of a coin until it shows heads, if heads has probability {chance}:",),
    ),
    "normal": Family(
        lambda rng: {"mean": rng.randint(-20, 120), "sd": rng.randint(1, 15)},
        normal,
        (
            "A random number from the normal distribution with mean {mean} and standard deviation {sd}, rounded:",
            "Draw from N({mean}, {sd}^2) and round to an integer:",
            "A measurement is normal with mean {mean} and sd {sd}. To the nearest whole number it is",
        ),
        ("A bell curve is centred at {mean} and has a standard deviation of {sd}. A rounded draw from it:",),
    ),
    "exponential": Family(
        lambda rng: {"mean": rng.randint(10, 120) / 10},
        exponential,
        (
            "A random number from the exponential distribution with mean {mean}, rounded:",
            "The waiting time is exponential with a mean of {mean} minutes. Rounded to whole minutes it is",
            "Draw from an exponential distribution with expectation {mean} and round to the nearest integer:",
        ),
        ("A lamp fails at a constant rate, after {mean} years on average. Rounded to years it lasted",),
    ),
    "categories": Family(
        lambda rng: percentages(rng, rng.choice((COLOURS, NAMES))),
        stated,
        (
            "One of these is drawn with the stated probabilities ({chances}):",
            "The chances are {chances}. The outcome is",
            "A wheel stops at random: {chances}. It stops at",
        ),
        ("Draw one at random, in these proportions: {chances}. Drawn:",),
        numeric=False,
    ),
    "weather": Family(
        lambda rng: percentages(rng, WEATHER),
        stated,
        (
            "The forecast for tomorrow says {chances}. Tomorrow it is",
            "Weather of a random day, where days are {chances}:",
            "In this town the weather is as follows: {chances}. Today it is",
        ),
        ("Chances for the weather on Sunday: {chances}. On Sunday it was",),
        numeric=False,
    ),
    "card": Family(
        some_cards,
        cards,
        (
            "A card is drawn from a shuffled deck with the cards from {lowest} to ace of {suits}. It is the",
            "A random card, {lowest} or higher (ace is highest), of {suits}: the",
            "The deck has only {suits}, from {lowest} up to ace. She draws the",
        ),
        ("All cards below {lowest} are taken out, and all suits but {suits} (aces stay). You draw the",),
        numeric=False,
    ),
    "weekday": Family(
        lambda rng: ends(rng, WEEKDAYS),
        lambda first, last: between(WEEKDAYS, first, last),
        (
            "A random day of the week from {first} to {last}:",
            "The shop is open from {first} to {last}. He comes on one of these days, each equally likely:",
            "One of the days from {first} to {last} is drawn uniformly. It is",
        ),
        ("Pick any weekday, not before {first} and not after {last}, at random:",),
        numeric=False,
    ),
    "month": Family(
        lambda rng: ends(rng, MONTHS),
        lambda first, last: between(MONTHS, first, last),
        (
            "A random month from {first} to {last}:",
            "The season lasts from {first} to {last}. One of its months, each equally likely:",
            "One of the months from {first} to {last} is drawn uniformly. It is",
        ),
        ("Pick any month, not before {first} and not after {last}, at random:",),
        numeric=False,
    ),
    "negative binomial": Family(
        lambda rng: {"successes": rng.randint(2, 8), "chance": rng.randint(4, 16) / 20},
        negative_binomial,
        (
            "Trials succeed with probability {chance}. The number of failures before success number {successes} is",
            "A random number from the negative binomial distribution (failures) with r = {successes}, p = {chance}:",
        ),
        ("She throws until she has hit {successes} times, with probability {chance} each. Her misses:",),
    ),
    "triangular": Family(
        some_triangle,
        triangular,
        (
            "A draw from the triangular distribution from {low} to {high} with mode {mode}, rounded:",
            "A number between {low} and {high}, with a triangular density that peaks at {mode}, rounded:",
        ),
        ("Triangular({low}, {mode}, {high}), to the nearest integer:",),
    ),
    "coin": Family(
        some_coin,
        stated,
        (
            "A bent coin is tossed ({chances}). It shows",
            "Heads or tails? The coin is loaded: {chances}. The toss gives",
        ),
        ("The coin lands with these chances: {chances}. It landed on",),
        numeric=False,
    ),
}
HELD_OUT = ("negative binomial", "triangular", "coin")  # never trained on
SEEN = tuple(name for name in FAMILIES if name not in HELD_OUT)
GROUPS = {
    "parameters": "families and phrasings of training, other parameters",
    "phrasings": "families of training, other phrasings and parameters",
    "families": f"families that are not in training: {', '.join(HELD_OUT)}",
}
