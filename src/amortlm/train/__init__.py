"""Training: settings, where trajectories come from, and the trainer."""

from amortlm.train.config import GFNConfig
from amortlm.train.trainer import GFNTrainer

__all__ = ["GFNConfig", "GFNTrainer"]
