"""The policy q: a trainable copy of the language model on a support."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amortlm import versions
from amortlm.engine.adapter import FULL, load_weights, save_weights, trainable_copy
from amortlm.engine.decoding import Draws, Exploration, Watch
from amortlm.engine.passes import Passes
from amortlm.engine.prefix import pad_right
from amortlm.engine.sampler import Request, Sampler
from amortlm.engine.shards import shards_of
from amortlm.errors import ConfigError, DataError, ModelError, TemplateError
from amortlm.seeds import seed_of
from amortlm.support import Support, SupportLaw
from amortlm.text.template import Messages, PromptTemplate
from amortlm.types import PolicyLogProbs, Rollouts, Row, row_key

if TYPE_CHECKING:
    from peft import LoraConfig

    from amortlm.engine.model import CausalLM


class Policy(nn.Module):
    """q(z | prompt): the language model with LoRA (default) or a full copy of it, on a support.

    With LoRA the frozen weights are shared with `lm`; the module tree of `lm` does not change.
    `sample` draws without gradient; `forward` (= `evaluate`) is one teacher-forced, differentiable pass.

    Raises TemplateError for `{z}` in the prompt, SupportError if the support does not fit the tokenizer, ConfigError or
    CheckpointError for an adapter that does not fit.
    """

    def __init__(
        self,
        lm: CausalLM,
        prompt: str | Messages,
        support: Support,
        adapter: LoraConfig | int | str | Path | None = None,
    ):
        """adapter: a PEFT config, the rank of a LoRA (None: the default rank), "full" for a full copy, or the folder of
        a saved adapter."""
        super().__init__()
        self.log_z: nn.Parameter  # log Z of each training row, if the objective learns it
        self.lm = lm
        self.prompt = PromptTemplate(prompt)
        if any(t.has_latent for t in self.prompt.templates):
            raise TemplateError(
                f"policy prompt {prompt!r}: take {{z}} out; the completion follows the prompt"
            )
        self.support_spec = support
        self.support: SupportLaw = support.bind(lm.codec)
        if shards_of(lm.model) is not None:
            raise ConfigError(f"{lm.name} is sharded for the policy of another trainer: load the model again")
        self.model = trainable_copy(lm, adapter)
        self.is_full = adapter == FULL
        if isinstance(adapter, str | Path) and not self.is_full:
            self.load_adapter(adapter)
        _zero_dropout(self.model)
        self.sharing = lm.sharing
        self.sampler: Sampler = lm.local_sampler(self.model)
        self.train()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def passes(self) -> Passes:
        """The forward passes of q, which shares prompts as p does."""
        return Passes(self.model, self.sharing, self.lm.memory)

    @property
    def prior(self) -> Policy:
        """The frozen model under the same prompt, on the same support. It shares all tensors with this policy, and is
        not to be trained."""
        other = copy.copy(self)
        other._modules = {**self._modules, "model": self.lm.model}
        other.sampler = self.lm.local_sampler(self.lm.model)
        return other

    def train(self, mode: bool = True) -> Policy:
        """As for any module, but the model stays in evaluation mode, also with gradients. So the sampling and the
        trained policy are the same distribution, even if the architecture is random in training mode."""
        super().train(mode)
        self.model.eval()
        return self

    def encode_rows(self, rows: Sequence[Row]) -> list[list[int]]:
        """Prompt tokens of each row. Raises PromptTooLongError if prompt and completion exceed the context."""
        prompts = [self.lm.encode_prompt(self.prompt, row) for row in rows]
        for n in {len(prompt) for prompt in prompts}:
            self.lm.check_context(n, n + self.support.max_tokens + 1, "a prompt with its completion")
        return prompts

    def sample(
        self,
        rows: Sequence[Row],
        num_samples: int | Sequence[int] = 1,
        *,
        seed: object = 0,
        seeds: Sequence[object] | None = None,
        exploration: Exploration | None = None,
        sampler: Sampler | None = None,
        watch: Watch | None = None,
    ) -> tuple[Rollouts, PolicyLogProbs]:
        """Completions in row order and their log q (nats). num_samples: K for every row, or a count for each.

        The same (seed, row) gives the same completions, whatever else is in the batch. seeds: one for each row, in
        place of `seed`. `exploration` changes the completions, but the returned log q is that of the policy itself.
        sampler: draws in place of the policy's own, and log q is then that of its model. watch: called with each token
        (`amortlm.engine.decoding`). Raises PromptTooLongError for a prompt that does not fit, DataError or
        TemplateError for rows that do not fit the prompt.
        """
        counts = [num_samples] * len(rows) if isinstance(num_samples, int) else list(num_samples)
        given = [seed] * len(rows) if seeds is None else seeds
        request = replace(self.request(rows, counts, given, exploration), watch=watch)
        draws = (sampler or self.sampler).sample(request)
        return self.drawn(rows, request, draws)

    def request(
        self,
        rows: Sequence[Row],
        counts: Sequence[int],
        seeds: Sequence[object],
        exploration: Exploration | None = None,
    ) -> Request:
        """What `sample` asks a sampler for."""
        streams = [seed_of((seed, row_key(row))) for seed, row in zip(seeds, rows, strict=True)]
        return Request(self.encode_rows(rows), counts, streams, self.support, exploration)

    def drawn(self, rows: Sequence[Row], request: Request, draws: Draws) -> tuple[Rollouts, PolicyLogProbs]:
        """The draws of a request as `sample` returns them."""
        tokens, lengths, stops, log_pf, log_pterm = (
            x.to(self.device)
            for x in (draws.tokens, draws.lengths, draws.stops, draws.log_pf, draws.log_pterm)
        )
        rollouts = self.support.rollouts(rows, request.index.to(self.device), tokens, lengths, stops)
        return rollouts, PolicyLogProbs(log_pf, log_pterm)

    def evaluate(self, rollouts: Rollouts) -> PolicyLogProbs:
        """log q of any rollouts, on the support: a teacher-forced pass, differentiable (on a CPU, one for each
        group of completions of similar length). Without gradient, in packs that fit the memory setting."""
        rollouts = rollouts.to(self.device)
        prompts = self.encode_rows(rollouts.rows)
        places, parts = [], []
        for block in self.passes.blocks(prompts):
            index = rollouts.row_index
            mine = ((index >= block.start) & (index < block.stop)).nonzero().squeeze(1)
            for rows, found in self._evaluated(rollouts, mine, prompts, block):
                places.append(rows)
                parts.append(found)
        width = rollouts.tokens.shape[1]
        log_pf = _joined([x for x, _ in parts], places, width)
        log_pterm = _joined([x for _, x in parts], places, width + 1)
        if (
            torch.is_grad_enabled()
            and not log_pterm.requires_grad
            and any(p.requires_grad for p in self.parameters())
        ):
            raise ModelError(
                f"{self.lm.name}: no gradient flows through this model in evaluation mode; it cannot be trained"
            )
        return PolicyLogProbs(torch.where(rollouts.action_mask, log_pf, 0.0), log_pterm)

    def _evaluated(
        self, rollouts: Rollouts, mine: Tensor, prompts: Sequence[Sequence[int]], block: slice
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """(log_pf, log_pterm) of the trajectories at `mine`, those of a block of prompts, pack by pack."""
        passes = self.passes
        prefix = passes.encode(prompts[block])
        for group in passes.groups(prefix, rollouts.lengths[mine]):
            rows = mine[group]
            tokens = rollouts.tokens[rows, : max(1, int(rollouts.lengths[rows].max()))]
            # The stop at max_tokens is sure: what follows the last token need not be computed.
            seen = tokens[:, : self.support.max_tokens - 1]
            at = rollouts.row_index[rows] - block.start
            # No name for the logits: a generator that waits would hold them.
            yield rows, self.support.log_probs(passes.state_logits(prefix, at, seen), tokens)

    def forward(self, rollouts: Rollouts) -> PolicyLogProbs:
        return self.evaluate(rollouts)

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Called for `gradient_checkpointing=True`: activations are computed again in the backward pass."""
        if not self.is_full:
            # Without this, reentrant checkpoints of frozen layers have no gradient.
            self.model.enable_input_require_grads()
        versions.checkpoint_activations(self.model, settings)

    gradient_checkpointing_enable = (
        activation_checkpointing_enable  # its name in Trainer before transformers 5.23
    )

    def rollouts(self, rows: Sequence[Row], completions: Sequence[Sequence[Sequence[int] | str]]) -> Rollouts:
        """Rollouts from given completions (texts or token lists), a list per row.

        A stop symbol at the end of a completion is removed. Raises DataError for a completion outside the support.
        """
        flat = [self.parse(c) for group in completions for c in group]
        index = [i for i, group in enumerate(completions) for _ in group]
        tokens, lengths = pad_right([c for c, _ in flat], self.device)
        stops = torch.tensor([s for _, s in flat], device=self.device)
        return self.support.rollouts(rows, torch.tensor(index, device=self.device), tokens, lengths, stops)

    def parse(self, completion: Sequence[int] | str) -> tuple[list[int], int]:
        """(tokens, stop symbol) of a completion. Raises DataError if it is outside the support."""
        if isinstance(completion, str):
            tokens = self.lm.encode_continuation(completion)
        else:
            tokens = list(completion)
            if not all(isinstance(t, int) for t in tokens):
                raise DataError(
                    f"completion {completion!r} is neither a text nor a list of token ids; for chat messages, give the "
                    "text of the assistant's message"
                )
        stop = self.support.stop_ids[0]
        if tokens and tokens[-1] in self.support.stop_ids:
            stop = tokens.pop()
        if not self.support.contains(tokens):
            lists = self.support.lists
            counts = "" if lists is None else f", not {lists.minimum} to {lists.maximum} non-empty statements"
            text = (
                ""
                if not self.support.patterns
                else f", a text that does not match {' and '.join(map(repr, self.support.patterns))} (hard constraints "
                "of a target are taken into the support, unless GFNConfig has narrow_support=False)"
            )
            raise DataError(
                f"completion {completion!r} is outside the support: {len(tokens)} tokens where "
                f"{self.support.min_tokens} to {self.support.max_tokens} are allowed{counts}{text}, or a banned token "
                "inside"
            )
        return tokens, stop

    def weights(self) -> dict[str, Tensor]:
        """Copies of the trained weights, by name, for `Sampler.load`. Of a sharded policy they are gathered."""
        if (shards := shards_of(self.model)) is not None:
            return shards.weights()
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def save_adapter(self, folder: str | Path) -> None:
        """A PEFT adapter folder, or a full model folder. safetensors and JSON."""
        save_weights(self.model, folder)
        if self.is_full:
            self.lm.tokenizer.save_pretrained(str(folder))

    def load_adapter(self, folder: str | Path) -> None:
        """Load weights saved by `save_adapter` into this policy. Raises CheckpointError if they do not fit."""
        load_weights(self.model, self.is_full, folder)


def _joined(parts: Sequence[Tensor], groups: Sequence[Tensor], width: int) -> Tensor:
    """[B, width]: the rows of all groups in their original order, padded with 0."""
    padded = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in parts]
    return torch.cat(padded)[torch.cat(list(groups)).argsort()]


def _zero_dropout(model: nn.Module) -> None:
    """Set all dropout to 0, of modules and of numbers in modules: activation checkpointing runs layers in training
    mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
