"""The server's law, from the tables that travel, against the policy's own: masks, nodes, log q and draws."""

from __future__ import annotations

import hashlib

import pytest
import structured_cases
import torch
from amortlm_vllm.law import AT_ONCE, Law, as_logits, draw, from_logits

from amortlm import Calculator, Support
from amortlm.engine.decoding import Exploration, _inverse_cdf
from amortlm.errors import ConfigError
from amortlm.rollout import wire

FEW = ("a", "t", " a", " cat", " ", "c")
SUPPORTS = {
    "one stop": Support(stop=".", max_tokens=3, allowed_tokens=["a", "b", "at"]),
    "two stops": Support(stop=[".", "!"], min_tokens=2, max_tokens=3),
    "may be empty": Support(stop=[".", "!"], min_tokens=0, max_tokens=2, banned_tokens=["b"]),
    "of one length": Support(stop=".", min_tokens=3, max_tokens=3),
    **structured_cases.SUPPORTS,
    "pattern": Support(
        stop=(".", "!"), min_tokens=2, max_tokens=4, allowed_tokens=FEW, pattern="(a|cat)( cat)*"
    ),
    "pattern, may be empty": Support(
        stop=".", min_tokens=0, max_tokens=3, allowed_tokens=FEW, pattern="a?t*"
    ),
    "pattern of one length": Support(
        stop=".", min_tokens=4, max_tokens=4, allowed_tokens=FEW, pattern="[act]+|a"
    ),
    "pattern of all tokens": Support(stop=".", max_tokens=3, pattern="(a|the) (cat|dog)"),
}


@pytest.fixture(params=SUPPORTS)
def laws(request, one_lm):
    """(the policy's law, the server's)."""
    law = SUPPORTS[request.param].bind(one_lm)
    tables = wire.tables(law)
    assert tables.name == hashlib.sha256(tables.data).hexdigest()
    return law, Law.from_bytes(tables.data)


def texts(law, count=200):
    """Prefixes of completions: their tokens [count, T], t and node [count]."""
    generator = torch.Generator().manual_seed(1)
    tokens, node = torch.zeros(count, law.max_tokens, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    nodes = [node]
    for k in range(law.max_tokens):
        legal = law.legal(torch.full((count,), k), node)
        legal[:, list(law.stop_ids)] = False
        legal[~legal.any(1), 0] = True  # nothing follows: what padding does there must agree, too
        tokens[:, k] = legal.float().multinomial(1, generator=generator).squeeze(1)
        node = law.advance(node, tokens[:, k])
        nodes.append(node)
    t = torch.arange(count) % (law.max_tokens + 1)
    return tokens, t, torch.stack(nodes, 1).gather(1, t[:, None]).squeeze(1)


def test_nodes_and_legal_tokens(laws):
    law, theirs = laws
    tokens, t, node = texts(law)
    assert [theirs.after(0, z[:n]) for z, n in zip(tokens.tolist(), t.tolist(), strict=True)] == node.tolist()
    assert torch.equal(theirs.legal(t, node), law.legal(t, node))
    assert law.legal(t, node).any(0).sum() > 1, "control: the texts are of the support"


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_draws_and_log_q(laws, epsilon):
    law, theirs = laws
    _, t, node = texts(law)
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(len(t), len(law.allowed), generator=generator)
    u, heat = torch.rand(len(t), generator=generator), torch.linspace(0, 2, len(t))
    drawn = draw(theirs, logits, t, node, u, heat, torch.full_like(u, epsilon))
    step, everyone = law.step(logits, t, node), torch.arange(len(t))
    expected = _inverse_cdf(Exploration(heat, epsilon).probabilities(step, everyone, everyone), u)
    assert torch.equal(drawn.token, expected)
    assert torch.equal(drawn.log_q, step.log_q[everyone, expected])
    assert torch.equal(drawn.log_stop, step.log_stop)
    assert theirs.legal(t, node)[everyone, drawn.token].all()


def test_without_exploration_as_the_policy_itself(laws):
    law, theirs = laws
    _, t, node = texts(law)
    logits = 3 * torch.randn(len(t), len(law.allowed), generator=torch.Generator().manual_seed(3))
    u = torch.rand(len(t), generator=torch.Generator().manual_seed(4))
    step, everyone = law.step(logits, t, node), torch.arange(len(t))
    drawn = draw(theirs, logits, t, node, u, torch.ones_like(u), torch.zeros_like(u))
    assert torch.equal(drawn.token, _inverse_cdf(Exploration().probabilities(step, everyone, everyone), u))


def test_what_logits_carry(laws):
    """The likeliest is the token drawn, and both figures come back as they were."""
    law, theirs = laws
    _, t, node = texts(law)
    logits = 30 * torch.randn(len(t), len(law.allowed), generator=torch.Generator().manual_seed(5))
    u = torch.rand(len(t), generator=torch.Generator().manual_seed(6))
    drawn = draw(theirs, logits, t, node, u, torch.full_like(u, 5), torch.full_like(u, 0.5))
    carried = as_logits(drawn, law.stop_ids, logits.shape[1])
    assert torch.equal(carried.argmax(1), drawn.token)
    values, ids = carried.topk(2)
    for i, token in enumerate(drawn.token.tolist()):
        log_q, log_stop = from_logits(token, dict(zip(ids[i].tolist(), values[i].tolist(), strict=True)))
        assert log_stop == drawn.log_stop[i]
        assert token in law.stop_ids or log_q == drawn.log_q[i]
    assert (drawn.log_q < -20).any(), "control: also what q hardly ever draws"


def test_many_rows_are_worked_on_in_parts(one_lm, monkeypatch):
    law = SUPPORTS["two stops"].bind(one_lm)
    theirs, (_, t, node) = Law.from_bytes(wire.tables(law).data), texts(law)
    logits, u = torch.randn(len(t), len(law.allowed)), torch.rand(len(t))
    more = (logits, t, node, u, torch.ones_like(u), torch.zeros_like(u))
    at_once = draw(theirs, *more)
    assert logits.numel() < AT_ONCE
    monkeypatch.setattr("amortlm_vllm.law.AT_ONCE", 7 * logits.shape[1])
    assert all(torch.equal(a, b) for a, b in zip(at_once, draw(theirs, *more), strict=True))


def test_what_is_no_table_is_refused(one_lm):
    from safetensors.torch import load, save

    tables = load(wire.tables(SUPPORTS["pattern"].bind(one_lm)).data)
    wrong = [
        b"garbage",
        save({"allowed": tables["allowed"]}),
        save(tables | {"other": torch.zeros(1)}),
        save(tables | {"stop_ids": torch.tensor([48])}),
        save(tables | {"stop_ids": torch.tensor([], dtype=torch.long)}),
        save(tables | {"lengths": torch.tensor([3, 2])}),
        save(tables | {"allowed": tables["allowed"].long()}),
        save(tables | {"step": tables["step"] + len(tables["step"])}),
        save(tables | {"token_class": tables["token_class"] - 1}),
        save(tables | {"can": tables["can"][1:]}),
        save({name: x for name, x in tables.items() if name != "ends"}),
    ]
    for data in wrong:
        with pytest.raises(ValueError, match="not the tables of a support"):
            Law.from_bytes(data)


def test_a_support_with_a_tool_does_not_travel(one_lm):
    law = Support(stop=".", max_tokens=6, tool=Calculator()).bind(one_lm)
    with pytest.raises(ConfigError, match="cannot draw on a support with a tool.*draw locally"):
        wire.tables(law)
