"""Decoding in a static cache: the draws of the ordinary loop, without the host in between, also as a replayed graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from host_syncs import HostSyncs
from reference import tiny_lm, tiny_policy, tiny_tokenizer
from replay import captured
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OpenAIGPTConfig,
)

from amortlm import LanguageModel, Policy, Support
from amortlm.engine import static
from amortlm.engine.decoding import Draws, Exploration
from amortlm.engine.passes import Passes, pausing
from amortlm.engine.sampler import LocalSampler, Request
from amortlm.engine.static import PATIENCE, StaticSampler, StaticWriter
from amortlm.errors import ConfigError, ModelError
from amortlm.policy.laws import check_policy, check_sampler, examine_sampling

FAMILIES = ("llama", "gpt2", "gpt_neox")
SUPPORTS = {
    "one stop": Support(stop=".", max_tokens=3, allowed_tokens=["a", "b", "at"]),
    "two stops": Support(stop=[".", "!"], min_tokens=0, max_tokens=3, allowed_tokens=["a", "b"]),
    "list": Support(stop=".", max_tokens=5, separator=",", max_statements=2, allowed_tokens=["a", "b"]),
    "pattern": Support(stop=[".", "!"], min_tokens=0, max_tokens=4, pattern="(a|b|cat)*( ?t(t|a)?)?"),
    "patterns": Support(stop=".", min_tokens=1, max_tokens=5, pattern=["(a|b)*c?", "a.*"]),
    "too large to list": Support(stop=".", max_tokens=6),
}
LONG = Support(stop=[".", "!"], max_tokens=3 * PATIENCE)


@pytest.fixture(scope="module")
def lms() -> dict[str, LanguageModel]:
    found = {}
    for family in FAMILIES:
        found[family] = tiny_lm(family, tiny_tokenizer(add_bos=family == "llama"), tied=family == "gpt2")
        found[family].static_cache = True
    return found


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[static._Loop]:
    """The loops of static steps, one for each step."""
    seen: list[static._Loop] = []
    step = static._Loop.step
    monkeypatch.setattr(static._Loop, "step", lambda loop: seen.append(loop) or step(loop))
    return seen


@pytest.fixture(params=["eager", "replayed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Step by step, as on a CPU, or as a graph, as on CUDA."""
    if request.param == "replayed":
        monkeypatch.setattr(static, "_captures", lambda device: True)
        monkeypatch.setattr(static, "_on_the_side", lambda step: step())
        monkeypatch.setattr(static, "_captured", captured)
    return str(request.param)


def asked(policy: Policy, n: int = 20, **more: Any) -> Request:
    """Prompts of different lengths, of one token among them."""
    rows = [{"x": "the cat sat"}, {"x": "a"}]
    return Request(policy.encode_rows(rows), [n, n], [1, 2], policy.support, **more)


def ordinary(policy: Policy) -> LocalSampler:
    return LocalSampler(policy.model, policy.sharing, policy.lm.memory)


def assert_same(a: Draws, b: Draws) -> None:
    for name in ("tokens", "lengths", "stops"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("log_pf", "log_pterm"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-4, rtol=0)
    assert len(a.tokens.unique(dim=0)) > 3  # they do differ


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SUPPORTS)
def test_it_is_the_law_of_a_sampler(lms: dict[str, LanguageModel], family: str, name: str) -> None:
    policy = tiny_policy(lms[family], "{x}", SUPPORTS[name])
    assert type(policy.sampler) is StaticSampler
    check_sampler(policy.sampler, policy, {"x": "the cat"}, num_samples=1000 if family == "llama" else 200)


def test_the_laws_of_a_policy(lms: dict[str, LanguageModel]) -> None:
    check_policy(tiny_policy(lms["llama"], "{x}", SUPPORTS["pattern"]), [{"x": "the cat"}, {"x": "a"}])


@pytest.mark.parametrize("name", [*SUPPORTS, "long"])
@pytest.mark.parametrize("explores", [False, True])
def test_draws_are_those_of_the_ordinary_loop(
    lms: dict[str, LanguageModel], steps: list[Any], name: str, explores: bool, way: str
) -> None:
    policy = tiny_policy(lms["llama"], "{x}", SUPPORTS.get(name, LONG))
    heat = Exploration(torch.linspace(0.3, 2.0, 40), epsilon=0.1) if explores else None
    request = asked(policy, exploration=heat)
    drawn = policy.sampler.sample(request)
    assert len(steps) >= 1 if way == "eager" else len(steps) <= 2
    steps.clear()
    assert_same(drawn, ordinary(policy).sample(request))
    assert not steps  # the control: those were drawn otherwise


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tokens_go_on(lms: dict[str, LanguageModel], family: str, way: str, steps: list[Any]) -> None:
    """Of different numbers, none, and all that there may be, so that texts end at different steps."""
    policy = tiny_policy(lms[family], "{x}", SUPPORTS["too large to list"])
    a = policy.lm.encode_continuation("a")[0]
    kept = [[a] * (b % 7) for b in range(40)]
    request = asked(policy, kept=kept)
    assert_same(policy.sampler.sample(request), ordinary(policy).sample(request))
    assert steps


def test_packs_are_drawn_alike(lms: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(lms["llama"], "{x}", SUPPORTS["too large to list"])
    whole = policy.sampler.sample(asked(policy, 5))
    monkeypatch.setattr(policy.lm, "memory_mb", 0)  # a pack for each prompt and completion
    assert_same(policy.sampler.sample(asked(policy, 5)), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_q_is_that_of_plain_passes(
    lms: dict[str, LanguageModel], steps: list[Any], family: str, way: str
) -> None:
    found = examine_sampling(lms[family])
    assert found.holds, str(found)
    assert steps


@pytest.mark.parametrize("name", [*SUPPORTS, "long"])
def test_no_step_waits_for_the_device(
    lms: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    policy = tiny_policy(lms["llama"], "{x}", SUPPORTS.get(name, LONG))
    waits: list[Counter[str]] = []
    step = static._Loop.step

    def noted(loop: static._Loop) -> None:
        with HostSyncs() as found:
            step(loop)
        waits.append(found.found)

    monkeypatch.setattr(static._Loop, "step", noted)
    heat = Exploration(torch.linspace(0.3, 2.0, 40), epsilon=0.1)
    policy.sampler.sample(asked(policy, exploration=heat))
    assert len(waits) > 1
    assert not any(waits[1:]), waits[1:]
    with HostSyncs() as found:
        ordinary(policy).sample(asked(policy))
    assert any("_unique2" in what for what in found.found), "control"
    assert any("nonzero" in what for what in found.found), "control"


def test_shapes_and_places_do_not_change(lms: dict[str, LanguageModel], steps: list[static._Loop]) -> None:
    policy = tiny_policy(lms["llama"], "{x}", LONG)
    seen: list[Any] = []
    policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            [(x.shape, x.data_ptr()) for x in (kwargs["input_ids"], kwargs["attention_mask"])]
        ),
        with_kwargs=True,
    )
    policy.sampler.sample(asked(policy))
    assert len(seen) - 1 == len(steps) > 2  # a pass for the prompts
    assert all(each == seen[1] for each in seen[1:])
    assert len({id(loop) for loop in steps}) == 1


def test_it_ends_with_the_last_completion(lms: dict[str, LanguageModel], steps: list[Any]) -> None:
    policy = tiny_policy(lms["llama"], "{x}", replace(LONG, allowed_tokens=["a", "b"]))
    drawn = policy.sampler.sample(asked(policy, 2))
    longest = int(drawn.lengths.max())
    assert longest < LONG.max_tokens - PATIENCE
    assert longest < len(steps) <= longest + PATIENCE + 1


def test_python_state_shows_in_a_replay(
    lms: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of `way`: tokens that are assigned anew, and not written where they were, are not replayed."""
    policy = tiny_policy(lms["llama"], "{x}", LONG)

    def append(writer: StaticWriter, ids: Tensor, going: Tensor) -> None:
        writer._ids = ids
        writer._positions.add_(going)
        writer._slot.add_(1)

    monkeypatch.setattr(StaticWriter, "append", append)
    wanted = ordinary(policy).sample(asked(policy))
    assert torch.equal(policy.sampler.sample(asked(policy)).tokens, wanted.tokens)
    monkeypatch.setattr(static, "_captures", lambda device: True)
    monkeypatch.setattr(static, "_on_the_side", lambda step: step())
    monkeypatch.setattr(static, "_captured", captured)
    assert not torch.equal(policy.sampler.sample(asked(policy)).log_pf, wanted.log_pf)


def test_others_have_their_turn_before_each_step(
    lms: dict[str, LanguageModel], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(lms["llama"], "{x}", LONG)
    turns: list[bool] = []
    with pausing(lambda: turns.append(torch.is_grad_enabled())):
        drawn = policy.sampler.sample(asked(policy))
    assert len(turns) > int(drawn.lengths.max())


def test_a_watch_is_told_every_token(lms: dict[str, LanguageModel], steps: list[Any]) -> None:
    policy, told = tiny_policy(lms["llama"], "{x}", LONG), [0]

    def watch(at: Tensor, token: Tensor, log_q: Tensor) -> None:
        told[0] += len(at)

    watched = policy.sampler.sample(asked(policy, watch=watch))
    assert not steps  # by the ordinary loop
    assert told[0] == int((watched.lengths + 1).sum())
    assert_same(watched, policy.sampler.sample(asked(policy)))


def test_a_tool_is_refused(lms: dict[str, LanguageModel]) -> None:
    support = Support(stop=".", max_tokens=6, tool={"lookup": {"table": {"cat": "ran"}}})
    policy = tiny_policy(lms["llama"], "{x}", support)
    with pytest.raises(ConfigError, match="a tool writes on the host: leave static_cache or the tool out"):
        policy.sampler.sample(asked(policy))


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MistralConfig(**SIZES, sliding_window=8), "its layers have windows"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "its rotary embeddings depend on the longest text",
        ),
        (
            OpenAIGPTConfig(vocab_size=48, n_positions=64, n_embd=32, n_layer=2, n_head=4),
            "has no static cache",
        ),
    ],
    ids=["windows", "dynamic rope", "no cache"],
)
def test_other_architectures_are_refused(config: Any, why: str) -> None:
    model = AutoModelForCausalLM.from_config(config)
    lm = LanguageModel(model, tiny_tokenizer(), "tiny", static_cache=True)
    with pytest.raises(ModelError, match=f"{why}.*leave static_cache out"):
        Policy(lm, "{x}", SUPPORTS["one stop"])
    lm.static_cache = False
    Policy(lm, "{x}", SUPPORTS["one stop"]).sample([{"x": "a"}], 2)


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static passes of a model that is wrong in them."""
    right = Passes.static_logits
    monkeypatch.setattr(
        Passes, "static_logits", lambda passes, ids, mask, at, cache: right(passes, ids, mask, at * 2, cache)
    )


def test_a_model_that_is_not_exact_is_refused(shifted: None) -> None:
    lm = tiny_lm("llama", tiny_tokenizer(), tied=False)
    lm.static_cache = True
    with pytest.raises(ModelError, match="its log-probabilities differ from those of plain passes"):
        Policy(lm, "{x}", SUPPORTS["one stop"])
