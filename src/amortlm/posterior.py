"""The trained sampler, for users: sample, log_prob, diagnose, predict, vote, save and load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import torch
from torch import Tensor

from amortlm import card, hub, saved
from amortlm.card import Card, Drawn
from amortlm.data import as_row, check_rows, is_row, rows_or_row
from amortlm.diagnostics import certificate
from amortlm.diagnostics.diagnose import LEVEL, Diagnosis, Gold, RowDiagnosis, diagnose
from amortlm.diagnostics.importance import ImportanceEstimate, estimate
from amortlm.engine import quantised
from amortlm.engine.adapter import FULL
from amortlm.engine.decoding import Watch
from amortlm.errors import AmortLMError, CheckpointError, ConfigError, DataError
from amortlm.inference.correct import BATCH, check_method, check_n, corrected, draw, require_target, weigh
from amortlm.inference.exact import LIMIT
from amortlm.inference.table import TOP, Table, tabulated
from amortlm.language_model import LanguageModel
from amortlm.policy.policy import Policy
from amortlm.posterior_file import FILE, FORMAT
from amortlm.predictive import Prediction, Votes, predict, vote
from amortlm.support.tools import Tool
from amortlm.targets.base import Target
from amortlm.targets.lists import check_statements
from amortlm.types import Rollouts, Row
from amortlm.weights import effective_sample_size, log_mean_exp

Rows = Sequence[Row]
Data = Row | Rows
N = 256  # default number of samples of an estimate (docstring of Posterior)


@dataclass(frozen=True)
class Sample:
    """One completion.

    text         with the stop symbol, unless it is a special token
    tokens       token ids, without the stop symbol
    log_q        log q of the completion, nats
    log_reward   log R of the completion, nats; None if the posterior has no target
    weight       importance weight, normalised over the samples of the row (0 for all if R = 0 for all); 1/n after a
                 correction; None if the posterior has no target
    statements   the statements of the list if the support has a separator, else None
    """

    text: str
    tokens: list[int]
    log_q: float
    log_reward: float | None
    weight: float | None
    statements: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Samples(list[Sample]):
    """The n samples of one row, and how they were drawn.

    Without a correction they are draws of q with importance weights. With a correction they are approximate draws of
    the posterior, of equal weight; if few draws of q have high weight, many samples are copies of these few.

    method           "none", "sir", "smc" or "mh"
    draws            completions drawn from q in all; a suffix that smc or mh redraws counts as one
    ess              effective sample size of the weights, in draws, before resampling. If it is far below n, samples
                     of sir and smc are mostly copies. None for mh, or without a target
    log_z            log of the mean weight, nats; -inf if R = 0 for all draws. The mean weight is an unbiased estimate
                     of Z. None for mh, or without a target
    acceptance_rate  share of accepted steps of mh, else None
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
        """The attributes above as a dict, for JSON."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Ask:
    """n uncorrected samples of one row, for `Posterior.sample_each`."""

    row: Row
    n: int = 1
    seed: object = 0


class Posterior:
    """A policy and the target it was trained on. `target` may be None: then samples have no weights.

    `sample`, `estimate`, `diagnose`, `predict` and `vote` take one row and return one result, or take rows (a list, a
    DataFrame, a Dataset) and return a result for each. The same seed gives the same samples of a row, whatever the
    other rows are. Estimates use n = 256 samples by default. Then a probability has a standard error of at most 0.03,
    and the Pareto fit of the weights (k-hat) uses a tail of about fifty samples.
    """

    def __init__(self, policy: Policy, target: Target | None):
        self.policy, self.target, self.lm = policy, target, policy.lm
        if target is not None:
            check_statements(target, policy.support)

    @property
    def columns(self) -> set[str]:
        """The data columns that a row needs: those of prompt and target."""
        return set(self.policy.prompt.columns) | (set(self.target.columns) if self.target else set())

    @overload
    def sample(
        self, rows: Row, n: int = ..., *, correct: str = ..., budget: int | None = ..., seed: object = ...
    ) -> Samples: ...
    @overload
    def sample(
        self, rows: Rows, n: int = ..., *, correct: str = ..., budget: int | None = ..., seed: object = ...
    ) -> list[Samples]: ...
    def sample(
        self, rows: Data, n: int = 1, *, correct: str = "none", budget: int | None = None, seed: object = 0
    ) -> Samples | list[Samples]:
        """n completions of a row, or of each row.

        correct: "none" draws from q, in one left-to-right pass per completion. The other methods converge to the
        posterior as the budget grows, for any q. "sir" resamples `budget` draws by weight. "smc" draws `budget`
        particles and also resamples them at prefixes. "mh" uses a quarter of the budget to choose where n chains start,
        and the rest for their steps. See docs/inference.md.
        budget: completions drawn from q for a row, by default max(256, 16 n); suffixes that smc redraws come on top.

        Raises DataError for a missing column, PromptTooLongError for a prompt that does not fit, ConfigError for an
        unknown correction, one without a target, a budget without a correction or too small for n (sir, smc: n; mh:
        2 n), smc or mh on a support with a tool; RewardError where every completion drawn for a correction has R = 0.
        """
        check_method(correct)
        check_n(n)
        if correct == "none" and budget is not None:
            raise ConfigError('budget is for corrected samples: give correct="sir", "smc" or "mh" with it')
        found = [self._sample(row, n, correct, budget, seed) for row in self._checked(rows)]
        return found[0] if is_row(rows) else found

    def _sample(self, row: Row, n: int, method: str, budget: int | None, seed: object) -> Samples:
        if method != "none":
            target = require_target(self.target)
            got = corrected(self.policy, target, row, n, method=method, budget=budget, seed=seed)
            return Samples(
                self._listed(got.drawn.rollouts, got.drawn.log_q, got.drawn.log_reward, [1 / n] * n),
                method=method,
                draws=got.drawn.draws,
                ess=got.ess,
                log_z=got.log_z,
                acceptance_rate=got.acceptance_rate,
            )
        return self._weighted(*draw(self.policy, self.target, row, n, seed=seed))

    def sample_prior(self, row: Row, n: int = 1, *, seed: object = 0) -> Samples:
        """n completions of the frozen model under the policy's prompt and support: of the sampler before training.

        log_q and the weights are those of this sampler. The same seed gives what `sample` gives before training.
        Raises DataError for a missing column, PromptTooLongError for a prompt that does not fit.
        """
        check_n(n)
        return self._weighted(
            *draw(self.policy.prior, self.target, self._checked(as_row(row))[0], n, seed=seed)
        )

    def sample_each(self, asks: Sequence[Ask], *, watch: Watch | None = None) -> list[Samples]:
        """What `sample` gives for each ask (log q and log R up to rounding), drawn together.

        watch: called with each token while they are drawn (`amortlm.engine.decoding`); completions are numbered ask by
        ask. Raises the errors of `sample`.
        """
        for ask in asks:
            check_n(ask.n)
        rows = self._checked([ask.row for ask in asks])
        # As many under one seed as `sample` draws at once.
        parts = [(i, start) for i, ask in enumerate(asks) for start in range(0, ask.n, BATCH)]
        rollouts, log_probs = self.policy.sample(
            [rows[i] for i, _ in parts],
            [min(BATCH, asks[i].n - start) for i, start in parts],
            seeds=[(asks[i].seed, start) for i, start in parts],
            watch=watch,
        )
        log_q = log_probs.final(rollouts.lengths).float().cpu()
        log_reward = None if self.target is None else self.target.score_final(rollouts).cpu()
        index = torch.arange(len(log_q), device=rollouts.lengths.device).split([ask.n for ask in asks])
        return [
            self._weighted(
                rollouts.select(i), log_q[i.cpu()], None if log_reward is None else log_reward[i.cpu()]
            )
            for i in index
        ]

    def _weighted(self, rollouts: Rollouts, log_q: Tensor, log_reward: Tensor | None) -> Samples:
        """Draws of q for one row, with their weights."""
        if log_reward is None:
            return Samples(self._listed(rollouts, log_q, None, None), draws=len(log_q))
        log_w = (log_reward - log_q).double()
        listed = self._listed(rollouts, log_q, log_reward, log_w.softmax(0).nan_to_num(0.0).tolist())
        return Samples(
            listed, draws=len(log_q), ess=effective_sample_size(log_w), log_z=log_mean_exp(log_w).item()
        )

    def _listed(
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
        """[n] log q of n completions (texts or token lists) of a row, exactly, in nats.

        Raises DataError for a completion outside the support, or a missing column.
        """
        row = self._checked(as_row(row))[0]
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

    @overload
    def estimate(self, rows: Row, n: int = ..., *, seed: object = ...) -> ImportanceEstimate: ...
    @overload
    def estimate(self, rows: Rows, n: int = ..., *, seed: object = ...) -> list[ImportanceEstimate]: ...
    def estimate(
        self, rows: Data, n: int = N, *, seed: object = 0
    ) -> ImportanceEstimate | list[ImportanceEstimate]:
        """Importance diagnostics from n fresh samples of each row. A small n makes a bad sampler look better than it
        is. Raises ConfigError without a target, DataError for a missing column."""
        target = require_target(self.target)
        pools = [weigh(self.policy, target, row, n, seed=seed) for row in self._checked(rows)]
        found = [estimate(pool.log_weights, pool.log_reward) for pool in pools]
        return found[0] if is_row(rows) else found

    @overload
    def diagnose(
        self,
        rows: Row,
        n: int = ...,
        *,
        seed: object = ...,
        limit: int = ...,
        level: float = ...,
        gold: Gold | None = ...,
        chains: bool = ...,
    ) -> RowDiagnosis: ...
    @overload
    def diagnose(
        self,
        rows: Rows,
        n: int = ...,
        *,
        seed: object = ...,
        limit: int = ...,
        level: float = ...,
        gold: Gold | None = ...,
        chains: bool = ...,
    ) -> Diagnosis: ...
    def diagnose(
        self,
        rows: Data,
        n: int = N,
        *,
        seed: object = 0,
        limit: int = LIMIT,
        level: float = LEVEL,
        gold: Gold | None = None,
        chains: bool = True,
    ) -> RowDiagnosis | Diagnosis:
        """How far the sampler is from the posterior, row by row, with a verdict (`amortlm.diagnostics.diagnose`).

        It consists of importance diagnostics of n samples for each row; intervals in nats for log Z, KL(q || p) and
        KL(p || q) that hold jointly with probability `level`, from draws of the posterior (`amortlm.inference.truth`);
        and, if the support has at most `limit` completions, the exact values by enumeration. It costs four to five
        times `estimate`, and more if q is so far from the posterior that Markov chains must run.

        gold: for each row (also for a single one) a list of completions known to be good, texts or tokens; they can
        show a mode that q misses. chains: False runs no Markov chains; a row that needs them has the verdict "not
        decided", and the other verdicts are the same. Raises ConfigError without a target, DataError for a missing
        column or a gold completion outside the support.
        """
        target, checked = require_target(self.target), self._checked(rows)
        options: dict[str, Any] = {
            "seed": seed,
            "limit": limit,
            "level": level,
            "gold": gold,
            "chains": chains,
        }
        found = diagnose(self.policy, target, checked, n, **options)
        return found.rows[0] if is_row(rows) else found

    def table(self, row: Row, n: int = N, *, limit: int = LIMIT, top: int = TOP, seed: object = 0) -> Table:
        """The posterior of a row: its `top` most probable completions with p, q and log R, and the mass of all others.

        Exact by enumeration if the support has at most `limit` completions. Else from 2 n draws of q, with estimated
        masses and their errors (`amortlm.inference.table`). Raises ConfigError without a target or for n < 2,
        DataError for a missing column, RewardError or SupportError where R = 0 for all completions.
        """
        target, checked = require_target(self.target), self._checked(as_row(row))[0]
        return tabulated(self.policy, target, checked, n, limit=limit, top=top, seed=seed)

    @overload
    def predict(
        self, rows: Row, answers: Sequence[str], n: int = ..., *, temperature: float = ..., seed: object = ...
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        rows: Rows,
        answers: Sequence[str],
        n: int = ...,
        *,
        temperature: float = ...,
        seed: object = ...,
    ) -> list[Prediction]: ...
    def predict(
        self, rows: Data, answers: Sequence[str], n: int = N, *, temperature: float = 1.0, seed: object = 0
    ) -> Prediction | list[Prediction]:
        """p(y | x) for each of the answers: the mean over n samples z of p(y | x z), with its standard error.

        temperature: softmax temperature of the samples; 0 is greedy. The target must be one log_prob with the
        answer's column after `{z}`, and the prompt may not show that column (`amortlm.predictive`). Raises ConfigError
        for another target, a temperature below 0 or n < 1, DataError for no answers.
        """
        known = rows_or_row(rows)
        found = predict(self.policy, self.target, known, answers, n, temperature=temperature, seed=seed)
        return found[0] if is_row(rows) else found

    @overload
    def vote(
        self, rows: Row, n: int = ..., *, temperature: float = ..., max_tokens: int = ..., seed: object = ...
    ) -> Votes: ...
    @overload
    def vote(
        self, rows: Rows, n: int = ..., *, temperature: float = ..., max_tokens: int = ..., seed: object = ...
    ) -> list[Votes]: ...
    def vote(
        self, rows: Data, n: int = N, *, temperature: float = 1.0, max_tokens: int = 8, seed: object = 0
    ) -> Votes | list[Votes]:
        """Counts of the frozen model's greedy answers after each of n samples z; an answer has at most `max_tokens`
        tokens. Requirements on target and prompt, and errors, are those of `predict`."""
        options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        found = vote(self.policy, self.target, rows_or_row(rows), n, **options)
        return found[0] if is_row(rows) else found

    def _checked(self, rows: Data) -> list[Row]:
        """The rows (or the one row) as a list of dicts that have the columns of prompt and target."""
        checked: list[Row] = [*rows_or_row(rows)]
        check_rows(checked, self.columns, "rows")
        return checked

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        rows: Data | None = None,
        diagnosis: Diagnosis | RowDiagnosis | None = None,
    ) -> None:
        """Write a PEFT adapter (or full model) folder with `posterior.json`: model, prompt, support and target; and a
        model card, README.md (`save_card`, for rows and diagnosis).

        The tokenizer is saved for other programs; amortlm loads the model's own. A target with a function that cannot
        be imported by name is not saved, nor is a tool of your own: pass them to from_pretrained again. Raises
        ConfigError for a guided or tempered policy.
        """
        if self.policy.support.is_guided:
            raise ConfigError("a guided policy cannot be saved: make it again with amortlm.guided")
        if self.policy.support.temperature != 1:
            raise ConfigError(
                "a tempered policy cannot be saved: save the policy, and temper it with amortlm.tempered"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        before = card.read(folder)
        self.policy.save_adapter(folder)
        self.lm.tokenizer.save_pretrained(str(folder))
        spec = self._spec()
        saved.write_base_model(folder, str(self.lm.model.name_or_path), spec["model"])
        (folder / FILE).write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
        card.write(folder, self._card(folder, rows, diagnosis), before)

    def save_card(
        self, folder: str | Path, rows: Data, diagnosis: Diagnosis | RowDiagnosis | None = None
    ) -> None:
        """Write the model card, README.md, of a folder that holds this posterior.

        It states prompt, target and support; the figures of `diagnosis` (what `diagnose` gives for these rows), or of
        the certificate in the folder, or else estimates from 64 draws; and four samples of each of the first four rows.
        A card that somebody has edited (its first line of text says how) stays. Raises DataError for a missing column,
        or another number of rows in the diagnosis.
        """
        card.write(Path(folder), self._card(Path(folder), rows, diagnosis), card.read(Path(folder)))

    def _spec(self) -> dict[str, Any]:
        """The content of `posterior.json`."""
        spec: dict[str, Any] = {
            "format": FORMAT,
            "model": saved.model_name(self.lm.name),
            "weights": FULL if self.policy.is_full else "adapter",
            "prompt": self.policy.prompt.source,
            "support": None,
            "target": None,
            "tokenizer": saved.tokenizer_hash(self.lm.tokenizer),
        }
        if self.lm.chat_template_kwargs:
            spec["chat_template_kwargs"] = self.lm.chat_template_kwargs
        if packing := quantised.settings(self.lm.model):
            spec["quantization"] = packing
        try:
            spec["support"] = self.policy.support_spec.to_dict()
        except ConfigError as e:
            spec["support"] = replace(self.policy.support_spec, tool=None).to_dict()
            spec["tool_not_saved"] = str(e)
        try:
            spec["target"] = self.target.to_spec() if self.target else None
        except ConfigError as e:
            spec["target_not_saved"] = str(e)
        return spec

    def _card(self, folder: Path, rows: Data | None, diagnosis: Diagnosis | RowDiagnosis | None) -> Card:
        """The card of a folder. Its certificate is cited if it is about the weights there."""
        checked = [] if rows is None else self._checked(rows)
        if isinstance(diagnosis, RowDiagnosis):
            diagnosis = Diagnosis([diagnosis])
        if diagnosis is not None and len(diagnosis.rows) != len(checked):
            raise DataError(
                f"a diagnosis of {len(diagnosis.rows)} rows for {len(checked)} rows: give its rows"
            )
        certified = certificate.found(folder)
        reports = [] if diagnosis is None else [row.to_dict() for row in diagnosis.rows]
        if certified is not None and diagnosis is None:
            reports, checked = certified.reports, self._checked(certified.rows)
        checked = checked[: card.ROWS]
        return Card(
            spec=self._spec(),
            base=card.base_of(self.lm),
            columns=sorted(self.columns),
            target=repr(self.target),
            rows=checked,
            drawn=[self._drawn(row) for row in checked],
            reports=reports,
            certificate=None if certified is None else (certificate.FILE, certificate.hash_file(folder)),
        )

    def _drawn(self, row: Row) -> Drawn:
        samples = self.sample(row, card.DRAWS, seed="card")
        shown = [
            (s.text, s.log_q, None if s.weight is None else s.weight * len(samples))
            for s in samples[: card.SAMPLES]
        ]
        ess = None if samples.ess is None else samples.ess / len(samples)
        return Drawn(len(samples), ess, samples.log_z, shown)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        rows: Data | None = None,
        diagnosis: Diagnosis | RowDiagnosis | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        allow_local_model: bool = False,
    ) -> str:
        """Save to the hub as `user/name`, and return the URL. The repository is created if there is none.

        rows, diagnosis: for the card, as in `save_card`. private: of a new repository (default: as your account has
        it). token: default is that of `hf auth login`, or HF_TOKEN. A folder of `amortlm train` with its certificate is
        uploaded by `amortlm push`.

        Only weights, configs, tokenizer and card are uploaded; a warning names functions of the target that are not.
        Raises ConfigError for a base model that is on this machine only, unless `allow_local_model`; then its path is
        left out. Raises HubError for what the hub refuses, or if it cannot be reached.
        """
        hub.check_model(self._spec(), allow_local_model)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, rows=rows, diagnosis=diagnosis)
            return hub.push(
                folder,
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                allow_local_model=allow_local_model,
            )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        lm: LanguageModel | str | None = None,
        target: Target | None = None,
        tool: Tool | None = None,
        trust: Sequence[str] = (),
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Posterior:
        """Load a saved posterior: a folder, or else a repository `user/name` of the hub.

        lm: the frozen model if it is already loaded, or its name or path if it has moved
        target: used instead of the saved target
        tool: used instead of the saved support's tool; needed for a tool of your own, which is not saved
        trust: modules (names, or paths of .py files) whose functions the saved target may call; a predicate or
        verifier is saved as a name, and importing it runs its module. Nothing else in the folder is run or imported
        revision, token: branch, tag or commit of the repository, and a token for the hub. Of a repository, only
        weights (safetensors), configs, tokenizer and card are downloaded

        Raises CheckpointError for an incomplete or damaged folder, ConfigError for a function that is not trusted or a
        model that cannot be loaded, HubError for a name that is neither a folder nor a repository that can be read.
        """
        from amortlm.targets.functions import Trust
        from amortlm.targets.spec import target_from_spec

        folder, allowed = hub.locate(folder, revision, token), Trust(trust)
        spec = saved.read(folder)
        if not isinstance(lm, LanguageModel):
            lm = saved.load_model(folder, spec, lm)
        saved.check_model(folder, spec, lm)
        try:
            if target is None and spec["target"] is not None:
                target = target_from_spec(spec["target"], lm, allowed)
            full = spec["weights"] == FULL
            support = saved.support_of(spec, tool)
            policy = Policy(lm, spec["prompt"], support, FULL if full else folder)
        except CheckpointError:
            raise
        except AmortLMError as e:
            raise type(e)(f"{folder / FILE}: {e}") from e
        if full:
            policy.load_adapter(folder)
        return cls(policy, target.bind(lm) if target is not None else None)
