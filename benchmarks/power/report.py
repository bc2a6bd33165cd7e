"""The page about the real-model results, from results.json alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from tabulate import tabulate

from .real import LEVEL, METHODS, POWER

Record = dict[str, Any]


def page(record: Record) -> str:
    """Markdown. A method that has not been measured on every question is marked with the number of questions."""
    parts = [HEAD.format(**record["settings"])]
    questions = [results for task in record["results"].values() for results in task.values()]
    if len(record["results"]) < 2 or not all(set(METHODS) <= results.keys() for results in questions):
        parts.append(UNFINISHED)
    for task, questions in record["results"].items():
        parts.append(f"## {task}\n\n" + _table(questions))
        parts.append(_bounds(questions))
        if task in record["training"]:
            parts.append(_break_even(questions, record["training"][task]))
    machine = record["environment"]
    made = f"Made with: {machine['cpu']}, {machine['threads']} thread; commit {machine['commit']}."
    more = "Every output and all settings: [results.json](results.json)."
    return "\n\n".join([*parts, f"{made} {more}"]) + "\n"


def _table(questions: Record) -> str:
    found_z = {x: _found(results) for x, results in questions.items()}
    lines = []
    for method in METHODS:
        outputs = [(x, o) for x, results in questions.items() for o in results.get(method, [])]
        if not outputs:
            continue
        right = [o["right"] for _, o in outputs]
        low, high = wilson(sum(right), len(right))
        lines.append(
            [
                method,
                mean(o["log_p"] for _, o in outputs),
                mean(POWER * o["log_p"] for _, o in outputs),
                mean(POWER * o["log_p"] - found_z[x] for x, o in outputs),
                f"{sum(right)}/{len(right)} ({low:.2f}..{high:.2f})",
                mean(o["length"] for _, o in outputs),
                mean(o["decoded"] for _, o in outputs),
                mean(o["judged"] for _, o in outputs),
                sum(method in results for results in questions.values()),
            ]
        )
    headers = ["method", "log p", "log R", "log R - log Z'", f"right ({LEVEL:.0%})", "tokens"]
    headers += ["tokens decoded", "tokens judged", "questions"]
    return tabulate(lines, headers, "github", floatfmt=".1f")


def _found(results: Record) -> float:
    """log Z': the sum of R over all different completions that any method has found, a lower bound on Z."""
    outputs = [o for name in METHODS for o in results.get(name, [])]
    different = {tuple(o["tokens"]): POWER * o["log_p"] for o in outputs}
    top = max(different.values())
    return top + math.log(sum(math.exp(v - top) for v in different.values()))


def _bounds(questions: Record) -> str:
    lines = []
    for x, results in questions.items():
        pools = [results.get(f"pool of {name}") for name in ("low temperature", "amortised")]
        figures = [f for p in pools for f in ((p["log_z_lower"], p["ess"]) if p else (None, None))]
        lines.append([x[:48].replace("|", " "), _found(results), *figures])
    headers = ["question", "log Z'", "low temperature", "its ESS", "amortised", "its ESS"]
    title = (
        f"Lower bounds on log Z, nats: Z' is certain, the others hold at {LEVEL:.0%}, from pools of draws\n\n"
    )
    return title + tabulate(lines, headers, "github", floatfmt=".1f")


def _break_even(questions: Record, training: Record) -> str:
    """Tokens of training against those that an output of q saves: what SIR takes less what q alone takes."""
    rival = mean(o["decoded"] for r in questions.values() for o in r.get("SIR", []))
    ours = mean(o["decoded"] for r in questions.values() for o in r.get("amortised", []))
    tokens = training["tokens"]
    if math.isnan(ours) or rival <= ours:
        return ""
    return (
        f"Training drew {tokens:,.0f} tokens ({training['completions']:,.0f} completions; each was also judged and "
        "passed forward and back once: four passes or so). Against SIR from the low temperature, at "
        f"{rival:.0f} tokens an output, an output of q takes {ours:.0f}: paid back after "
        f"{4 * tokens / (rival - ours):,.0f} outputs if they are as good, which the table decides."
    )


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a proportion."""
    p, square = right / n, z * z
    middle, spread = p + square / (2 * n), z * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + square / n)), min(1.0, (middle + spread) / (1 + square / n))


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


UNFINISHED = "**Not finished**: what is missing below is not measured yet. The command, given again, goes on."

HEAD = """# Power posteriors p(z|x)^{power} of a real model

How likely completions does each method reach, and how often is their last number the answer, at about equal passes?

```bash
python -m benchmarks.power --model models/SmolLM2-135M-Instruct.Q4_1.gguf --data ../shared/data/gsm8k \\
    --output results/smollm2/power
```

{outputs} outputs of each method for a question. Best-of-n, SIR and SMC take {draws} draws or particles at
temperature 1/{power} for an output, MH a chain of {steps} steps, blocks {block_steps} steps after each of {blocks}
blocks. Amortised: q that starts at the model itself, trained by VarGrad on other questions. Means over outputs.
Tokens decoded and judged are for one output; the model's own logits give log p of what it decodes, so judging could be
free for all but the amortised q. Intervals treat outputs as independent, though two are of one question. No upper
bounds on log Z: they need draws that are known to be of the posterior."""
