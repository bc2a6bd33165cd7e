"""The self-check: what it lets a model share is exact, what it cannot settle is not used, and what is no causal LM is refused."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from reference import tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from amortlm import LanguageModel, Policy, Support
from amortlm.cli import main
from amortlm.engine.exactness import attention_windows, examine, index_limit
from amortlm.errors import ModelError, PromptTooLongError
from amortlm.policy.laws import examine_policy

BASE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny(kind: str, **settings) -> LanguageModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**BASE, **settings}))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data.normal_(0, 0.25)
    return LanguageModel(model, tiny_tokenizer(), name=kind)


def test_full_attention_shares_everything(family_lm):
    assert family_lm.sharing == type(family_lm.sharing)()
    assert all(f.exact for f in family_lm.exactness.findings)


def test_windows_are_tried_on_short_texts_and_left_as_they_were():
    lm = tiny("mistral", sliding_window=50)
    assert attention_windows(lm.model.config) == {"sliding_window": 50}
    sharing, findings = lm.sharing, lm.exactness.findings
    assert (sharing.steps, sharing.spans, sharing.packed, sharing.window, sharing.longest) == (
        True,
        True,
        True,
        50,
        None,
    )
    beyond = [f for f in findings if "beyond a window" in f.what]
    assert len(beyond) == 2
    assert all(f.exact for f in beyond)
    assert attention_windows(lm.model.config) == {"sliding_window": 50}


def test_a_cache_that_forgets_is_found_out(monkeypatch):
    """The fault in miniature: keys that fall out of the window of a prompt are gone for its completions."""
    monkeypatch.setattr("amortlm.engine.passes.DynamicLayer", partial(DynamicSlidingWindowLayer, 3))
    sharing = tiny("mistral", sliding_window=50).sharing
    assert not sharing.steps
    assert not sharing.spans


def test_what_is_not_exact_is_not_used():
    lm = tiny("mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=128)
    assert lm.sharing.spans
    assert not lm.sharing.packed
    assert [f.exact for f in lm.exactness.findings if "side by side" in f.what] == [False]


@pytest.mark.parametrize(("off", "used"), [(1.5e-3, False), (2e-4, True)])
def test_steps_that_are_a_little_off_are_not_used(one_lm, monkeypatch, off, used):
    """As of Mamba layers whose step is another formula: a batch of whole texts may be that far off, steps may not."""
    forward = type(one_lm.model).forward

    def near(self, **arguments):
        out = forward(self, **arguments)
        if out.logits.shape[1] == 1 and len(out.logits) > 1:
            out.logits = out.logits + off * torch.arange(out.logits.shape[2]).remainder(2)
        return out

    monkeypatch.setattr(type(one_lm.model), "forward", near)
    found = examine(one_lm.model, "near").sharing
    assert (found.steps, found.spans) == (used, True)


def test_a_model_that_sees_the_future_is_refused():
    lm = tiny("bert")
    with pytest.raises(ModelError, match="not a causal LM"):
        Policy(lm, "{x}", Support(stop=".", max_tokens=3))
    assert tiny("bert", is_decoder=True).sharing.spans


def test_a_model_whose_rows_change_each_other_is_refused(one_lm, monkeypatch):
    forward = type(one_lm.model).forward

    def mixed(self, **arguments):
        out = forward(self, **arguments)
        if len(out.logits) > 1:
            out.logits = out.logits + out.logits.roll(1, 0)
        return out

    monkeypatch.setattr(type(one_lm.model), "forward", mixed)
    with pytest.raises(ModelError, match=r"other texts in the batch \(\S+ nats\);"):
        examine(one_lm.model, "mixed")


def test_nan_is_refused(one_lm, monkeypatch):
    forward = type(one_lm.model).forward

    def broken(self, **arguments):
        out = forward(self, **arguments)
        out.logits = out.logits * torch.nan
        return out

    monkeypatch.setattr(type(one_lm.model), "forward", broken)
    with pytest.raises(ModelError, match="NaN"):
        examine(one_lm.model, "broken")


def longrope(switch: int) -> LanguageModel:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": switch, **factors}
    return tiny("phi3", rope_parameters=rope, original_max_position_embeddings=switch)


def test_texts_on_both_sides_of_longrope_share_a_batch_rightly():
    lm = longrope(24)
    policy = Policy(lm, "{x}", Support(stop=".", max_tokens=4), "full")
    rows = [{"x": "the cat"}, {"x": "the cat sat on the dog and ran " * 5}]
    rollouts = policy.rollouts(rows, [[" a cat"], [" a cat"]])
    both = lm.log_prob("{z}", given="{x}").score_final(rollouts)
    for row, found in zip(rows, both, strict=True):
        alone = lm.log_prob("{z}", given="{x}").score_final(policy.rollouts([row], [[" a cat"]]))
        ids = [*lm.encode_start(row["x"]), *lm.encode_continuation(" a cat"), lm.token_id(".")]
        with torch.no_grad():
            log_p = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(lm.encode_start(row["x"]))
        plain = sum(log_p[i - 1, ids[i]] for i in range(start, len(ids))).item()
        assert found.item() == pytest.approx(plain, abs=1e-4)
        assert alone.item() == pytest.approx(plain, abs=1e-4)


def test_a_text_that_crosses_the_switch_of_longrope_is_refused():
    lm = longrope(24)
    policy = Policy(lm, "{x}", Support(stop=".", max_tokens=12), "full")
    with pytest.raises(PromptTooLongError, match="LongRoPE"):
        policy.sample([{"x": "the cat sat on the dog and ran "}], 2)


def test_a_text_whose_keys_an_index_must_pick_is_refused():
    """Ties among the scores of the index break by padding: plain passes of one text and of a padded batch differ."""
    sizes = {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    }
    lm = tiny(
        "glm_moe_dsa",
        index_topk=16,
        index_n_heads=2,
        index_head_dim=16,
        num_key_value_heads=4,
        **sizes,
        **experts,
    )
    row = {"x": "the cat sat on the dog"}
    sampled, _ = Policy(lm, "{x}", Support(stop=".", max_tokens=4), "full").sample([row], 2)
    assert torch.isfinite(lm.log_prob("{z}", given="{x}").score_final(sampled)).all()
    with pytest.raises(PromptTooLongError, match="beyond 16 an index of glm_moe_dsa picks"):
        Policy(lm, "{x}", Support(stop=".", max_tokens=12), "full").sample([row], 2)


def test_an_index_over_compressed_keys_counts_them_in_tokens():
    config = CONFIG_MAPPING["deepseek_v4"](index_topk=8, compress_rates={"compressed_sparse_attention": 4})
    assert index_limit(config) == 32
    assert index_limit(CONFIG_MAPPING["llama"]()) is None


def test_the_doctor_looks_at_p_and_q(one_lm):
    findings = examine_policy(one_lm)
    assert [f.error for f in findings] == [0.0, 0.0]


def test_without_the_check_a_model_is_taken_for_one_of_full_attention(one_lm):
    lm = LanguageModel(one_lm.model, one_lm.tokenizer, self_check=False)
    assert lm.sharing.packed
    assert "exactness" not in vars(lm)


def test_the_doctor_on_the_command_line(capsys, tmp_path):
    assert main(["doctor", "embedded"]) == 0
    assert "prompts are encoded once" in capsys.readouterr().out
    assert main(["doctor", "embedded", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sharing"]["packed"] is True
    lm = tiny("bert")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path)]) == 2
    assert "not a causal LM" in capsys.readouterr().err
