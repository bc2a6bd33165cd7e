"""Power posteriors that can be enumerated: the exact distance of every method from p(z|x)^a, at equal passes.

The texts are longer than the model would write of its own. So the likeliest next token is often a bad start, which is
where p^a and a low temperature differ.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.posteriors import laws
from benchmarks.posteriors.cases import Truth, policy_law, truth_of
from benchmarks.posteriors.laws import Array, Law
from benchmarks.posteriors.smc_law import average, between, smc_law
from tabulate import tabulate

from amortlm import GFNConfig, LanguageModel, Policy, Support, default_lora, tempered
from amortlm.environment import environment
from amortlm.types import Row

from .blocks_law import blockwise
from .training import TemperedTrainer

ROW: Row = {}
PROMPTS = {
    "story": ("Once upon a time there was a", "little big girl bear and"),
    "weather": ("The weather was cold. Tom felt", "very so sad cold and tired"),
}
POWERS = (2, 4)
MIN_TOKENS, MAX_TOKENS = 4, 5
PASSES = [1, *(n for k in range(1, 10) for n in (2**k, 3 * 2 ** (k - 1))), 1024]
STEPS = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
SIMULATED = 2**16  # particles of a point of SMC
UPDATES, SAMPLES = 100, 32
MARKS = (0.1, 0.05)
Point = dict[str, float]


@dataclass(frozen=True)
class Problem:
    prompt: str
    support: Support
    power: int

    def policy(self, lm: LanguageModel) -> Policy:
        return Policy(lm, self.prompt, self.support, default_lora(1)).prior

    def trained(self, lm: LanguageModel, temperature: float) -> Array:
        """log q after training that starts at the model at a temperature."""
        with tempfile.TemporaryDirectory() as folder:
            args = GFNConfig(
                output_dir=folder,
                objective="vargrad",
                max_steps=UPDATES,
                num_samples=SAMPLES,
                per_device_train_batch_size=1,
                buffer_size=2 * SAMPLES,
                learning_rate=1e-3,
                save_strategy="no",
                logging_strategy="no",
                diagnose_steps=0,
                disable_tqdm=True,
            )
            target = self.power * lm.log_prob("{z}", given=self.prompt)
            trainer = TemperedTrainer(
                lm,
                target=target,
                prompt=self.prompt,
                support=self.support,
                train_dataset=[ROW],
                args=args,
                adapter=16,
                temperature=temperature,
            )
            trainer.train()
            return policy_law(trainer.policy)


def problems() -> Iterator[tuple[str, Problem]]:
    for power, (name, (prompt, words)) in product(POWERS, PROMPTS.items()):
        allowed = [f" {word}" for word in words.split()]
        support = Support(stop=".", min_tokens=MIN_TOKENS, max_tokens=MAX_TOKENS, allowed_tokens=allowed)
        yield f"{name}, a = {power}", Problem(prompt, support, power)


def point(law: Law, truth: Truth) -> Point:
    kl_qp, kl_pq = law.kl(truth.p)
    return {"passes": law.passes, "tv": law.total_variation(truth.p), "kl_qp": kl_qp, "kl_pq": kl_pq}


def smc(truth: Truth, log_q: Array) -> list[Point]:
    """Simulated: `tv` is an upper bound, `tv_low` a lower one."""
    rng, out = np.random.default_rng(0), []
    for n in PASSES:
        runs = max(SIMULATED // n, 64) // 2
        one, other = (
            smc_law(truth.space, np.exp(log_q), truth.log_r, n, rng, twisted=True, runs=runs)
            for _ in range(2)
        )
        low, high = between(one, other, truth.p)
        out.append({"passes": average(one, other).passes, "tv": high, "tv_low": low})
    return out


def curves(truth: Truth, log_q: Array, which: str) -> list[Point]:
    q, w = np.exp(log_q), laws.weights(log_q, truth.log_r)
    if which == "plain":
        return [point(Law(q / q.sum()), truth)]
    if which == "best-of-n":
        return [point(laws.best_of(q, truth.log_r, n), truth) for n in PASSES]
    if which == "SIR":
        rng = np.random.default_rng(0)
        return [point(laws.sir(q, w, n, rng), truth) for n in PASSES]
    if which == "MH":
        return [point(law, truth) for law in laws.metropolis_hastings(truth.space, q, w, PASSES)]
    if which == "SMC":
        return smc(truth, log_q)
    block = int(which.removeprefix("blocks of "))
    return [point(blockwise(truth.space, log_q, truth.log_r, block, n), truth) for n in STEPS]


METHODS = {
    "base": ("plain", "best-of-n", "SIR"),
    "low temperature": (
        "plain",
        "best-of-n",
        "SIR",
        "SMC",
        "MH",
        "blocks of 1",
        "blocks of 2",
        "blocks of 3",
    ),
    "amortised": ("plain", "SIR", "MH"),
    "amortised, from low temperature": ("plain", "SIR", "MH", "blocks of 2"),
}


def measure(problem: Problem, lm: LanguageModel) -> dict[str, list[Point]]:
    base = problem.policy(lm)
    low = 1 / problem.power
    truth = truth_of(problem.power * lm.log_prob("{z}", given=problem.prompt), base)
    proposals: dict[str, Callable[[], Array]] = {
        "base": lambda: policy_law(base),
        "low temperature": lambda: policy_law(tempered(base, low)),
        "amortised": lambda: problem.trained(lm, 1.0),
        "amortised, from low temperature": lambda: problem.trained(lm, low),
    }
    found = {}
    for name, make in proposals.items():
        log_q = make()
        for which in METHODS[name]:
            found[f"{name}, {which}"] = curves(truth, log_q, which)
    return found


def to_reach(points: list[Point], mark: float) -> float | None:
    """The fewest passes at which the total variation is at most the mark; None if it is not reached."""
    return min((p["passes"] for p in points if p["tv"] <= mark), default=None)


def at(points: list[Point], passes: float) -> Point:
    """The last point of at most so many passes."""
    return max((p for p in points if p["passes"] <= passes), key=lambda p: p["passes"])


def tables(results: dict[str, dict[str, list[Point]]]) -> str:
    names, parts = list(results), []
    methods = list(results[names[0]])
    for mark in MARKS:
        lines = [[m, *(_few(to_reach(results[n][m], mark)) for n in names)] for m in methods]
        parts.append(
            f"Passes for one output at a total variation of at most {mark}\n\n" + _table(lines, names)
        )
    for passes in (1, 16, 256):
        lines = [[m, *(_distances(at(results[n][m], passes)) for n in names)] for m in methods]
        parts.append(
            f"Total variation (KL(law || p), nats) at up to {passes} passes\n\n" + _table(lines, names)
        )
    for mark in MARKS:
        lines = [
            [m, *(_even(results[n], m, mark) for n in names)]
            for m in methods
            if m.startswith("amortised") and "SIR" in m
        ]
        title = (
            f"Break-even: outputs at a total variation of {mark} after which {UPDATES * SAMPLES:,} passes of training "
            "on this posterior have paid, against the quickest method without training"
        )
        parts.append(f"{title}\n\n{_table(lines, names)}")
    return "\n\n".join(parts)


def page(record: dict[str, Any]) -> str:
    """Markdown, from exact.json alone."""
    machine, head = record["environment"], HEAD.format(words=MAX_TOKENS, least=MIN_TOKENS)
    made = f"Made with: {machine['cpu']}, {machine['threads']} thread; commit {machine['commit']}."
    more = f"Training: VarGrad, {UPDATES} updates of {SAMPLES}. Every figure: [exact.json](exact.json)."
    return "\n\n".join([head, tables(record["results"]), f"{made} {more}"]) + "\n"


def _even(results: dict[str, list[Point]], method: str, mark: float) -> str:
    ours = to_reach(results[method], mark)
    rivals = [to_reach(points, mark) for name, points in results.items() if not name.startswith("amortised")]
    best = min((r for r in rivals if r is not None), default=None)
    if ours is None or best is None:
        return "-" if ours is None else "at once"
    return f"{UPDATES * SAMPLES / (best - ours):,.0f}" if best > ours else "never"


def _few(passes: float | None) -> str:
    return "-" if passes is None else f"{passes:,.0f}" if passes >= 10 else f"{passes:.1f}"


def _distances(p: Point) -> str:
    return f"{p['tv']:.3f}" + (f" ({p['kl_qp']:.3f})" if "kl_qp" in p else "")


def _table(lines: list[list[Any]], names: list[str]) -> str:
    return tabulate(lines, ["method", *names], "github", disable_numparse=True)


def run(folder: Path) -> None:
    """Measure all problems, and write exact.json after each; those that it has are not measured again."""
    file = folder / "exact.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"results": {}}
    lm = LanguageModel.from_pretrained("embedded")
    folder.mkdir(parents=True, exist_ok=True)
    for name, problem in problems():
        if name not in record["results"]:
            record["results"][name] = measure(problem, lm)
            record["environment"] = environment()
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(page(record), encoding="utf-8")
            print(name, "done", flush=True)


HEAD = """# Power posteriors p(z|x)^a, exactly

How near does one output of each method come to p(z|x)^a, at equal passes? Texts of {least} to {words} of six words on
the embedded model: all are scored, and the law of an output is computed, not sampled (of SMC: simulated).

```bash
python -m benchmarks.power --exact --output results/power
```

A pass is a completion drawn and judged; a step of blocks among texts of n tokens is n / {words} of one. "Low
temperature" is the model at temperature 1 / a. "Amortised" is trained on this posterior from the model itself,
"amortised, from low temperature" from the model at temperature 1 / a."""
