"""A small template grammar: ``[a|b]`` picks one alternative, ``{slot}`` asks the cast for a word.

Slots are filled lazily and then stay fixed, so a colour named in the first sentence of a story is the same
colour in the last one. ``{toy2}`` is a second draw from the list ``toy``, different from ``{toy}``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from . import lexicon

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!uni|use|one\b|eu)")
_PRONOUNS = {
    "f": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "m": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
}


def choose(template: str, rng: random.Random) -> str:
    """Resolve every ``[a|b|c]`` of the template, innermost first."""
    while True:
        match = _CHOICE.search(template)
        if match is None:
            return template
        picked = rng.choice(match.group(1).split("|"))
        template = template[: match.start()] + picked + template[match.end() :]


def articles(text: str) -> str:
    """Write "an" where a vowel follows."""
    return _ARTICLE.sub(r"\1n ", text)


def tidy(sentence: str) -> str:
    """Fix a/an, squeeze double spaces and capitalise the first letter."""
    sentence = articles(re.sub(r" {2,}", " ", sentence)).strip()
    return sentence[:1].upper() + sentence[1:]


def fill(template: str, words: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """Expand a template without memory: every slot is a fresh draw, and may itself be a template."""
    text = choose(template, rng)
    while True:
        match = _SLOT.search(text)
        if match is None:
            return text
        drawn = choose(rng.choice(words[match.group(1)]), rng)
        text = text[: match.start()] + drawn + text[match.end() :]


class Cast:
    """The people and the words of one story."""

    def __init__(self, rng: random.Random, animal: bool = False) -> None:
        self.rng = rng
        self.values: dict[str, str] = {}
        self.relatives: list[str] = []
        gender = rng.choice("fm")
        kind = rng.choice(lexicon.HERO_ANIMALS) if animal else {"f": "girl", "m": "boy"}[gender]
        self._person("", gender, name=rng.choice(lexicon.ANIMAL_NAMES) if animal else None)
        self.values["who"] = self._introduction(kind, animal)

    def fork(self, rng: random.Random) -> Cast:
        """The same cast so far, with another source of chance for what is still open."""
        twin = Cast.__new__(Cast)
        twin.rng, twin.values, twin.relatives = rng, dict(self.values), list(self.relatives)
        return twin

    def render(self, template: str) -> str:
        """One finished sentence."""
        text = choose(template, self.rng)
        return tidy(_SLOT.sub(lambda match: self.get(match.group(1)), text))

    def get(self, slot: str) -> str:
        """The value of a slot, drawn when it is first asked for."""
        if slot not in self.values:
            self._draw(slot)
        return self.values[slot]

    def _introduction(self, kind: str, animal: bool) -> str:
        name = self.values["N"]
        size = self.rng.choice(("little ", "young ", "small ", "", "", "clever ", "shy ", "curious "))
        options = [f"a {size}{kind} named {name}", f"a {size}{kind} called {name}"]
        options += [f"{name} the {kind}"] * 2 if animal else [name] * 4
        return self.rng.choice(options)

    def _person(self, prefix: str, gender: str, name: str | None = None) -> None:
        taken = {self.values.get(key) for key in ("N", "F", "F2", "G")}
        pool = lexicon.GIRLS if gender == "f" else lexicon.BOYS
        chosen = name or self.rng.choice([other for other in pool if other not in taken])
        self.values[{"": "N", "f": "F", "f2": "F2", "g": "G"}[prefix]] = chosen
        for word, form in _PRONOUNS[gender].items():
            self.values[prefix + word] = form

    def _relative(self, prefix: str) -> None:
        pool = [
            entry
            for entry in lexicon.RELATIVES
            if entry[1] not in self.relatives and not (prefix == "k" and "neighbor" in entry[0])
        ]
        full, short, gender = self.rng.choice(pool)
        self.relatives.append(short)
        self.values[prefix.upper()] = full.format(p=self.values["his"])
        self.values[prefix] = short.format(p=self.values["his"])
        for word, form in _PRONOUNS[gender].items():
            self.values[prefix + word] = form

    def _draw(self, slot: str) -> None:
        if slot in ("F", "fhe", "fhim", "fhis"):
            self._person("f", self.rng.choice("fm"))
        elif slot == "F2":
            self._person("f2", "m")
        elif slot == "G":
            self._person("g", "f")
        elif slot[0] in "KkHh" and slot[1:] in ("", "he", "him", "his"):
            self._relative(slot[0].lower())
        elif slot == "pet_name":
            self.values[slot] = self.rng.choice(lexicon.PET_NAMES)
        else:
            base = slot.rstrip("0123456789")
            used = {value for key, value in self.values.items() if key.rstrip("0123456789") == base}
            self.values[slot] = self.rng.choice([word for word in lexicon.WORDS[base] if word not in used])
