"""Supervised fine-tuning: maximum likelihood of gold completions, by TRL."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amortlm.data import as_rows
from amortlm.errors import DataError
from amortlm.lab.baselines.finetune import adopt_weights, quiet, run_trl, trl, trl_settings, working_copy
from amortlm.policy import Policy
from amortlm.types import Row

LOG = "sft.jsonl"


def train_sft(
    policy: Policy,
    rows: Sequence[Row],
    completions: Sequence[Sequence[str | Sequence[int]]],
    *,
    output_dir: str | Path,
    max_steps: int = 200,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    resume: bool = False,
    **settings: Any,
) -> Policy:
    """Train `policy` in place on gold completions of its support (a list for each row), and return it.

    TRL's `SFTTrainer` minimises the mean over tokens of -log p(token), for the tokens of a completion and the stop
    symbol that ends it, under the policy's prompt. p is the softmax over the whole vocabulary, not renormalised on
    the support: its minimum over q is the same, since gold completions lie inside. `output_dir` receives
    `sft.jsonl` (loss by step); resume: go on from what an interrupted run of the same settings left there; settings:
    further fields of `trl.SFTConfig`.
    Raises DataError for a completion outside the support, or for none at all.
    """
    config_class, trainer_class = trl("SFTConfig", "SFTTrainer")
    from datasets import Dataset

    trained = working_copy(policy)
    given = trl_settings(policy, output_dir, seed, resume) | {
        "max_steps": max_steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "logging_steps": 10,
        "completion_only_loss": True,
        "max_length": None,
        "packing": False,
    }
    with quiet():
        trainer = trainer_class(
            model=trained.model,
            args=config_class(**(given | settings)),
            train_dataset=Dataset.from_list(examples(policy, rows, completions)),
            processing_class=padded_tokenizer(policy),
        )
        run_trl(trainer, Path(output_dir) / LOG, resume)
    return adopt_weights(policy, trained)


def examples(
    policy: Policy, rows: Sequence[Row], completions: Sequence[Sequence[str | Sequence[int]]]
) -> list[dict[str, list[int]]]:
    """Tokens and loss mask of every (row, completion): the prompt has mask 0, the completion and its stop 1.

    The sure stop after max_tokens has mask 0: the policy does not choose it.
    """
    rows = as_rows(rows, "rows")
    if len(rows) != len(completions):
        raise DataError(
            f"{len(completions)} lists of completions for {len(rows)} rows; give one list per row"
        )
    if not any(completions):
        raise DataError("SFT needs at least one gold completion")
    out = []
    for prompt, group in zip(policy.encode_rows(rows), completions, strict=True):
        for completion in group:
            tokens, stop = policy.parse(completion)
            chosen = int(len(tokens) < policy.support.max_tokens)
            mask = [0] * len(prompt) + [1] * len(tokens) + [chosen]
            out.append({"input_ids": [*prompt, *tokens, stop], "completion_mask": mask})
    return out


def padded_tokenizer(policy: Policy) -> Any:
    """A copy of the tokenizer that has a padding token, which TRL asks for (padding is masked everywhere)."""
    tokenizer = copy.deepcopy(policy.lm.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
