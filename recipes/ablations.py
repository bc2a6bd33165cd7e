"""What the authors leave open: does each part of the training procedure help?

One thing at a time differs from the default: replay, tempered behaviour, a temperature of the reward that falls
from 1.5 to 1, SubTB on a few random stopping states in place of all, and VarGrad. Two targets: one that can be
enumerated, with the exact distance from the posterior, and story infilling, by importance weights.

    python recipes/ablations.py --output runs/ablations
"""

from __future__ import annotations

import time
from typing import Any

from _common import Metrics, Results, average, load_model, parser, train
from amortlm import LanguageModel, Posterior, Support, exact
from amortlm.lab.tasks import infilling
from amortlm.types import Row

WORDS = [" he", " she", " found", " the", " dog", " home", " was", " her"]
SHORT = Support(stop=".", min_tokens=1, max_tokens=4, allowed_tokens=WORDS)  # 4,680 strings
SHORT_ROW = {
    "x": "Tom had a dog. One day the dog was lost.",
    "y": "Tom was happy to have his dog again.",
}
COMMON: dict[str, Any] = {"objective": "subtb", "behaviour": {"replay": 0.25, "tempered": 0.375}}
SHORT_CONFIG = {"num_samples": 32, "per_device_train_batch_size": 1, "learning_rate": 1e-3}
STORY_CONFIG = {"num_samples": 12, "per_device_train_batch_size": 2, "learning_rate": 2e-3}
SOME, FEW = {"short": 3, "stories": 6}, {"short": 2, "stories": 3}


def settings_of(task: str, steps: int) -> dict[str, dict[str, Any]]:
    """What each setting changes; the schedule ends half-way, so that the last updates have the target itself."""
    return {
        "default": {},
        "no replay": {"behaviour": {"tempered": 0.5}},
        "no tempering": {"behaviour": {"replay": 0.25}},
        "reward T 1.5 to 1": {"reward_temperature": (1.5, 1.0, max(1, steps // 2))},
        "some states": {"objective": {"subtb": {"states": SOME[task]}}},
        "few states": {"objective": {"subtb": {"states": FEW[task]}}},
        "VarGrad": {"objective": "vargrad"},
        "VarGrad, own samples": {"objective": "vargrad", "behaviour": {"policy": 1.0}},
    }


class Tasks:
    """Training and measuring on the two targets. The enumerable one is tempered, else one string has nearly all."""

    def __init__(self, lm: LanguageModel, stories: int, samples: int):
        self.lm, self.samples = lm, samples
        self.target = lm.log_prob("{z} {y}", given="{x}")
        self.flat = self.target / 2
        self.truth = exact.enumerate_posterior(self.flat, SHORT.bind(lm), SHORT_ROW)
        self.rows: list[Row] = [dict(row) for row in infilling.STORIES[:stories]]

    def short(self, name: str, steps: int, seed: int) -> Metrics:
        config = COMMON | SHORT_CONFIG | settings_of("short", steps)[name]
        posterior, seconds = self._train(self.flat, "{x}", SHORT, [SHORT_ROW], config, steps, seed)
        d = exact.distance(exact.policy_log_probs(posterior.policy, SHORT_ROW), self.truth.log_p)
        return {
            "short: TV": d.total_variation,
            "short: KL(q||p)": d.kl_qp,
            "short: KL(p||q)": d.kl_pq,
            "short: seconds": seconds,
        }

    def stories(self, name: str, steps: int, seed: int) -> Metrics:
        config = COMMON | STORY_CONFIG | settings_of("stories", steps)[name]
        spec = infilling.SPEC
        support, prompt = Support(**spec.support), str(spec.prompt)
        posterior, seconds = self._train(self.target, prompt, support, self.rows, config, steps, seed)
        found = [posterior.estimate(row, self.samples, seed=("measure", seed)) for row in self.rows]
        figures = average([{"ESS": e.ess, "ELBO": e.elbo, "var log w": e.log_w_variance} for e in found])
        return {f"stories: {k}": v for k, v in figures.items()} | {"stories: seconds": seconds}

    def _train(self, *what: Any) -> tuple[Posterior, float]:
        target, prompt, support, rows, config, steps, seed = what
        start = time.perf_counter()
        posterior = train(self.lm, target, prompt, support, rows, max_steps=steps, seed=seed, **config)
        return posterior, time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "ablations", steps=60, seeds=3)
    options.add_argument("--short-steps", type=int, default=80, help="updates on the enumerable target")
    options.add_argument("--stories", type=int, default=4, help="stories to train and measure on")
    options.add_argument("--samples", type=int, default=256, help="samples a story that are measured")
    args = options.parse_args(argv)
    tasks = Tasks(load_model(args.model), args.stories, args.samples)
    settings = {k: v for k, v in vars(args).items() if k not in ("seeds", "output")}
    settings |= {"common": COMMON, "short": SHORT_CONFIG, "stories_config": STORY_CONFIG}
    results = Results(args.output, "Parts of the training procedure", settings)

    def measure(name: str, seed: int) -> Metrics:
        return tasks.short(name, args.short_steps, seed) | tasks.stories(name, args.steps, seed)

    for seed in range(args.seeds):
        for name in settings_of("short", args.short_steps):
            results.run(name, seed, lambda n=name, s=seed: measure(n, s))
    results.finish(
        f"*short*: infilling at T = 2 on {len(tasks.truth.completions):,} strings of one prompt, "
        f"{args.short_steps} updates, exact. *stories*: {args.stories} stories, {args.steps} updates, "
        f"{args.samples} samples each. Default: SubTB on all stopping states, a quarter of the prompts replayed, half "
        f"of the others tempered, no schedule. *some states*: {SOME['short']} (short) and {SOME['stories']} (stories) "
        f"at random, the last always; *few*: {FEW['short']} and {FEW['stories']}. Seconds are those of training. Nats; "
        "± between seeds: differences within it are none."
    )


if __name__ == "__main__":
    main()
