"""A training run on disk: its configuration, its checkpoints and its log.

Layout of a run folder:

- `config.json`: the configuration and what was trained on; the same command resumes the run, another is refused.
- `metrics.jsonl`: one line every `log_every` steps.
- `checkpoints/step_00001000/`: see `checkpoints.py`; the last N, and the one that `extend` goes on from.
- `cfg.json`, `sae_weights.safetensors`, `feature_stats.safetensors`: the finished SAE (`SAE.load(run)`).
- `loss.png`, `density.png`.
- `wandb.json`: of a run that logs to Weights & Biases, its id there.

One process at a time writes it, the first rank of a job; the lock is the operating system's, so that a killed process
leaves none.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steersman.config import differences
from steersman.errors import SteersmanError
from steersman.files import format_bytes, make_folder, write_json, write_text
from steersman.folders import FolderLock
from steersman.reading import parse_json, read_bytes, read_json_object
from steersman.sae.formats.saelens import CONFIG
from steersman.sealed import seal, unseal
from steersman.train.run.checkpoints import Checkpoints, read_state
from steersman.train.run.recipe import Recipe, TrainConfig, identity_of_record

RECORD, METRICS, WANDB = "config.json", "metrics.jsonl", "wandb.json"
_METRICS_BYTES = 4 << 30


class RunFolder:
    """The folder of one run. Opening it with another configuration than it holds is an error that names the fields."""

    def __init__(self, path: Path) -> None:
        """The folder, which need not be there yet; nothing is made or read."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: FolderLock | None = None

    # Whose it is

    def open(self, record: dict[str, Any], config: TrainConfig, tokens: int) -> tuple[dict[str, Any], bool]:
        """Settle which run this is: its record, and whether it is finished. For one process.

        `record` says what the run is, its settings under "training"; of them those that are no part of the identity
        may have changed since. `tokens` is how many it trains on. Where the folder holds a shorter run that differs in
        nothing else, and `config.extend` is set, it becomes the longer one. A run that is not finished is this
        process's until `close`.

        Raises SteersmanError for a folder that holds something else, or that another process or nobody can write.
        """
        try:
            if not (self.path / RECORD).is_file() and (self.path / CONFIG).exists():
                raise SteersmanError(f"{self.path} already holds an SAE; choose another folder")
            known = self._known(record, config, tokens)
            if known is not None and self._is_finished(known):
                return known, True
            make_folder(self.checkpoints)
            self._lock = FolderLock(self.path, "this run")
            if not os.access(self.checkpoints, os.W_OK):
                raise SteersmanError(f"{self.checkpoints} cannot be written: read-only, or another user's")
            known = self._known(record, config, tokens)  # as it is now that nobody else changes it
            if known is None:
                known = self._extended(record, config, tokens) if (self.path / RECORD).is_file() else record
                write_json(self.path / RECORD, seal(known))
            elif self._is_finished(known):
                self.close()
                return known, True
            Checkpoints(self.checkpoints, 1).clear_unfinished()
            self._remove_superseded(known)
            return known, False
        except OSError as error:
            self.close()
            raise SteersmanError(f"{self.path}: {error.filename or ''} {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _recorded(self) -> dict[str, Any]:
        path = self.path / RECORD
        before = unseal(read_json_object(path), path)
        for name in ("training", "recipe", "data"):
            if not isinstance(before.get(name), dict):
                raise SteersmanError(f"{path} is not the record of a run: it has no {name}")
        Recipe.from_record(before["recipe"], path)
        return before

    def _known(self, record: dict[str, Any], config: TrainConfig, tokens: int) -> dict[str, Any] | None:
        """The record on disk if it is of this run; None if there is none, or one of a shorter run that is to go on."""
        if not (self.path / RECORD).is_file():
            return None
        before = self._recorded()
        old, new = identity_of_record(before), identity_of_record(record)
        if "text" in old["data"]:  # what model and text are is compared, and not what they are called
            for name in ("fingerprint", "model_name"):
                old["data"].pop(name, None)
        new["data"] = {name: value for name, value in new["data"].items() if name in old["data"]}
        if old == new or not differences(old, new):
            return before
        if not differences(_without_length(old), _without_length(new)):
            recipe = Recipe.from_record(before["recipe"], self.path / RECORD)
            n_steps = tokens // recipe.batch_size
            if n_steps == recipe.n_steps and "extended" in before:
                return before  # its rates and sizes are those that the shorter run had
            done = recipe.n_steps * recipe.batch_size
            if n_steps > recipe.n_steps and config.extend:
                return None
            if n_steps > recipe.n_steps:
                raise SteersmanError(
                    f"{self.path} holds a run of {done:,} tokens, and {tokens:,} are asked for: it goes on to them "
                    "with --extend (extend=True); or choose another folder"
                )
            if n_steps < recipe.n_steps:
                raise SteersmanError(
                    f"{self.path} holds a run of {done:,} tokens, more than the {tokens:,} that are asked for; choose "
                    "another folder"
                )
        changed = [name for name in sorted(old["data"]) if old["data"][name] != new["data"].get(name)]
        what = f"was trained on other data: another {', '.join(changed)}" if changed else "has another configuration"
        raise SteersmanError(
            f"{self.path} holds a run that {what} ({differences(old, new)}); choose another folder or delete it"
        )

    def _extended(self, record: dict[str, Any], config: TrainConfig, tokens: int) -> dict[str, Any]:
        """The record of the run on disk once it goes on to `tokens`."""
        before = self._recorded()
        recipe = Recipe.from_record(before["recipe"], self.path / RECORD)
        longer = recipe.of_length(tokens // recipe.batch_size, config.decay)
        kept = Checkpoints(self.checkpoints, 1).steps()
        flat = [step for step in kept if step <= recipe.decay_start]
        if not kept and (self.path / CONFIG).exists():
            raise SteersmanError(f"{self.checkpoints} holds no checkpoint to go on from; train in another folder")
        start = max(flat, default=max(kept, default=0))
        extension = {"from_step": start, "n_steps": recipe.n_steps}
        return {
            **before,
            "training": record["training"],
            "recipe": asdict(longer),
            "extended": [*before.get("extended", []), extension],
        }

    def _remove_superseded(self, known: dict[str, Any]) -> None:
        """Remove the checkpoints past the step that an extension goes on from that were made before it."""
        if not known.get("extended"):
            return
        checkpoints = Checkpoints(self.checkpoints, 1)
        for step in checkpoints.steps():
            if step > known["extended"][-1]["from_step"] and _planned_steps(
                read_state(checkpoints.folder_of(step))["sae"]
            ) != known["recipe"].get("n_steps"):
                checkpoints.remove(step)

    def _is_finished(self, known: dict[str, Any]) -> bool:
        if not (self.path / CONFIG).is_file():
            return False
        if not known.get("extended"):
            return True
        fields = read_json_object(self.path / CONFIG)
        metadata = fields.get("metadata")
        own = metadata.get("steersman") if isinstance(metadata, dict) else None
        return _planned_steps({"metadata": own}) == known["recipe"].get("n_steps")

    def retract(self) -> None:
        """Before a longer run's SAE takes the place of the shorter one's: from now on there is none."""
        (self.path / CONFIG).unlink(missing_ok=True)

    def check_space(self, n_bytes: int, what: str) -> None:
        """Raise a SteersmanError if the disk cannot hold `n_bytes` more, which are those of `what`."""
        usage = shutil.disk_usage(self.path)
        if usage.total and usage.free < n_bytes:
            raise SteersmanError(
                f"{self.path}: {what} need {format_bytes(n_bytes)} and {format_bytes(usage.free)} are free on the "
                "disk: free space or choose another folder"
            )

    # The log

    def open_metrics(self, step: int) -> "MetricsFile":
        """metrics.jsonl, open for appending, without the lines of steps past `step` (they will be made again)."""
        file = self.path / METRICS
        if file.exists():
            kept = [line for line in self._lines() if line["step"] <= step]
            write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
        return MetricsFile(file)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return list(self._lines())

    def _lines(self) -> list[dict[str, Any]]:
        """The lines of the log; the last is passed over where it was cut short by a kill."""
        path, found = self.path / METRICS, []
        *whole, last = read_bytes(path, limit=_METRICS_BYTES).split(b"\n")
        for number, content in enumerate([*whole, last], 1):
            if not content.strip():
                continue
            try:
                line = parse_json(content, f"{path}, line {number}")
                if not (isinstance(line, dict) and _is_number(line.get("step")) and _is_number(line.get("tokens"))):
                    raise SteersmanError(f"{path}, line {number}: no line of a log")
            except SteersmanError as error:
                if number > len(whole):
                    break
                raise SteersmanError(f"{error}; delete this line, it says only how training went") from error
            found.append(line)
        return found

    # Weights & Biases

    def wandb_id(self, project: str) -> str | None:
        """The run's id at a Weights & Biases project, if it has logged to it before."""
        path = self.path / WANDB
        if not path.is_file():
            return None
        known = read_json_object(path)
        return str(known["id"]) if known.get("project") == project and known.get("id") else None

    def set_wandb_id(self, project: str, run_id: str) -> None:
        """Keep the id, so that a resumed run goes on there."""
        write_json(self.path / WANDB, {"project": project, "id": run_id})


class MetricsFile:
    """metrics.jsonl, to which lines are added. Each is written at once, by one call of the system."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - until `close`
        except OSError as error:
            raise SteersmanError(f"{path} cannot be written: {error.strerror or error}") from error

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line. Raises SteersmanError when the disk is full."""
        content = (json.dumps(line) + "\n").encode()
        try:
            if self._file.write(content) == len(content):
                return
            problem = "No space left on device"
        except OSError as error:
            problem = error.strerror or str(error)
        raise SteersmanError(
            f"{self._path} could not be written: {problem}; checkpoints are intact: free space and run the same "
            "command again to resume"
        )

    def close(self) -> None:
        self._file.close()


def _without_length(identity: Mapping[str, Any]) -> dict[str, Any]:
    """A run's identity but for how long it is and what follows from that."""
    training = {name: value for name, value in identity["training"].items() if name != "tokens"}
    return {**identity, "training": training, "recipe": None, "extended": None}


def _planned_steps(sae: Mapping[str, Any]) -> int | None:
    """The length of the schedule under which an SAE was trained, as its metadata says."""
    metadata = sae.get("metadata")
    training = metadata.get("training") if isinstance(metadata, dict) else None
    return training.get("n_steps") if isinstance(training, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def record_in(path: Path) -> dict[str, Any]:
    """What the run folder `path` says that its run is; nothing where there is none yet."""
    return read_json_object(path / RECORD) if (path / RECORD).is_file() else {}
