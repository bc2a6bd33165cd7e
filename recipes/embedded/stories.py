"""Five-sentence stories whose ending depends on the fourth sentence.

The plots are text files in ``plots/``. Each plot gives several wordings of sentences 1, 2 and 3, and several
*branches*: a branch is one thing that may happen in sentence 4 (the middle), in several wordings, with the
endings that follow from it. A branch is good (``+``) or bad (``-``); ``=+`` and ``=-`` lines are endings that
fit every good or every bad branch of the plot, so an ending does not always give its middle away.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from . import lexicon
from .grammar import Cast

PLOT_FILES = Path(__file__).parent / "plots"
SHARED_ENDING = 0.18  # share of stories that end in a sentence common to all good or all bad branches
ANIMAL_HERO = 0.15


@dataclass
class Branch:
    """One thing that may happen in the middle, and how the story then ends."""

    good: bool
    middles: list[str] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)


@dataclass
class Plot:
    """One plot schema: wordings of sentences 1 to 3, the branches, and the shared endings."""

    name: str
    steps: dict[str, list[str]] = field(default_factory=lambda: {"1": [], "2": [], "3": []})
    branches: list[Branch] = field(default_factory=list)
    shared: dict[bool, list[str]] = field(default_factory=lambda: {True: [], False: []})


@dataclass(frozen=True)
class Story:
    """A finished story: its sentences, the plot and the branch it took."""

    sentences: tuple[str, ...]
    plot: str
    branch: int

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def parse_plots(text: str) -> list[Plot]:
    """Read plots in the line format described in the README."""
    plots: list[Plot] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("== "):
            plots.append(Plot(line[3:]))
            continue
        plot, head, rest = plots[-1], line[0], line[2:].strip()
        if line.startswith(("=+", "=-")):
            plot.shared[line[1] == "+"].append(rest)
        elif head in "+-":
            plot.branches.append(Branch(good=head == "+"))
        elif head in "123":
            plot.steps[head].append(rest)
        else:
            branch = plot.branches[-1]
            (branch.middles if head == "4" else branch.endings).append(rest)
    return plots


@lru_cache(maxsize=1)
def plots() -> tuple[Plot, ...]:
    """Every plot of the ``plots/`` folder, in a fixed order."""
    files = sorted(PLOT_FILES.glob("*.txt"))
    return tuple(plot for file in files for plot in parse_plots(file.read_text(encoding="utf-8")))


def _name_hero_first(template: str) -> str:
    """In an opening sentence, turn "his aunt gave Tom ..." into "Tom's aunt gave him ..."."""
    relative, hero = template.find("{K}"), re.search(r"\{(N|who)\}", template)
    if relative < 0 or (hero is not None and hero.start() < relative):
        return template
    rest = re.sub(r"\b(and|so) \{N\}(?!')", r"\1 {he}", template[relative + 3 :])
    rest = re.sub(r"\{N\}(?!')", "{him}", rest).replace("{N}'s", "{his}")
    return template[:relative] + "{N}'s {relation}" + rest


def _opening(rng: random.Random) -> tuple[Plot, Cast, list[str]]:
    plot = rng.choice(plots())
    animal = rng.random() < ANIMAL_HERO
    first = [line for line in plot.steps["1"] if "{who}" in line] if animal else plot.steps["1"]
    if not first:
        animal, first = False, plot.steps["1"]
    cast = Cast(rng, animal)
    template = _name_hero_first(rng.choice(first))
    if "{relation}" in template:
        cast.values["relation"] = cast.get("K").split(" ", 1)[1]
    sentences = [cast.render(template)]
    sentences += [cast.render(rng.choice(plot.steps[step])) for step in "23"]
    return plot, cast, sentences


def _close(plot: Plot, branch: Branch, cast: Cast) -> tuple[str, str]:
    middle = cast.render(cast.rng.choice(branch.middles))
    shared = plot.shared[branch.good]
    use_shared = bool(shared) and cast.rng.random() < SHARED_ENDING
    return middle, cast.render(cast.rng.choice(shared if use_shared else branch.endings))


def story(key: str) -> Story:
    """The five-sentence story of a key: the same key always gives the same story."""
    rng = random.Random(key)
    plot, cast, sentences = _opening(rng)
    number = rng.randrange(len(plot.branches))
    return Story((*sentences, *_close(plot, plot.branches[number], cast)), plot.name, number)


def other_middle(key: str) -> str:
    """A middle of the same story opening (same plot, people and things) that takes another branch."""
    rng = random.Random(key)
    plot, cast, _ = _opening(rng)
    taken = rng.randrange(len(plot.branches))
    chance = random.Random(key + "/other")
    number = chance.choice([index for index in range(len(plot.branches)) if index != taken])
    return _close(plot, plot.branches[number], cast.fork(chance))[0]


def loose_story(key: str) -> str:
    """A story of three to eight sentences: sentences left out, or an opener and codas added."""
    rng = random.Random(key + "/loose")
    plot, cast, sentences = _opening(rng)
    parts = [*sentences, *_close(plot, rng.choice(plot.branches), cast)]
    length = rng.randint(3, 8)
    for index in [2, 1][: max(0, 5 - length)]:
        del parts[index]
    if length >= 6:
        parts.insert(0, cast.render(rng.choice(lexicon.OPENERS)))
    codas = rng.sample(lexicon.CODAS, max(0, length - 6))
    return " ".join([*parts, *(cast.render(coda) for coda in codas)])
