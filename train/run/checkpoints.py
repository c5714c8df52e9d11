"""Checkpoints of a run: written in the background, whole or not at all, and read by any number of processes.

`checkpoints/step_00001000/` holds

- `state.safetensors`, or one `state-00002-of-00004.safetensors` from each process of several: weights, optimiser state
  and counters of the latents that the process updates; what does not belong to latents is in the first one's file;
- `state.json`: the step, the SAE's configuration, and the size and latents of each file.

Everything is written to `.writing-00001000`, synced, and renamed when the last process has finished its part.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import fsync_folder, write_json, write_whole
from steersman.parallel import RankGroup
from steersman.sae import SAE, SAEConfig
from steersman.sae.formats.saelens import CONFIG

STATE = "state.json"


def latent_axis(name: str, tensor: Tensor, n_latents: int) -> int | None:
    """The dimension of a state's tensor that counts latents, None where there is none.

    >>> latent_axis("sae.W_enc", torch.zeros(8, 64), 64), latent_axis("adam.2.step", torch.zeros(()), 64)
    (1, None)
    """
    if name == "sae.b_dec" or re.match(r"(adam|ema)\.3\b", name) or name in ("sums", "rng"):
        return None
    if name == "sae.W_enc" or re.match(r"(adam|ema)\.0\b", name):
        return 1 if tensor.ndim == 2 else None
    return next((dim for dim, size in enumerate(tensor.shape) if size == n_latents), None)


class Checkpoints:
    """The checkpoints of one run. With several processes, each has one of these and all call its methods together."""

    def __init__(self, folder: Path, keep: int, axis: RankGroup | None = None) -> None:
        """`axis` holds all processes of the run and is used by the thread alone."""
        self.folder, self.keep, self.axis = folder, keep, axis or RankGroup()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def clear_unfinished(self) -> None:
        """Delete what a killed run was writing. For one process, before the others start."""
        for unfinished in self.folder.glob(".writing*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    # Writing

    def save(
        self, step: int, tensors: dict[str, Tensor], latents: tuple[int, int], sae: SAEConfig, scale: float
    ) -> None:
        """Take a copy of `tensors`, the part of the state that belongs to `latents`, and write it in a thread.

        Waits for the writing before this one, and raises what went wrong there.
        """
        self.wait()
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        n = latents[1] - latents[0]
        axes = {name: latent_axis(name, tensor, n) for name, tensor in tensors.items()}
        state = {"step": step, "sae": sae.record() | {"metadata": sae.metadata}, "scale": scale}
        state["axes"] = {name: axis for name, axis in axes.items() if axis is not None}
        self._thread = threading.Thread(
            target=self._write_safely, args=(step, copied, latents, state), name="steersman-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raises a SteersmanError when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Wait for the thread without a word: for an end that has an error of its own to tell."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write_safely(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # handed to the thread that trains, by `wait`
            self._error = error

    def _write(self, step: int, tensors: dict[str, Tensor], latents: tuple[int, int], state: dict[str, Any]) -> None:
        temporary = self.folder / f".writing-{step:08d}"
        problem: Exception | None = None
        size = 0
        try:
            temporary.mkdir(exist_ok=True)
            file = temporary / self._name(self.axis.index)
            for name in tensors:  # one after another, so that the transposed ones are not all held twice
                tensors[name] = tensors[name].contiguous()
            write_whole(file, lambda path: save_file(tensors, path))
            size = file.stat().st_size
        except (OSError, SafetensorError, SteersmanError) as error:
            problem = error
        parts = self.axis.all_gather(torch.tensor([problem is None, size, *latents])).tolist()
        try:
            if problem is None and self.axis.index == 0 and all(part[0] for part in parts):
                self._commit(temporary, step, parts, state)
        except (OSError, SteersmanError) as error:
            problem = error
        if problem is not None or not all(part[0] for part in parts):
            failed = [rank for rank, part in enumerate(parts) if not part[0]]
            shutil.rmtree(temporary, ignore_errors=True)
            what = problem or f"rank {', '.join(map(str, failed))} could not write its part"
            raise SteersmanError(
                f"{self.folder}: checkpoint {step} could not be written: {what}; earlier ones are intact: free space "
                "and run the same command again to go on"
            ) from problem

    def _name(self, index: int) -> str:
        return f"state-{index:05d}-of-{self.axis.size:05d}.safetensors" if self.axis.size > 1 else "state.safetensors"

    def _commit(self, temporary: Path, step: int, parts: list[list[int]], state: dict[str, Any]) -> None:
        files = [
            {"name": self._name(index), "bytes": size, "latents": [start, stop]}
            for index, (_, size, start, stop) in enumerate(parts)
        ]
        write_json(temporary / STATE, state | {"files": files})
        final = self.folder / f"step_{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        fsync_folder(self.folder)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step_{old:08d}")

    # Reading

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, in order."""
        return sorted(int(child.name.removeprefix("step_")) for child in self.folder.glob("step_*"))

    def load(self, latents: Callable[[str], tuple[int, int]]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint's tensors, of each the part of `latents(name)`, and its state; None if there is none.

        Raises a SteersmanError that names a file which is missing, cut short or damaged.
        """
        steps = self.steps()
        return load_checkpoint(self.folder / f"step_{steps[-1]:08d}", latents) if steps else None


def load_checkpoint(
    folder: Path, latents: Callable[[str], tuple[int, int]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the parts of a checkpoint that belong to some latents; see `Checkpoints.load`."""
    try:
        state = json.loads((folder / STATE).read_text())
        parts: dict[str, list[Tensor]] = {}
        axes: dict[str, int] = state["axes"]
        for record in sorted(state["files"], key=lambda record: record["latents"]):
            path = folder / record["name"]
            if path.stat().st_size != record["bytes"]:
                raise ValueError(f"{record['name']} was cut short or altered")
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    part = _overlap(file.get_slice(name), axes.get(name), record["latents"], latents(name))
                    if part is not None:
                        parts.setdefault(name, []).append(part)
        tensors = {
            name: torch.cat(found, dim=axes.get(name, 0)) if len(found) > 1 else found[0]
            for name, found in parts.items()
        }
        return tensors, state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SteersmanError(f"{folder} cannot be read ({error}); delete it to go on from the one before") from error


def _overlap(stored: Any, axis: int | None, held: list[int], wanted: tuple[int, int]) -> Tensor | None:
    """Of a stored tensor of the latents `held`, those that are wanted; all of it when it does not count latents."""
    if axis is None:
        return stored[:] if stored.get_shape() else torch.as_tensor(stored[...])
    low, high = max(held[0], wanted[0]) - held[0], min(held[1], wanted[1]) - held[0]
    if low >= high:
        return None
    return stored[low:high] if axis == 0 else stored[:, low:high]


def is_unfinished_run(path: str | Path) -> bool:
    """Whether a local path is a checkpoint, or the folder of a run that has checkpoints and no finished SAE.

    >>> is_unfinished_run("a/folder/that/is/not/there")
    False
    """
    folder = Path(path)
    checkpoint = (folder / STATE).is_file() and any(folder.glob("state*.safetensors"))
    return checkpoint or ((folder / "checkpoints").is_dir() and not (folder / CONFIG).is_file())


def checkpoint_to_sae(path: str | Path) -> SAE:
    """The SAE of a checkpoint, or of the newest one of a run folder, for inputs as they are, on the CPU.

    Of a run that averages its weights (`ema`), the average. Raises a SteersmanError when there is no checkpoint there.
    """
    folder = Path(path)
    if not (folder / STATE).is_file():
        steps = Checkpoints(folder / "checkpoints", 1).steps()
        if not steps:
            raise SteersmanError(f"{folder} holds no checkpoint: name a run folder or one of its checkpoints/step_*")
        folder = folder / "checkpoints" / f"step_{steps[-1]:08d}"
    tensors, state = load_checkpoint(folder, lambda _: (0, 1 << 62))
    sae = SAE(SAEConfig.from_record(state["sae"]))
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    with torch.no_grad():
        for i, name in enumerate(names):
            getattr(sae, name).copy_(tensors.get(f"ema.{i}", tensors[f"sae.{name}"]))
        for name, buffer in sae.named_buffers():
            buffer.copy_(tensors[f"sae.{name}"])
    sae.normalize_decoder()
    sae.fold_input_scale(state["scale"])
    return sae
