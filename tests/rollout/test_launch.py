"""Servers that are started here: by hand, by `amortlm launch`, and on a Ray cluster of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_server import program
from fake_vllm import RANK
from trainers import ROWS
from vllm_model import save_tiny_llama

from amortlm import LanguageModel, Policy, Posterior, Support
from amortlm.cli import main
from amortlm.engine.adapter import default_lora
from amortlm.errors import ConfigError, RolloutError
from amortlm.policy.laws import check_sampler
from amortlm.rollout import HTTPSampler, launch
from amortlm.rollout.launch import Program, servable, servers, servers_on_ray

WORDS = {"stop": ".", "min_tokens": 1, "max_tokens": 2, "allowed_tokens": ["a", "b", "at", " cat", " dog"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    return str(folder)


@pytest.fixture
def spec(model, tmp_path):
    """A run whose exact total variation falls from above .5 to below .1."""
    file = tmp_path / "run.yaml"
    config = {
        "max_steps": 80,
        "num_samples": 32,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "warmup_steps": 5,
        "epsilon": 0.1,
        "max_staleness": 2,  # for servers, which only the command knows
        "diagnose_steps": 0,
        "save_strategy": "no",
        "use_cpu": True,
    }
    target = [{"log_prob": {"of": "{z}{y}", "given": "{x}"}, "weight": 2.0}]
    run = {"model": model, "prompt": "{x}{y}", "target": target, "support": WORDS, "data": ROWS[:2]}
    file.write_text(yaml.safe_dump(run | {"adapter": RANK, "config": config}))
    return str(file)


def gap(folder):
    """The exact total variation, mean over the rows."""
    return Posterior.from_pretrained(folder).diagnose(ROWS[:2], 32).mean("total_variation")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("place", [[], ["--ray", "local"]], ids=["here", "ray"])
def test_launch_trains_with_two_servers(spec, tmp_path, place, monkeypatch, capfd):
    monkeypatch.delenv("AMORTLM_API_KEY", raising=False)
    output = tmp_path / "out"
    command = ["launch", spec, "--output", str(output), "--python", program(tmp_path), "--servers", "2"]
    assert main([*command, *place]) == 0
    assert gap(output) < 0.1
    said = capfd.readouterr().err
    assert said.count("http://") >= 2
    assert [port for port in ports(said) if answers(port)] == [], "the servers have ended"


@pytest.mark.slow
def test_a_full_copy_is_served_by_merged_weights(spec, tmp_path, monkeypatch, capfd):
    """Without being told; and what is told counts."""
    command = [
        "launch",
        spec,
        "--python",
        program(tmp_path),
        "--set",
        "max_steps=2",
        "--set",
        "max_staleness=0",
    ]
    text = Path(spec).read_text().replace(f"adapter: {RANK}", "adapter: full")
    Path(spec).write_text(text)
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    told = [*command, "--server-options", "--weights adapter", "--output", str(tmp_path / "other")]
    assert main(told) != 0
    assert "loads LoRA alone, not a full copy: start it with --weights merged" in capfd.readouterr().err


def ports(said):
    line = next(line for line in said.splitlines() if line.startswith("completions from"))
    return [address.removeprefix("http://").rpartition(":")[::2] for address in line.split()[2:]]


def answers(place):
    try:
        socket.create_connection((place[0], int(place[1])), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_servers_on_ray_obey_the_law_of_samplers(model, tmp_path, monkeypatch):
    monkeypatch.delenv("AMORTLM_API_KEY", raising=False)
    lm = LanguageModel.from_pretrained(model)
    policy = Policy(lm, "{x}", Support(**WORDS), default_lora(RANK))
    with servers_on_ray(Program(program(tmp_path), model), 2, "local") as urls:
        assert len(set(urls)) == 2
        assert not any("127.0.0.1" in url for url in urls), "others can reach them"
        check_sampler(HTTPSampler(urls, policy), policy, ROWS[0], num_samples=500)
        with monkeypatch.context() as patch:
            patch.setenv("AMORTLM_API_KEY", "another")
            with pytest.raises(ConfigError, match="wants a key"):
                HTTPSampler(urls, policy)
    assert "AMORTLM_API_KEY" not in os.environ, "the key that it made up goes with the servers"


def test_a_cluster_that_is_not_there(model, tmp_path):
    with (
        pytest.raises(ConfigError, match="no Ray cluster at 'auto'"),
        servers_on_ray(Program(program(tmp_path), model), 1, "auto"),
    ):
        pass


def test_a_server_that_cannot_start(model, tmp_path):
    for python, message in (
        (str(tmp_path / "nothing"), "cannot be started .No such file"),
        (sys.executable, "has ended .*No module named .*amortlm_vllm.*give --python the interpreter"),
    ):
        with pytest.raises(RolloutError, match=message), servers(Program(python, model), 1):
            pass


def test_a_server_that_takes_too_long(model, tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho loading >&2\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(launch, "STARTING", 0.5)
    with (
        pytest.raises(RolloutError, match="does not serve after 0.5 s .loading"),
        servers(Program(str(slow), model), 1),
    ):
        pass


@pytest.mark.slow
def test_a_server_in_the_foreground_ends_with_its_command(model, tmp_path):
    command = [sys.executable, "-c", "import sys; from amortlm.cli import main; sys.exit(main())"]
    started = subprocess.Popen(
        [*command, "rollout-server", "--python", program(tmp_path), model, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    line = next(line for line in started.stderr if line.startswith("serving "))
    place = line.split("http://")[1].split()[0].split(":")
    assert answers(place)
    started.send_signal(signal.SIGTERM)
    assert started.wait(30) == 128 + signal.SIGTERM
    time.sleep(0.5)
    assert not answers(place)


def test_a_gguf_file_is_served_as_a_folder(one_lm, model, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "from_pretrained", classmethod(lambda cls, *_, **__: one_lm))
    with servable(str(tmp_path / "model.gguf")) as folder:
        assert os.path.exists(os.path.join(folder, "model.safetensors"))
        assert os.path.exists(os.path.join(folder, "tokenizer.json"))
    assert not os.path.exists(folder)
    with servable(model) as same:
        assert same == model
