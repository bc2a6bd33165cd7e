from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from reference import tiny_lm, tiny_policy
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from amortlm import LanguageModel, Posterior, Support
from amortlm.serve import create_app

SUPPORT = Support(stop=".", min_tokens=1, max_tokens=8)


@pytest.fixture(scope="session")
def posterior(models: dict[str, LanguageModel]) -> Posterior:
    """A posterior with one column."""
    lm = models["llama-untied"]
    return Posterior(tiny_policy(lm, "{x}", SUPPORT), lm.log_prob("{z}", given="{x}"))


@pytest.fixture(scope="session")
def infilling(models: dict[str, LanguageModel]) -> Posterior:
    """A posterior with the columns x and y, of which its prompt shows x."""
    lm = models["llama-untied"]
    return Posterior(tiny_policy(lm, "{x}", SUPPORT), lm.log_prob("{z}{y}", given="{x}"))


@pytest.fixture
def client(posterior: Posterior) -> Iterator[TestClient]:
    with TestClient(create_app(posterior, name="tiny"), raise_server_exceptions=False) as found:
        yield found


@pytest.fixture(scope="session")
def byte_fallback_lm(models: dict[str, LanguageModel]) -> LanguageModel:
    """A tokenizer like that of Llama 2, in which a character that is no token is one token for each byte."""
    names = [f"<0x{b:02X}>" for b in range(256)]
    tokens = ["<s>", "</s>", "<unk>", *names, *"abcdefghij.", "▁"]
    tokenizer = Tokenizer(
        BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    return tiny_lm("llama", fast, tied=False)
