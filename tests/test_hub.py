"""Posteriors on the hub, against a stand-in of its HTTP interface: what goes up, what comes down, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import TOKEN, FakeHub, Repository, fake_hub
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from reference import tiny_lm, tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM

from amortlm import LanguageModel, Posterior, Support, constraint
from amortlm.cli import main
from amortlm.diagnostics import certificate
from amortlm.errors import AmortLMError, CheckpointError, ConfigError, HubError
from amortlm.hub import push
from amortlm.saved import hub_id

ROW = {"x": "the dog", "y": " ran"}
SUPPORT = Support(stop=".", min_tokens=1, max_tokens=3, allowed_tokens=(" a", " cat", " dog", "s"))
TEXTS = [" a", " cats", " dog a"]


def no_dog(text: str) -> bool:
    return "dog" not in text


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A model with a name on the hub."""
    lm = tiny_lm("llama", tiny_tokenizer(add_bos=True), tied=False)
    lm.name = "maker/tiny"
    return lm


@pytest.fixture
def posterior(lm: LanguageModel) -> Posterior:
    return Posterior(tiny_policy(lm, "{y}{x}", SUPPORT), lm.log_prob("{z}{y}", given="{x}") / 0.9)


@pytest.mark.parametrize("adapter", [None, "full"])
def test_a_posterior_comes_back_the_same_to_the_bit(
    hub: FakeHub, lm: LanguageModel, adapter: str | None
) -> None:
    posterior = Posterior(
        tiny_policy(lm, "{y}{x}", SUPPORT, adapter), lm.log_prob("{z}{y}", given="{x}") / 0.9
    )
    url = posterior.push_to_hub("user/sampler", token=TOKEN, rows=ROW, commit_message="the first")
    assert url == f"{hub.url}/user/sampler"
    again = Posterior.from_pretrained("user/sampler", lm=lm)
    assert torch.equal(again.log_prob(ROW, TEXTS), posterior.log_prob(ROW, TEXTS))
    assert again.sample(ROW, 5)[:] == posterior.sample(ROW, 5)[:]


def test_what_goes_up_is_named(hub: FakeHub, posterior: Posterior) -> None:
    posterior.push_to_hub("user/sampler", token=TOKEN, private=True)
    assert set(hub.files("user/sampler")) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "posterior.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert hub.repositories["user/sampler"].private
    assert any(path.startswith("/lfs/") for method, path in hub.requests if method == "PUT")
    card = hub.files("user/sampler")["README.md"].decode()
    assert 'from_pretrained("user/sampler")' in card
    assert "user/name" not in card


def test_a_private_repository_needs_a_token(hub: FakeHub, lm: LanguageModel, posterior: Posterior) -> None:
    posterior.push_to_hub("user/sampler", token=TOKEN, private=True)
    with pytest.raises(HubError, match=r"shows no repository user/sampler to you \(401\)"):
        Posterior.from_pretrained("user/sampler", lm=lm)
    loaded = Posterior.from_pretrained("user/sampler", lm=lm, token=TOKEN)
    assert torch.equal(loaded.log_prob(ROW, TEXTS), posterior.log_prob(ROW, TEXTS))


def test_a_revision_is_that_commit(hub: FakeHub, lm: LanguageModel, posterior: Posterior) -> None:
    posterior.push_to_hub("user/sampler", token=TOKEN)
    first = posterior.log_prob(ROW, TEXTS)
    with torch.no_grad():
        for name, p in posterior.policy.named_parameters():
            if "lora_B" in name:
                p.add_(0.5)
    posterior.push_to_hub("user/sampler", token=TOKEN)
    sha = hub.repositories["user/sampler"].commits[0][0]
    assert torch.equal(
        Posterior.from_pretrained("user/sampler", lm=lm, revision=sha).log_prob(ROW, TEXTS), first
    )
    assert not torch.equal(Posterior.from_pretrained("user/sampler", lm=lm).log_prob(ROW, TEXTS), first)
    with pytest.raises(HubError, match="no revision 'v9'"):
        Posterior.from_pretrained("user/sampler", lm=lm, revision="v9")


def test_plain_peft_loads_the_download(
    hub: FakeHub, lm: LanguageModel, posterior: Posterior, tmp_path: Path
) -> None:
    lm.model.save_pretrained(tmp_path / "base")
    posterior.push_to_hub("user/sampler", token=TOKEN)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "user/sampler")
    ids = torch.tensor([[3, 14, 15, 9, 26]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, posterior.policy.model(ids).logits)
        assert (model(ids).logits - lm.model(ids).logits).abs().max() > 0.1, "the adapter does something"


def test_only_files_of_a_posterior_come_down(
    hub: FakeHub, lm: LanguageModel, posterior: Posterior, tmp_path: Path
) -> None:
    posterior.push_to_hub("user/sampler", token=TOKEN)
    hostile = (
        "adapter_model.bin",
        "model.pt",
        "modeling.py",
        "training_args.bin",
        "data.pkl",
        "sub/posterior.py",
    )
    hub.repositories["user/sampler"].commit(dict.fromkeys(hostile, b"hostile"))
    Posterior.from_pretrained("user/sampler", lm=lm)
    down = {p.name for p in (tmp_path / "cache").rglob("*")}
    assert "posterior.json" in down
    assert not down & {Path(name).name for name in hostile}


def test_a_local_folder_comes_first(
    hub: FakeHub, lm: LanguageModel, posterior: Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    posterior.save_pretrained("user/sampler")
    assert torch.equal(
        Posterior.from_pretrained("user/sampler", lm=lm).log_prob(ROW, TEXTS), posterior.log_prob(ROW, TEXTS)
    )
    assert hub.requests == []
    with pytest.raises(ConfigError, match="is a folder here, and has no revision 'main'"):
        Posterior.from_pretrained("user/sampler", lm=lm, revision="main")


def test_another_repository_is_no_posterior(hub: FakeHub, lm: LanguageModel) -> None:
    hub.repositories["maker/tiny"] = Repository()
    hub.repositories["maker/tiny"].commit({"config.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"maker/tiny on the hub has no posterior\.json"):
        Posterior.from_pretrained("maker/tiny", lm=lm)


# The base model


def test_a_model_of_this_machine_is_refused(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = tiny_lm("llama", tiny_tokenizer(add_bos=True), tied=False)
    lm.model.save_pretrained(tmp_path / "secret" / "base")
    lm.tokenizer.save_pretrained(tmp_path / "secret" / "base")
    lm = LanguageModel.from_pretrained(tmp_path / "secret" / "base", device="cpu")
    posterior = Posterior(tiny_policy(lm, "{x}", SUPPORT), lm.log_prob("{z}", given="{x}"))
    with pytest.raises(ConfigError, match="is on this machine only.*allow_local_model=True"):
        posterior.push_to_hub("user/sampler", token=TOKEN)
    assert hub.repositories == {}
    posterior.push_to_hub("user/sampler", token=TOKEN, allow_local_model=True)
    for name, content in hub.files("user/sampler").items():
        assert b"secret" not in content, name
    config = json.loads(hub.files("user/sampler")["adapter_config.json"])
    assert config["base_model_name_or_path"] is None, "not the name of some other model on the hub"
    with pytest.raises(ConfigError, match="its model had no name"):
        Posterior.from_pretrained("user/sampler")
    loaded = Posterior.from_pretrained("user/sampler", lm=lm)
    assert torch.equal(loaded.log_prob(ROW, TEXTS), posterior.log_prob(ROW, TEXTS))


def test_the_licence_is_that_of_the_base_model(hub: FakeHub, posterior: Posterior) -> None:
    posterior.push_to_hub("user/unknown", token=TOKEN)
    assert "license" not in ModelCard(hub.files("user/unknown")["README.md"].decode()).data.to_dict()
    hub.repositories["maker/tiny"] = Repository()
    hub.repositories["maker/tiny"].commit({"README.md": b"---\nlicense: mit\n---\nTiny."})
    posterior.push_to_hub("user/known", token=TOKEN)
    card = ModelCard(hub.files("user/known")["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.base_model == "maker/tiny"
    assert "## What it samples from" in card.text


def test_functions_that_do_not_go_up_are_named(
    hub: FakeHub, lm: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    target = lm.log_prob("{z}", given="{x}") + constraint.predicate(no_dog)
    Posterior(tiny_policy(lm, "{x}", SUPPORT), target).push_to_hub("user/named", token=TOKEN)
    assert f"calls {__name__}:no_dog, and no code is uploaded" in caplog.text
    caplog.clear()
    target = lm.log_prob("{z}", given="{x}") + constraint.predicate(lambda text: True)
    Posterior(tiny_policy(lm, "{x}", SUPPORT), target).push_to_hub("user/nameless", token=TOKEN)
    assert "the target is not saved, so samples have no weights" in caplog.text
    caplog.clear()
    Posterior(tiny_policy(lm, "{x}", SUPPORT), lm.log_prob("{z}", given="{x}")).push_to_hub(
        "user/whole", token=TOKEN
    )
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", "gpt2"), ("maker/tiny", "maker/tiny"), ("maker/tiny/file.gguf", "maker/tiny"), ("embedded", None),
        ("/srv/models/model", None), ("~/model", None), ("~nobody/model", None), ("../model", None), ("a/b/c", None),
        ("model.gguf", None), ("here", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_names_of_the_hub(
    name: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_id(name) == expected


# What does not work says why


def test_offline(hub: FakeHub, posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for act in (
        lambda: Posterior.from_pretrained("user/sampler"),
        lambda: posterior.push_to_hub("user/sampler"),
    ):
        assert_one_sentence(act, HubError, "because HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_offline_after_a_download(
    hub: FakeHub, lm: LanguageModel, posterior: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior.push_to_hub("user/sampler", token=TOKEN)
    Posterior.from_pretrained("user/sampler", lm=lm)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = Posterior.from_pretrained("user/sampler", lm=lm)
    assert torch.equal(loaded.log_prob(ROW, TEXTS), posterior.log_prob(ROW, TEXTS))


def test_no_network(hub: FakeHub, posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    for act in (
        lambda: Posterior.from_pretrained("user/sampler"),
        lambda: posterior.push_to_hub("user/sampler"),
    ):
        assert_one_sentence(act, HubError, "the hub cannot be reached for user/sampler (ConnectError)")


def test_refusals(hub: FakeHub, posterior: Posterior) -> None:
    hub.repositories["user/sampler"] = Repository(private=True)
    load = Posterior.from_pretrained
    assert_one_sentence(
        lambda: load("user/none"), HubError, "user/none is no folder here, and the hub shows no repository"
    )
    assert_one_sentence(lambda: load("user/none", token=TOKEN), HubError, "to you (404)")
    assert_one_sentence(
        lambda: load("user/sampler", token="wrong"), HubError, "refuses this for user/sampler (401)"
    )
    assert_one_sentence(lambda: posterior.push_to_hub("user/mine"), HubError, "(401)")
    for token in (None, "wrong"):
        assert_one_sentence(
            lambda token=token: posterior.push_to_hub("user/mine", token=token),
            HubError,
            "; or share a folder: what",
        )
    with pytest.raises(HubError) as caught:
        load("user/none")
    assert "share a folder" not in str(caught.value)
    assert_one_sentence(lambda: posterior.push_to_hub("a name", token=TOKEN), ConfigError, "write user/name")


def assert_one_sentence(act: object, kind: type[AmortLMError], text: str) -> None:
    assert callable(act)
    with pytest.raises(kind) as caught:
        act()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


# The command line


def test_push_and_sample(
    hub: FakeHub,
    embedded: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    support = Support(stop=".", max_tokens=2, allowed_tokens=(" 1", " 2"))
    folder = tmp_path / "run"
    Posterior(tiny_policy(embedded, "{x}", support), embedded.log_prob("{z}", given="{x}")).save_pretrained(
        folder
    )
    for name in ("rows.jsonl", "run.json", "training_args.json", "code.py", "optimizer.pt"):
        (folder / name).write_text("stays here")
    assert main(["push", str(folder), "user/numbers", "--private"]) == 0
    assert f"{hub.url}/user/numbers" in capfd.readouterr().out
    assert hub.repositories["user/numbers"].private
    assert not any(b"stays here" in content for content in hub.files("user/numbers").values())
    assert main(["sample", "user/numbers", "--column", "x=one", "-n", "2", "--json"]) == 0
    theirs = capfd.readouterr().out
    assert main(["sample", str(folder), "--column", "x=one", "-n", "2", "--json"]) == 0
    assert theirs == capfd.readouterr().out
    assert len(theirs.splitlines()) == 2
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(folder), "user/other"]) == 2
    assert "log in (hf auth login)" in capfd.readouterr().err


def test_a_certificate_can_be_checked_by_others(
    hub: FakeHub, embedded: LanguageModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    support, row = Support(stop=".", max_tokens=2, allowed_tokens=(" 1", " 2")), {"x": "one"}
    target = embedded.log_prob("{z}", given="{x}")
    posterior = Posterior(tiny_policy(embedded, "{x}", support), target)
    posterior.save_pretrained(tmp_path)
    found = posterior.diagnose([row], 64)
    about: dict[str, Any] = {"mark": 50.0, "level": 0.99, "step": 1, "n": 64, "seed": 0}
    certificate.issue(posterior.policy, target, found, tmp_path, **about, rows=[row], gold=[[]], data=[row])
    push(str(tmp_path), "user/numbers", token=TOKEN)
    assert main(["evaluate", "user/numbers", "--check"]) == 0
    assert "certificate holds" in capfd.readouterr().out
    assert main(["evaluate", "user/numbers", "--card"]) == 2
    assert "--card writes into a folder" in capfd.readouterr().err


def test_the_trainer_names_the_way() -> None:
    from amortlm import GFNConfig

    with pytest.raises(ConfigError, match=r"posterior\.push_to_hub"):
        GFNConfig(push_to_hub=True)
