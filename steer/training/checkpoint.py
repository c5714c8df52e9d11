"""Where a training run stands, and the file from which it goes on.

The file is safetensors: the parameters, Adam's moments and the best parameters so far, with the epoch, the losses and
the identity of the run in the header. It is written whole after each epoch; a finished run's file is read as it is.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.config import differences, identity
from steersman.errors import SteersmanError
from steersman.files import make_folder
from steersman.reading import parse_json
from steersman.tensor_files import load_tensors, save_tensors

FORMAT = "steersman.edit_training"


class Checkpoint:
    """The epoch, losses and best parameters of a run, in memory and, where the settings name a file, on disk."""

    def __init__(self, config: Any, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, count: int) -> None:
        self.path = None if config.checkpoint is None else Path(config.checkpoint)
        self.leaves, self.optimizer = leaves, optimizer
        shapes = {name: list(p.shape) for name, p in leaves.items()}
        self.identity = {**identity(config), "items": count, "shapes": shapes}
        self.epoch, self.losses, self.lowest = 0, [], math.inf
        self.best: dict[str, Tensor] = {name: p.detach().clone() for name, p in leaves.items()}

    def note(self, loss: float, parameters: Mapping[str, Tensor]) -> None:
        """Take in the loss of an epoch and the parameters that it is of."""
        self.losses.append(loss)
        if loss < self.lowest:
            self.lowest, self.best = loss, {name: p.detach().clone() for name, p in parameters.items()}

    def save(self, epoch: int) -> None:
        """Write the file, after `epoch` epochs."""
        self.epoch = epoch
        if self.path is None:
            return
        tensors = {f"now.{name}": p.detach() for name, p in self.leaves.items()}
        tensors |= {f"best.{name}": p for name, p in self.best.items()}
        steps = 0.0
        for name, p in self.leaves.items():
            state = self.optimizer.state[p]
            tensors |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
            steps = float(state["step"])
        progress = {"epoch": epoch, "losses": self.losses, "lowest": self.lowest, "steps": steps}
        make_folder(self.path.parent)
        header = {"format": FORMAT, "run": json.dumps(self.identity), "progress": json.dumps(progress)}
        save_tensors(self.path, tensors, header)

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the file, where there is one. Raises SteersmanError for that of another run."""
        if self.path is None or not self.path.exists():
            return
        tensors, header = load_tensors(self.path)
        if header.get("format") != FORMAT:
            raise SteersmanError(f"{self.path} holds no training of an edit: name another file as checkpoint")
        run = parse_json(header["run"], f"{self.path}: its header")
        if changed := differences(run, self.identity):
            raise SteersmanError(f"{self.path} is of another run ({changed}): name another file as checkpoint")
        progress = parse_json(header["progress"], f"{self.path}: its header")
        self.epoch, self.losses, self.lowest = progress["epoch"], progress["losses"], progress["lowest"]
        for name, p in self.leaves.items():
            p.copy_(tensors[f"now.{name}"])
            self.best[name] = tensors[f"best.{name}"].to(p.device)
            self.optimizer.state[p] = {
                "step": torch.tensor(progress["steps"]),
                "exp_avg": tensors[f"exp_avg.{name}"].to(p.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(p.device),
            }
