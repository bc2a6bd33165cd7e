"""Draws that were asked for before they are needed. They are saved in checkpoints, so a resumed run uses them, too."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from amortlm.engine.decoding import Draws
from amortlm.engine.sampler import Request
from amortlm.errors import RolloutError
from amortlm.files import save_tensors

FILE = "ahead"  # .json: what the draws in .safetensors are of


@dataclass(frozen=True)
class Asked:
    """Draws to come, and the number of the update that needs them."""

    draws: Future[Draws]
    due: int


class Ahead:
    """Draws by what was asked for: prompt, seed, support and exploration. A request for fewer completions of the same
    prompt gets the first of them, which are the same whatever their number."""

    def __init__(self) -> None:
        self._asked: dict[str, Asked] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._asked

    def put(self, key: str, draws: Future[Draws], due: int) -> None:
        self._asked[key] = Asked(draws, due)

    def take(self, key: str, count: int) -> Draws | None:
        """`count` draws, or None if they were not asked for. Waits for them. Raises what drawing raised."""
        if key not in self._asked:
            return None
        draws = self._asked[key].draws.result()
        del self._asked[key]
        return draws.select(torch.arange(count)) if count <= len(draws) else None

    def forget(self, update: int) -> None:
        """Drop what was due before an update, and turned out not to be needed."""
        for key in [key for key, asked in self._asked.items() if asked.due < update]:
            self._asked.pop(key).draws.cancel()

    def save(self, folder: Path) -> None:
        """Waits for the draws. Those that fail are not saved: a resumed run asks for them again."""
        tensors: dict[str, Tensor] = {}
        about: list[dict[str, Any]] = []
        for key, asked in self._asked.items():
            try:
                draws = asked.draws.result()
            except RolloutError:
                continue
            names = [f.name for f in fields(Draws) if f.name != "version"]
            tensors |= {f"{len(about)}.{name}": getattr(draws, name).cpu().contiguous() for name in names}
            about.append({"key": key, "due": asked.due, "version": draws.version})
        save_tensors(tensors, folder / f"{FILE}.safetensors")
        (folder / f"{FILE}.json").write_text(json.dumps(about), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """What `save` wrote; nothing if the run drew here until now."""
        self._asked.clear()
        if not (folder / f"{FILE}.json").exists():
            return
        about = json.loads((folder / f"{FILE}.json").read_text(encoding="utf-8"))
        tensors = load_file(str(folder / f"{FILE}.safetensors"))
        for i, each in enumerate(about):
            own = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith(f"{i}.")}
            done: Future[Draws] = Future()
            done.set_result(Draws(**own, version=each["version"]))
            self.put(each["key"], done, each["due"])


def key_of(request: Request, support: str) -> str:
    """A name of what a request for one prompt asks for, but for the number of completions."""
    heat = None if request.exploration is None else request.exploration.temperature
    asked = {
        "support": support,
        "prompt": list(request.prompts[0]),
        "seed": request.seeds[0],
        "temperature": None if heat is None else sorted(set(heat.tolist())),
        "epsilon": None if request.exploration is None else request.exploration.epsilon,
        "kept": None if request.kept is None else [list(z) for z in request.kept],
    }
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
