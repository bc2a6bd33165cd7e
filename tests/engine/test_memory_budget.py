"""`memory_mb`: work in packs gives what it gives at once, and no pass holds more than the setting allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from reference import random_rollouts, tiny_policy
from torch import Tensor

from amortlm.engine.exactness import NONE
from amortlm.engine.memory import Sizes
from amortlm.engine.packs import Sharing
from amortlm.inference.correct import corrected
from amortlm.lab.baselines.decoding import decode
from amortlm.language_model import LanguageModel
from amortlm.posterior import Posterior
from amortlm.support import Support

SUPPORT = Support(stop=(".", "!"), min_tokens=1, max_tokens=4)
ROWS = [{"x": "the cat", "y": "dog"}, {"x": "a", "y": "a cat ran"}, {"x": "a dog ran. the cat", "y": "cat"}]
UNBOUNDED, MB, FEW = 1024.0, 0.04, 5  # MiB; under the second no pass is of more than a few texts


def posterior_of(lm: LanguageModel, sharing: Sharing | None = None) -> Posterior:
    """On a copy of the model, whose setting is its own."""
    own = lm.with_model(lm.model)
    if sharing is not None:
        own.sharing = sharing  # type: ignore[misc]
    target = own.log_prob("the {z} the {y}!", given="{x}") + 0.5 * own.log_prob("{z}", given="{x}")
    return Posterior(tiny_policy(own, "{x}", SUPPORT), target)


def evaluate(it: Posterior) -> Tensor:
    rollouts = random_rollouts(it.lm, SUPPORT, ROWS, per_row=7)
    with torch.no_grad():
        found = it.policy.evaluate(rollouts)
    return torch.cat([found.log_pf, found.log_pterm.masked_fill(~rollouts.stop_mask, 0.0)], 1)


def sample(it: Posterior) -> Tensor:
    rollouts, log_q = it.policy.sample(ROWS, [9, 0, 8], seed=1)
    return torch.cat([rollouts.tokens, log_q.final(rollouts.lengths)[:, None]], 1)


def score(it: Posterior) -> Tensor:
    return it.target.score(random_rollouts(it.lm, SUPPORT, ROWS, per_row=7))  # type: ignore[union-attr]


def estimate(it: Posterior) -> Tensor:
    return torch.tensor([[found.log_z, found.ess] for found in it.estimate(ROWS, n=20)])


def answers(it: Posterior) -> Tensor:
    it = Posterior(it.policy, it.lm.log_prob("{z} the {y}!", given="{x}"))
    votes = it.vote(ROWS, n=8, max_tokens=3)
    probs = [p.probs for p in it.predict(ROWS, ["dog", "a cat"], n=8)]
    counts = [sorted((answer, c) for answer, c in v.counts.items()) for v in votes]
    return torch.tensor([*(p for row in probs for p in row), *(float(c) for row in counts for _, c in row)])


def corrections(it: Posterior) -> Tensor:
    drawn = [
        corrected(it.policy, it.target, ROWS[2], 2, method=m, budget=12, seed=0).drawn  # type: ignore[arg-type]
        for m in ("sir", "smc", "mh")
    ]
    return torch.cat([torch.stack([d.log_q.double(), d.log_reward.double()]) for d in drawn])


def searches(it: Posterior) -> Tensor:
    rollouts = decode(it.policy, ROWS, "beam", 2)
    return torch.cat([rollouts.tokens, rollouts.lengths[:, None]], 1).float()


CASES = [evaluate, sample, score, estimate, answers, corrections, searches]


@contextmanager
def seen(it: Posterior) -> Iterator[list[tuple[int, int]]]:
    """(texts, bytes of the logits) of every pass of p and q."""
    passes: list[tuple[int, int]] = []

    def note(_module: object, _inputs: object, output: object) -> None:
        passes.append((len(output.logits), output.logits.numel() * 4))  # type: ignore[attr-defined]

    # generate() calls what peft has wrapped, whose hooks peft itself passes by.
    models = (it.lm.model, it.policy.model, it.policy.model.get_base_model())
    hooks = [model.register_forward_hook(note) for model in models]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def run(
    it: Posterior, case: Callable[[Posterior], Tensor], mb: float
) -> tuple[Tensor, list[tuple[int, int]]]:
    it.lm.memory_mb = mb
    with seen(it) as passes:
        return case(it).double(), passes


@pytest.mark.parametrize("sharing", [None, NONE], ids=["shared prompts", "whole texts"])
@pytest.mark.parametrize("case", CASES)
def test_packs_give_what_one_pass_gives(
    one_lm: LanguageModel, case: Callable[[Posterior], Tensor], sharing: Sharing | None
) -> None:
    if case is searches and sharing is not None:
        pytest.skip("generate() shares prompts")
    it = posterior_of(one_lm, sharing)
    assert it.lm.exactness is not None  # its passes are not counted
    whole, at_once = run(it, case, UNBOUNDED)
    parts, packed = run(it, case, MB)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    width = 2 if case is searches else 1  # the beams of a row go together
    assert max(texts for texts, _ in packed) <= FEW
    assert all(held <= MB * 2**20 or texts <= width for texts, held in packed)
    # Control: without the bound the spy sees passes that break it.
    assert max(texts for texts, _ in at_once) > FEW
    assert len(packed) > len(at_once)


def test_nothing_is_cut_where_gradients_flow(one_lm: LanguageModel) -> None:
    it = posterior_of(one_lm)
    rollouts = random_rollouts(it.lm, SUPPORT, ROWS, per_row=7)
    it.lm.memory_mb = 0
    with seen(it) as passes:
        it.policy.evaluate(rollouts).log_pf.sum().backward()
    assert list(dict.fromkeys(texts for texts, _ in passes)) == [3, 21]  # the prompts, the completions


def test_a_prompt_is_encoded_once_for_all_packs(one_lm: LanguageModel) -> None:
    it = posterior_of(one_lm)
    rollouts = random_rollouts(it.lm, SUPPORT, ROWS[2:], per_row=12)
    it.lm.memory_mb = MB
    lengths: list[int] = []
    hook = it.lm.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    it.lm.log_prob("{z}", given="{x}").score(rollouts)
    hook.remove()
    prompt = len(it.policy.encode_rows(ROWS[2:])[0])
    assert prompt - 1 > SUPPORT.max_tokens + 1  # else its pass could not be told from the others
    assert len(lengths) > 4
    assert [n for n in lengths if n >= prompt - 1] == [prompt - 1]


def test_the_setting_belongs_to_a_model_and_its_policies(one_lm: LanguageModel) -> None:
    it, other = posterior_of(one_lm), posterior_of(one_lm)
    it.lm.memory_mb = 7
    assert it.policy.passes.memory.mb == it.policy.sampler.memory.mb == it.lm.passes.memory.mb == 7  # type: ignore
    assert other.lm.memory_mb == one_lm.memory_mb == 256


def test_sizes_of_a_cache_are_those_of_its_tensors(family_lm: LanguageModel) -> None:
    passes = family_lm.passes
    prefix = passes.encode([list(range(2, 11)), list(range(2, 11))])
    exact = prefix.held / (2 * 8)
    sizes = Sizes.of(family_lm.model)
    layers = family_lm.model.config.num_hidden_layers
    assert (
        exact <= sizes.cache <= exact * (1 + 1 / layers) + 4 * 2 * 32
    )  # its own copy of a layer, and of all heads
    assert sizes.vocabulary == family_lm.vocab_size
