"""The state of a training loop in its folder: an interrupted run goes on from there and ends with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from amortlm.files import replacing

FILE = "loop.safetensors"
EVERY = 20  # steps


class LoopState:
    """What the optimizer trains, its own state, that of the schedule, and notes: one file, replaced as a whole.

    The loop draws everything else that is random from the seed and the number of the step.
    """

    def __init__(
        self,
        folder: str | Path,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ):
        self.folder, self.optimizer, self.schedule = Path(folder), optimizer, schedule
        self.weights: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]

    def save(self, step: int, notes: Any = None) -> None:
        """step: the number of steps that are done; notes: JSON."""
        state = self.optimizer.state_dict()
        tensors = {f"weight.{i}": p.detach() for i, p in enumerate(self.weights)}
        tensors |= {f"{i}.{name}": t for i, own in state["state"].items() for name, t in own.items()}
        stated = {
            "step": step,
            "groups": state["param_groups"],
            "schedule": self.schedule.state_dict(),
            "notes": notes,
        }
        with replacing(self.folder, last=FILE) as part:
            save_file(
                {k: t.cpu().contiguous() for k, t in tensors.items()},
                part / FILE,
                {"state": json.dumps(stated)},
            )

    def restore(self) -> tuple[int, Any]:
        """The number of steps that are done, and the notes; 0 and None where nothing was saved."""
        path = self.folder / FILE
        if not path.exists():
            return 0, None
        with safe_open(path, "pt") as file:
            stated = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                owner, _, rest = name.partition(".")
                if owner == "weight":
                    self.weights[int(rest)].copy_(tensor)
                else:
                    moments.setdefault(int(owner), {})[rest] = tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": stated["groups"]})
        self.schedule.load_state_dict(stated["schedule"])
        return stated["step"], stated["notes"]
