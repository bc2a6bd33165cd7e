"""Structured latents: lists of eight statements, trees, programs of several variables, constraints between variables.

Each kind has a small form, whose posterior is enumerated, and a large one, of which only bounds are known. Both are
trained with the budget of `benchmarks.posteriors`, 100 updates of 32 at learning rate 1e-3; the rest are defaults.

    python recipes/structured.py --output runs/structured
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import log10
from pathlib import Path

import torch

from _common import metrics
from amortlm import LanguageModel, Policy, Posterior, Support, constraint, exact, narrow
from amortlm.lab import command
from amortlm.lab.experiment import Context, Experiment, Outcome, Results, Settings, Trained
from amortlm.lab.training import Problem, train_gflownet, untrained
from amortlm.targets import Target
from amortlm.train import GFNConfig
from amortlm.types import Row

SETTINGS: Settings = {
    "model": "embedded",
    "draws": 1000,  # exact draws of the posterior, for the floor of the total variation
    "samples": 64,  # of a diagnosis
    "adapter": 64,
    "gflownet": {"max_steps": 100, "num_samples": 32, "learning_rate": 1e-3},
}
COLORS = "red blue green white yellow pink black brown orange purple"
PEOPLE = (
    "old big small sad dog cat bird boy girl man bear rabbit farmer baby little brave happy white tall proud"
)
STORY = "Once upon a time there was a"
PAINTING = {
    "x": "Anna painted a big picture. The colors in it were",
    "y": "It looked like the sky and the sun.",
}
FEELINGS = "sad happy scared tired hungry afraid so very"
HERO = {"x": STORY, "y1": " He lived with his mom.", "y2": " He cried.", "y3": " He ate it all."}
TREE = """
root ::= "( " tree " " tree ")"
tree ::= word | "( " tree " " tree ")"
word ::= {words}
"""


@dataclass(frozen=True)
class Form:
    """A posterior of one row. `shape` says what the latent is."""

    shape: str
    row: Row
    target: Target
    support: Support

    def problem(self) -> Problem:
        return Problem(self.target, "{x}", self.support, [self.row])

    def posterior(self, context: Context) -> Posterior:
        return untrained(context, self.problem()).sampler

    @cached_property
    def start(self) -> torch.Tensor:
        """log q before training."""
        assert isinstance(self.target.lm, LanguageModel)
        return exact.policy_log_probs(Policy(self.target.lm, "{x}", self.support, 1), self.row)

    @cached_property
    def truth(self) -> exact.ExactPosterior:
        assert self.target.lm is not None
        return exact.enumerate_posterior(self.target, self.support.bind(self.target.lm), self.row)


def words_of(text: str) -> list[str]:
    return [f" {word}" for word in text.split()]


def lists(words: Sequence[str], statements: int, tokens: int) -> Support:
    """Exactly so many statements, of at most `tokens` tokens with the separators between them."""
    return Support(
        stop=".", max_tokens=tokens, allowed_tokens=words, separator=",",
        min_statements=statements, max_statements=statements,
    )  # fmt: skip


def eight(lm: LanguageModel, large: bool) -> Form:
    words = words_of(f"{COLORS} big dark bright") if large else words_of(COLORS)[:2]
    shape = f"8 statements, {'18 tokens at most' if large else 'a word each'}, of {len(words)} words"
    target = lm.log_prob("{z} {y}", given="{x}")
    return Form(shape, PAINTING, target, lists(words, 8, 18 if large else 15))


def trees(lm: LanguageModel, large: bool) -> Form:
    words = words_of(PEOPLE)[: None if large else 5]
    depth = 2 if large else 1  # how often a tree stands inside a tree
    grammar = TREE.format(words=" | ".join(f'"{word.strip()}"' for word in words))
    target = lm.log_prob("{z} {y}", given="{x}") + constraint.grammar(grammar, depth)
    support = Support(stop=".", max_tokens=22 if large else 16, allowed_tokens=[" (", ")", *words])
    support = narrow(support, target, lm)[0]
    shape = f"binary trees of depth {depth + 1} or less, of {len(words)} words"
    return Form(shape, {"x": STORY, "y": "He was very happy."}, target, support)


def program(lm: LanguageModel, large: bool) -> Form:
    """Who (z1), how (z2), and in the large form what for (z3): each has an observation, and z1 is in all of them."""
    target = (
        lm.log_prob("{z1}.", given="{x}")
        + lm.log_prob("{y1}", given="{x}{z1}.")
        + lm.log_prob("{z2}.", given="{x}{z1}. The{z1} was")
        + lm.log_prob("{y2}", given="The{z1} was{z2}.")
    )
    words = words_of(f"{PEOPLE} {FEELINGS}")
    if not large:
        return Form(f"2 variables of a word, of {len(words)}", HERO, target, lists(words, 2, 3))
    target += lm.log_prob("{z3}.", given="The{z1} was{z2}. He saw a") + lm.log_prob(
        "{y3}", given="He saw a{z3}."
    )
    words = [*words, *words_of("apple cake toy ball new")]
    return Form(f"3 variables, 7 words at most in all, of {len(words)}", HERO, target, lists(words, 3, 9))


def distinct(lm: LanguageModel, large: bool) -> Form:
    """All statements differ, and the first is not longer than the second."""
    words = words_of(f"{COLORS} big dark bright") if large else words_of(COLORS)[:7]
    count = 8 if large else 4
    target = (
        lm.log_prob("{z} {y}", given="{x}") + constraint.distinct() + constraint.relation(first_is_shorter)
    )
    shape = f"{count} statements, all distinct, the first no longer than the second, of {len(words)} words"
    return Form(shape, PAINTING, target, lists(words, count, 18 if large else 7))


def first_is_shorter(statements: list[str]) -> bool:
    return len(statements[0]) <= len(statements[1])


KINDS: dict[str, Callable[[LanguageModel, bool], Form]] = {
    "lists": eight,
    "trees": trees,
    "program": program,
    "constraint": distinct,
}
NAMES = {name + suffix: (make, bool(suffix)) for name, make in KINDS.items() for suffix in ("", ", large")}


def prepare(settings: Settings, lm: LanguageModel, data: Path | None) -> dict[str, Form]:
    return {name: make(lm, large) for name, (make, large) in NAMES.items()}


@dataclass(frozen=True)
class Both:
    """A form, and its sampler before and after training."""

    form: Form
    before: Posterior
    after: Posterior


def method(context: Context, name: str) -> Trained:
    form: Form = context.data[name]
    before = form.posterior(context)
    trained = train_gflownet(context, form.problem(), context.settings["gflownet"])
    return Trained(Both(form, before, trained.sampler), trained.reward_evaluations)


def evaluate(context: Context, trained: Trained) -> Outcome:
    both: Both = trained.sampler
    size = both.form.support.bind(context.lm).size()
    found = {"log10 of the completions": log10(size)}
    said = {"shape": both.form.shape, "verdict": "", "examples": _examples(both)}
    if size <= exact.LIMIT:
        found |= _enumerated(both, context.settings["draws"], context.seed)
    else:
        for when, posterior in (("before", both.before), ("after", both.after)):
            figures, verdict = _bounded(posterior, both.form.row, context)
            found |= {f"{when}: {name}": x for name, x in figures.items()}
            said["verdict"] += f"{when}: {verdict}; "
    return Outcome({name: found.get(name, float("nan")) for name in METRICS}, said)


def _examples(both: Both) -> list[str]:
    return [sample.text for sample in both.after.sample(both.form.row, 4, seed="examples")]


def _enumerated(both: Both, draws: int, seed: int) -> dict[str, float]:
    p = both.form.truth
    out = {"exact log Z": p.log_z, "floor": _floor(p, draws, seed)}
    after = exact.policy_log_probs(both.after.policy, both.form.row)
    for when, log_q in (("before", both.form.start), ("after", after)):
        d = exact.distance(log_q, p.log_p)
        out |= {f"{when}: TV": d.total_variation, f"{when}: KL(p||q)": d.kl_pq}
    return out


def _floor(truth: exact.ExactPosterior, draws: int, seed: int) -> float:
    """The total variation that so many exact draws show."""
    p = truth.log_p.exp()
    index = torch.multinomial(p, draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    return 0.5 * (torch.bincount(index, minlength=len(p)) / draws - p).abs().sum().item()


def _bounded(posterior: Posterior, row: Row, context: Context) -> tuple[dict[str, float], str]:
    found = posterior.diagnose(row, context.settings["samples"], seed=("measure", context.seed), chains=False)
    log_z = found.bounds.log_z
    figures = {
        "log Z, low": log_z.lower,
        "log Z, high": log_z.upper,
        "gap": found.gap,
        "ESS": found.importance.ess,
        "valid": found.importance.valid,
    }
    return figures, found.verdict


def notes(results: Results) -> str:
    s = results["settings"]
    g = s["gflownet"]
    lines = [
        f"{g['max_steps']} updates of {g['num_samples']} completions at learning rate {g['learning_rate']:g}, as in "
        "`benchmarks.posteriors`; all other settings are the defaults. TV: total variation by enumeration; floor: TV "
        f"that {s['draws']:,} exact draws would show. log Z (low to high) and gap (the smaller KL divergence, at most) "
        f"in nats, at level .99, of {s['samples']} samples, without Markov chains (–: no draws of the posterior could "
        "be trusted without them); ESS as a share; valid: share with R > 0. The large forms have one seed.",
        "",
    ]
    for name, runs in results["runs"].items():
        first = runs[0]["details"]
        verdict = f" {first['verdict']}" if first["verdict"] else ""
        shown = "; ".join(f"`{text.strip()}`" for text in first["examples"])
        lines.append(f"- {name}: {first['shape']}.{verdict} Samples: {shown}")
    return "\n".join(lines)


METRICS = (
    "log10 of the completions",
    *("before: TV", "after: TV", "floor", "before: KL(p||q)", "after: KL(p||q)", "exact log Z"),
    *(
        f"{when}: {x}"
        for when in ("before", "after")
        for x in ("log Z, low", "log Z, high", "gap", "ESS", "valid")
    ),
)
EXPERIMENT = Experiment(
    name="structured",
    question="How near does training come to posteriors over lists, trees, programs and related statements?",
    presets={"small": SETTINGS},
    groups={"gflownet": GFNConfig},
    prepare=prepare,
    methods={name: partial(method, name=name) for name in NAMES},
    once=frozenset(name for name, (_, large) in NAMES.items() if large),
    evaluate=evaluate,
    metrics=metrics(*METRICS),
    rows="metrics",
    summary=notes,
)

if __name__ == "__main__":
    command.main(EXPERIMENT)
