"""Law 2: the score of a prefix is one number, however it is computed; and it is the number the formula says."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from reference import plain_ids, random_rollouts, slow_score, slow_score_given, tiny_policy

from amortlm.language_model import LanguageModel
from amortlm.support import Support
from amortlm.targets import Target, constraints
from amortlm.targets.base import Scoring, Softened
from amortlm.targets.laws import check_target
from amortlm.targets.lm import owners
from amortlm.types import Rollouts

ROWS = [
    {"x": "the dog", "y": " the cat ran."},
    {"x": "", "y": " a"},
    {"x": "a cat ran, the dog ran", "y": " dogs, cats and rats ran!"},
]
ONE_STOP = Support(stop=".", min_tokens=1, max_tokens=4)
TWO_STOPS = Support(stop=(".", "!"), min_tokens=0, max_tokens=3)
CHAT = [{"role": "user", "content": "{x}"}, {"role": "system", "content": "a {y}"}]


@pytest.fixture
def passes(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The arguments of every forward pass of the model from now on."""
    found: list[dict] = []
    assert one_lm.sharing.packed  # the self-check is done
    forward = type(one_lm.model).forward
    monkeypatch.setattr(
        type(one_lm.model), "forward", lambda self, **k: found.append(k) or forward(self, **k)
    )
    return found


def count_letters(texts: list[str], rows: list[dict]) -> list[float]:
    return [-0.5 * len(t) - 0.1 * len(r["x"]) for t, r in zip(texts, rows, strict=True)]


def has_an_a(text: str) -> bool:
    return "a" in text


def longer_than_x(text: str, row: dict) -> bool:
    return len(text) > len(row["x"])


KINDS = {
    "continuation": lambda lm: lm.log_prob("{z}", given="{x}"),
    "unconditional": lambda lm: lm.log_prob("{z}"),
    "tempered": lambda lm: lm.log_prob("{z}", given="{x}") / 0.8,
    "contrastive": lambda lm: 1.5 * lm.log_prob("{z}", given="{x}") - 0.5 * lm.log_prob("{z}"),
    "infilling": lambda lm: lm.log_prob("{z}{y}", given="{x}"),
    "suffix of text": lambda lm: lm.log_prob("{z} the {y}", given="{x}"),
    "text before z": lambda lm: lm.log_prob(" a{x}{z}", given="the"),
    "text before and after z": lambda lm: lm.log_prob("{x} a{z}{y}"),
    "z in given": lambda lm: lm.log_prob("{y}", given="{x}{z}"),
    "z in given, text between": lambda lm: lm.log_prob("{y}", given="{x}{z} so"),
    "prior and likelihood": lambda lm: (
        lm.log_prob("{z}", given="{x}") + 0.7 * lm.log_prob("{y}", given="{x}{z}")
    ),
    "contains": lambda lm: lm.log_prob("{z}", given="{x}") + constraints.contains("a"),
    "contains, penalised": lambda lm: lm.log_prob("{z}") + constraints.contains("a", penalty=5.0),
    "matches": lambda lm: lm.log_prob("{z}") + constraints.matches("[a-m ]*"),
    "matches, penalised": lambda lm: lm.log_prob("{z}") - constraints.matches("[a-m ]*", penalty=2.0),
    "allowed_tokens": lambda lm: lm.log_prob("{z}") + constraints.allowed_tokens("a", "b", " the", 5),
    "allowed_tokens, penalised": lambda lm: (
        lm.log_prob("{z}") + constraints.allowed_tokens("a", "b", *range(8, 30), penalty=3.0)
    ),
    "canonical": lambda lm: lm.log_prob("{z}") + constraints.canonical(),
    "length": lambda lm: lm.log_prob("{z}{y}") + constraints.length(2, 3),
    "length, penalised": lambda lm: lm.log_prob("{z}") + constraints.length(2, penalty=1.0),
    "predicate": lambda lm: lm.log_prob("{z}") + constraints.predicate(has_an_a),
    "predicate of the row": lambda lm: lm.log_prob("{z}") + constraints.predicate(longer_than_x, penalty=4.0),
    "verifier": lambda lm: (
        lm.log_prob("{z}", given="{x}") + 0.5 * constraints.verifier(count_letters, every_prefix=True)
    ),
    "verifier of the end": lambda lm: lm.log_prob("{z}", given="{x}") + constraints.verifier(count_letters),
    "softened": lambda lm: Softened(
        0.5 * lm.log_prob("{z}") + 2 * constraints.contains("a") + constraints.length(2),
        lm.log_prob("{z}"),
        6.0,
    ),
    "softened with a prior": lambda lm: Softened(
        (constraints.contains("a") + constraints.length(2)).bind(lm), lm.log_prob("{z}", given="{x}"), 6.0
    ),
    "constraint alone": lambda lm: constraints.contains("a").bind(lm),
}


@pytest.mark.parametrize("support", [ONE_STOP, TWO_STOPS], ids=["one stop", "two stops"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_target_obeys_the_laws(one_lm: LanguageModel, kind: str, support: Support) -> None:
    check_target(KINDS[kind](one_lm), random_rollouts(one_lm, support, ROWS))


@pytest.mark.parametrize("kind", ["contrastive", "text before and after z", "z in given, text between"])
def test_every_model_obeys_the_laws(lm: LanguageModel, kind: str) -> None:
    check_target(KINDS[kind](lm), random_rollouts(lm, TWO_STOPS, ROWS))


def test_chat_prompts_obey_the_laws(models: dict[str, LanguageModel]) -> None:
    lm = models["gpt2-tied"]
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    try:
        target = lm.log_prob("{z}{y}", given=CHAT)
        rollouts = random_rollouts(lm, ONE_STOP, ROWS)
        check_target(target, rollouts)
        texts = [f"user: {r['x']}\nsystem: a {r['y']}\na:" for r in ROWS]
        given = [plain_ids(lm, t) for t in texts]
        after = [plain_ids(lm, r["y"]) for r in ROWS]
        expected = slow_score(lm, rollouts, given, [[]] * 3, after)
        torch.testing.assert_close(target.score(rollouts), expected, atol=1e-4, rtol=0)
    finally:
        lm.tokenizer.chat_template = None


def start(lm: LanguageModel, text: str) -> list[int]:
    """Tokens of a text at the start, written out: BOS where the tokenizer adds it, or for an empty text."""
    ids = lm.tokenizer(text).input_ids
    return ids or [lm.tokenizer.bos_token_id]


@pytest.mark.parametrize("support", [ONE_STOP, TWO_STOPS], ids=["one stop", "two stops"])
def test_scores_equal_full_passes(lm: LanguageModel, support: Support) -> None:
    rollouts = random_rollouts(lm, support, ROWS, per_row=2)
    x = [r["x"] for r in ROWS]
    y = [plain_ids(lm, r["y"]) for r in ROWS]
    none = [[], [], []]
    starts = [start(lm, text) for text in x]
    expected = {
        ("{z}", "{x}"): slow_score(lm, rollouts, starts, none, none),
        ("{z}{y}", "{x}"): slow_score(lm, rollouts, starts, none, y),
        ("{x} a{z}{y}", "the"): slow_score(
            lm, rollouts, [start(lm, "the")] * 3, [plain_ids(lm, text + " a") for text in x], y
        ),
        ("{y}", "{x}{z} so"): slow_score_given(lm, rollouts, starts, [plain_ids(lm, " so")] * 3, y),
    }
    for (of, given), scores in expected.items():
        torch.testing.assert_close(lm.log_prob(of, given).score(rollouts), scores, atol=2e-4, rtol=0)


def test_sums_equal_the_arithmetic_of_their_terms(one_lm: LanguageModel) -> None:
    rollouts = random_rollouts(one_lm, ONE_STOP, ROWS)
    a, b = one_lm.log_prob("{z}", given="{x}"), one_lm.log_prob("{z}{y}", given="{x}")
    mixed = ((1.5 * a - 0.5 * b) / 0.5).score(rollouts)
    torch.testing.assert_close(mixed, 3 * a.score(rollouts) - b.score(rollouts), atol=1e-4, rtol=0)


def test_terms_with_one_prompt_share_its_pass(one_lm: LanguageModel, passes: list[dict]) -> None:
    rollouts = random_rollouts(one_lm, ONE_STOP, ROWS)
    one_lm.log_prob("{z}", given="{x}").score(rollouts)
    alone = len(passes)
    (one_lm.log_prob("{z}", given="{x}") - 0.5 * one_lm.log_prob("{z}", given="{x}")).score(rollouts)
    assert len(passes) == 2 * alone


def test_all_prefixes_with_a_suffix_take_three_passes(
    one_lm: LanguageModel, passes: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, completions, all branches (in one pass where padding is cheap): not one pass for each prefix."""
    monkeypatch.setattr("amortlm.engine.packs.MIN_SAVED", 10**9)
    rollouts = random_rollouts(one_lm, ONE_STOP, ROWS)
    one_lm.log_prob("{z}{y}", given="{x}").score(rollouts)
    assert len(passes) == 3


def test_a_state_that_several_trajectories_share_is_read_once(
    one_lm: LanguageModel, passes: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of a trajectory add no text behind `{z}`; a prefix that differs does."""
    support = Support(stop=".", min_tokens=0, max_tokens=5)
    policy = tiny_policy(one_lm, "{x}", support)
    target = one_lm.log_prob("{z}{y}", given="{x}")
    a, b = ([one_lm.token_id(t) for t in text] for text in ((" dog", " ran", "s"), (" dog", " ran", " a")))

    def tokens_behind(*completions: list[list[int]]) -> int:
        passes.clear()
        target.score(policy.rollouts(ROWS[: len(completions)], completions))
        return sum(k["input_ids"].numel() for k in passes if k["attention_mask"].dim() == 4)

    alone = tokens_behind([a])
    assert tokens_behind([a, a, a]) == alone
    monkeypatch.setattr("amortlm.engine.packs.MIN_SAVED", 0)  # no padding between packs
    assert tokens_behind([a, b]) == alone * 5 / 4, "three of four states of b are a's"


def test_owners_are_among_the_states_that_count(one_lm: LanguageModel) -> None:
    policy = tiny_policy(one_lm, "{x}", Support(stop=".", min_tokens=0, max_tokens=5))
    z = [one_lm.token_id(t) for t in (" dog", " ran", "s")]
    rollouts = policy.rollouts(ROWS[:2], [[z, z, z[:1]], [z]])
    assert owners(rollouts)[:, :4].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 2], [3, 3, 3, 3]]
    mask = rollouts.stop_mask.clone()
    mask[0, 1] = False
    assert owners(replace(rollouts, stop_mask=mask))[:, 1].tolist() == [0, 1, 1, 3]


def test_gaps_in_the_stopping_states(one_lm: LanguageModel) -> None:
    """Tools write tokens that nobody may stop between."""
    rollouts = random_rollouts(one_lm, Support(stop=".", min_tokens=0, max_tokens=5), ROWS)
    target = one_lm.log_prob("{z}{y}", given="{x}")
    full = target.score(rollouts)
    gaps = rollouts.stop_mask.clone()
    gaps[::2, 1] = gaps[1::3, 2:4] = False
    gappy = replace(rollouts, stop_mask=gaps)
    check_target(target, gappy)
    torch.testing.assert_close(target.score(gappy), full * gaps, atol=1e-4, rtol=0)


def test_half_precision(one_lm: LanguageModel) -> None:
    """bfloat16 has three digits: scores stay finite float32, near those in single precision."""
    half = LanguageModel(copy.deepcopy(one_lm.model).bfloat16(), one_lm.tokenizer)
    rollouts = random_rollouts(one_lm, TWO_STOPS, ROWS)
    scores = half.log_prob("{z}{y}", given="{x}").score(rollouts)
    exact = one_lm.log_prob("{z}{y}", given="{x}").score(rollouts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, atol=1.0, rtol=0.02)


def test_branches_in_chunks_of_every_width(one_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = random_rollouts(one_lm, TWO_STOPS, ROWS)
    target = one_lm.log_prob("{z}{y}", given="{x}")
    whole = target.score(rollouts)
    for width in (1, 13, 17, 31, 1000):
        monkeypatch.setattr("amortlm.targets.lm.MAX_WIDTH", width)
        torch.testing.assert_close(target.score(rollouts), whole, atol=1e-4, rtol=0)


def test_metaspace_tokenizer(metaspace_lm: LanguageModel) -> None:
    """A tokenizer that glues a space to every text must not do so in front of a continuation."""
    lm = metaspace_lm
    tokens = lm.tokenizer.convert_ids_to_tokens
    assert tokens(lm.encode_start("the cat")) == ["<s>", "▁the", "▁cat"]
    assert tokens(lm.encode_continuation("s ran.")) == ["s", "▁ran", "."]
    assert tokens(lm.encode_continuation(" ran")) == ["▁ran"]
    assert lm.encode_continuation("") == []
    assert tokens([lm.token_id("."), lm.token_id(" cat")]) == [".", "▁cat"]
    for text in (" ran", "s ran.", "", "a", "\n a", " a\n"):
        assert lm.decode(lm.encode_continuation(text)) == text
    rollouts = random_rollouts(lm, ONE_STOP, ROWS)
    target = lm.log_prob("{z}{y}", given="{x}")
    check_target(target, rollouts)
    ids = lm.tokenizer.convert_tokens_to_ids
    given = [[0, *ids(["▁the", "▁dog"])], [0], lm.tokenizer("a cat ran, the dog ran").input_ids]
    after = [
        ids(["▁the", "▁cat", "▁ran", "."]),
        ids(["▁a"]),
        ids(["▁dog", "s", ",", "▁cat", "s", "▁a", "n", "d", "▁r", "at", "s", "▁ran", "!"]),
    ]
    expected = slow_score(lm, rollouts, given, [[]] * 3, after)
    torch.testing.assert_close(target.score(rollouts), expected, atol=1e-4, rtol=0)


def test_embedded_model(embedded: LanguageModel) -> None:
    rows = [{"x": "Once upon a time", "y": " They were happy."}, {"x": "The dog", "y": " It ran."}]
    support = Support(stop=(".", "!"), min_tokens=1, max_tokens=6)
    rollouts = random_rollouts(embedded, support, rows)
    target = embedded.log_prob("{z}{y}", given="{x}") - 0.5 * embedded.log_prob("{z}")
    check_target(target, rollouts, atol=1e-3)


# The law itself must fail for targets that break it.


class Broken(Target):
    """A target that obeys every law, with one thing broken on purpose."""

    def __init__(self, breakage: str):
        self.breakage = breakage

    def score_batch(self, scoring: Scoring) -> torch.Tensor:
        rollouts = scoring.rollouts
        scores = torch.nn.functional.pad(rollouts.tokens.float().cumsum(1), (1, 0)) * -0.1
        if self.breakage == "future":
            scores = scores + 0.01 * rollouts.lengths[:, None]
        elif self.breakage == "padding":
            scores = scores + 0.01 * rollouts.tokens.shape[1]
        elif self.breakage == "order":
            scores = scores + 0.01 * torch.arange(len(rollouts))[:, None]
        elif self.breakage == "neighbours":
            scores = scores + 0.01 * rollouts.tokens.sum()
        return scores


class OutsideMask(Broken):
    def score(self, rollouts: Rollouts) -> torch.Tensor:
        return super().score(rollouts) - (~rollouts.stop_mask).float()


class NotANumber(Broken):
    def score(self, rollouts: Rollouts) -> torch.Tensor:
        return super().score(rollouts).masked_fill(rollouts.stop_mask, float("nan"))


def test_the_law_holds_for_the_unbroken_target(one_lm: LanguageModel) -> None:
    check_target(Broken("nothing"), random_rollouts(one_lm, ONE_STOP, ROWS))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Broken("future"), "scoring the prefix as a finished completion changes the score of trajectory"),
        (Broken("padding"), "padding on the right changes the score of trajectory 0"),
        (Broken("order"), "trajectory 0"),
        (Broken("neighbours"), "changes the score of trajectory 0"),
        (
            OutsideMask("nothing"),
            r"trajectory 0 state 0 is outside stop_mask, so its score must be 0, not -1",
        ),
        (NotANumber("nothing"), r"trajectory 0 state 1 scores nan"),
    ],
)
def test_the_law_notices(one_lm: LanguageModel, target: Target, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_target(target, random_rollouts(one_lm, ONE_STOP, ROWS))
