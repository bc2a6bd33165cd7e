"""Slow, plain re-implementations that the tests compare the library with, and the tiny models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from amortlm.language_model import LanguageModel
from amortlm.policy import Policy
from amortlm.support import Support
from amortlm.types import Rollouts, Row

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKS = ".,!?:"
WORDS = ("a", "the", "cat", "dog", "ran")
CONTEXT = 64


def tiny_tokenizer(metaspace: bool = False, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """48 tokens: letters, marks, white space, " a", " the", " cat", " dog", " ran" and <s>, </s>.

    Byte-level like GPT-2, or (metaspace) with a space put before every text like Llama 2.
    """
    space, newline = ("▁", "\n") if metaspace else ("Ġ", "Ċ")
    merges = [
        *((space, "a"), (space, "t"), ("h", "e"), (space + "t", "he")),
        *((space, "c"), ("a", "t"), (space + "c", "at")),
        *((space, "d"), ("o", "g"), (space + "d", "og")),
        *((space, "r"), ("a", "n"), (space + "r", "an")),
    ]
    tokens = ["<s>", "</s>", *LETTERS, *MARKS, space, newline, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges))
    if metaspace:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(space), normalizers.Replace(" ", space)]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(space, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_lm(
    family: str, tokenizer: PreTrainedTokenizerFast, tied: bool, unused_rows: int = 0
) -> LanguageModel:
    """A model of two layers with weights large enough that its distributions are far from uniform.

    unused_rows: rows of the output layer that no token has.
    """
    common = {
        "vocab_size": len(tokenizer) + unused_rows,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": CONTEXT,
    }
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, **sizes, num_key_value_heads=2))
    elif family == "gpt_neox":
        # Dropout on, here and in GPT-2 by default: the policy has to switch it off.
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(**common, **sizes, attention_dropout=0.1, hidden_dropout=0.1)
        )
    else:
        common["n_positions"] = common.pop("max_position_embeddings")
        model = GPT2LMHeadModel(GPT2Config(**common, n_embd=32, n_layer=2, n_head=4))
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * 0.3
        elif name.endswith("bias"):
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return LanguageModel(model, tokenizer, name=f"tiny {family}")


def tiny_policy(lm: LanguageModel, prompt: str, support: Support, adapter: str | None = None) -> Policy:
    """A policy that differs clearly from `lm`: LoRA weights (or all weights of a full copy) moved."""
    torch.manual_seed(3)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = Policy(lm, prompt, support, adapter or lora)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
        elif p.requires_grad and policy.is_full:
            p.data += 0.05 * torch.randn_like(p)
    return policy


def random_rollouts(
    lm: LanguageModel, support: Support, rows: Sequence[Row], per_row: int = 3, seed: int = 0
) -> Rollouts:
    """Uniform completions of the support, of every length that it allows, in mixed order."""
    bound = support.bind(lm)
    generator = torch.Generator().manual_seed(seed)
    allowed = bound.allowed.nonzero().squeeze(1)
    n, width = len(rows) * per_row, bound.max_tokens
    spread = bound.max_tokens - bound.min_tokens + 1
    lengths = bound.min_tokens + torch.arange(n) % spread
    tokens = allowed[torch.randint(len(allowed), (n, width), generator=generator)]
    tokens = tokens * (torch.arange(width) < lengths[:, None])
    row_index = torch.arange(n) % len(rows)
    order = torch.randperm(n, generator=generator)
    return bound.rollouts(rows, row_index[order], tokens[order], lengths[order])


def plain_ids(lm: LanguageModel, text: str) -> list[int]:
    """Tokens without special tokens, straight from the tokenizer."""
    return lm.tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def sequence_log_prob(model: torch.nn.Module, ids: Sequence[int], first: int) -> float:
    """log p(ids[first:] | ids[:first]) from one plain forward pass, in float64 after the logits."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    return sum(logits[k - 1, ids[k]].item() for k in range(first, len(ids)))


def slow_score(
    lm: LanguageModel,
    rollouts: Rollouts,
    given: Sequence[Sequence[int]],
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
) -> Tensor:
    """log p(before z s after | given), summed over the stop symbols s, by one full pass per state and symbol."""
    out = torch.zeros(rollouts.stop_mask.shape)
    for b, t in rollouts.stop_mask.nonzero().tolist():
        n = int(rollouts.row_index[b])
        z = rollouts.tokens[b, :t].tolist()
        per_symbol = [
            sequence_log_prob(lm.model, [*given[n], *before[n], *z, s, *after[n]], len(given[n]))
            for s in rollouts.stop_ids
        ]
        out[b, t] = torch.tensor(per_symbol).logsumexp(0)
    return out


def slow_score_given(
    lm: LanguageModel,
    rollouts: Rollouts,
    before: Sequence[Sequence[int]],
    between: Sequence[Sequence[int]],
    of: Sequence[Sequence[int]],
) -> Tensor:
    """log p(of | before z s between): with several stop symbols, s as likely as the model has it after z."""
    out = torch.zeros(rollouts.stop_mask.shape)
    for b, t in rollouts.stop_mask.nonzero().tolist():
        n = int(rollouts.row_index[b])
        start = [*before[n], *rollouts.tokens[b, :t].tolist()]
        symbol = torch.tensor(
            [sequence_log_prob(lm.model, [*start, s], len(start)) for s in rollouts.stop_ids]
        )
        text = torch.tensor(
            [
                sequence_log_prob(
                    lm.model, [*start, s, *between[n], *of[n]], len(start) + 1 + len(between[n])
                )
                for s in rollouts.stop_ids
            ]
        )
        out[b, t] = (symbol.log_softmax(0) + text).logsumexp(0)
    return out


@torch.no_grad()
def slow_log_q(policy: Policy, prompt: Sequence[int], z: Sequence[int]) -> tuple[list[float], list[float]]:
    """(log q of every token, log q of stopping at every state) by a plain pass per state."""
    support = policy.support
    log_pf, log_pterm = [], []
    for t in range(len(z) + 1):
        logits = policy.model(input_ids=torch.tensor([[*prompt, *z[:t]]])).logits[0, -1].double()
        legal = [] if t == support.max_tokens else support.allowed.nonzero().squeeze(1).tolist()
        ends = list(support.stop_ids) if t >= support.min_tokens else []
        norm = logits[[*legal, *ends]].logsumexp(0)
        log_pterm.append((logits[ends].logsumexp(0) - norm).item() if ends else float("-inf"))
        if t < len(z):
            log_pf.append((logits[z[t]] - norm).item())
    return log_pf, log_pterm
