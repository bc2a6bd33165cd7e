"""A frozen causal language model in the engine: its weights, and the kinds of passes that are exact for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amortlm.engine.exactness import Exactness, examine, index_limit, rotary_limit, rotary_switch
from amortlm.engine.memory import Memory, default_mb
from amortlm.engine.packs import Sharing
from amortlm.engine.passes import Passes
from amortlm.engine.sampler import LocalSampler
from amortlm.engine.static import StaticSampler, require
from amortlm.errors import PromptTooLongError
from amortlm.text.codec import Codec


class CausalLM(Codec):
    """The frozen p: the base of `amortlm.LanguageModel`, which adds loading and targets."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        memory_mb: float | None = None,
        self_check: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        static_cache: bool = False,
    ):
        super().__init__(
            tokenizer,
            name=name or str(model.config.name_or_path),
            vocab_size=_rows(model.get_output_embeddings()),
            num_embeddings=_rows(model.get_input_embeddings()),
            context=_context(model.config),
            chat_template_kwargs=chat_template_kwargs,
        )
        self.model = model.eval().requires_grad_(False)
        self.memory = Memory(default_mb(model.device) if memory_mb is None else memory_mb)
        self.self_check, self.static_cache = self_check, static_cache

    _static_is_exact = False

    @cached_property
    def codec(self) -> Codec:
        """The tokenizer and its sizes without the weights: a support is bound to it, and it can be pickled."""
        return Codec(
            self.tokenizer,
            name=self.name,
            vocab_size=self.vocab_size,
            num_embeddings=self.num_embeddings,
            context=self.context,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    @cached_property
    def special_ids(self) -> set[int]:
        return self.codec.special_ids

    def with_model(self, model: Any) -> Self:
        """A copy that uses `model`, a model of the same architecture with other weights. It keeps the result of the
        self-check."""
        other = copy.copy(self)
        other.memory = copy.copy(self.memory)
        other.model = model.eval().requires_grad_(False)
        return other

    @property
    def memory_mb(self) -> float:
        """MiB that a pass without gradient may hold at once, of p and of the policies made of it."""
        return self.memory.mb

    @memory_mb.setter
    def memory_mb(self, mb: float) -> None:
        self.memory.mb = mb

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def exactness(self) -> Exactness:
        """The result of the self-check. Raises ModelError for a model that cannot be used."""
        return examine(self.model, self.name)

    @cached_property
    def sharing(self) -> Sharing:
        """How prompts are shared: by the self-check, or, without it, as for full attention."""
        if self.self_check:
            return self.exactness.sharing
        return Sharing(switch=rotary_switch(self.model.config))

    @property
    def passes(self) -> Passes:
        """The forward passes of p."""
        return Passes(self.model, self.sharing, self.memory)

    def local_sampler(self, model: Any) -> LocalSampler:
        """The sampler in this process that draws from `model`: p, or a trainable copy of it. Raises ModelError."""
        if not self.static_cache:
            return LocalSampler(model, self.sharing, self.memory)
        if not self._static_is_exact:
            require(self.model, self.name, self.sharing, self.self_check)
            self._static_is_exact = True
        return StaticSampler(model, self.sharing, self.memory)

    def check_context(self, prompt: int, total: int, what: str) -> None:
        """Raise PromptTooLongError if `total` tokens, of which the first `prompt` are given, do not fit the model."""
        if self.context is not None and total > self.context:
            raise PromptTooLongError(
                f"{what} needs {total} tokens, but {self.name} has a context of {self.context}; "
                "shorten the prompt, lower max_tokens, or drop such rows"
            )
        index = index_limit(self.model.config)
        if index is not None and total > index:
            raise PromptTooLongError(
                f"{what} needs {total} tokens, and beyond {index} an index of {self.name} picks the keys that "
                "attention sees: equal ones by padding, so that log-probabilities of one text differ by nats; "
                "shorten the prompt, lower max_tokens, or drop such rows"
            )
        switch = rotary_switch(self.model.config)
        if switch is not None and prompt - 1 <= switch < total:
            raise PromptTooLongError(
                f"{what} goes from {prompt} to {total} tokens, and at {switch} {self.name} changes the rotary "
                "embedding of the whole text (LongRoPE): tokens before and after would come from two different models. "
                f"Keep texts below {switch} tokens, or give prompts that are longer, or drop such rows"
            )


def _rows(layer: Any) -> int:
    """Tokens that an embedding or output layer knows."""
    return int(layer.weight.shape[0])


def _context(config: Any) -> int | None:
    """The longest sequence that a model was made for, in tokens."""
    config = config.get_text_config(decoder=True)
    known = [getattr(config, "max_position_embeddings", None), rotary_limit(config)]
    return min((n for n in known if n is not None and n > 0), default=None)
