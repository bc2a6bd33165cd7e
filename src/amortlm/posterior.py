"""The trained sampler, for users: sample, log_prob, diagnose, save and load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amortlm import saved
from amortlm.data import as_row, check_rows, rows_or_row
from amortlm.diagnostics.diagnose import LEVEL, Diagnosis, Gold, diagnose
from amortlm.diagnostics.importance import ImportanceEstimate, estimate
from amortlm.engine.adapter import FULL
from amortlm.errors import AmortLMError, CheckpointError, ConfigError, DataError
from amortlm.inference.correct import Weighted, check_method, corrected, draw
from amortlm.inference.exact import LIMIT
from amortlm.language_model import LanguageModel
from amortlm.policy.policy import Policy
from amortlm.predictive import Prediction, Votes, predict, vote
from amortlm.saved import FILE, FORMAT
from amortlm.support.spec import Support
from amortlm.targets.base import Target
from amortlm.targets.lists import check_statements
from amortlm.types import Rollouts, Row

BATCH = 256  # completions sampled and scored at once


@dataclass(frozen=True)
class Sample:
    """One completion. log_q, log_reward: nats; weight: self-normalised importance weight among its batch (they
    sum to 1; all 0 where R = 0 for every one of them), 1/n after a correction, None when the posterior has no
    target; statements: of a completion that is a list (the support has a separator)."""

    text: str
    tokens: list[int]
    log_q: float
    log_reward: float | None
    weight: float | None
    statements: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Samples(list[Sample]):
    """n samples and how they came about. Without a correction they are draws of q, with importance weights; with
    one, draws of the posterior, approximately, of equal weight: copies of each other where the budget found little.

    method           "none", "sir", "smc" or "mh"
    draws            completions drawn from q for them; the rest of one, drawn anew by smc or mh, counts as one
    ess              effective sample size, in draws, of the weights: before resampling for sir and smc, where far
                     fewer than n means many copies. None for mh, or without a target
    log_z            log of the mean weight, whose expectation is Z exactly; nats; -inf where R = 0 for all draws.
                     None for mh, or without a target
    acceptance_rate  of mh, else None
    """

    def __init__(
        self,
        samples: Iterable[Sample] = (),
        *,
        method: str = "none",
        draws: int = 0,
        ess: float | None = None,
        log_z: float | None = None,
        acceptance_rate: float | None = None,
    ):
        super().__init__(samples)
        self.method, self.draws = method, draws
        self.ess, self.log_z, self.acceptance_rate = ess, log_z, acceptance_rate

    def summary(self) -> dict[str, Any]:
        """All of the above, for JSON."""
        return dict(self.__dict__)


class Posterior:
    """A policy and the target it was trained on. `target` may be None: then it samples but cannot weigh."""

    def __init__(self, policy: Policy, target: Target | None):
        self.policy, self.target, self.lm = policy, target, policy.lm
        if target is not None:
            check_statements(target, policy.support)

    def sample(
        self, row: Row, n: int = 1, *, correct: str = "none", budget: int | None = None, seed: object = 0
    ) -> Samples:
        """n completions for one row. The same seed gives the same samples.

        correct: "none" draws from q, in one left-to-right pass each. The others draw from the posterior itself as
        the budget grows, whatever q is: "sir" resamples `budget` draws by weight, "smc" as many particles, weighted
        and resampled on the way, "mh" spends a quarter of the budget on draws to start from and the rest on the
        steps of n chains. budget: completions drawn from q in all, by default max(256, 16 n); what smc draws anew
        after resampling comes on top. See docs/inference.md.

        Raises DataError for a missing column, PromptTooLongError for a prompt that does not fit, ConfigError for a
        correction that is unknown or has no target, a budget without one or too small for n (sir, smc: n; mh: 2 n),
        and smc or mh on a support with a tool; RewardError where there is nothing to resample: R = 0 everywhere.
        """
        check_method(correct)
        if correct == "none":
            if budget is not None:
                raise ConfigError(
                    'budget is for corrected samples: give correct="sir", "smc" or "mh" with it'
                )
            return self._uncorrected(row, n, seed)
        if self.target is None:
            raise ConfigError(f"correct={correct!r} needs a target; pass target= to from_pretrained")
        row = self._check_draw(row, n)
        got = corrected(
            self.policy, self.target, row, n, method=correct, budget=budget, seed=seed, batch=BATCH
        )
        return Samples(
            self._samples(got.drawn.rollouts, got.drawn.log_q, got.drawn.log_reward, [1 / n] * n),
            method=correct,
            draws=got.drawn.draws,
            ess=got.ess,
            log_z=got.log_z,
            acceptance_rate=got.acceptance_rate,
        )

    def _uncorrected(self, row: Row, n: int, seed: object) -> Samples:
        rollouts, log_q, log_reward = self._draw(row, n, seed)
        if log_reward is None:
            return Samples(self._samples(rollouts, log_q, None, None), draws=n)
        log_w = log_reward - log_q
        weights = log_w.double().softmax(0).nan_to_num(0.0).tolist()
        pool = Weighted(rollouts, log_q, log_reward, log_w, n)
        return Samples(
            self._samples(rollouts, log_q, log_reward, weights), draws=n, ess=pool.ess, log_z=pool.log_z
        )

    def _samples(
        self, rollouts: Rollouts, log_q: Tensor, log_reward: Tensor | None, weights: list[float] | None
    ) -> list[Sample]:
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
        row = self._check(as_row(row))[0]
        if isinstance(completions, str):
            raise DataError(f"log_prob takes a list of completions: write [{completions!r}]")
        if len(completions) == 0:
            return torch.zeros(0)
        rollouts = self.policy.rollouts([row], [completions])
        return self.policy.evaluate(rollouts).final(rollouts.lengths).float().cpu()

    def texts(self, rollouts: Rollouts) -> list[str]:
        """Completions with their stop symbols, as text; a special token as stop symbol is left out."""
        special = self.lm.special_ids
        pairs = zip(rollouts.completions(), rollouts.stops.tolist(), strict=True)
        return [self.lm.decode(tokens if stop in special else [*tokens, stop]) for tokens, stop in pairs]

    def estimate(self, row: Row, n: int = 256, *, seed: object = 0) -> ImportanceEstimate:
        """Importance diagnostics of one row from n fresh samples. Small n flatter a bad proposal."""
        return self._weigh(row, n, seed)[2]

    def _weigh(self, row: Row, n: int, seed: object) -> tuple[Rollouts, Tensor, ImportanceEstimate]:
        """n samples, their log weights [n] and what these say."""
        rollouts, log_q, log_reward = self._draw(row, n, seed)
        if log_reward is None:
            raise ConfigError(
                "this posterior has no target to weigh samples with; pass target= to from_pretrained"
            )
        log_w = log_reward - log_q
        return rollouts, log_w, estimate(log_w, log_reward)

    def diagnose(
        self,
        rows: Row | Sequence[Row],
        n: int = 256,
        *,
        seed: object = 0,
        limit: int = LIMIT,
        level: float = LEVEL,
        gold: Gold | None = None,
    ) -> Diagnosis:
        """How far the sampler is from the posterior, row by row, with a verdict (`amortlm.diagnostics.diagnose`).

        Importance diagnostics from n samples each, and intervals for log Z and both KL divergences that hold jointly
        at `level`, from draws of the posterior (`amortlm.inference.truth`): four to five times the cost of
        `estimate`, more where q is too far off and chains must run. Where the support has at most `limit`
        completions, also exact log Z, total variation and both divergences by enumeration.

        gold: per row, completions known to be good (texts or tokens); they can show a mode that q misses. Raises
        ConfigError without a target, DataError for missing columns or gold completions outside the support.
        """
        return diagnose(self, self._check(rows), n, seed=seed, limit=limit, level=level, gold=gold)

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

    def _draw(self, row: Row, n: int, seed: object) -> tuple[Rollouts, Tensor, Tensor | None]:
        row = self._check_draw(row, n)
        return draw(self.policy, self.target, row, n, seed=seed, batch=BATCH)

    def _check_draw(self, row: Row, n: int) -> Row:
        row = self._check(as_row(row))[0]
        if n < 1:
            raise ConfigError(f"n must be at least 1, got {n}")
        return row

    def _check(self, rows: Row | Sequence[Row]) -> list[Row]:
        """These rows, or this row, as dicts that have the columns of prompt and target."""
        checked: list[Row] = [*rows_or_row(rows)]
        columns = set(self.policy.prompt.columns) | (set(self.target.columns) if self.target else set())
        check_rows(checked, columns, "rows")
        return checked

    def save_pretrained(self, folder: str | Path) -> None:
        """A PEFT adapter (or full model) folder with `posterior.json`: model, prompt, support, target; and a tokenizer
        for other programs: amortlm uses the model's own.

        A target with a function that has no import path is saved without it; pass it to from_pretrained again.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save_adapter(folder)
        self.lm.tokenizer.save_pretrained(str(folder))
        model = saved.model_name(self.lm.name)
        saved.write_base_model(folder, str(self.lm.model.name_or_path), model)
        spec: dict[str, Any] = {
            "format": FORMAT,
            "model": model,
            "weights": FULL if self.policy.is_full else "adapter",
            "prompt": self.policy.prompt.source,
            "support": self.policy.support_spec.to_dict(),
            "target": None,
            "tokenizer": saved.tokenizer_hash(self.lm.tokenizer),
        }
        if getattr(self.lm, "chat_template_kwargs", None):
            spec["chat_template_kwargs"] = self.lm.chat_template_kwargs  # type: ignore[attr-defined]
        try:
            spec["target"] = self.target.to_spec() if self.target else None
        except ConfigError as e:
            spec["target_not_saved"] = str(e)
        (folder / FILE).write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        lm: LanguageModel | str | None = None,
        target: Target | None = None,
        trust: Sequence[str] = (),
    ) -> Posterior:
        """Load a saved posterior.

        lm: the frozen model, or its name or path, if it is at hand or has moved; target: overrides the saved. trust:
        modules (names, or paths of .py files) whose functions the saved target may call. Nothing else that the folder
        says is run or imported: a saved predicate or verifier is a name, and importing it runs its module.

        Raises CheckpointError for an incomplete or damaged folder, ConfigError for a function that is not trusted or a
        model that cannot be loaded.
        """
        from amortlm.targets.functions import Trust
        from amortlm.targets.spec import target_from_spec

        folder, allowed = Path(folder), Trust(trust)
        spec = saved.read(folder)
        if not isinstance(lm, LanguageModel):
            lm = saved.load_model(folder, spec, lm)
        saved.check_model(folder, spec, lm)
        try:
            if target is None and spec["target"] is not None:
                target = target_from_spec(spec["target"], lm, allowed)
            full = spec["weights"] == FULL
            policy = Policy(lm, spec["prompt"], Support(**spec["support"]), FULL if full else folder)
        except CheckpointError:
            raise
        except AmortLMError as e:
            raise type(e)(f"{folder / FILE}: {e}") from e
        if full:
            policy.load_adapter(folder)
        return cls(policy, target.bind(lm) if target is not None else None)
