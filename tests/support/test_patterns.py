"""Supports whose completions match a regular expression, against every string that does."""

from __future__ import annotations

import dataclasses
import random
import re
import signal
from collections import Counter
from itertools import product

import pytest
import torch
from reference import tiny_lm, tiny_policy, tiny_tokenizer
from stats import LEVEL, g_test
from structured_cases import ROW, ROWS, log_q, p_value

from amortlm import LanguageModel, Posterior, Support, constraint, exact
from amortlm.engine.decoding import Exploration
from amortlm.engine.prefix import pad_right
from amortlm.errors import DataError, SupportError
from amortlm.inference.mcmc import metropolis_hastings
from amortlm.inference.smc import smc
from amortlm.policy.laws import check_policy, support_completions
from amortlm.support import automaton, patterns, token_tables
from amortlm.support.spelling import Spelling, spelling
from amortlm.types import Rollouts

FEW = ("a", "t", " a", " cat", " ", "c")
SUPPORTS = {
    "a choice": Support(stop=".", max_tokens=3, pattern="(a|the) (cat|dog)"),
    "no bound": Support(stop=(".", "!"), min_tokens=2, max_tokens=4, allowed_tokens=FEW, pattern="(a|cat)( cat)*"),
    "may be empty": Support(stop=".", min_tokens=0, max_tokens=3, allowed_tokens=FEW, pattern="a?t*"),
    "longer than its start": Support(stop=".", min_tokens=4, max_tokens=4, allowed_tokens=FEW, pattern="[act]+|a"),
    "first alternative too short": Support(stop=".", max_tokens=3, allowed_tokens=FEW, pattern="a|a+t|(c|ca)t? cat"),
    "tokens end between matches": Support(stop=".", max_tokens=4, allowed_tokens=FEW, pattern="(ca)*|a(ta)*|cat( cat)*"),
    "alternatives that nothing writes": Support(stop=".", max_tokens=3, allowed_tokens=FEW, pattern="ax|at|1+|c9*"),
    "two patterns": Support(stop=".", max_tokens=3, allowed_tokens=FEW, pattern=["a.*", ".*cat|.*t+"]),
    "without a letter": Support(stop=".", max_tokens=3, allowed_tokens=FEW, pattern="[^c]*"),
}  # fmt: skip


def tables(pattern: str, texts: dict[int, str], size: int) -> dict[str, torch.Tensor]:
    """Of one pattern, on tokens that write these texts."""
    return patterns._tables([pattern], Spelling(texts, {}, frozenset()), size)


def matching(support: Support, lm: LanguageModel) -> list[list[int]]:
    """The completions from the definition: all strings of allowed tokens whose text matches."""
    words = support.allowed_tokens or [i for i in range(2, len(lm.tokenizer)) if i != lm.token_id(".")]
    ids = [lm.token_id(w) for w in words]
    strings = (z for n in range(support.min_tokens, support.max_tokens + 1) for z in product(ids, repeat=n))
    return [list(z) for z in strings if all(re.fullmatch(p, lm.decode(z).strip()) for p in support.patterns)]


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_support_holds_what_matches_and_nothing_else(family_lm: LanguageModel, name: str) -> None:
    support = SUPPORTS[name]
    bound, expected = support.bind(family_lm), matching(support, family_lm)
    found = [z for n in range(bound.min_tokens, bound.max_tokens + 1) for z in bound.completions(n)]
    assert len(found) == len(expected) == bound.size() > 0
    assert set(map(tuple, found)) == set(map(tuple, expected))
    ids = [family_lm.token_id(w) for w in support.allowed_tokens or FEW]
    strings = [z for n in range(bound.max_tokens + 2) for z in product(ids, repeat=n)]
    expected = set(map(tuple, expected))
    assert [bound.contains(z) for z in strings] == [z in expected for z in strings]
    tokens, lengths = pad_right(found, "cpu")
    rollouts = bound.rollouts([ROW], torch.zeros_like(lengths), tokens, lengths)
    for z, mask in zip(found, rollouts.stop_mask.tolist(), strict=True):
        assert mask[: len(z) + 1] == [tuple(z[:t]) in expected for t in range(len(z) + 1)]


ATOMS = ["a", "t", "c", " ", ".", "[^a]", "[ac]", r"\s", r"\S", r"\w", ""]
# What engines differ in: Unicode classes, letter case, flags, escapes, signs in classes.
ODD_ATOMS = [
    *[r"\d", r"\W", r"\D", "(?i:é)", "(?i:k)", "(?i:[^s])", r"(?a:\w)", r"(?a:\s)", "(?s:.)", "(?-i:k)", r"\x61", r"\101"],
    *[r"\n", r"[\]a]", "[a-]", "[]a]", "[^]a]", r"[^\W\d]", r"\.", r"[\s\S]", "É", "[à-ï]", r"\u0661", "ſ", "(?x: a #\n)"],
]  # fmt: skip
REFUSED = [
    *["^a", "a$", r"a\b", r"\Ba", r"\Aa", r"a\Z", "(?=a)a", "(?!c)a", "(?<=a)t", "(?<!a)t", r"(a|c)\1", "(?P<m>a)(?P=m)"],
    *["(?>a*)", "a*+", "(a)?(?(1)t|c)", r"\h", r"\p{L}", r"\x{61}", "a{,2}", "[[:alpha:]]", "[a&&c]", "[a--c]", "a**", "(?z)a"],
]  # fmt: skip


def random_pattern(rng: random.Random, depth: int, atoms: list[str] = ATOMS) -> str:
    choice = rng.random()
    if depth == 0 or choice < 0.3:
        return rng.choice(atoms)
    part = f"{rng.choice(['(?:', '('])}{random_pattern(rng, depth - 1, atoms)})"
    if choice < 0.6:
        return part + random_pattern(rng, depth - 1, atoms)
    if choice < 0.8:
        return f"(?:{part}|{random_pattern(rng, depth - 1, atoms)})"
    return part + rng.choice(["*", "?", "+", "{2}", "{1,2}", "{0,3}", "{2,}"]) + rng.choice(["", "", "?"])


def test_random_patterns_are_those_of_re(one_lm: LanguageModel) -> None:
    rng, sizes = random.Random(0), []
    for _ in range(150):
        pattern = random_pattern(rng, 3)
        words = rng.sample(["a", "t", " a", " cat", " ", "c", "\n"], rng.randint(1, 4))
        ids = sorted(one_lm.token_id(w) for w in words)
        strings = [z for n in range(4) for z in product(ids, repeat=n)]
        expected = [list(z) for z in strings if re.fullmatch(pattern, one_lm.decode(z).strip())]
        sizes.append(len(expected))
        support = Support(stop=".", min_tokens=0, max_tokens=3, allowed_tokens=words, pattern=pattern)
        if not expected:
            with pytest.raises(SupportError, match="no text of 0 to 3 allowed tokens"):
                support.bind(one_lm)
            continue
        bound = support.bind(one_lm)
        assert [z for n in range(4) for z in bound.completions(n)] == expected, pattern
        assert bound.size() == len(expected)
    assert sum(n > 0 for n in sizes) > 75


def differing(pattern: str, words: list[str]) -> list[str]:
    """Texts of up to three words that the tables and `re` judge differently."""
    found_tables = tables(pattern, dict(enumerate(words)), len(words))
    step, kind, accepts = (found_tables[name].tolist() for name in ("step", "token_class", "accepts"))
    step.append([len(accepts)] * len(step[0]))
    accepts.append(False)
    whole, found = re.compile(pattern), []
    for z in (z for n in range(4) for z in product(range(len(words)), repeat=n)):
        text, state = "".join(words[token] for token in z), 0
        for token in z:
            state = step[state][kind[token]]
        if accepts[state] != bool(whole.fullmatch(text.strip())):
            found.append(text)
    return found


def test_patterns_that_engines_read_differently_are_those_of_re_or_refused() -> None:
    rng, refused = random.Random(0), 0
    words = [
        "a",
        "t",
        "c",
        " ",
        "\n",
        "A",
        "é",
        "É",
        "k",
        "\u212a",
        "ſ",
        "S",
        "s",
        "1",
        "\u0661",
        "_",
        ".",
        "]",
        "-",
    ]
    words += [
        "\x1c",
        "\x85",
        "\xa0",
        "\u200b",
        "\u3000",
        "at",
        " a",
        "t ",
        "  ",
        "a\n",
        "日本",
        "🙂",
        "]a",
        "#",
    ]
    for _ in range(400):
        atoms = ATOMS + ODD_ATOMS + rng.sample(REFUSED, 1) * (rng.random() < 0.3)
        pattern = rng.choice(["", "", "(?i)", "(?s)", "(?x)", "(?a)"]) + random_pattern(rng, 4, atoms)
        try:
            assert not differing(pattern, rng.sample(words, 9)), pattern
        except SupportError:
            refused += 1
    assert 0 < refused < 100


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_not_regular_or_not_read_alike_is_refused(pattern: str) -> None:
    for text in (pattern, f"(?:c|{pattern})*" if pattern != "(?z)a" else pattern):
        with pytest.raises(SupportError, match=r"regular expression '"):
            tables(text, {0: "a"}, 1)


COUNTED = {  # with the states of the smallest automaton over characters, the dead end included
    ".{0,40}": 42,
    "[a-z ]{0,40}": 42,
    r"\S(.{0,98}\S)?": 102,
    r"\w+( \w+){0,30}": 63,
    ".*a.{6}": 131,
    "(.{0,20}){0,20}": 402,
}


@pytest.mark.parametrize("pattern", COUNTED)
def test_counts_with_white_space(embedded: LanguageModel, pattern: str) -> None:
    support = Support(stop="</s>", max_tokens=60, pattern=pattern).bind(embedded)
    characters = patterns._characters([pattern], spelling(embedded.codec, support.allowed))
    assert len(characters.table) + 1 == COUNTED[pattern]
    rng, held = random.Random(0), Counter()
    ids = [embedded.token_id(t) for t in ("a", " a", " the", "c", " ", "1")] + rng.sample(range(4, 2560), 30)
    for _ in range(400):
        z = rng.choices(ids, k=rng.randint(1, 59))
        if support.allowed[z].all():
            matches = bool(re.fullmatch(pattern, embedded.decode(z).strip()))
            assert support.contains(z) == matches, embedded.decode(z)
            held[matches] += 1
    assert min(held.values()) > 20


TOO_LARGE = {
    "(a|c)*a(a|c){15}": r"more than 20,00\d nodes, which",
    "(.{0,50}){0,50}": r"more than 1,\d\d\d nodes, each of 1,\d\d\d positions",
    "a{0,20000}": "more than 10,000 places",
}


@pytest.mark.parametrize("pattern", TOO_LARGE)
def test_what_is_too_large_is_refused_with_its_size(pattern: str) -> None:
    with pytest.raises(SupportError, match=TOO_LARGE[pattern] + ".* smaller counts"):
        tables(pattern, dict(enumerate("ac \n")), 4)


def test_tables_of_too_many_kinds_of_tokens_are_refused(monkeypatch) -> None:
    words = ["".join(z) for n in (1, 2, 3) for z in product("ac", repeat=n)]
    monkeypatch.setattr(token_tables, "MAX_CELLS", 1_000)
    with pytest.raises(
        SupportError, match="128 nodes and more than 7 kinds of tokens, .*fewer allowed_tokens"
    ):
        tables("(a|c)*a(a|c){6}", dict(enumerate(words)), len(words))


def test_building_can_be_interrupted(monkeypatch) -> None:
    """As Ctrl-C does; without an end of its own it would go on for hours."""
    monkeypatch.setattr(patterns, "MAX_NODES", 2**40)
    monkeypatch.setattr(patterns, "MAX_VISITS", 2**60)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            tables("(a|c)*a(a|c){40}", dict(enumerate("ac")), 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tables_of(automaton: automaton.Automaton) -> list:
    return [x.tolist() for x in (automaton.step, automaton.token_class, automaton.reach)]


def test_tables_are_kept_on_disk(one_lm: LanguageModel, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("AMORTLM_CACHE", str(tmp_path))
    build, built = patterns._tables, []
    monkeypatch.setattr(patterns, "_tables", lambda *a: built.append(a[0]) or build(*a))
    support = SUPPORTS["a choice"]
    first = support.bind(one_lm).automaton
    [file] = (tmp_path / "patterns").iterdir()
    assert tables_of(support.bind(one_lm).automaton) == tables_of(first)
    assert len(built) == 1
    # Other lengths read the same tables; another pattern, other tokens and other texts do not.
    dataclasses.replace(support, max_tokens=4).bind(one_lm)
    assert len(built) == 1
    dataclasses.replace(support, pattern="(a|the) (cat|cat)").bind(one_lm)
    dataclasses.replace(support, banned_tokens=[" the"]).bind(one_lm)
    true = one_lm.decode
    with monkeypatch.context() as m:
        m.setattr(one_lm, "decode", lambda z: true(z).upper())
        dataclasses.replace(support, pattern="(a|the) (cat|dog)|A").bind(one_lm)
    assert len(built) == 4
    # A damaged file is computed again, and mended.
    good = file.read_bytes()
    for i, bad in enumerate((b"", b"garbage", good[:-3], good[:-20] + bytes([good[-20] ^ 1]) + good[-19:])):
        file.write_bytes(bad)
        assert tables_of(support.bind(one_lm).automaton) == tables_of(first)
        assert len(built) == 5 + i
        assert file.read_bytes() == good
    assert len(list((tmp_path / "patterns").iterdir())) == 4, "no parts are left"


def test_a_cache_that_cannot_be_written_is_done_without(one_lm: LanguageModel, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("AMORTLM_CACHE", str(tmp_path / "file"))
    assert SUPPORTS["a choice"].bind(one_lm).size() > 0


@pytest.mark.parametrize("metaspace", [False, True])
def test_texts_are_those_of_the_tokenizer(metaspace: bool) -> None:
    """A space at the start of a token counts, as GPT-2 writes it and as Llama does; white space around the text not."""
    lm = tiny_lm("gpt2", tiny_tokenizer(metaspace=metaspace), tied=True)
    bound = Support(stop=".", max_tokens=3, pattern="(a|the) cat").bind(lm)
    texts = {lm.decode(z) for n in range(1, 4) for z in bound.completions(n)}
    assert {"a cat", " a cat", " the cat", " a cat "} <= texts
    assert {text.strip() for text in texts} == {"a cat", "the cat"}


def test_tokens_of_one_text_are_all_written(one_lm: LanguageModel, monkeypatch) -> None:
    """As a byte and a piece may be: here "t" reads as "a"."""
    a, t = one_lm.token_id("a"), one_lm.token_id("t")
    true = one_lm.decode
    monkeypatch.setattr(one_lm, "decode", lambda z: true([a if i == t else i for i in z]))
    bound = Support(stop=".", max_tokens=1, pattern="a").bind(one_lm)
    assert list(bound.completions(1)) == [[a], [t], [one_lm.token_id(" a")]]


def test_half_characters_and_texts_that_do_not_add_up(one_lm: LanguageModel, monkeypatch) -> None:
    true, a = one_lm.decode, one_lm.token_id("a")
    monkeypatch.setattr(one_lm, "decode", lambda z: "".join("\ufffd" if i == a else true([i]) for i in z))
    bound = Support(stop=".", max_tokens=1, pattern=r"(?s:.)").bind(one_lm)
    assert bound.contains([one_lm.token_id("t")])
    assert not bound.contains([a])
    monkeypatch.setattr(
        one_lm, "decode", lambda z: " ".join(true([i]) for i in z)
    )  # as WordPiece joins words
    with pytest.raises(SupportError, match="the text of a token depends on the tokens beside it"):
        Support(stop=".", max_tokens=2, allowed_tokens=["a"], pattern="a+").bind(one_lm)
    monkeypatch.setattr(one_lm, "decode", lambda z: true(z).replace(" ,", ","))  # as "clean-up" does
    with pytest.raises(SupportError, match="the text of a token depends on the tokens beside it"):
        Support(stop=".", max_tokens=2, pattern="a+").bind(one_lm)


@pytest.mark.parametrize("pattern", [".*“.*”", "(a|“|\ufffd)*", r"\W*", "[^\ufffd]+", "\u2003*a", "(“|é)*"])
def test_tokens_that_are_parts_of_characters(embedded: LanguageModel, pattern: str) -> None:
    """Every string of bytes of “, ”, é and an em space, among them those that are no text."""
    piece = {bytes([b]): i for i, b in single_bytes(embedded).items()}
    ids = [piece[bytes([b])] for b in (0xE2, 0x80, 0x9C, 0x9D, 0x83, 0xC3, 0xA9)] + [embedded.token_id("a")]
    support = Support(stop="</s>", min_tokens=0, max_tokens=7, allowed_tokens=ids, pattern=pattern).bind(
        embedded
    )
    rng, held = random.Random(0), Counter()
    short = (z for n in range(4) for z in product(ids, repeat=n))
    long = (rng.choices(ids, k=rng.randint(4, 7)) for _ in range(2_000))
    typed = (
        [i for c in rng.choices("“”é\u2003a", k=2) for i in embedded.encode_continuation(c)]
        for _ in range(200)
    )
    for z in (*short, *long, *(z for z in typed if set(z) <= set(ids))):
        matches = bool(re.fullmatch(pattern, embedded.decode(z).strip()))
        assert support.contains(z) == matches, (z, embedded.decode(z))
        held[matches] += 1
    assert min(held.values()) > 2


def single_bytes(lm: LanguageModel) -> dict[int, int]:
    """Of a byte-level vocabulary: token id -> its byte, of the tokens that are one byte and no character."""
    law = Support(stop="</s>").bind(lm)
    return {i: part[0] for i, part in spelling(lm.codec, law.allowed).parts.items() if len(part) == 1}


def test_a_tokenizer_that_replaces_whole_runs_of_bytes_has_no_parts(
    embedded: LanguageModel, monkeypatch
) -> None:
    """As byte fallback does: one byte that is no text makes replacement characters of all beside it."""
    parts, true = single_bytes(embedded), embedded.codec.decode

    def decode(tokens: list[int]) -> str:
        whole = true(tokens)
        n = sum(t in parts for t in tokens)
        return "\ufffd" * n + "".join(c for c in whole if c != "\ufffd") if "\ufffd" in whole else whole

    law = Support(stop="</s>").bind(embedded)
    monkeypatch.setattr(embedded.codec, "decode", decode)
    found = spelling(embedded.codec, law.allowed)
    assert not found.parts
    assert parts.keys() <= found.unknown
    with pytest.raises(SupportError, match="not known what .* allowed tokens write"):
        patterns.pattern_automaton([".*"], embedded.codec, law.allowed, 0, 3, strict=True)


def test_parts_that_make_the_tables_too_large_are_left_out(
    embedded: LanguageModel, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("AMORTLM_CACHE", str(tmp_path))
    law, quote = Support(stop="</s>").bind(embedded), embedded.encode_continuation("“a")
    assert patterns.pattern_automaton([r"\W*\w"], embedded.codec, law.allowed, 0, 9).contains(quote)
    monkeypatch.setenv("AMORTLM_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(token_tables, "MAX_CELLS", 20_000)
    smaller = patterns.pattern_automaton([r"\W*\w"], embedded.codec, law.allowed, 0, 9)
    assert not smaller.contains(quote)
    assert smaller.contains(embedded.encode_continuation("! a"))
    with pytest.raises(SupportError, match="which is too much"):
        patterns.pattern_automaton([r"\W*\w"], embedded.codec, law.allowed, 0, 9, strict=True)


@pytest.mark.parametrize("name", SUPPORTS)
def test_q_on_a_pattern_obeys_the_laws(family_lm: LanguageModel, name: str) -> None:
    policy = tiny_policy(family_lm, "{x}", SUPPORTS[name])
    assert policy.support.size() <= 20_000, "the sum is checked"
    check_policy(policy, ROWS)


def test_the_law_notices_a_dead_end(one_lm: LanguageModel) -> None:
    """Negative control: the automaton says of every state that it can be finished."""
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["a choice"])
    policy.support.automaton.can[:, :-1] = True
    with pytest.raises(AssertionError, match="q sums to 0"):
        check_policy(policy, ROWS)


def test_samples_follow_q(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["no bound"])
    log_p = log_q(policy, support_completions(policy))
    drawn, _ = policy.sample([ROW], 8_000, seed=1)
    assert p_value(policy, drawn, log_p) > LEVEL
    uniform, _ = policy.sample([ROW], 8_000, seed=1, exploration=Exploration(epsilon=0.3))
    assert p_value(policy, uniform, log_p) < LEVEL
    assert all(map(policy.support.contains, uniform.completions()))


def test_the_posterior_is_that_of_the_constraint(one_lm: LanguageModel) -> None:
    """The pattern in the support or in the target: the same posterior, one with every q(z) > 0 inside it."""
    free = Support(stop=".", max_tokens=4, allowed_tokens=FEW)
    inside = Support(stop=".", max_tokens=4, allowed_tokens=FEW, pattern="a( cat)*")
    p = one_lm.log_prob("{z}{y}", given="{x}")
    in_target = exact.enumerate_posterior(
        (p + constraint.matches("a( cat)*")).bind(one_lm), free.bind(one_lm), ROW
    )
    in_support = exact.enumerate_posterior(p, inside.bind(one_lm), ROW)
    held = {
        tuple(z): lp
        for z, lp in zip(in_target.completions, in_target.log_p.tolist(), strict=True)
        if lp > -1e9
    }
    assert in_support.log_z == pytest.approx(in_target.log_z, abs=1e-5)
    assert held == pytest.approx(
        dict(zip(map(tuple, in_support.completions), in_support.log_p.tolist(), strict=True)), abs=1e-5
    )


def test_correction_inside_a_pattern_is_exact(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["no bound"])
    target = one_lm.log_prob("{z}{y}", given="{x}") / 3
    truth = exact.enumerate_posterior(target, policy.support, ROW)
    number = {tuple(z): i for i, z in enumerate(truth.completions)}

    def fits(drawn: Rollouts) -> float:
        index = torch.tensor([number[tuple(z)] for z in drawn.completions()])
        return g_test(torch.bincount(index, minlength=len(number)), truth.log_p.exp())

    particles = smc(policy, target, ROW, num_particles=4_000, seed=3)
    assert fits(particles.resample(1_500, seed=3)) > LEVEL
    assert fits(policy.sample([ROW], 1_500, seed=3)[0]) < LEVEL
    # Chains that start at the truth stay there, and leave it for another one.
    start = torch.multinomial(
        truth.log_p.exp(), 1_500, True, generator=torch.Generator().manual_seed(3)
    ).tolist()
    initial = policy.rollouts([ROW], [[truth.completions[i] for i in start]])
    settings = {"num_chains": 1_500, "num_steps": 6, "seed": 3, "initial": initial}
    assert fits(metropolis_hastings(policy, target, ROW, **settings).rollouts) > LEVEL
    assert fits(metropolis_hastings(policy, 2 * target, ROW, **settings).rollouts) < LEVEL


def test_a_pattern_is_saved(one_lm: LanguageModel, tmp_path) -> None:
    posterior = Posterior(
        tiny_policy(one_lm, "{x}", SUPPORTS["a choice"]), one_lm.log_prob("{z}{y}", given="{x}")
    )
    posterior.save_pretrained(tmp_path)
    again = Posterior.from_pretrained(tmp_path, lm=one_lm)
    assert again.policy.support.patterns == ("(a|the) (cat|dog)",)
    assert again.sample(ROW, 6, seed=1) == posterior.sample(ROW, 6, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "(a"}, r"regular expression '\(a': missing \)"),
        ({"pattern": 5}, "must be text, or a list of texts that all match, got 5"),
        ({"pattern": []}, r"must be text, or a list of texts that all match, got \[\]"),
        (
            {"pattern": ["a.*", ".*c"], "max_tokens": 1},
            "no text of 1 to 1 allowed tokens matches 'a.*' and '.*c'",
        ),
        ({"pattern": b"a"}, "must be text, .*got b'a'"),
        ({"pattern": "(" * 300 + "a" + ")*" * 300}, "nested too deeply|recursion"),
        ({"pattern": " a "}, "white space around a text is removed"),
        ({"pattern": r"a(?=c)"}, "cannot contain look-around"),
        ({"pattern": "a)|(t"}, "unbalanced parenthesis"),
        ({"pattern": r"\bcat"}, "cannot contain .*: the whole text is matched anyway"),
        (
            {"pattern": "a{9}", "max_tokens": 3, "allowed_tokens": FEW},
            "no text of 1 to 3 allowed tokens matches",
        ),
        ({"pattern": "x", "allowed_tokens": FEW}, "no text of 1 to 25 allowed tokens matches 'x'; widen"),
        ({"pattern": "a", "separator": ","}, "take out tool or separator"),
        ({"pattern": "1", "tool": "calculator"}, "take out tool or separator"),
    ],
)
def test_patterns_that_cannot_be_are_refused(one_lm: LanguageModel, settings: dict, message: str) -> None:
    with pytest.raises(SupportError, match=message):
        Support(stop=".", **settings).bind(one_lm)


def test_what_does_not_match_is_refused_as_data(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", SUPPORTS["a choice"])
    assert policy.parse(" the cat.")[0] == [one_lm.token_id(" the"), one_lm.token_id(" cat")]
    with pytest.raises(DataError, match=r"a text that does not match '\(a\|the\) \(cat\|dog\)'"):
        policy.parse(" the ran")


def test_counts_do_not_overflow() -> None:
    step, classes = torch.tensor([[0, 1]]), torch.zeros(50_000, dtype=torch.long)
    anything = automaton.Automaton(step, classes, torch.tensor([True]), 0, 40)
    assert anything.size == sum(50_000**n for n in range(41))
