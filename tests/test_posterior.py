"""The trained sampler as its users see it: samples, log q, diagnosis, and folders on disk."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from reference import plain_ids, sequence_log_prob, slow_log_q, tiny_policy
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from amortlm import LanguageModel, Policy, Posterior, Support, Target, constraint
from amortlm.diagnostics.diagnose import RowDiagnosis
from amortlm.errors import CheckpointError, ConfigError, DataError
from amortlm.lab.tasks.numbers import is_valid
from amortlm.targets.base import Scoring

ROW = {"x": "the dog", "y": " ran"}
ROWS = [ROW, {"x": "a", "y": " a cat"}]
PROMPT = "{y}{x}"
SUPPORT = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=(" a", " cat", " dog", "s"))


def no_dog(text: str) -> bool:
    return "dog" not in text


def make(
    lm: LanguageModel, support: Support = SUPPORT, adapter: str | None = None, extra: Target | None = None
) -> Posterior:
    """A posterior whose policy is far from its target."""
    target = lm.log_prob("{z}{y}", given="{x}") / 0.9
    return Posterior(tiny_policy(lm, PROMPT, support, adapter), target + extra if extra else target)


@pytest.fixture
def posterior(one_lm: LanguageModel) -> Posterior:
    return make(one_lm)


def log_q_by_loop(posterior: Posterior, z: list[int]) -> float:
    prompt = posterior.policy.encode_rows([ROW])[0]
    log_pf, log_pterm = slow_log_q(posterior.policy, prompt, z)
    return sum(log_pf) + log_pterm[-1]


def log_r_by_loop(lm: LanguageModel, z: list[int]) -> float:
    given, after = lm.encode_start(ROW["x"]), plain_ids(lm, ROW["y"])
    return sequence_log_prob(lm.model, [*given, *z, lm.token_id("."), *after], len(given)) / 0.9


# Samples


def test_samples_carry_their_text_tokens_and_logs(posterior: Posterior) -> None:
    lm = posterior.lm
    samples = posterior.sample(ROW, 12)
    assert len(samples) == 12
    assert len({s.text for s in samples}) > 3
    for s in samples:
        assert 1 <= len(s.tokens) <= 3
        assert s.text == lm.decode(s.tokens) + "."
        assert s.log_q == pytest.approx(log_q_by_loop(posterior, s.tokens), abs=1e-4)
        assert s.log_reward == pytest.approx(log_r_by_loop(lm, s.tokens), abs=1e-4)


def test_weights_are_self_normalised(posterior: Posterior) -> None:
    samples = posterior.sample(ROW, 300)  # more than one batch
    assert len(samples) == 300
    weights = torch.tensor([s.weight for s in samples], dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(1.0)
    log_w = torch.tensor([s.log_reward - s.log_q for s in samples], dtype=torch.float64)
    torch.testing.assert_close(weights, log_w.softmax(0), atol=1e-6, rtol=1e-4)
    assert weights.max() > 2 * weights.min()


def test_batches_of_one_call_are_not_copies_of_each_other(
    posterior: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amortlm.inference.correct.BATCH", 8)
    tokens = [s.tokens for s in posterior.sample(ROW, 20)]
    assert len(tokens) == 20
    assert tokens[:8] != tokens[8:16]


def test_the_same_seed_gives_the_same_samples(posterior: Posterior) -> None:
    torch.manual_seed(1)
    first = posterior.sample(ROW, 8, seed=3)
    torch.manual_seed(2)
    assert posterior.sample(ROW, 8, seed=3) == first
    assert posterior.sample(ROW, 8, seed=4) != first
    assert posterior.sample(ROWS[1], 8, seed=3) != first


@pytest.mark.parametrize("adapter", [None, "full"])
def test_the_prior_is_the_sampler_before_training(one_lm: LanguageModel, adapter: str | None) -> None:
    trained = make(one_lm, adapter=adapter)
    untrained = Posterior(Policy(one_lm, PROMPT, SUPPORT), trained.target)
    prior, first = trained.sample_prior(ROW, 300, seed=5), untrained.sample(ROW, 300, seed=5)
    assert list(prior) == list(first)
    assert prior.summary() == first.summary()
    assert list(prior) != list(trained.sample(ROW, 300, seed=5))  # the control
    with pytest.raises(DataError, match="y"):
        trained.sample_prior({"x": "a"})
    with pytest.raises(ConfigError, match="at least 1"):
        trained.sample_prior(ROW, 0)


def test_without_a_target_there_is_no_weight(one_lm: LanguageModel) -> None:
    posterior = Posterior(tiny_policy(one_lm, PROMPT, SUPPORT), None)
    sample = posterior.sample({"x": "a", "y": ""})[0]
    assert sample.log_reward is None
    assert sample.weight is None
    assert sample.log_q < 0
    with pytest.raises(
        ConfigError,
        match="has no target, .* pass target= to Posterior or from_pretrained. .* give --trust MODULE",
    ):
        posterior.estimate(ROW)


def test_samples_become_json(posterior: Posterior) -> None:
    sample = posterior.sample(ROW)[0]
    data = json.loads(json.dumps(sample.to_dict()))
    assert data == {
        "text": sample.text, "tokens": sample.tokens, "log_q": sample.log_q,
        "log_reward": sample.log_reward, "weight": 1.0, "statements": None,
    }  # fmt: skip


@pytest.mark.parametrize("n", [0, -1])
def test_no_samples_cannot_be_drawn(posterior: Posterior, n: int) -> None:
    with pytest.raises(ConfigError, match="n must be at least 1"):
        posterior.sample(ROW, n)


# A row or rows


def test_rows_give_a_list_and_a_row_its_result_alone(posterior: Posterior) -> None:
    calls: list[Callable[[Any], Any]] = [
        lambda rows: posterior.sample(rows, 3, seed=1),
        lambda rows: posterior.sample(rows, 3, correct="sir", budget=8, seed=1),
        lambda rows: posterior.estimate(rows, 30, seed=1),
    ]
    for call in calls:
        alone, together = [call(row) for row in ROWS], call(ROWS)
        assert isinstance(together, list)
        assert str(together) == str(alone), "NaN is not equal to itself"
        assert str(call(ROWS[:1])) == str(alone[:1]), "a list of one row gives a list"
    alone, together = (
        [posterior.diagnose(row, 20, seed=1) for row in ROWS],
        posterior.diagnose(ROWS, 20, seed=1),
    )
    assert str(together.rows) == str(alone)
    assert len(posterior.diagnose(ROWS[:1], 20).rows) == 1


def test_estimates_share_one_default(posterior: Posterior) -> None:
    defaults = {
        name: signature(getattr(Posterior, name)).parameters["n"].default
        for name in ("estimate", "diagnose", "predict", "vote")
    }
    assert set(defaults.values()) == {256}
    assert posterior.estimate(ROW).n == 256


# log q of given completions


def test_log_prob_of_samples_is_their_log_q(posterior: Posterior) -> None:
    samples = posterior.sample(ROW, 10)
    log_q = torch.tensor([s.log_q for s in samples])
    for completions in ([s.tokens for s in samples], [s.text for s in samples]):
        torch.testing.assert_close(posterior.log_prob(ROW, completions), log_q, atol=1e-4, rtol=0)


def test_log_prob_reads_texts_and_tokens_with_and_without_stop(posterior: Posterior) -> None:
    lm = posterior.lm
    tokens = [lm.token_id(" cat"), lm.token_id("s")]
    same = [" cats", " cats.", tokens, [*tokens, lm.token_id(".")]]
    log_q = posterior.log_prob(ROW, [*same, " dog"])
    assert log_q.shape == (5,)
    torch.testing.assert_close(
        log_q[:4], torch.full((4,), log_q_by_loop(posterior, tokens)), atol=1e-4, rtol=0
    )
    assert abs(log_q[4] - log_q[0]) > 1e-3
    assert not log_q.requires_grad


def test_log_prob_adds_up_the_stop_symbols(one_lm: LanguageModel) -> None:
    posterior = make(one_lm, Support(stop=(".", "!"), max_tokens=2, allowed_tokens=(" a", " cat")))
    log_q = posterior.log_prob(ROW, [" cat", " cat.", " cat!"])
    assert log_q[0] == log_q[1] == log_q[2]
    sample = next(s for s in posterior.sample(ROW, 50) if s.text.endswith("!"))
    assert sample.log_q == pytest.approx(posterior.log_prob(ROW, [sample.text]).item(), abs=1e-4)


@pytest.mark.parametrize(
    "completion", ["", ".", " cat cat cat cat", " the", " cat. a.", [2, 3], [10**6], [-1]]
)
def test_completions_outside_the_support_are_refused(
    posterior: Posterior, completion: str | list[int]
) -> None:
    with pytest.raises(DataError, match="is outside the support: .* 1 to 3 are allowed"):
        posterior.log_prob(ROW, [" cat", completion])


def test_no_completions_have_no_log_probs(posterior: Posterior) -> None:
    assert posterior.log_prob(ROW, []).shape == (0,)


def test_one_text_is_not_a_list_of_letters(posterior: Posterior) -> None:
    with pytest.raises(DataError, match="takes a list of completions"):
        posterior.log_prob(ROW, "s")


def test_rows_need_the_columns_of_prompt_and_target(posterior: Posterior) -> None:
    for bad in ({"x": "a"}, {"y": "a", "X": "a"}):
        for call in (posterior.sample, posterior.estimate, posterior.diagnose):
            with pytest.raises(DataError, match="row 0 has no column '[xy]', which a template uses"):
                call(bad)
        with pytest.raises(DataError, match="has no column"):
            posterior.log_prob(bad, [" cat"])
    with pytest.raises(DataError, match="row 1 has no column 'y'"):
        posterior.diagnose([ROW, {"x": "a"}])
    with pytest.raises(DataError, match="rows is empty: give at least one row"):
        posterior.diagnose([])


def test_only_the_target_needs_its_own_columns(one_lm: LanguageModel) -> None:
    target = one_lm.log_prob("{z}{y}")
    policy = tiny_policy(one_lm, "{x}", SUPPORT)
    assert Posterior(policy, None).sample({"x": "a"})
    with pytest.raises(DataError, match="'y'"):
        Posterior(policy, target).sample({"x": "a"})


# Diagnosis


def test_diagnosis_agrees_with_a_direct_enumeration(posterior: Posterior) -> None:
    lm = posterior.lm
    ids = [lm.token_id(t) for t in SUPPORT.allowed_tokens or ()]
    strings = [[a] for a in ids] + [[a, b] for a in ids for b in ids]
    strings += [[a, b, c] for a in ids for b in ids for c in ids]
    log_q = torch.tensor([log_q_by_loop(posterior, z) for z in strings]).double()
    log_r = torch.tensor([log_r_by_loop(lm, z) for z in strings]).double()
    log_z = log_r.logsumexp(0)
    log_p, q = log_r - log_z, log_q.exp()
    kl_qp = (q * (log_q - log_p)).sum().item()

    diagnosis = posterior.diagnose(ROWS, n=2000)
    assert len(diagnosis.rows) == 2
    found = diagnosis.rows[0]
    assert found.distance is not None
    assert found.exact_log_z == pytest.approx(log_z.item(), abs=1e-4)
    assert found.distance.total_variation == pytest.approx(
        0.5 * (q - log_p.exp()).abs().sum().item(), abs=1e-4
    )
    assert found.distance.kl_qp == pytest.approx(kl_qp, abs=1e-4)
    assert found.distance.kl_pq == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), abs=1e-4)
    assert found.distance.kl_qp > 0.05, "the two distributions differ, or the test says nothing"

    # Estimates of the same figures from 2000 samples, within six standard errors.
    log_w = log_r - log_q
    spread = ((q * log_w**2).sum() - (q * log_w).sum() ** 2).sqrt().item()
    assert found.importance.elbo == pytest.approx(log_z.item() - kl_qp, abs=6 * spread / math.sqrt(2000))
    w = (log_w - log_z).exp()  # relative to Z: its mean is 1
    error = ((q * w**2).sum() - 1).sqrt().item() / math.sqrt(2000)
    assert found.importance.log_z == pytest.approx(log_z.item(), abs=6 * error)
    assert found.importance.n == 2000
    assert found.importance.valid == 1.0
    assert 0 < found.diversity.distinct < 1
    assert diagnosis.mean("elbo") == pytest.approx(sum(row.importance.elbo for row in diagnosis.rows) / 2)


def test_one_row_may_stand_alone_and_large_supports_are_not_enumerated(posterior: Posterior) -> None:
    alone = posterior.diagnose(ROW, n=50, limit=83)
    assert isinstance(alone, RowDiagnosis)
    assert alone.distance is None, "4 + 16 + 64 completions"
    assert alone.exact_log_z is None
    assert posterior.diagnose(ROW, n=50, limit=84).distance is not None
    with pytest.raises(DataError, match="not every row has the figure 'total_variation'"):
        posterior.diagnose([ROW], n=50, limit=83).mean("total_variation")


def test_a_hard_constraint_shows_in_the_diagnosis(one_lm: LanguageModel) -> None:
    found = make(one_lm, extra=constraint.predicate(no_dog)).diagnose(ROW, n=200)
    assert 0 < found.importance.valid < 1
    assert found.importance.elbo == -math.inf
    assert found.distance is not None
    assert found.distance.kl_qp == math.inf
    assert 0 < found.distance.kl_pq < math.inf


# On disk


def test_plain_peft_reads_the_folder(family_lm: LanguageModel, tmp_path: Path) -> None:
    posterior = make(family_lm)
    posterior.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 14, 15, 9, 26]])
    loaded = PeftModel.from_pretrained(copy.deepcopy(family_lm.model), str(tmp_path)).eval()
    with torch.no_grad():
        logits = posterior.policy.model.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, logits)
        assert (logits - family_lm.model(ids).logits).abs().max() > 0.1, "the adapter does something"


def test_plain_transformers_reads_a_full_model(one_lm: LanguageModel, tmp_path: Path) -> None:
    posterior = make(one_lm, adapter="full")
    posterior.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 14, 15, 9, 26]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, posterior.policy.model(ids).logits)
        assert (loaded(ids).logits - one_lm.model(ids).logits).abs().max() > 0.01
    assert LanguageModel.from_pretrained(tmp_path).encode_start("a dog") == one_lm.encode_start("a dog")


@pytest.mark.parametrize("adapter", [None, "full"])
def test_a_loaded_posterior_is_the_same(
    family_lm: LanguageModel, tmp_path: Path, adapter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    support = Support(stop=(".", "!"), min_tokens=1, max_tokens=3, banned_tokens=("a", " the"))
    posterior = make(family_lm, support, adapter, extra=constraint.predicate(no_dog, penalty=2.0))
    posterior.save_pretrained(tmp_path / "new" / "folder")
    forbid_pickle(monkeypatch)
    loaded = Posterior.from_pretrained(tmp_path / "new" / "folder", lm=family_lm, trust=[__name__])
    assert loaded.policy.is_full == (adapter == "full")
    assert loaded.policy.support_spec.to_dict() == support.to_dict()
    texts = [" cat", " dogs!", "b,."]
    torch.testing.assert_close(loaded.log_prob(ROW, texts), posterior.log_prob(ROW, texts))
    before, after = posterior.sample(ROW, 6), loaded.sample(ROW, 6)
    assert [s.text for s in after] == [s.text for s in before]
    assert [s.log_reward for s in after] == pytest.approx([s.log_reward for s in before], abs=1e-4)
    assert posterior.target is not None
    assert loaded.target is not None
    assert loaded.target.to_spec() == posterior.target.to_spec()


def forbid_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something is unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("adapter", [None, "full"])
def test_the_folder_holds_safetensors_and_text_only(
    one_lm: LanguageModel, tmp_path: Path, adapter: str | None
) -> None:
    make(one_lm, adapter=adapter).save_pretrained(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md", ".jinja"}
    assert (tmp_path / "posterior.json") in files
    assert any(p.suffix == ".safetensors" for p in files)


def test_a_predicate_with_an_import_path_survives(one_lm: LanguageModel, tmp_path: Path) -> None:
    posterior = make(one_lm, extra=constraint.predicate(no_dog))
    posterior.save_pretrained(tmp_path)
    terms = json.loads((tmp_path / "posterior.json").read_text())["target"]
    assert terms[1] == {"predicate": f"{__name__}:no_dog", "weight": 1.0}
    loaded = Posterior.from_pretrained(tmp_path, lm=one_lm, trust=[__name__])
    samples = loaded.sample(ROW, 40)
    assert {math.isfinite(s.log_reward) for s in samples} == {True, False}
    assert all(math.isfinite(s.log_reward) == no_dog(s.text) for s in samples)


# posterior.json as commit 94b16de wrote it.
OLD = """{"format": 1, "model": "embedded", "weights": "adapter", "prompt": "{x}", "support": {"stop": [".", "!"],
"min_tokens": 1, "max_tokens": 3, "allowed_tokens": null, "banned_tokens": ["a"], "tool": null}, "target": [{"log_prob":
{"of": "{z}", "given": "{x}"}, "weight": 1.25}, {"predicate": "amortlm.tasks.numbers:is_valid", "weight": 1.25}]}"""


def test_a_posterior_of_an_earlier_version_loads(one_lm: LanguageModel, tmp_path: Path) -> None:
    support = Support(stop=(".", "!"), min_tokens=1, max_tokens=3, banned_tokens=("a",))
    policy = tiny_policy(one_lm, "{x}", support)
    policy.save_adapter(tmp_path)
    (tmp_path / "posterior.json").write_text(OLD)
    loaded = Posterior.from_pretrained(tmp_path, lm=one_lm)
    target = (one_lm.log_prob("{z}", given="{x}") + constraint.predicate(is_valid)) / 0.8
    assert loaded.target is not None
    assert loaded.target.to_spec() == target.to_spec()
    assert loaded.policy.support_spec.to_dict() == support.to_dict()
    assert loaded.sample(ROW, 8) == Posterior(policy, target).sample(ROW, 8)


class Mine(Target):
    """All that a target has to be."""

    def score_batch(self, scoring: Scoring) -> Tensor:
        return torch.zeros(scoring.rollouts.stop_mask.shape)


def test_a_target_is_its_score_and_no_more(one_lm: LanguageModel, tmp_path: Path) -> None:
    posterior = Posterior(tiny_policy(one_lm, PROMPT, SUPPORT), Mine())
    assert {s.log_reward for s in posterior.sample(ROW, 4)} == {0.0}
    assert repr(Mine()) == "Mine", "no address: a run is known by its target in other processes, too"
    with pytest.raises(
        ConfigError, match="Mine cannot be saved by name: .* pass target= to Posterior.from_pretrained"
    ):
        Mine().to_spec()
    posterior.save_pretrained(tmp_path)
    assert (
        "Mine cannot be saved by name"
        in json.loads((tmp_path / "posterior.json").read_text())["target_not_saved"]
    )
    assert Posterior.from_pretrained(tmp_path, lm=one_lm, target=Mine()).sample(ROW, 4) == posterior.sample(
        ROW, 4
    )


def test_a_lambda_is_left_out_and_given_again(one_lm: LanguageModel, tmp_path: Path) -> None:
    only = constraint.predicate(lambda text: "cat" in text)
    posterior = make(one_lm, extra=only)
    posterior.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "posterior.json").read_text())
    assert saved["target"] is None
    assert "cannot be saved by name" in saved["target_not_saved"]
    bare = Posterior.from_pretrained(tmp_path, lm=one_lm)
    assert bare.target is None
    assert bare.sample(ROW)[0].text == posterior.sample(ROW)[0].text
    with pytest.raises(ConfigError, match="pass target= to Posterior or from_pretrained"):
        bare.diagnose(ROW)
    again = Posterior.from_pretrained(tmp_path, lm=one_lm, target=only)
    samples = again.sample(ROW, 20)
    assert {s.log_reward for s in samples} == {0.0, -math.inf}, "a target without a model is bound on loading"


def test_a_given_target_replaces_the_saved_one(one_lm: LanguageModel, tmp_path: Path) -> None:
    make(one_lm).save_pretrained(tmp_path)
    other = constraint.length(1, penalty=3.0) + constraint.length(9, penalty=4.0)
    loaded = Posterior.from_pretrained(tmp_path, lm=one_lm, target=other)
    assert {s.log_reward for s in loaded.sample(ROW, 5)} == {-4.0}


def test_the_model_is_found_by_the_name_in_the_folder(one_lm: LanguageModel, tmp_path: Path) -> None:
    base = tmp_path / "base"
    one_lm.model.save_pretrained(base)
    one_lm.tokenizer.save_pretrained(base)
    posterior = make(LanguageModel.from_pretrained(base, device="cpu"))
    posterior.save_pretrained(tmp_path / "run")
    loaded = Posterior.from_pretrained(tmp_path / "run")
    assert loaded.lm.name == str(base)
    torch.testing.assert_close(loaded.log_prob(ROW, [" cat"]), posterior.log_prob(ROW, [" cat"]))


@pytest.mark.parametrize("share", [None, 0.0, 0.4, 0.95])
def test_a_damaged_posterior_json_is_refused(
    posterior: Posterior, tmp_path: Path, share: float | None
) -> None:
    posterior.save_pretrained(tmp_path)
    file = tmp_path / "posterior.json"
    text = file.read_text()
    file.unlink()
    if share is not None:
        file.write_text(text[: int(len(text) * share)])
    with pytest.raises(
        CheckpointError, match=r"posterior\.json is missing or damaged .*not a complete saved"
    ):
        Posterior.from_pretrained(tmp_path, lm=posterior.lm)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": None},
        {"support": None},
        {"support": {"stop": ".", "longest": 3}},
        {"weights": None},
        {"target": None},
    ],
)
def test_a_posterior_json_with_missing_parts_is_refused(
    posterior: Posterior, tmp_path: Path, change: dict
) -> None:
    posterior.save_pretrained(tmp_path)
    file = tmp_path / "posterior.json"
    spec = json.loads(file.read_text())
    for key, value in change.items():
        del spec[key]
        if value is not None:
            spec[key] = value
    file.write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match=r"posterior\.json is missing or damaged"):
        Posterior.from_pretrained(tmp_path, lm=posterior.lm)


def test_a_folder_of_another_format_is_refused(posterior: Posterior, tmp_path: Path) -> None:
    posterior.save_pretrained(tmp_path)
    file = tmp_path / "posterior.json"
    spec = json.loads(file.read_text())
    assert spec["format"] == 1
    file.write_text(json.dumps({**spec, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2"):
        Posterior.from_pretrained(tmp_path, lm=posterior.lm)


@pytest.mark.parametrize("adapter", [None, "full"])
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.99])
def test_weights_that_were_cut_short_are_refused(
    one_lm: LanguageModel, tmp_path: Path, adapter: str | None, share: float | None
) -> None:
    make(one_lm, adapter=adapter).save_pretrained(tmp_path)
    file = tmp_path / ("model.safetensors" if adapter else "adapter_model.safetensors")
    content = file.read_bytes()
    file.unlink()
    if share is not None:
        file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="the save (is incomplete|was cut short)"):
        Posterior.from_pretrained(tmp_path, lm=one_lm)


def test_a_full_model_without_one_of_its_weights_is_refused(family_lm: LanguageModel, tmp_path: Path) -> None:
    make(family_lm, adapter="full").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[next(name for name in weights if "layers.1" in name or "h.1" in name)]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing"):
        Posterior.from_pretrained(tmp_path, lm=family_lm)


def test_an_adapter_of_another_model_is_refused(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    make(models["gpt2-tied"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the adapter belongs to another model"):
        Posterior.from_pretrained(tmp_path, lm=models["llama-untied"])


def test_weights_are_zero_where_no_sample_is_possible(one_lm: LanguageModel) -> None:
    target = one_lm.log_prob("{z}", given="{x}") + constraint.length(99)
    posterior = Posterior(Policy(one_lm, "{x}", Support(stop=".", max_tokens=3)), target)
    assert [s.weight for s in posterior.sample({"x": "a"}, 4)] == [0.0] * 4
