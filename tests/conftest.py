"""Tiny models of three architectures, with tokenizers of 48 tokens: supports are small enough to enumerate."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from reference import tiny_lm, tiny_tokenizer
from transformers import logging as transformers_logging

from amortlm.language_model import EMBEDDED_PATH, LanguageModel

torch.set_num_threads(1)
# A shell in the background (nohup, CI) may have these ignored, which amortlm leaves so; the tests send them.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)
transformers_logging.set_verbosity_error()

FAMILIES = ("llama", "gpt2", "gpt_neox")
MODELS = tuple(f"{family}-{head}" for family in FAMILIES for head in ("tied", "untied"))


def pytest_configure(config: pytest.Config) -> None:
    for warning in ("fan_in_fan_out is set to False:UserWarning", ".*activation_checkpointing:FutureWarning"):
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept between processes stays out of the home folder."""
    os.environ["AMORTLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def models() -> dict[str, LanguageModel]:
    """The six tiny models by name. Frozen, so one instance serves the whole session."""
    out = {}
    for name in MODELS:
        family, head = name.split("-")
        tokenizer = tiny_tokenizer(add_bos=family == "llama")
        out[name] = tiny_lm(family, tokenizer, tied=head == "tied")
    return out


@pytest.fixture(params=MODELS)
def lm(request: pytest.FixtureRequest, models: dict[str, LanguageModel]) -> LanguageModel:
    """Each of the six models."""
    return models[request.param]


@pytest.fixture(params=("llama-untied", "gpt2-tied", "gpt_neox-untied"))
def family_lm(request: pytest.FixtureRequest, models: dict[str, LanguageModel]) -> LanguageModel:
    """One model of each architecture: for what the output head cannot change."""
    return models[request.param]


@pytest.fixture
def one_lm(models: dict[str, LanguageModel]) -> LanguageModel:
    """One model, for what the architecture cannot change."""
    return models["llama-untied"]


@pytest.fixture(scope="session")
def metaspace_lm() -> LanguageModel:
    """A model whose tokenizer glues a space to the start of every text, like those of Llama 2."""
    return tiny_lm("llama", tiny_tokenizer(metaspace=True, add_bos=True), tied=False)


@pytest.fixture(scope="session")
def embedded() -> LanguageModel:
    """The model that ships with the package."""
    if not (EMBEDDED_PATH / "config.json").exists():
        pytest.skip(f"the embedded model is not built: no {EMBEDDED_PATH.name}/config.json in the package")
    return LanguageModel.from_pretrained("embedded", device="cpu")
