"""The support: which completions a policy can produce at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amortlm.errors import SupportError
from amortlm.types import Rollouts, Row

if TYPE_CHECKING:
    from amortlm.language_model import LanguageModel

Tokens = Sequence[str | int] | None


@dataclass(frozen=True)
class Support:
    """Completions of min_tokens to max_tokens allowed tokens, ended by a stop token.

    stop             one token or several (text or id); not part of the completion
    min_tokens       stopping is impossible before so many tokens
    max_tokens       stopping is sure after so many tokens
    allowed_tokens   only these may be written (default: all but special tokens)
    banned_tokens    never written; wins over allowed_tokens

    Stop tokens and the tokenizer's special tokens are never written inside a completion.
    """

    stop: str | int | Sequence[str | int]
    min_tokens: int = 1
    max_tokens: int = 25
    allowed_tokens: Tokens = None
    banned_tokens: Tokens = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise SupportError(
                f"min_tokens={self.min_tokens}, max_tokens={self.max_tokens} allows nothing; "
                "need 0 <= min_tokens <= max_tokens and max_tokens >= 1"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def bind(self, lm: LanguageModel) -> BoundSupport:
        """Resolve tokens for a model. Raises SupportError if a token is unknown or nothing is allowed."""
        stops = [self.stop] if isinstance(self.stop, str | int) else list(self.stop)
        if not stops:
            raise SupportError("support has no stop token; name at least one")
        stop_ids = tuple(dict.fromkeys(lm.token_id(s) for s in stops))
        allowed = torch.zeros(lm.vocab_size, dtype=torch.bool)
        if self.allowed_tokens is None:
            allowed[: len(lm.tokenizer)] = True
            allowed[sorted(i for i in lm.special_ids if i < lm.vocab_size)] = False
        else:
            allowed[[lm.token_id(t) for t in self.allowed_tokens]] = True
        allowed[[lm.token_id(t) for t in self.banned_tokens or []]] = False
        allowed[list(stop_ids)] = False
        if self.min_tokens > 0 and not allowed.any():
            raise SupportError(
                "support allows nothing: no token is left after banned, special and stop tokens; widen allowed_tokens"
            )
        return BoundSupport(stop_ids, self.min_tokens, self.max_tokens, allowed)


@dataclass(frozen=True)
class BoundSupport:
    """A support resolved for one model. allowed [V] bool: what may be written inside a completion."""

    stop_ids: tuple[int, ...]
    min_tokens: int
    max_tokens: int
    allowed: Tensor

    def size(self) -> int:
        """Number of completions in the support."""
        n = int(self.allowed.sum())
        return sum(n**t for t in range(self.min_tokens, self.max_tokens + 1))

    def contains(self, tokens: Sequence[int]) -> bool:
        inside = self.min_tokens <= len(tokens) <= self.max_tokens
        known = all(0 <= t < len(self.allowed) for t in tokens)
        return inside and known and bool(self.allowed[list(tokens)].all())

    def log_probs(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalisers of q at states 0..S-1 of logits [B, S, V], all float32:

        log_norm [B, S] log-sum-exp over everything allowed at the state, log_stop [B, S] log q(stop) there,
        masked [B, S, V] the logits with what is never written at -inf (stop symbols at -inf too).
        """
        logits = logits.float()
        masked = logits.masked_fill(~self.allowed.to(logits.device), -torch.inf)
        log_go = masked.logsumexp(-1)
        log_end = logits[..., list(self.stop_ids)].logsumexp(-1)
        state = torch.arange(logits.shape[1], device=logits.device)
        log_end = log_end.masked_fill(state < self.min_tokens, -torch.inf)
        log_go = log_go.masked_fill(state >= self.max_tokens, -torch.inf)
        log_norm = torch.logaddexp(log_go, log_end)
        return log_norm, log_end - log_norm, masked

    def rollouts(
        self,
        rows: Sequence[Row],
        row_index: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        stops: Tensor | None = None,
    ) -> Rollouts:
        """Rollouts on this support: masks follow from the lengths."""
        states = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        if stops is None:
            stops = torch.full_like(lengths, self.stop_ids[0])
        stop_mask = (states <= lengths[:, None]) & (states >= self.min_tokens) & (states <= self.max_tokens)
        action_mask = states[:-1] < lengths[:, None]
        return Rollouts(rows, row_index, tokens, lengths, stops, stop_mask, action_mask, self.stop_ids)
