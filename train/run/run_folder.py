"""A training run on disk: its configuration, its checkpoints and its log.

Layout of a run folder:

- `config.json`: the configuration and what was trained on; the same command finds it and goes on, another is refused.
- `metrics.jsonl`: one line every `log_every` steps.
- `checkpoints/step_00001000/`: see `checkpoints.py`; the last N.
- `cfg.json`, `sae_weights.safetensors`, `feature_stats.safetensors`: the finished SAE (`SAE.load(run)`).
- `loss.png`, `density.png`.
"""

import json
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.files import write_json, write_whole
from steersman.sae.formats.saelens import CONFIG


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

    def open_metrics(self, step: int) -> Any:
        """metrics.jsonl, open for appending, without the lines of steps past `step` (they will be made again)."""
        file = self.path / "metrics.jsonl"
        if file.is_file():
            kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
            write_whole(file, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))
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
