"""The weights of policies on a server: adapters, of which vLLM keeps several, or whole models, of which it has one."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from amortlm_vllm.refusals import RefusalError
from amortlm_vllm.turns import Turns

ADAPTER, MERGED = "adapter", "merged"  # the forms of weights: a server takes one of them
CONFIG = "adapter_config"  # in the metadata of an adapter's file


class Adapters:
    """LoRA as in a PEFT folder. Texts of different adapters are drawn together."""

    form = ADAPTER

    def __init__(self, engine: AsyncLLM, folder: Path, keep: int):
        """keep: how many are loaded at a time; the one not used for longest makes room for a new one."""
        self.engine, self.folder, self.keep = engine, folder, keep
        self.known: OrderedDict[str, LoRARequest] = OrderedDict()
        self.drawing: Counter[str] = Counter()  # requests that use each
        self.loaded, self.loading = 0, asyncio.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self.known

    async def put(self, name: str, file: Path) -> None:
        """Load an adapter under a name and number that vLLM has not seen: its caches know prefixes by these."""
        async with self.loading:
            if name in self.known:
                return
            while len(self.known) >= self.keep:
                await self._make_room()
            self.loaded += 1
            path = self.folder / f"adapter-{self.loaded}"
            request = LoRARequest(f"{name}-{self.loaded}", self.loaded, str(path))
            try:
                _unpack(file, path)
                done = await self.engine.add_lora(request)
            except Exception as e:  # of many types: a rank, a module or a model that vLLM has no LoRA for
                shutil.rmtree(path, ignore_errors=True)
                raise RefusalError(400, f"vLLM cannot load these weights: {e}") from e
            if not done:
                raise RefusalError(400, "vLLM has not loaded these weights: see the server's terminal")
            self.known[name] = request

    async def _make_room(self) -> None:
        """Unload the adapter that was not used for longest, once one is not in use."""
        idle = next((name for name in self.known if not self.drawing[name]), None)
        if idle is None:
            await asyncio.sleep(0.05)
            return
        old = self.known.pop(idle)
        await self.engine.remove_lora(old.lora_int_id)
        shutil.rmtree(old.lora_path, ignore_errors=True)

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[LoRARequest]:
        """In the block texts can be drawn with an adapter: what vLLM is told for that."""
        self.known.move_to_end(name)
        self.drawing[name] += 1
        try:
            yield self.known[name]
        finally:
            self.drawing[name] -= 1


class Merged:
    """Whole weights, in files. vLLM's model has those of one file at a time: texts of another wait for their turn."""

    form = MERGED

    def __init__(self, engine: AsyncLLM, folder: Path, keep: int):
        """keep: how many files are kept; the one not used for longest makes room for a new one."""
        self.engine, self.folder, self.keep = engine, folder, keep
        self.known: OrderedDict[str, Path] = OrderedDict()
        self.drawing: Counter[str] = Counter()  # requests that use each, or wait to
        self.turns = Turns(self._load)

    def __contains__(self, name: str) -> bool:
        return name in self.known

    async def put(self, name: str, file: Path) -> None:
        if CONFIG in _metadata(file):
            raise RefusalError(
                400, "this server takes merged weights, not an adapter: start the training again"
            )
        self.known[name] = file.replace(self.folder / f"merged-{name}.safetensors")
        idle = [old for old in self.known if old != name and not self.drawing[old]]
        for old in idle[: max(0, len(self.known) - self.keep)]:
            self.known.pop(old).unlink()

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[None]:
        """In the block vLLM's model has these weights."""
        self.known.move_to_end(name)
        self.drawing[name] += 1
        try:
            async with self.turns.of(name):
                yield None
        finally:
            self.drawing[name] -= 1

    async def _load(self, name: str) -> None:
        try:
            await self.engine.collective_rpc("load_merged", args=(str(self.known[name]),))
        except Exception as e:  # of many types: names or shapes of another model
            raise RefusalError(400, f"vLLM cannot load these weights: {e}") from e
        # What was computed from other weights: prefixes are found by their tokens alone. Requests that nobody waits for
        # any more may still run.
        if not await self.engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise RefusalError(
                500, "vLLM keeps its cache of prefixes, which is of other weights: start it again"
            )


def _metadata(file: Path) -> dict[str, str]:
    """Raises RefusalError for a file that is not safetensors."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as e:
        raise RefusalError(400, f"these are not weights: {e}") from e


def _unpack(file: Path, folder: Path) -> None:
    """A PEFT folder; its config travels as metadata of its weights. Raises ValueError if it is none."""
    config = _metadata(file).get(CONFIG)
    if config is None:
        raise ValueError("this server takes adapters: start the training again")
    folder.mkdir(parents=True)
    file.replace(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(json.loads(config)))
