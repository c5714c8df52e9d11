"""A training run on disk: its configuration, its checkpoints and its log.

Layout of a run folder:

- `config.json`: the configuration and what was trained on; the same command resumes the run, another is refused.
- `metrics.jsonl`: one line every `log_every` steps.
- `checkpoints/step_00001000/`: see `checkpoints.py`; the last N.
- `cfg.json`, `sae_weights.safetensors`, `feature_stats.safetensors`: the finished SAE (`SAE.load(run)`).
- `loss.png`, `density.png`.
"""

import json
from pathlib import Path
from typing import Any

from steersman.config import differences
from steersman.errors import SteersmanError
from steersman.files import make_folder, write_json, write_whole
from steersman.sae.formats.saelens import CONFIG
from steersman.train.run.recipe import identity_of_record


class RunFolder:
    """The folder of one run. Opening it with another configuration than it holds is an error that names the fields."""

    def __init__(self, path: Path, record: dict[str, Any]):
        """`record` says what the run is, its settings under "training"; of them those that are no part of the identity
        may have changed since."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        recorded = path / "config.json"
        make_folder(self.checkpoints)
        if recorded.is_file():
            before = json.loads(recorded.read_text())
            differing = differences(identity_of_record(before), identity_of_record(record))
            if differing:
                raise SteersmanError(
                    f"{path} holds a run with another configuration ({differing}); choose another folder or delete it"
                )
        elif (path / CONFIG).exists():
            raise SteersmanError(f"{path} already holds an SAE; choose another folder")
        else:
            write_json(recorded, record)

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
