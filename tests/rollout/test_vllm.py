"""The real vLLM on this CPU: `make test-vllm` (docs/scale.md). Not a part of the other suites.

One server per module, in little room: it interrupts requests, which then begin again.
"""

from __future__ import annotations

import pytest
import torch
from drawn_supports import SUPPORTS
from real_vllm import PYTHON, check_training, served
from reference import tiny_policy
from vllm_model import save_tiny_llama

from amortlm import LanguageModel, Support
from amortlm.engine.decoding import Exploration
from amortlm.engine.sampler import LocalSampler, Request
from amortlm.errors import ConfigError
from amortlm.policy.laws import check_sampler
from amortlm.rollout import HTTPSampler

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="needs vLLM: make test-vllm")]

ROW = {"x": "the cat"}
# Twenty blocks of 32 tokens: each request begins in one and needs a second one, so many are interrupted.
TIGHT = '{"num_gpu_blocks_override": 20, "block_size": 32, "max_num_seqs": 32}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return LanguageModel.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def url(folder):
    with served(folder, "--enforce-eager") as address:
        yield address


@pytest.mark.parametrize("name", SUPPORTS)
def test_it_obeys_the_law_of_samplers(lm, url, name):
    policy = tiny_policy(lm, "{x}", SUPPORTS[name])
    check_sampler(HTTPSampler(url, policy), policy, ROW)


def compared(lm, url, count):
    """Draws of the server and of the local engine that are asked for the same."""
    policy = tiny_policy(lm, "{x}", Support(stop=[".", "!"], min_tokens=10, max_tokens=30))
    generator = torch.Generator().manual_seed(3)
    kept = [torch.randint(2, 28, (k % 5,), generator=generator).tolist() for k in range(2 * count)]
    heat = torch.linspace(0.3, 2, 2 * count)
    prompts = policy.encode_rows([{"x": "the cat" + " the dog" * n} for n in (8, 9)])
    asked = Request(prompts, [count, count], [1, 2], policy.support, Exploration(heat, 0.1), kept)
    return HTTPSampler(url, policy).sample(asked), LocalSampler(policy.model, policy.sharing).sample(asked)


def test_it_draws_what_the_local_engine_draws(lm, url):
    same(*compared(lm, url, 64))


def same(theirs, mine):
    """Equal tokens but for rounding, which may turn one of a thousand, and equal log q."""
    n = min(theirs.tokens.shape[1], mine.tokens.shape[1])
    equal = (theirs.tokens[:, :n] == mine.tokens[:, :n]).all(1) & (theirs.lengths == mine.lengths)
    assert equal.float().mean() > 0.95
    torch.testing.assert_close(theirs.log_q[equal], mine.log_q[equal], atol=1e-3, rtol=0)


def test_interrupted_requests_go_on_as_if_they_had_not_been(lm, folder):
    with served(folder, "--enforce-eager", "--engine", TIGHT) as address:
        same(*compared(lm, address, 64))


def test_a_rank_above_the_servers_is_refused(lm, url):
    from peft import LoraConfig

    lora = LoraConfig(r=65, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="vLLM cannot load these weights.*65"):
        HTTPSampler(url, tiny_policy(lm, "{x}", SUPPORTS["one stop"], lora))


@pytest.mark.parametrize("lag", [0, 4])
def test_training_nears_the_exact_posterior(lm, url, tmp_path, lag):
    check_training(lm, url, tmp_path, lag)
