"""A training run on disk: its configuration, its checkpoints and its log.

Layout of a run folder:

- `config.json`: the configuration and what was trained on; the same command finds it and goes on, another is refused.
- `metrics.jsonl`: one line every `log_every` steps.
- `checkpoints/step_00001000/`: `state.safetensors` (weights, optimiser, counters) and `state.json` (step), the last N.
- `cfg.json`, `sae_weights.safetensors`, `feature_stats.safetensors`: the finished SAE (`SAE.load(run)`).
- `loss.png`, `density.png`.

A checkpoint is written under a temporary name, synced and renamed, so one that can be seen is whole.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.sae.checkpoint import CONFIG, write_atomically, write_json


class RunFolder:
    """The folder of one run. Opening it with another configuration than it holds is an error that names the fields."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.checkpoints = path / "checkpoints"
        recorded = path / "config.json"
        # Through JSON and back, so that tuples and lists compare equal.
        config = json.loads(json.dumps(config))
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SteersmanError(f"{path} cannot be made: {error.strerror}") from error
        if recorded.is_file():
            differing = _differences(json.loads(recorded.read_text()), config)
            if differing:
                raise SteersmanError(
                    f"{path} holds a run with another configuration ({differing}); choose another folder or delete it"
                )
        elif (path / CONFIG).exists():
            raise SteersmanError(f"{path} already holds an SAE; choose another folder")
        else:
            write_json(recorded, config)

    @property
    def finished(self) -> bool:
        return (self.path / CONFIG).is_file()

    def _steps(self) -> list[int]:
        return sorted(int(child.name.removeprefix("step_")) for child in self.checkpoints.glob("step_*"))

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> None:
        """Write the checkpoint of `step`, then delete all but the newest `keep`."""
        temporary = self.checkpoints / ".writing"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            write_atomically(temporary / "state.safetensors", lambda file: save_file(tensors, file))
            write_json(temporary / "state.json", state | {"step": step})
            final = self.checkpoints / f"step_{step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            _sync(self.checkpoints)
        except (OSError, SafetensorError) as error:
            raise SteersmanError(f"{self.checkpoints}: checkpoint {step} could not be written: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self._steps()[:-keep]:
            shutil.rmtree(self.checkpoints / f"step_{old:08d}")

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint's tensors and state, or None."""
        steps = self._steps()
        if not steps:
            return None
        folder = self.checkpoints / f"step_{steps[-1]:08d}"
        try:
            return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())
        except (OSError, ValueError, SafetensorError) as error:
            raise SteersmanError(
                f"{folder} cannot be read ({error}); delete it to go on from the one before"
            ) from error

    def open_metrics(self, step: int) -> Any:
        """metrics.jsonl, open for appending, without the lines of steps past `step` (they will be made again)."""
        file = self.path / "metrics.jsonl"
        if file.is_file():
            kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
            write_atomically(file, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))
        return open(file, "a", buffering=1)

    def append(self, file: Any, line: dict[str, Any]) -> None:
        """Add one line to the open metrics.jsonl."""
        try:
            file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise SteersmanError(f"{self.path / 'metrics.jsonl'} could not be written: {error.strerror}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return float("inf")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _differences(a, b, f"{prefix}{name}.")
            parts += [inner] if inner else []
        elif a != b:
            parts.append(f"{prefix}{name} was {a}, now {b}")
    return "; ".join(parts)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
