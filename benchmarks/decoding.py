"""How fast are completions drawn, against what the device could do? The ordinary loop, the static cache
(`amortlm.engine.static`), `generate` of transformers, and generation as TRL's GRPO does it; and what bfloat16 costs in
exactness.

    python -m benchmarks.decoding --output decoding [--shapes 135m 1b] [--samples 8 64] [--tokens 32 256]
    python -m benchmarks.decoding --output toy --shapes tiny --samples 4 --tokens 8 --dtype float32 --device cpu

Models are Llamas of these shapes with random weights (flatter than trained ones), and LoRA that was moved; every
completion has all its tokens.
Each (shape, samples, tokens) is a process of its own, with `--seconds` for each of its parts; what it has found is in
`results.jsonl` and `table.md` of `--output` at once, also if it is then killed.

tokens/s    sampled tokens of all completions, median over the repetitions that fit
bandwidth   bytes that must be read for them (weights once a token, keys and values of all completions) a second, as a
            share of what a copy of a large tensor reaches here
matmul      2 operations for each weight and token, as a share of what a large product reaches here; for updates 6: the
            target's pass, q's pass and the way back to its activations
peak        of the device's memory, GiB (CUDA alone)
exactness   nats: the sampler's log q against `evaluate`, a token and a completion; the same against a float32 copy; and
            the variance of the log weights with each log q, log R being that of the float32 copy
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tabulate import tabulate
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from amortlm import GFNConfig, GFNTrainer, LanguageModel, Policy, Support
from amortlm.engine.adapter import default_lora
from amortlm.engine.memory import Sizes
from amortlm.engine.sampler import LocalSampler, Request
from amortlm.engine.static import StaticSampler, require
from amortlm.language_model import EMBEDDED_PATH

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
PROMPT = "One day, a little girl went to the park to play with her friends"
REPEATS, UPDATES = 5, 6
COLUMNS = ("shape", "K", "T", "part", "tokens/s", "updates/s", "bandwidth", "matmul", "peak", "note")


class Case:
    """A model, a policy, and what is asked of them."""

    def __init__(self, shape: str, samples: int, tokens: int, device: str, dtype: str, seconds: float):
        self.shape, self.samples, self.tokens, self.seconds = shape, samples, tokens, seconds
        self.device = torch.device(device)
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=2048)
        with self.device:
            model = LlamaForCausalLM(config).to(getattr(torch, dtype))
        self.lm = LanguageModel(model, AutoTokenizer.from_pretrained(EMBEDDED_PATH), f"llama {shape}")
        self.support = Support(stop=".", min_tokens=tokens, max_tokens=tokens)
        self.policy = self.moved(self.lm)
        self.weights = sum(p.nbytes for p in self.lm.model.parameters())
        self.numbers = sum(p.numel() for p in self.lm.model.parameters())

    def moved(self, lm: LanguageModel) -> Policy:
        policy = Policy(lm, "{x}", self.support, default_lora(16))
        generator = torch.Generator().manual_seed(1)
        for p in policy.model.parameters():
            if p.requires_grad:
                p.data += (0.02 * torch.randn(p.shape, generator=generator)).to(p)
        return policy

    @property
    def request(self) -> Request:
        prompts = self.policy.encode_rows([{"x": PROMPT}])
        return Request(prompts, [self.samples], [int(time.monotonic_ns())], self.policy.support)

    def median(self, work: Callable[[], Any]) -> float:
        """Seconds, after one that does not count."""
        begin, found = time.monotonic(), []
        for _ in range(REPEATS + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
            if time.monotonic() - begin > self.seconds:
                break
        return statistics.median(found[1:] or found)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def ceilings(case: Case) -> dict[str, Any]:
    """Bytes a second of a copy (read and written), and operations a second of a product, in the dtype of the model."""
    large, dtype = case.device.type == "cuda", case.lm.model.dtype
    x = torch.empty(2**30 if large else 2**25, dtype=torch.uint8, device=case.device)
    y, n = torch.empty_like(x), 8192 if large else 1024
    a = torch.randn(n, n, device=case.device, dtype=dtype)
    return {
        "bytes": 2 * x.numel() / case.median(lambda: y.copy_(x)),
        "operations": 2 * n**3 / case.median(lambda: a @ a),
    }


def generation(case: Case, **settings: Any) -> Callable[[], Any]:
    """transformers' own loop, without a support: it may write any token but no end."""
    ids = torch.tensor(case.policy.encode_rows([{"x": PROMPT}]) * case.samples, device=case.device)
    settings |= {"do_sample": True, "top_k": 0, "max_new_tokens": case.tokens, "eos_token_id": None}
    mask = torch.ones_like(ids)
    return lambda: case.policy.model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **settings)


def grpo(case: Case, folder: str) -> Callable[[], Any]:
    """What GRPOTrainer calls for the completions of an update (a private method of TRL 1.16)."""
    from amortlm.lab.baselines.finetune import trl

    config, trainer = trl("GRPOConfig", "GRPOTrainer")
    settings = config(
        output_dir=folder,
        per_device_train_batch_size=case.samples,
        num_generations=case.samples,
        max_completion_length=case.tokens,
        generation_kwargs={"min_new_tokens": case.tokens},
        use_cpu=case.device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    tokenizer = copy.deepcopy(case.lm.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    made = trainer(
        model=copy.deepcopy(case.lm.model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * case.samples),
        peft_config=default_lora(16),
        processing_class=tokenizer,
    )
    prompts = case.policy.encode_rows([{"x": PROMPT}]) * case.samples
    return lambda: made._generate_single_turn(prompts, None, {}, case.samples)


def update_seconds(case: Case, folder: str, static: bool) -> float:
    """Seconds of an update of `GFNTrainer`: drawing, scoring, gradient, step."""
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            case.wait()
            times.append(time.perf_counter())
            control.should_training_stop |= times[-1] - times[0] > case.seconds

    case.lm.static_cache = static
    args = GFNConfig(
        output_dir=f"{folder}/{'static' if static else 'ordinary'}",
        objective="vargrad",
        num_samples=case.samples,
        per_device_train_batch_size=1,
        max_steps=UPDATES,
        diagnose_steps=0,
        save_strategy="no",
        logging_steps=1000,
        use_cpu=case.device.type == "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    trainer = GFNTrainer(
        case.lm,
        target=case.lm.log_prob("{z}", given="{x}"),
        prompt="{x}",
        support=case.support,
        train_dataset=[{"x": PROMPT}],
        args=args,
        adapter=default_lora(16),
    )
    trainer.add_callback(Clock())
    trainer.train()
    return statistics.median(b - a for a, b in pairwise(times))


@torch.no_grad()
def exactness(case: Case, sampler: LocalSampler) -> dict[str, float]:
    request = replace(case.request, seeds=[0])  # the same draws by both
    draws, whole = sampler.sample(request), copy.deepcopy(case.lm.model).float()
    zero = torch.zeros(len(draws), dtype=torch.long)
    lm = case.lm.with_model(whole)
    precise = case.moved(lm)
    precise.sampler.load({name: w.float() for name, w in case.policy.weights().items()}, 0)
    rollouts = case.policy.support.rollouts(
        [{"x": PROMPT}], zero.to(case.device), draws.tokens, draws.lengths, draws.stops
    )
    mine, theirs = case.policy.evaluate(rollouts), precise.evaluate(rollouts)
    log_r = lm.log_prob("{z}", given="{x}").score_final(rollouts).double()
    log_q = {
        "sampler": draws.log_q,
        "evaluate": mine.final(rollouts.lengths).double(),
        "float32": theirs.final(rollouts.lengths).double(),
    }
    found = {f"variance of log w, {name}": (log_r - q).var().item() for name, q in log_q.items()}
    for name, each in (("evaluate", mine), ("float32", theirs)):
        apart = (draws.log_pf - each.log_pf).abs()
        found |= {f"token, {name}, mean": apart.mean().item(), f"token, {name}, max": apart.max().item()}
        found[f"completion, {name}, mean"] = (log_q["sampler"] - log_q[name]).abs().mean().item()
    return found


def parts(case: Case, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, figures) of each part as it is done; an error is a figure, too."""
    lm, policy = case.lm, case.policy
    require(lm.model, lm.name, lm.sharing, True)
    ordinary = LocalSampler(policy.model, lm.sharing, lm.memory)
    static = StaticSampler(policy.model, lm.sharing, lm.memory)
    draws: dict[str, Callable[[], Callable[[], Any]]] = {
        "ordinary": lambda: lambda: ordinary.sample(case.request),
        "static": lambda: lambda: static.sample(case.request),
        "generate": lambda: generation(case),
        "generate, static": lambda: generation(case, cache_implementation="static"),
        "GRPO (TRL)": lambda: grpo(case, folder),
    }
    best = ceilings(case)
    yield "ceilings", {"GB/s": best["bytes"] / 1e9, "Tflop/s": best["operations"] / 1e12}
    tokens, prompt = case.samples * case.tokens, len(case.request.prompts[0])
    held = Sizes.of(lm.model).cache * (prompt + case.tokens / 2)
    for name, make in draws.items():
        with _figures(case) as found:
            seconds = case.median(make())
            found |= {
                "tokens/s": tokens / seconds,
                "bandwidth": case.tokens * (case.weights + case.samples * held) / seconds / best["bytes"],
                "matmul": 2 * case.numbers * tokens / seconds / best["operations"],
            }
        yield name, found
    for name, is_static in (("update, ordinary", False), ("update, static", True)):
        with _figures(case) as found:
            seconds = update_seconds(case, folder, is_static)
            passed = 6 * case.numbers * tokens / seconds
            found |= {"updates/s": 1 / seconds, "matmul": passed / best["operations"]}
        yield name, found
    for name, sampler in (("exactness, ordinary", ordinary), ("exactness, static", static)):
        with _figures(case) as found:
            lm.static_cache = False
            found |= exactness(case, sampler)
        yield name, found


class _figures(dict[str, Any]):  # noqa: N801
    """A dict for the figures of a part, which gets its peak of memory, or its error."""

    def __init__(self, case: Case):
        super().__init__()
        self.cuda = case.device.type == "cuda"

    def __enter__(self) -> _figures:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if self.cuda:
            self["peak"] = torch.cuda.max_memory_allocated() / 2**30
        if isinstance(error, Exception):
            self["note"] = f"{type(error).__name__}: {str(error)[:200]}"
        return isinstance(error, Exception)


def one(args: argparse.Namespace) -> None:
    """All parts of one case, each written when it is done."""
    shape, samples, tokens = args.shapes[0], args.samples[0], args.tokens[0]
    case = Case(shape, samples, tokens, args.device, args.dtype, args.seconds)
    about = {"shape": shape, "K": samples, "T": tokens, "dtype": args.dtype, "device": _device(args.device)}
    with tempfile.TemporaryDirectory() as folder:
        for name, found in parts(case, folder):
            with (args.output / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({**about, "part": name, **found}) + "\n")


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def write_table(folder: Path) -> str:
    file = folder / "results.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = []
    for each in found:
        rest = {k: v for k, v in each.items() if k not in (*COLUMNS, "dtype", "device")}
        note = each.get("note") or ", ".join(f"{k} {v:.3g}" for k, v in rest.items())
        rows.append([each.get(column, "") for column in COLUMNS[:-1]] + [note])
    table = tabulate(rows, headers=COLUMNS, tablefmt="github", floatfmt=".3g")
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["135m", "1b"], choices=sorted(SHAPES))
    parser.add_argument(
        "--samples", nargs="+", type=int, default=[8, 64], help="completions of the prompt, K"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[32, 256], help="of a completion, T")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each part, of which there are ten")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.jsonl").unlink(missing_ok=True)
    for shape, samples, tokens in product(args.shapes, args.samples, args.tokens):
        case = ["--shapes", shape, "--samples", str(samples), "--tokens", str(tokens)]
        rest = ["--device", args.device, "--dtype", args.dtype, "--seconds", str(args.seconds)]
        command = [sys.executable, "-m", "benchmarks.decoding", "--one", "--output", str(args.output)]
        try:
            # Twice the time of the parts and a minute: for what cannot be interrupted, and for loading.
            subprocess.run([*command, *case, *rest], timeout=20 * args.seconds + 60, check=False)
        except subprocess.TimeoutExpired:
            print(f"{shape}, {samples} completions of {tokens} tokens: out of time", file=sys.stderr)
        write_table(args.output)
    print(write_table(args.output))


if __name__ == "__main__":
    main()
