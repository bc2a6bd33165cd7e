"""The algebra of targets: a target is a linear combination of log-density terms.

A sum multiplies densities, a scalar tempers: `(a + b) / 0.8`, `1.5 * a - 0.5 * b`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amortlm.errors import ConfigError, RewardError
from amortlm.types import Rollouts

if TYPE_CHECKING:
    from amortlm.text.codec import Codec


class Scoring:
    """One batch that is being scored. Terms share passes and texts through `memo`; `lasting` is shared by the chunks
    of one `Target.score`, too."""

    def __init__(self, rollouts: Rollouts):
        self.rollouts = rollouts
        self._memo: dict[Any, Any] = {}
        self.lasting: dict[Any, Any] = {}

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def sharing(self, rollouts: Rollouts) -> Scoring:
        """The scoring of rollouts that differ from these only in data columns; both use the same memo."""
        other = Scoring(rollouts)
        other._memo, other.lasting = self._memo, self.lasting
        return other

    def chunk(self, index: Tensor) -> Scoring:
        """The scoring of the trajectories at `index` alone."""
        other = Scoring(self.rollouts.select(index))
        other.lasting = self.lasting
        return other


class Target(ABC):
    """An unnormalised log posterior log R over completions.

    A new kind of target implements `score_batch`, overrides the attributes below if their defaults are wrong for it,
    and passes `amortlm.targets.laws.check_target`. With `to_spec` it can be saved with a posterior.
    """

    every_prefix: bool = True  # False: only finished completions can be judged
    has_suffix: bool = False  # text after z is scored: unfinished completions take passes of their own
    columns: frozenset[str] = frozenset()  # data columns that templates use
    normalised: bool = False  # a language model's density: its sum over all completions is finite
    hard: bool = False  # gives log R = -inf to completions it rejects, so a negative weight is refused
    statements: int = 0  # how many statements of a list it reads, at least: the support needs as many
    lm: Codec | None = None  # the tokenizer that it reads, once it is bound

    @abstractmethod
    def score_batch(self, scoring: Scoring) -> Tensor:
        """log R [B, T+1] in nats at the states in `scoring.rollouts.stop_mask`; other entries are ignored."""

    def to_spec(self) -> list[dict[str, Any]]:
        """The target as JSON/YAML: a list of terms (see `amortlm.targets.spec`). Raises ConfigError if it has no such
        form."""
        raise ConfigError(
            f"{self!r} cannot be saved by name: state it as verifier('package.module:function'), or pass target= to "
            "Posterior.from_pretrained when it is loaded"
        )

    def __repr__(self) -> str:
        return type(self).__qualname__  # equal in all processes, because it is part of the identity of a run

    def bind(self, lm: Codec) -> Target:
        """A copy whose text terms use `lm`'s tokenizer. Sums that contain a `log_prob` are bound already."""
        return self

    @property
    def terms(self) -> list[tuple[float, Target]]:
        return [(1.0, self)]

    def memory_share(self, scoring: Scoring) -> float:
        """The share of the model's memory setting that scoring one of the trajectories takes; 0 where no model runs."""
        return 0.0

    def at_once(self, scoring: Scoring) -> int:
        """How many trajectories may be scored at once; at least one."""
        share = self.memory_share(scoring)
        return max(1, int(1 / share)) if share > 0 else len(scoring.rollouts)

    def score(self, rollouts: Rollouts) -> Tensor:
        """log R of every stopping state: [B, T+1] float32, nats, 0 outside `stop_mask`, -inf where R = 0.

        Without gradient. Trajectories are scored in chunks that fit the models' memory budgets.
        Raises RewardError for NaN or +inf.
        """
        with torch.inference_mode(False), torch.no_grad():
            scoring = Scoring(rollouts)
            chunk = self.at_once(scoring)
            order = rollouts.row_index.argsort(stable=True)
            out = torch.zeros(rollouts.stop_mask.shape, device=rollouts.tokens.device)
            for part in order.split(chunk):
                piece, where = (scoring, slice(None)) if chunk >= len(order) else (scoring.chunk(part), part)
                log_r = self.score_batch(piece).float().to(out.device)
                out[where, : log_r.shape[1]] = log_r.masked_fill(~piece.rollouts.stop_mask, 0.0)
        if torch.isnan(out).any() or torch.isposinf(out).any():
            bad = (torch.isnan(out) | torch.isposinf(out)).any(1).nonzero()[0].item()
            raise RewardError(
                f"{self!r} gave NaN or +inf for completion {rollouts.completions()[int(bad)]}; return finite numbers "
                "(or -inf for 'impossible')"
            )
        return out

    def score_final(self, rollouts: Rollouts) -> Tensor:
        """log R [B] of the finished completions, nats. Raises RewardError for NaN or +inf."""
        return self.score(rollouts.final_only()).gather(1, rollouts.lengths[:, None]).squeeze(1)

    def __add__(self, other: Target) -> Target:
        if not isinstance(other, Target):
            raise RewardError(
                f"{self!r} + {other!r}: terms of a target are added to terms; verifier(fn) is the term of a function"
            )
        return LinearCombination([*self.terms, *other.terms])

    def __mul__(self, scale: float) -> Target:
        return LinearCombination([(w * float(scale), t) for w, t in self.terms])

    __rmul__ = __mul__

    def __truediv__(self, temperature: float) -> Target:
        if temperature <= 0:
            raise RewardError(f"a temperature must be positive, got {temperature}")
        return self * (1.0 / temperature)

    def __sub__(self, other: Target) -> Target:
        return self + (-1.0) * other

    def __neg__(self) -> Target:
        return self * -1.0


class LinearCombination(Target):
    """A weighted sum of terms. Terms of the same frozen model share its passes."""

    def __init__(self, terms: list[tuple[float, Target]]):
        self._terms = [(w, t) for w, t in terms if w != 0]
        if not self._terms:
            raise RewardError("a target needs at least one term with a weight other than 0")
        for weight, term in self._terms:
            if weight < 0 and term.hard:
                raise RewardError(f"{term!r} is a hard constraint: a negative weight would make it +inf")
        self.lm = next((t.lm for _, t in self._terms if t.lm is not None), None)
        if self.lm is not None:
            self._terms = [(w, t.bind(self.lm) if t.lm is None else t) for w, t in self._terms]
        self.hard = any(t.hard for _, t in self._terms)
        self.every_prefix = all(t.every_prefix for _, t in self._terms)
        self.has_suffix = any(t.has_suffix for _, t in self._terms)
        self.columns = frozenset().union(*(t.columns for _, t in self._terms))

    def bind(self, lm: Codec) -> Target:
        return LinearCombination([(w, t.bind(lm)) for w, t in self._terms])

    @property
    def terms(self) -> list[tuple[float, Target]]:
        return self._terms

    def memory_share(self, scoring: Scoring) -> float:
        return sum(
            t.memory_share(scoring) for _, t in self._terms
        )  # what terms share stays until the chunk is done

    def score_batch(self, scoring: Scoring) -> Tensor:
        total = torch.zeros(scoring.rollouts.stop_mask.shape, device=scoring.rollouts.tokens.device)
        for weight, term in self._terms:
            total = total + weight * term.score_batch(scoring).to(total.device)
        return total

    def to_spec(self) -> list[dict[str, Any]]:
        return [{**spec, "weight": w} for w, t in self._terms for spec in t.to_spec()]

    def __repr__(self) -> str:
        """As on paper: "1.5 * a - 0.5 * b + c"."""
        signs = [
            ("- " if w < 0 else "+ ") + ("" if abs(w) == 1 else f"{abs(w):g} * ") for w, _ in self._terms
        ]
        text = " ".join(sign + repr(term) for sign, (_, term) in zip(signs, self._terms, strict=True))
        return text.removeprefix("+ ")


class Softened(Target):
    """`target` with a finite reward in place of every R = 0, because objectives square log weights.

    A rejected completion (by a hard constraint, or a verifier's -inf) gets exp(-penalty) times the reward of the other
    terms. If no term is the density of a language model, this is also multiplied by prior(z): otherwise the rewards of
    all rejected completions would sum to more than those of the few accepted ones.

    penalty: nats.
    """

    def __init__(self, target: Target, prior: Target, penalty: float):
        self.target, self.prior, self.penalty = target, prior, penalty
        self.every_prefix, self.columns = target.every_prefix, target.columns
        self._needs_prior = not any(t.normalised for _, t in target.terms)

    def memory_share(self, scoring: Scoring) -> float:
        prior = self.prior.memory_share(scoring) if self._needs_prior else 0.0
        return self.target.memory_share(scoring) + prior

    def score_batch(self, scoring: Scoring) -> Tensor:
        mask = scoring.rollouts.stop_mask
        total, rejected = torch.zeros(mask.shape, device=mask.device), torch.zeros_like(mask)
        for weight, term in self.target.terms:
            log_r = weight * term.score_batch(scoring).to(mask.device)
            impossible = torch.isneginf(log_r)
            total, rejected = total + log_r.masked_fill(impossible, 0.0), rejected | impossible
        fallback = total - self.penalty
        if self._needs_prior and (rejected & mask).any():
            fallback = fallback + self.prior.score_batch(scoring).to(mask.device)
        return torch.where(rejected, fallback, total)

    def to_spec(self) -> list[dict[str, Any]]:
        return self.target.to_spec()

    def __repr__(self) -> str:
        prior = f" or {self.prior!r}" if self._needs_prior else ""
        return f"softened({self.target!r}{prior}, penalty {self.penalty:g})"
