"""The trained sampler, for users: sample, log_prob, diagnose, save and load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amortlm.diagnostics.diversity import diversity
from amortlm.diagnostics.exact import LIMIT, distance, enumerate_posterior, policy_log_probs
from amortlm.diagnostics.importance import ImportanceEstimate, estimate
from amortlm.errors import CheckpointError, ConfigError, DataError
from amortlm.language_model import LanguageModel
from amortlm.policy.adapter import FULL
from amortlm.policy.policy import Policy
from amortlm.policy.support import Support
from amortlm.predictive import Prediction, Votes, predict, vote
from amortlm.targets.base import Target
from amortlm.targets.lists import check_statements
from amortlm.targets.template import Messages, check_rows
from amortlm.types import Rollouts, Row

FILE = "posterior.json"
FORMAT = 1
BATCH = 256  # completions sampled and scored at once


@dataclass(frozen=True)
class Sample:
    """One completion. log_q, log_reward: nats; weight: self-normalised importance weight among its batch (they
    sum to 1; all 0 where R = 0 for every one of them), None when the posterior has no target; statements: of a
    completion that is a list (the support has a separator)."""

    text: str
    tokens: list[int]
    log_q: float
    log_reward: float | None
    weight: float | None
    statements: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Posterior:
    """A policy and the target it was trained on. `target` may be None: then it samples but cannot weigh."""

    def __init__(self, policy: Policy, target: Target | None):
        self.policy, self.target, self.lm = policy, target, policy.lm
        if target is not None:
            check_statements(target, policy.support)

    def sample(self, row: Row, n: int = 1, *, seed: object = 0) -> list[Sample]:
        """n completions for one row, in one left-to-right pass each. The same seed gives the same samples.

        Raises DataError for a missing column, PromptTooLongError for a prompt that does not fit.
        """
        rollouts, log_q, log_reward = self._draw(row, n, seed)
        weights = (
            None if log_reward is None else (log_reward - log_q).double().softmax(0).nan_to_num(0.0).tolist()
        )
        texts = self.texts(rollouts)
        return [
            Sample(
                text=texts[i],
                tokens=tokens,
                log_q=log_q[i].item(),
                log_reward=None if log_reward is None else log_reward[i].item(),
                weight=None if weights is None else weights[i],
                statements=self._statements(tokens),
            )
            for i, tokens in enumerate(rollouts.completions())
        ]

    def _statements(self, tokens: list[int]) -> list[str] | None:
        support = self.policy.support
        return [self.lm.decode(s) for s in support.statements(tokens)] if support.lists else None

    @torch.no_grad()
    def log_prob(self, row: Row, completions: Sequence[str | Sequence[int]]) -> Tensor:
        """[n] exact log q of completions (texts or token lists), nats, on the support.

        A completion outside the support raises DataError.
        """
        self._check([row])
        if isinstance(completions, str):
            raise DataError(f"log_prob takes a list of completions: write [{completions!r}]")
        if len(completions) == 0:
            return torch.zeros(0)
        rollouts = self.policy.rollouts([row], [completions])
        return self.policy.evaluate(rollouts).final(rollouts.lengths).float().cpu()

    def texts(self, rollouts: Rollouts) -> list[str]:
        """Completions with their stop symbols, as text."""
        pairs = zip(rollouts.completions(), rollouts.stops.tolist(), strict=True)
        return [self.lm.decode([*tokens, stop]) for tokens, stop in pairs]

    def estimate(self, row: Row, n: int = 256, *, seed: object = 0) -> ImportanceEstimate:
        """Importance diagnostics of one row from n fresh samples. Small n flatter a bad proposal."""
        return self._weigh(row, n, seed)[1]

    def _weigh(self, row: Row, n: int, seed: object) -> tuple[Rollouts, ImportanceEstimate]:
        rollouts, log_q, log_reward = self._draw(row, n, seed)
        if log_reward is None:
            raise ConfigError(
                "this posterior has no target to weigh samples with; pass target= to from_pretrained"
            )
        return rollouts, estimate(log_reward - log_q, log_reward)

    def diagnose(
        self, rows: Row | Sequence[Row], n: int = 256, *, seed: object = 0, limit: int = LIMIT
    ) -> Diagnosis:
        """How far the sampler is from the posterior, row by row.

        Importance diagnostics from n samples each; where the support has at most `limit` completions, also
        exact log Z, total variation and both KL divergences by enumeration.
        """
        rows = [rows] if isinstance(rows, dict) else list(rows)  # type: ignore[arg-type]
        self._check(rows)
        reports = []
        for row in rows:
            rollouts, weighed = self._weigh(row, n, seed)
            report = weighed.to_dict() | diversity(rollouts.completions())
            if self.policy.support.size() <= limit:
                report |= self._exact(row, limit)
            reports.append(report)
        return Diagnosis(reports)

    def predict(
        self, row: Row, answers: Sequence[str], n: int = 64, *, temperature: float = 1.0, seed: object = 0
    ) -> Prediction:
        """p(y | x) over the answers: the mean over n samples z of p(y | x z), with its Monte-Carlo error.

        The target must be one log_prob with the answer's column after `{z}`, which the prompt may not show (see
        `amortlm.predictive`, also for many rows at once). Raises ConfigError, DataError.
        """
        return predict(self, [row], answers, n, temperature=temperature, seed=seed)[0]

    def vote(self, row: Row, n: int = 10, *, temperature: float = 1.0, seed: object = 0) -> Votes:
        """The model's greedy answers after each of n samples z, counted; under the same conditions."""
        return vote(self, [row], n, temperature=temperature, seed=seed)[0]

    def _exact(self, row: Row, limit: int) -> dict[str, float]:
        assert self.target is not None
        exact = enumerate_posterior(self.target, self.policy.support, row, limit)
        d = distance(policy_log_probs(self.policy, row), exact.log_p)
        return {
            "exact_log_z": exact.log_z,
            "total_variation": d.total_variation,
            "kl_qp": d.kl_qp,
            "kl_pq": d.kl_pq,
        }

    def _draw(self, row: Row, n: int, seed: object) -> tuple[Rollouts, Tensor, Tensor | None]:
        self._check([row])
        if n < 1:
            raise ConfigError(f"n must be at least 1, got {n}")
        parts, log_q, log_r = [], [], []
        for start in range(0, n, BATCH):
            rollouts, log_probs = self.policy.sample([row], min(BATCH, n - start), seed=(seed, start))
            parts.append(rollouts)
            log_q.append(log_probs.final(rollouts.lengths).float().cpu())
            if self.target is not None:
                log_r.append(self.target.score_final(rollouts).cpu())
        return Rollouts.cat(parts), torch.cat(log_q), torch.cat(log_r) if log_r else None

    def _check(self, rows: Sequence[Row]) -> None:
        columns = set(self.policy.prompt.columns) | (set(self.target.columns) if self.target else set())
        check_rows(rows, columns, "rows")

    def save_pretrained(self, folder: str | Path) -> None:
        """A PEFT adapter (or full model) folder with `posterior.json`: model, prompt, support, target.

        A target with a function that has no import path is saved without it; pass it to from_pretrained again.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save_adapter(folder)
        spec: dict[str, Any] = {
            "format": FORMAT,
            "model": self.lm.name,
            "weights": FULL if self.policy.is_full else "adapter",
            "prompt": self.policy.prompt.source,
            "support": self.policy.support_spec.to_dict(),
            "target": None,
        }
        try:
            spec["target"] = self.target.to_spec() if self.target else None
        except ConfigError as e:
            spec["target_not_saved"] = str(e)
        (folder / FILE).write_text(json.dumps(spec, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, lm: LanguageModel | None = None, target: Target | None = None
    ) -> Posterior:
        """Load a saved posterior. lm: the frozen model if it is at hand or has moved; target: overrides the saved.

        Raises CheckpointError for an incomplete folder.
        """
        from amortlm.targets.spec import target_from_spec

        folder = Path(folder)
        try:
            spec = json.loads((folder / FILE).read_text())
            prompt: str | Messages = spec["prompt"]
            support, weights, saved = Support(**spec["support"]), spec["weights"], spec["target"]
            found = spec["format"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(
                f"{folder}: {FILE} is missing or damaged ({e}); this is not a complete saved posterior"
            ) from e
        if found != FORMAT:
            raise CheckpointError(
                f"{folder}: {FILE} has format {found}, this version reads format {FORMAT}; load it with the version "
                "of amortlm that saved it"
            )
        lm = lm or LanguageModel.from_pretrained(spec["model"])
        policy = Policy(lm, prompt, support, FULL if weights == FULL else folder)
        if weights == FULL:
            policy.load_adapter(folder)
        if target is None and saved is not None:
            target = target_from_spec(saved, lm)
        return cls(policy, target.bind(lm) if target is not None else None)


class Diagnosis:
    """One report (a dict of figures) per row; prints as a table."""

    def __init__(self, reports: list[dict[str, Any]]):
        self.reports = reports

    def mean(self, name: str) -> float:
        return sum(r[name] for r in self.reports) / len(self.reports)

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [{"row": i, **report} for i, report in enumerate(self.reports)]
        return tabulate(rows, headers="keys", floatfmt=".3g")
