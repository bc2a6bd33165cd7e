"""A stand-in for vLLM: the names that servers/vllm imports, and an engine that treats requests as vLLM's does.

They enter and leave a small batch, change places in it, are interrupted and begin again with what they have written,
and get logits of no meaning while their prompt is not read to its end. The model is the policy's own, or, for merged
weights, a copy of the frozen one. Logits are remembered by what was read, as vLLM's cache of prefixes remembers keys:
also after other weights are loaded, until it is reset.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from serving import running
from transformers import AutoConfig

from amortlm import LanguageModel, Policy, Support
from amortlm.engine.adapter import default_lora, holding

PLACES, MAX_RANK, BLOCK = 7, 16, 16
RANK = 4  # of the server in a process of its own
State = tuple[int, ...]  # number of an adapter (0: none), then the tokens of a text
MoveDirectionality = Enum("MoveDirectionality", ["UNIDIRECTIONAL", "SWAP"])


class LoRARequest(SimpleNamespace):
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str):
        super().__init__(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)


class Engine:
    """The part of vLLM's AsyncLLM that the server uses."""

    def __init__(self, policy: Policy, max_model_len: int = 64):
        self.policy, self.processor = policy, None
        size = policy.lm.vocab_size
        self.model_config = SimpleNamespace(
            max_model_len=max_model_len,
            get_vocab_size=lambda: size,
            hf_text_config=policy.lm.model.config,
        )
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=BLOCK))
        self.adapters: dict[int, dict[str, torch.Tensor]] = {}
        self.used: set[int] = set()
        self.whole = copy.deepcopy(policy.lm.model)  # for merged weights
        self.loads = 0  # of merged weights
        self.lost = False  # a fault: weights are taken and not used
        self.forgetful = True  # False is a fault: a cache of prefixes that is not reset
        self._logits: dict[State, torch.Tensor] = {}
        self._waiting: list[SimpleNamespace] = []
        self._batch: list[SimpleNamespace | None] = []
        self._random, self._runner = random.Random(0), None
        self.interruptions = self.finished = 0

    @classmethod
    def from_engine_args(cls, args: SimpleNamespace) -> Engine:
        """With a model as vLLM loads it, and the LoRA of `fake_server.py`."""
        lm = LanguageModel.from_pretrained(args.model)
        engine = cls(Policy(lm, "{x}", Support(stop=".", max_tokens=3), default_lora(RANK)))
        vars(engine.model_config).update(model=args.model, dtype=torch.float32)
        return engine

    def shutdown(self) -> None:
        pass

    async def check_health(self) -> None:
        pass

    async def add_lora(self, request: LoRARequest) -> bool:
        assert request.lora_int_id not in self.used, "vLLM caches by number: none may be used again"
        self.used.add(request.lora_int_id)
        config = json.loads((Path(request.lora_path) / "adapter_config.json").read_text("utf-8"))
        if config["r"] > MAX_RANK:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {MAX_RANK}.")
        saved = load_file(str(Path(request.lora_path) / "adapter_model.safetensors"))
        own = {name.replace(".default.", "."): name for name, _ in self.policy.model.named_parameters()}
        weights = {own[name]: x for name, x in saved.items()}
        if self.lost:
            weights = {name: torch.zeros_like(x) for name, x in weights.items()}
        self.adapters[request.lora_int_id] = weights
        return True

    async def remove_lora(self, number: int) -> bool:
        return self.adapters.pop(number, None) is not None

    async def collective_rpc(self, method: str, args: tuple[str]) -> None:
        """What `amortlm_vllm.worker` does in vLLM's processes."""
        assert method == "load_merged"
        half_written = [*self._waiting, *(r for r in self._batch if r is not None)]
        assert not half_written, "other weights under a text"
        if not self.lost:
            found = self.whole.load_state_dict(load_file(args[0]), strict=False)
            tied = {"lm_head.weight"} if self.whole.config.tie_word_embeddings else set()
            if found.unexpected_keys or set(found.missing_keys) - tied:
                raise ValueError(f"{found}")
        self.loads += 1

    async def reset_prefix_cache(self, reset_running_requests: bool, reset_connector: bool) -> bool:
        if self.forgetful:
            self._logits.clear()
        return True

    async def generate(
        self,
        prompt: dict[str, Any],
        params: SimpleNamespace,
        request_id: str,
        lora_request: LoRARequest | None,
    ) -> AsyncIterator[SimpleNamespace]:
        number = 0 if lora_request is None else lora_request.lora_int_id
        known = number in self.adapters if lora_request else self.loads > 0
        assert known, "a request for weights that are not there"
        request = SimpleNamespace(prompt=prompt["prompt_token_ids"], params=params, adapter=number)
        request.output, request.logprobs, request.done = [], [], asyncio.Event()
        request.unread = 0
        self._waiting.append(request)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.ensure_future(self._run())
        await asyncio.wait(
            [asyncio.ensure_future(request.done.wait()), self._runner], return_when="FIRST_COMPLETED"
        )
        if not request.done.is_set():
            await self._runner  # raises what ended it
        yield SimpleNamespace(
            outputs=[
                SimpleNamespace(token_ids=request.output, logprobs=request.logprobs, finish_reason="stop")
            ]
        )

    async def _run(self) -> None:
        if self.processor is None:
            from amortlm_vllm.processor import SupportProcessor

            self.processor = SupportProcessor(None, torch.device("cpu"), False)
        while self._waiting or any(self._batch):
            update = self._rearranged()
            self.processor.update_state(update)
            self._step()
            await asyncio.sleep(0)

    def _rearranged(self) -> SimpleNamespace | None:
        """Finished and interrupted requests leave, others take their places, the last move into the holes."""
        batch, moved, added = self._batch, [], []
        removed = [i for i, r in enumerate(batch) if r is None]
        for i, r in enumerate(batch):
            if r is not None and self._waiting and self._random.random() < 0.05:
                r.unread = self._random.randint(0, 2)
                self._waiting.append(r)
                batch[i] = None
                removed.append(i)
                self.interruptions += 1
        while self._waiting and (removed or len(batch) < PLACES):
            r = self._waiting.pop(0)
            if removed:
                i = removed.pop()
                batch[i] = r
            else:
                i = len(batch)
                batch.append(r)
            added.append((i, r.params, r.prompt, r.output))
        left = sorted(removed)
        while left and batch:
            if batch[-1] is None:
                batch.pop()
                left = [i for i in left if i < len(batch)]
            else:
                i = left.pop(0)
                moved.append((len(batch) - 1, i, MoveDirectionality.UNIDIRECTIONAL))
                batch[i] = batch.pop()
        if len(batch) > 1 and self._random.random() < 0.2:
            a, b = self._random.sample(range(len(batch)), 2)
            batch[a], batch[b] = batch[b], batch[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        if not (removed or added or moved):
            return None
        return SimpleNamespace(batch_size=len(batch), removed=removed, added=added, moved=moved)

    def _step(self) -> None:
        requests = list(self._batch)
        self._compute([r for r in requests if not r.unread])
        rows = [
            torch.randn(self.policy.lm.vocab_size) if r.unread else self._logits[_state(r)] for r in requests
        ]
        logits = self.processor.apply(torch.stack(rows))
        for i, (r, row) in enumerate(zip(requests, logits, strict=True)):
            if r.unread:
                r.unread -= 1
                continue
            token = int(row.argmax())
            values, ids = row.topk(r.params.logprobs)
            near = zip(ids.tolist(), values.tolist(), strict=True)
            r.output.append(token)
            r.logprobs.append({k: SimpleNamespace(logprob=x) for k, x in near})
            if token in r.params.stop_token_ids or len(r.output) == r.params.max_tokens:
                r.done.set()
                self.finished += 1
                self._batch[i] = None

    @torch.no_grad()
    def _compute(self, requests: list[SimpleNamespace]) -> None:
        """The next logits of these requests, those of one adapter and length in one pass."""
        groups: dict[tuple[int, int], set[State]] = {}
        for state in map(_state, requests):
            if state not in self._logits:
                groups.setdefault((state[0], len(state)), set()).add(state)
        for (adapter, _), states in groups.items():
            ids = torch.tensor([state[1:] for state in states])
            with holding(self.policy.model, self.adapters.get(adapter, self.policy.weights())):
                model = self.policy.model if adapter else self.whole
                logits = model(input_ids=ids).logits[:, -1].float()
            self._logits.update(zip(states, logits, strict=True))


def _state(request: SimpleNamespace) -> State:
    return (request.adapter, *request.prompt, *request.output)


class AsyncEngineArgs(SimpleNamespace):
    def create_model_config(self) -> SimpleNamespace:
        names = AutoConfig.from_pretrained(self.model).architectures
        registry = SimpleNamespace(resolve_model_cls=lambda names, config: (names[0], config))
        return SimpleNamespace(architectures=names, registry=registry)


def modules() -> dict[str, ModuleType]:
    """What `import vllm` is to find: the names above."""
    names: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": SimpleNamespace, "__version__": "0"},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=2)},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {"supports_lora": lambda name: "Llama" in name},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": Engine},
        "vllm.v1.sample": {},
        "vllm.v1.sample.logits_processor": {
            "BatchUpdate": SimpleNamespace,
            "LogitsProcessor": object,
            "MoveDirectionality": MoveDirectionality,
        },
    }
    found = {name: ModuleType(name) for name in names}
    for name, module in found.items():
        vars(module).update(names[name])
    return found


@contextmanager
def serving(
    policy: Policy, folder: Path, key: str | None = None, merged: bool = False, **settings: Any
) -> Iterator[tuple[str, Engine]]:
    """(address, engine) of the server of servers/vllm on the stand-in; its model is that of a policy of its own, or,
    merged, a copy of that of its `lm`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules().items():
            patch.setitem(sys.modules, name, module)  # not for longer: TRL asks whether there is vLLM
        from amortlm_vllm import processor, server, weights

        patch.setenv(processor.FOLDER, str(folder))
        engine = Engine(policy, **settings)
        about = {"model": "tiny", "dtype": "float32", "vocab_size": policy.lm.vocab_size}
        about |= {"tied": engine.whole.config.tie_word_embeddings, "block_size": BLOCK}
        about["max_model_len"] = engine.model_config.max_model_len
        kind = weights.Merged if merged else weights.Adapters
        app = server.create_app(server.Service(engine, folder, kind(engine, folder, keep=2)), about, key)
        with running(app) as port:
            yield f"http://127.0.0.1:{port}", engine
