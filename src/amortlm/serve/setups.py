"""Posteriors of the playground, built from plain fields: nothing that a client sends is a template or code."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from amortlm.language_model import LanguageModel
from amortlm.policy.policy import Policy
from amortlm.posterior import Posterior
from amortlm.serve.refusals import RequestError
from amortlm.support.spec import Support
from amortlm.targets.base import Target
from amortlm.targets.constraints import Contains

LONGEST = 40  # tokens of a completion
WORDS = 4


class Setup(BaseModel):
    """A kind of posterior over sentences of `shortest` to `longest` tokens that follow a beginning x.

    continue  p(z | x)^(1 / temperature): with a temperature below 1, the more probable continuations
    fill      p(z | x, y): the gap between x and an ending y
    contain   p(z | x, z contains all `words`); the words are separated by white space or commas
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    kind: Literal["continue", "fill", "contain"] = "continue"
    temperature: float = Field(default=0.7, ge=0.3, le=2)
    words: str = Field(default="dog", max_length=120)
    shortest: int = Field(default=3, ge=1, le=LONGEST)
    longest: int = Field(default=16, ge=1, le=LONGEST)

    def posterior(self, lm: LanguageModel) -> Posterior:
        """With a sampler that is not trained. Raises RequestError or SupportError for fields that do not fit."""
        support = Support(stop=".", min_tokens=self.shortest, max_tokens=self.longest)
        prompt = _ending_first(lm) if self.kind == "fill" else "{x}"
        return Posterior(Policy(lm, prompt, support), self._target(lm).bind(lm))

    def _target(self, lm: LanguageModel) -> Target:
        if self.kind == "fill":
            return lm.log_prob("{z} {y}", given="{x}")
        if self.kind == "contain":
            return lm.log_prob("{z}", given="{x}") + Contains(self._words())
        return lm.log_prob("{z}", given="{x}") / self.temperature

    def _words(self) -> list[str]:
        words = re.findall(r"[^\s,]+", self.words)
        if not 1 <= len(words) <= WORDS:
            raise RequestError(
                400, f"words must be 1 to {WORDS} words, separated by spaces, got {len(words)}", param="words"
            )
        return words


def _ending_first(lm: LanguageModel) -> str:
    """A prompt with the ending, then the beginning as a document of its own, which the model continues."""
    tokenizer = lm.tokenizer
    between = f"{tokenizer.eos_token or ''}{tokenizer.bos_token or ''}" or "\n"
    return "{y}" + between.replace("{", "{{").replace("}", "}}") + "{x}"
