"""The mix of behaviours, and what becomes of the settings and keywords of earlier versions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from trainers import ROWS, make_trainer

from amortlm import EM, GFNConfig, LanguageModel, Support
from amortlm.errors import ConfigError
from amortlm.train.behaviour import DEFAULT, chances, choose, full_mix
from amortlm.train.spec import RunSpec, settings_from_text


def test_a_mix_sums_to_one() -> None:
    assert GFNConfig().behaviour == full_mix(DEFAULT) == DEFAULT
    assert sum(DEFAULT.values()) == 1
    assert full_mix({"replay": "0.25"}) == DEFAULT | {"policy": 0.75, "tempered": 0}
    nothing = dict.fromkeys(DEFAULT, 0)
    assert full_mix({}) == nothing | {"policy": 1}
    assert full_mix({"replay": 1}) == nothing | {"replay": 1}
    assert full_mix({"prior": 0.2, "replay": 0.3}) == nothing | {"prior": 0.2, "replay": 0.3, "policy": 0.5}
    assert full_mix(full_mix({"corrected": 0.1, "replay": 0.2})) == full_mix(
        {"corrected": 0.1, "replay": 0.2}
    )
    GFNConfig().behaviour["replay"] = 0.5
    assert GFNConfig().behaviour == DEFAULT, "the default is nobody's to change"


def test_chances_are_those_of_the_shares() -> None:
    """Chosen one after the other, they give the shares; and the ratios of earlier versions come back to the bit."""
    assert chances(DEFAULT) == (0.0, 0.25, 0.5, 0.0)
    assert chances(full_mix({"corrected": 0.2, "replay": 0.4, "prior": 0.1})) == pytest.approx(
        (0.2, 0.5, 0, 0.25)
    )
    rng = random.Random(0)
    for _ in range(100):
        c, r, t = (rng.choice([0.0, 0.25, 0.5, 0.75, 1.0]) for _ in range(3))
        found = chances(full_mix({"corrected": c, "replay": (1 - c) * r, "tempered": (1 - c) * (1 - r) * t}))
        expected = (c, r if c < 1 else 0.0, t if c < 1 and r < 1 else 0.0, 0.0)
        assert found == expected
    assert chances(full_mix({"policy": 0.0, "tempered": 0.3, "replay": 0.3, "corrected": 0.4}))[2] <= 1


# Earlier versions

OLD = [
    ({"subtb_lambda": 0.9}, "objective={'subtb': {'lam': 0.9}}"),
    ({"subtb_states": 6, "objective": "subtb"}, "objective={'subtb': {'states': 6}}"),
    ({"log_z": "learned", "objective": "tb"}, "objective={'tb': {'log_z': 'learned'}}"),
    ({"log_z": "learned", "objective": "vargrad"}, "objective='vargrad'"),
    ({"log_z_learning_rate": 0.5}, "objective={'subtb': {'log_z_learning_rate': 0.5}}"),
    ({"replay_ratio": 0.5}, "behaviour={'replay': 0.5, 'tempered': 0.25}"),
    ({"replay_ratio": 0.0, "tempered_ratio": 0.0}, "behaviour={'policy': 1.0}"),
    ({"tempered_ratio": 0.67}, "behaviour={'replay': 0.25, 'tempered': 0.5025}"),
    ({"corrected_ratio": 0.5}, "behaviour={'corrected': 0.5, 'replay': 0.125, 'tempered': 0.1875}"),
    ({"subtb_lambda": 0.9, "replay_ratio": 0.0}, "objective={'subtb': {'lam': 0.9}} and behaviour={'tempered': 0.5}"),
    ({"replay_ratio": "half"}, "replay_ratio must be a number, got 'half'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "instead"), OLD, ids=str)
def test_settings_of_earlier_versions_say_what_to_write(given: dict[str, Any], instead: str) -> None:
    """In Python, in YAML and after --set; what they say to write is accepted."""
    spec = RunSpec("{x}", [], {"stop": "."}, [{"x": "a"}], config=given)
    for use in (
        lambda: GFNConfig(**given),
        lambda: spec.args("out"),
        lambda: settings_from_text({k: str(v) for k, v in given.items()}),
    ):
        with pytest.raises(ConfigError) as e:
            use()
        assert instead in str(e.value)
        assert all(name in str(e.value) for name in given if name != "objective")
    if "must be" not in instead:
        GFNConfig(**eval(f"dict({instead.replace(' and ', ', ')})"))


def test_keywords_of_earlier_versions_name_the_new_one(one_lm: LanguageModel, tmp_path: Path) -> None:
    for old, new in {"peft_config": "adapter", "seeds": "gold"}.items():
        with pytest.raises(ConfigError, match=f"{old} is now called {new}"):
            make_trainer(one_lm, tmp_path, extra={old: None})
        with pytest.raises(ConfigError, match=f"{old} is now called {new}"):
            EM(
                one_lm,
                target=one_lm.log_prob("{z}{y}", given="{x}"),
                prompt="{x}",
                support=Support(stop="."),
                train_dataset=ROWS,
                args=GFNConfig(),
                **{old: None},
            )


def test_an_adapter_is_a_rank_too(one_lm: LanguageModel, tmp_path: Path) -> None:
    trainer = make_trainer(one_lm, tmp_path, adapter=3)
    assert trainer.policy.model.peft_config["default"].r == 3


def test_a_behaviour_is_chosen_by_its_chance() -> None:
    """Of 4,000 choices each count is within 5 standard deviations of its share (false alarm below 1e-5). A corrected
    prompt is not replayed, and takes no random number for it."""
    mix, n = full_mix({"replay": 0.3, "tempered": 0.2, "prior": 0.1}), 4000
    found = [choose(mix, (0.5, 2.0), False, random.Random(i)) for i in range(n)]
    counts = {
        "replay": sum(choice.replay is not None for choice in found),
        "prior": sum(choice.replay is None and choice.temperature is None for choice in found),
        "tempered": sum(choice.replay is None and choice.temperature not in (None, 1.0) for choice in found),
    }
    for name, count in counts.items():
        assert abs(count - n * mix[name]) < 5 * (n * mix[name] * (1 - mix[name])) ** 0.5, name
    heats = [choice.temperature for choice in found if choice.temperature not in (None, 1.0)]
    assert min(heats) >= 0.5
    assert max(heats) <= 2.0
    for i in range(100):
        choice = choose(mix, (0.5, 2.0), True, random.Random(i))
        u = random.Random(i).random()
        assert (choice.corrected, choice.replay) == (True, None)
        assert (choice.temperature == 1.0) == (u >= chances(mix)[2] + chances(mix)[3])
