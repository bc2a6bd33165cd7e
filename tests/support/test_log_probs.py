"""log q on a support with its gradient written out, against autograd on a plain log-softmax; passes grouped by length."""

from __future__ import annotations

import pytest
import torch
from reference import random_rollouts, tiny_policy
from torch import Tensor

from amortlm import Support
from amortlm.engine import packs
from amortlm.engine.packs import length_groups
from amortlm.engine.prefix import pad_right
from amortlm.support import SupportLaw, log_probs

SUPPORTS = {
    "one stop": Support(stop=".", min_tokens=1, max_tokens=5),
    "two stops": Support(stop=[".", "!"], min_tokens=2, max_tokens=5),
    "few tokens": Support(stop=".", min_tokens=0, max_tokens=5, allowed_tokens=["a", "b"]),
    "list": Support(stop=".", max_tokens=5, separator=",", min_statements=2),
    "pattern": Support(stop=[".", "!"], min_tokens=0, max_tokens=5, pattern="(a|b|cat)*( ?t(t|a)?)?"),
}


def plain(support: SupportLaw, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same by autograd: everything illegal at about -inf (at -inf its gradient is NaN), one log-softmax."""
    log_p = []
    for t in range(logits.shape[1]):
        legal = support.legal(torch.full((len(tokens),), t), support.nodes(tokens)[:, t])
        log_p.append(logits[:, t].float().masked_fill(~legal, -1e9).log_softmax(-1))
    log_q = torch.stack(log_p, 1)
    width = tokens.shape[1]
    return log_q[:, :width].gather(-1, tokens[..., None]).squeeze(-1), log_q[..., support.stop_ids].logsumexp(
        -1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 10**6])
@pytest.mark.parametrize("name", SUPPORTS)
def test_values_and_gradient_are_those_of_autograd(one_lm, monkeypatch, name, chunk, dtype):
    monkeypatch.setattr(log_probs, "CPU_CHUNK", chunk)
    support = SUPPORTS[name].bind(one_lm)
    generator = torch.Generator().manual_seed(0)
    if name == "list":
        comma = one_lm.token_id(",")
        tokens = torch.tensor([[5, comma, 6, 7, 0], [8, 9, comma, 3, comma], [4, 5, 6, comma, 9]])
        tokens[1, 4] = 11
        lengths = torch.tensor([4, 5, 5])
        rollouts = support.rollouts([{}], torch.zeros(3, dtype=torch.long), tokens, lengths)
    elif name == "pattern":
        found = [z for n in range(6) for z in support.completions(n)]
        tokens, lengths = pad_right(found[:: max(1, len(found) // 12)], "cpu")
        rollouts = support.rollouts([{}], torch.zeros_like(lengths), tokens, lengths)
    else:
        rollouts = random_rollouts(one_lm, SUPPORTS[name], [{}], per_row=12)
    batch, width = rollouts.tokens.shape
    logits = (3 * torch.randn(batch, width + 1, one_lm.vocab_size, generator=generator)).to(dtype)
    weight = torch.randn(2, batch, width + 1, generator=generator)
    found = []
    for log_p in (support.log_probs, lambda *args: plain(support, *args)):
        leaf = logits.clone().requires_grad_(True)
        log_pf, log_pterm = log_p(leaf, rollouts.tokens)
        log_pf = torch.where(rollouts.action_mask, log_pf, 0.0)
        log_pterm = torch.where(rollouts.stop_mask, log_pterm, 0.0)
        ((log_pf * weight[0, :, :width]).sum() + (log_pterm * weight[1]).sum()).backward()
        found.append((log_pf, log_pterm, leaf.grad))
    loose = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs, tolerance in zip(*found, (1e-5, 1e-5, loose), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    assert found[0][2].abs().max() > 0.1


def test_evaluation_is_the_same_in_groups_of_similar_length(one_lm, monkeypatch):
    support = Support(stop=".", min_tokens=1, max_tokens=12)
    policy = tiny_policy(one_lm, "{x}", support)
    rollouts = random_rollouts(one_lm, support, [{"x": "the cat"}, {"x": "a"}], per_row=12)
    whole = policy.evaluate(rollouts)
    monkeypatch.setattr(packs, "MIN_SAVED", 10)
    assert len(length_groups(rollouts.lengths)) > 2
    parts = policy.evaluate(rollouts)
    torch.testing.assert_close(parts.log_pf, whole.log_pf, atol=1e-5, rtol=0)
    mask = rollouts.stop_mask
    torch.testing.assert_close(parts.log_pterm[mask], whole.log_pterm[mask], atol=1e-5, rtol=0)


def test_length_groups_hold_every_row_once_and_save_padding(monkeypatch):
    lengths = torch.tensor([3, 20, 4, 19, 3, 20] * 20)
    groups = length_groups(lengths)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(len(lengths)))
    assert sum(len(g) * int(lengths[g].max()) for g in groups) < 0.65 * 20 * len(lengths)
    assert len(length_groups(torch.full((100,), 9))) == 1
    assert len(length_groups(torch.tensor([1, 2, 3]))) == 1
