from __future__ import annotations

import copy

import pytest
from genlm_cases import support
from reference import tiny_policy

from amortlm import LanguageModel, Policy


@pytest.fixture(scope="module")
def lm(models: dict[str, LanguageModel]) -> LanguageModel:
    """A tiny model with smaller weights: a posterior that is spread out."""
    model = copy.deepcopy(models["llama-untied"].model)
    for p in model.parameters():
        p.data *= 0.7
    return LanguageModel(model, models["llama-untied"].tokenizer)


@pytest.fixture(scope="module")
def policy(lm: LanguageModel) -> Policy:
    return tiny_policy(lm, "{x}", support())
