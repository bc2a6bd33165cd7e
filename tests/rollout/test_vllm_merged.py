"""Merged weights on the real vLLM on this CPU: `make test-vllm`. Not a part of the other suites.

A Llama, whose server is told to take them, and GPT-2, for which vLLM has no LoRA.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig
from real_vllm import PYTHON, check_training, served
from vllm_model import save_tiny_gpt2, save_tiny_llama

from amortlm import LanguageModel, Policy, Support
from amortlm.engine.sampler import LocalSampler, Request
from amortlm.errors import ConfigError, RolloutError
from amortlm.policy.laws import check_sampler
from amortlm.rollout import HTTPSampler

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="needs vLLM: make test-vllm")]

WORDS = Support(stop=".", max_tokens=3, allowed_tokens=["a", "b", "at"])
SAVED = {"llama": save_tiny_llama, "gpt2": save_tiny_gpt2}
# A tiny model's texts fill such a block, so that vLLM's cache of prefixes is used.
BLOCKS = ("--engine", '{"block_size": 32}')
OPTIONS = {"llama": ("--weights", "merged", "--enforce-eager", *BLOCKS), "gpt2": ("--enforce-eager", *BLOCKS)}
# The server, without what makes vLLM forget the prefixes of other weights.
FORGETS_NOTHING = """
from vllm.v1.engine.async_llm import AsyncLLM
async def nothing(*_, **__): return True
AsyncLLM.reset_prefix_cache = nothing
from amortlm_vllm.__main__ import main
if __name__ == "__main__":
    main()
"""


def adapter(kind, lm):
    own = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    embeddings = "wte" if lm.model.config.model_type == "gpt2" else "embed_tokens"
    return {
        "plain": LoraConfig(**own),
        "dora": LoraConfig(**own, use_dora=True),
        "biases": LoraConfig(**own, bias="all"),
        "head": LoraConfig(**own | {"target_modules": ["lm_head"]}),
        "embeddings": LoraConfig(**own | {"target_modules": [embeddings]}),
        "full": "full",
    }[kind]


def policy_of(lm, kind, support=WORDS):
    policy = Policy(lm, "{x}", support, adapter(kind, lm))
    generator = torch.Generator().manual_seed(1)
    for p in policy.model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return policy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {name: tmp_path_factory.mktemp(name) for name in SAVED}
    for name, save in SAVED.items():
        save(found[name])
    return found


@pytest.fixture(scope="module")
def lms(folders):
    return {name: LanguageModel.from_pretrained(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def urls(folders):
    with ExitStack() as stack:
        yield {name: stack.enter_context(served(folder, *OPTIONS[name])) for name, folder in folders.items()}


@pytest.mark.parametrize("kind", ["plain", "dora", "biases", "full"])
@pytest.mark.parametrize("name", SAVED)
def test_it_obeys_the_law_of_samplers(lms, urls, name, kind):
    policy = policy_of(lms[name], kind)
    check_sampler(HTTPSampler(urls[name], policy), policy, {"x": "the cat"})


@pytest.mark.parametrize("name", SAVED)
def test_changed_weights_change_the_draws_as_here(lms, urls, name):
    """Of prompts that fill a block, so that the cache would keep them."""
    policy = policy_of(lms[name], "full", Support(stop=[".", "!"], min_tokens=5, max_tokens=12))
    prompts = policy.encode_rows([{"x": "the cat" + " the dog" * n} for n in (15, 16)])
    assert min(map(len, prompts)) > 32
    request = Request(prompts, [32, 32], [1, 2], policy.support)
    sampler, drawn = HTTPSampler(urls[name], policy), []
    for version in range(3):
        sampler.load(policy.weights(), version)
        drawn.append((sampler.sample(request), LocalSampler(policy.model, policy.sharing).sample(request)))
        with torch.no_grad():
            for p in policy.model.parameters():
                p.mul_(0.9)
    for theirs, mine in drawn:
        width = min(theirs.tokens.shape[1], mine.tokens.shape[1])
        equal = (theirs.tokens[:, :width] == mine.tokens[:, :width]).all(1) & (theirs.lengths == mine.lengths)
        assert equal.float().mean() > 0.95  # rounding may turn a token
        torch.testing.assert_close(theirs.log_q[equal], mine.log_q[equal], atol=1e-3, rtol=0)
    assert (drawn[0][0].log_q - drawn[2][0].log_q).abs().mean() > 0.1, "control"


def test_a_cache_of_prefixes_that_is_kept_is_found(folders, lms, tmp_path):
    """The control of what vLLM forgets: with the cache of other weights the check fails."""
    program = tmp_path / "program.py"
    program.write_text(FORGETS_NOTHING)
    policy = policy_of(lms["gpt2"], "plain")
    with served(folders["gpt2"], *OPTIONS["gpt2"], program=[str(program)]) as url:
        sampler = HTTPSampler(url, policy)  # nothing is remembered yet
        other = {name: w + 0.1 for name, w in policy.weights().items()}
        with pytest.raises(RolloutError, match="draws from other weights or another model"):
            sampler.load(other, 1)


def test_two_tensors_for_head_and_embeddings(folders, lms):
    """Compiled, too: a graph that vLLM has compiled reads the new weights."""
    with served(folders["gpt2"], "--untied", *BLOCKS) as url:
        for kind in ("head", "embeddings", "full"):
            policy = policy_of(lms["gpt2"], kind)
            check_sampler(HTTPSampler(url, policy), policy, {"x": "the cat"})


def test_one_tensor_cannot_be_both(lms, urls):
    with pytest.raises(ConfigError, match="one tensor for both: start it with --untied"):
        HTTPSampler(urls["gpt2"], policy_of(lms["gpt2"], "head"))


@pytest.mark.parametrize(
    ("name", "lag", "kind"), [("gpt2", 0, "plain"), ("gpt2", 2, "full"), ("llama", 0, "dora")]
)
def test_training_nears_the_exact_posterior(lms, urls, tmp_path, name, lag, kind):
    check_training(lms[name], urls[name], tmp_path, lag, adapter=adapter(kind, lms[name]))
