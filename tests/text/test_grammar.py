"""Grammars as regular expressions, against the languages that they describe."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from itertools import product

import pytest

from amortlm import LanguageModel, Support, constraint, exact, narrow
from amortlm.errors import ConfigError
from amortlm.text.grammar import grammar_pattern
from amortlm.text.positions import Positions

SUMS = """
root ::= sum              # of products
sum ::= product ([+-] product)*
product ::= factor ("*" factor)*
factor ::= [0-9]{1,2} | "(" sum ")"
"""
NESTED = 'root ::= ("(" root ")")*'


def nesting(text: str) -> int:
    """How deep the brackets are nested; -1 if they do not pair."""
    deepest = now = 0
    for letter in text:
        now += 1 if letter == "(" else -1
        if now < 0:
            return -1
        deepest = max(deepest, now)
    return deepest if now == 0 else -1


def texts(letters: str, longest: int) -> Iterator[str]:
    for n in range(longest + 1):
        yield from map("".join, product(letters, repeat=n))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_brackets_nest_as_deep_as_is_said(depth: int) -> None:
    pattern = grammar_pattern(NESTED, depth)
    for text in texts("()", 10):
        assert (re.fullmatch(pattern, text) is not None) == (0 <= nesting(text) <= depth), text


def test_sums_are_what_python_reads() -> None:
    """All short texts: those that match are the arithmetic of Python without signs and with brackets once nested."""
    pattern = re.compile(grammar_pattern(SUMS, 1))
    found = 0
    for text in texts("1+*()", 6):
        try:
            tree = ast.parse(text, mode="eval")
            kinds = (ast.Expression, ast.BinOp, ast.Constant, ast.operator)
            right = all(isinstance(node, kinds) for node in ast.walk(tree)) and "**" not in text
        except SyntaxError:
            right = False
        right = right and nesting(re.sub("[^()]", "", text)) <= 1 and "111" not in text
        assert (pattern.fullmatch(text) is not None) == right, text
        found += right
    assert found > 40


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        ('root ::= "a" | "b" "c"', ["a", "bc"], ["ab", "c", "ac", ""]),
        ('root ::= [a-c\\-]+ [^a\\]] .', ["a-xx", "bb\nc", "cb]"], ["ax", "aaa", "a]x"]),
        ('root ::= "say \\"hi\\"\\n\\x41\\u00e9" "."', ['say "hi"\nA\u00e9.'], ['say "hi"nA\u00e9.', 'say "hi"\nA\u00e9x']),
        ('root ::= (a | "x"){2} a?\na ::= "q"  # comment "\nb ::= "never"', ["qx", "xxq", "qqq"], ["q", "xxx", "never"]),
        ('root ::= ["#|]* "#"', ["#", "\"|##"], ["", "|"]),
        ('root ::=\n  | "long"\n  | other-rule\nother-rule ::= "a" {0} "b" {1,2}', ["", "long", "b", "bb"], ["a", "ab", "bbb"]),
        ('root ::= [^^-]', ["a"], ["^", "-"]),
        ('root ::= [-a]', ["-", "a"], ["b"]),
    ],
)  # fmt: skip
def test_the_notation(source: str, right: list[str], wrong: list[str]) -> None:
    pattern = grammar_pattern(source)
    for text in right + wrong:
        assert (re.fullmatch(pattern, text) is not None) == (text in right), text
        assert Positions(pattern).matches(text) == (text in right), text


def derived(rules: dict[str, list[str]], text: str, inside: dict[str, int], depth: int) -> set[str]:
    """What is left of a text after any beginning that the rule `inside` was last entered for could have derived: by
    trying every alternative. Rules are capital letters."""
    rests = set()
    for alternative in rules[[*inside][-1]]:
        left = {text}
        for sign in alternative:
            if sign.isupper():
                if inside.get(sign, 0) > depth:
                    left = set()
                    break
                entered = {k: v for k, v in inside.items() if k != sign} | {sign: inside.get(sign, 0) + 1}
                left = {rest for t in left for rest in derived(rules, t, entered, depth)}
            else:
                left = {t[1:] for t in left if t.startswith(sign)}
        rests |= left
    return rests


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_rules_that_refer_to_each_other(depth: int) -> None:
    """The same rule stands in places that are differently deep."""
    rules = {"R": ["XYX"], "X": ["(Y)", "a"], "Y": ["[X]", "[YX]", "b"]}
    lines = [
        f"{'root' if k == 'R' else k} ::= "
        + " | ".join(" ".join(s if s.isupper() else f'"{s}"' for s in a) for a in v)
        for k, v in rules.items()
    ]
    pattern = re.compile(grammar_pattern("\n".join(lines), depth))
    rng, found = random.Random(depth), 0
    longer = list(texts("ab()[]", 5)) + ["".join(rng.choices("ab()[]", k=9)) for _ in range(20_000)]
    for _ in range(3000):  # texts that are derived at some depth
        text = "R"
        while any(s.isupper() for s in text) and len(text) < 40:
            at = next(i for i, s in enumerate(text) if s.isupper())
            text = text[:at] + rng.choice(rules[text[at]]) + text[at + 1 :]
        longer.append(text)
    for text in {t for t in longer if not any(s.isupper() for s in t)}:
        right = "" in derived(rules, text, {"R": 1}, depth)
        assert (pattern.fullmatch(text) is not None) == right, text
        found += right
    assert found > 5


def test_a_part_that_is_too_deep_is_left_out() -> None:
    source = 'root ::= "a" root? | "b" root | "c" root{0,2} | "d" root+ | "e"'
    assert set(filter(re.compile(grammar_pattern(source, 0)).fullmatch, texts("abcde", 2))) == {"a", "c", "e"}
    with pytest.raises(ConfigError, match="raise depth"):
        grammar_pattern('root ::= "(" root ")"', 3)


@pytest.mark.parametrize(
    ("source", "depth", "said"),
    [
        (SUMS, None, "'sum' refers to itself: give depth"),
        (SUMS, -1, "depth=-1"),
        ('root ::= rooot\nroot2 ::= "a"', None, "no rule 'rooot'"),
        ('start ::= "a"', None, "no rule 'root'"),
        ("", None, "it has none"),
        ('root ::= "a"\nroot ::= "b"', None, "line 2 of the grammar: there are two rules"),
        ('root ::= "a\n', None, "line 1 of the grammar: '\"a' cannot be read"),
        ('root ::= ("a"', None, "not closed"),
        ('root ::= "a")', None, "line 1 of the grammar: a rule"),
        ('root ::= | *', None, "nothing before it"),
        ('root ::= []', None, "empty set"),
        ('root ::= [^]', None, "empty set"),
        ({"root": "a"}, None, "a grammar is a text"),
        ('root ::= root root root root | "a"', 30, "too large"),
    ],
)  # fmt: skip
def test_what_is_no_grammar_is_refused(source: str, depth: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        grammar_pattern(source, depth)


def test_rules_without_texts_take_no_time() -> None:
    with pytest.raises(ConfigError, match="raise depth"):
        grammar_pattern("root ::= root root | root | root | root", 25)


def test_a_grammar_is_a_support(one_lm: LanguageModel) -> None:
    """Its posterior is that of the constraint on the wide support, and every draw is derived."""
    rule = constraint.grammar('root ::= "a" root | "t"+', depth=2)
    target = one_lm.log_prob("{z}", given="{x}") + rule
    wide = Support(stop=".", max_tokens=4, allowed_tokens=("a", "t", " a"))
    support, _ = narrow(wide, target, one_lm)
    law, row = support.bind(one_lm.codec), {"x": "the"}
    found = {one_lm.decode(z) for n in range(1, 5) for z in law.completions(n)}
    assert found == {"t", "tt", "ttt", "tttt", "at", "att", "attt", "aat", "aatt"} | {" a" + "t" * n for n in (1, 2, 3)} | {
        " aat", " aatt"
    }  # fmt: skip
    truth = [
        exact.enumerate_posterior(target.bind(one_lm), s.bind(one_lm.codec), row) for s in (wide, support)
    ]
    assert truth[0].log_z == pytest.approx(truth[1].log_z, abs=1e-5)


def test_random_matches_are_derived() -> None:
    """Beyond short texts: random walks through the automaton are sums, with brackets at most twice nested."""
    pattern, rng = Positions(grammar_pattern(SUMS, 2)), random.Random(0)
    letters = "0123456789+-*()"
    readers = dict(zip(letters, pattern.readers(letters), strict=True))
    deepest = 0
    for _ in range(200):
        reached, text = 1, ""
        while not (reached & pattern.final and rng.random() < 0.1) and len(text) < 80:
            ways = [(c, to) for c, reads in readers.items() if (to := pattern.after(reached) & reads)]
            letter, reached = rng.choice(ways)
            text += letter
        if reached & pattern.final:
            ast.parse(re.sub(r"\b0+(?=\d)", "", text), mode="eval")
            deepest = max(deepest, nesting(re.sub("[^()]", "", text)))
    assert deepest == 2
