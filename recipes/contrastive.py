"""Continuations that are specific to their beginning: p(z | x)^a p(z)^b with b < 0.

A low temperature alone makes continuations likely, and the likeliest fit any story. Dividing by a power of p(z)
asks for what x makes likelier: the pointwise mutual information log p(z | x) - log p(z) is to rise. On a support of
4,368 strings, where the posterior is known, also the exact distance from it.

    python recipes/contrastive.py --a 1.5 --b -0.5 --output runs/contrastive
"""

from __future__ import annotations

from typing import Any

import torch

from _common import Metrics, Results, average, load_model, parser, train, untrained
from amortlm import LanguageModel, Posterior, Support, Target, exact, importance
from amortlm.diagnostics.diversity import distinct
from amortlm.errors import ConfigError
from amortlm.lab.tasks.infilling import STORIES
from amortlm.types import Row

PROMPT = "{x}"
LONG = Support(stop=".", min_tokens=3, max_tokens=20)
WORDS = ["the", "a", "dog", "cat", "ran", "home", "saw", "was", "happy", "sad"]
WORDS += ["to", "and", "her", "his", "she", "found"]
SHORT = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=[f" {w}" for w in WORDS])
SHORT_ROW = {"x": "Tom had a dog. One day the dog was lost."}
CONFIG: dict[str, Any] = {"num_samples": 12, "per_device_train_batch_size": 6, "learning_rate": 2e-3}
SHORT_CONFIG = {"num_samples": 64, "per_device_train_batch_size": 1, "learning_rate": 1e-3, "epsilon": 0.1}


class Task:
    """The target and its two parts, and what is measured of a sampler."""

    def __init__(self, lm: LanguageModel, a: float, b: float, rows: list[Row], samples: int):
        self.conditional, self.prior = lm.log_prob("{z}", given="{x}"), lm.log_prob("{z}")
        self.target = a * self.conditional + b * self.prior
        self.rows, self.samples = rows, samples
        self.truth = exact.enumerate_posterior(self.target, SHORT.bind(lm), SHORT_ROW)
        parts = (
            exact.enumerate_posterior(t, SHORT.bind(lm), SHORT_ROW) for t in (self.conditional, self.prior)
        )
        given, alone = (part.log_p + part.log_z for part in parts)
        self.short_information = given - alone

    def stories(self, posterior: Posterior, seed: int) -> Metrics:
        return average([self._story(posterior, row, seed) for row in self.rows])

    def _story(self, posterior: Posterior, row: Row, seed: int) -> Metrics:
        rollouts, log_probs = posterior.policy.sample([row], self.samples, seed=("measure", seed))
        log_q = log_probs.final(rollouts.lengths)
        log_given, log_alone = (part.score_final(rollouts) for part in (self.conditional, self.prior))
        log_r = self.target.score_final(rollouts)
        found = importance.estimate(log_r - log_q, log_r)
        return {
            "log p(z|x) - log p(z)": (log_given - log_alone).mean().item(),
            "log p(z|x)": log_given.mean().item(),
            "log p(z)": log_alone.mean().item(),
            "distinct": distinct(rollouts.completions()),
            "ESS": found.ess,
            "ELBO": found.elbo,
        }

    def short(self, log_q: torch.Tensor) -> Metrics:
        """Exact figures of a distribution over the short strings."""
        d = exact.distance(log_q, self.truth.log_p)
        return {
            "short: log p(z|x) - log p(z)": (log_q.exp() * self.short_information).sum().item(),
            "short: TV": d.total_variation,
            "short: KL(q||p)": d.kl_qp,
            "short: KL(p||q)": d.kl_pq,
        }


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "contrastive", steps=100, seeds=3)
    options.add_argument("--a", type=float, default=1.5, help="power of p(z | x)")
    options.add_argument("--b", type=float, default=-0.5, help="power of p(z), negative")
    options.add_argument("--rows", type=int, default=12, help="stories")
    options.add_argument("--samples", type=int, default=256, help="samples a story that are measured")
    args = options.parse_args(argv)
    if args.a + args.b <= 0 or args.b >= 0:
        raise ConfigError(f"need b < 0 < a + b for a contrast that can be summed, got a={args.a}, b={args.b}")
    lm = load_model(args.model)
    rows = [{"x": story["x"]} for story in STORIES[: args.rows]]
    task = Task(lm, args.a, args.b, rows, args.samples)
    settings = {**vars(args), **CONFIG, "short": SHORT_CONFIG}
    del settings["seeds"], settings["output"]
    results = Results(args.output, "Continuations specific to their beginning", settings)

    def figures(long: Posterior, short: Posterior, seed: int) -> Metrics:
        return task.stories(long, seed) | task.short(exact.policy_log_probs(short.policy, SHORT_ROW))

    def trained(target: Target, seed: int) -> Metrics:
        common = {"objective": "subtb", "seed": seed}
        long = train(lm, target, PROMPT, LONG, rows, **CONFIG, **common, max_steps=args.steps, lora=32)
        short = train(
            lm, target, PROMPT, SHORT, [SHORT_ROW], **SHORT_CONFIG, **common, max_steps=2 * args.steps
        )
        return figures(long, short, seed)

    def start(seed: int) -> Metrics:
        return figures(
            untrained(lm, task.target, PROMPT, LONG), untrained(lm, task.target, PROMPT, SHORT), seed
        )

    for seed in range(args.seeds):
        results.run("untrained", seed, lambda s=seed: start(s))
        results.run("tempered", seed, lambda s=seed: trained(args.a * task.conditional, s))
        results.run("contrastive", seed, lambda s=seed: trained(task.target, s))
    results.run("exact posterior", 0, lambda: task.short(task.truth.log_p))
    results.finish(
        f"The target is p(z|x)^{args.a:g} p(z)^{args.b:g}, and ESS, ELBO and distances are from it. *tempered* was "
        f"trained on p(z|x)^{args.a:g} alone. Above: {args.samples} samples for each of {args.rows} stories; *short*: "
        f"by enumeration of {len(task.truth.completions):,} strings of one prompt, exact. Nats; ± between seeds."
    )


if __name__ == "__main__":
    main()
