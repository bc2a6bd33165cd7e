"""How near do corrected samples of an untrained policy come to the posterior? The table of docs/inference.md.

python -m benchmarks.correction
"""

from __future__ import annotations

from collections import Counter

from tabulate import tabulate
from transformers.utils import logging as hf_logging

from amortlm import LanguageModel, Policy, Posterior, Support
from amortlm.inference.exact import enumerate_posterior

ROW = {
    "x": "Anna painted a big picture. The colors in it were",
    "y": "It looked like the sky and the sun.",
}
COLORS = ("red", "blue", "green", "white", "yellow", "brown", "pink", "black")


def main(n: int = 500, budgets: tuple[int, ...] = (1000, 4000)) -> None:
    hf_logging.disable_progress_bar()
    lm = LanguageModel.from_pretrained("embedded")
    support = Support(
        stop=".",
        separator=",",
        min_statements=2,
        max_statements=2,
        max_tokens=3,
        allowed_tokens=[f" {c}" for c in COLORS],
    )
    target = lm.log_prob("{z} {y}", given="{x}")
    posterior = Posterior(Policy(lm, "{x}", support), target)  # q = p: it has not seen y
    exact = enumerate_posterior(target, posterior.policy.support, ROW)
    p = dict(zip(map(tuple, exact.completions), exact.log_p.exp().tolist(), strict=True))
    table = []
    for budget in budgets:
        for method in ("none", "sir", "smc", "mh"):
            given = {} if method == "none" else {"budget": budget}
            samples = posterior.sample(ROW, n, correct=method, **given)
            counts = Counter(tuple(s.tokens) for s in samples)
            tv = sum(abs(counts[z] / n - p[z]) for z in p) / 2
            error = None if samples.log_z is None else samples.log_z - exact.log_z
            table.append([budget, method, tv, error, samples.ess, samples.draws])
    print(f"{len(p)} completions, log Z {exact.log_z:.3f}")
    print(
        tabulate(
            table, ["budget", "correct", "TV", "log Z - exact", "ESS", "draws"], "github", floatfmt=".3f"
        )
    )


if __name__ == "__main__":
    main()
