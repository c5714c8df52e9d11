"""Checkpoints of a run: written in the background, whole or not at all, and read by any number of processes.

`checkpoints/step_00001000/` holds

- `state.safetensors`, or one `state-00002-of-00004.safetensors` from each process of several: weights, optimiser state
  and counters of the latents that the process updates; what does not belong to latents is in the first one's file;
- `state.json`: the step, the SAE's configuration, and the size and latents of each file.

All of them carry checksums, which are compared before anything is resumed from them. Everything is written to
`.writing-00001000-of-00004` (by four processes), synced, and renamed when the last process has finished its part. Of
what lies in these folders, only the files that are named here are ever removed.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import fsync_folder, temporary_path, write_json
from steersman.folders import remove_folder
from steersman.parallel import RankGroup
from steersman.reading import read_json_object
from steersman.sae import SAE, SAEConfig
from steersman.sae.formats.saelens import CONFIG
from steersman.sealed import seal, unseal
from steersman.tensor_files import check_tensors, save_tensors
from steersman.train.run.host_copies import HostCopies
from steersman.train.run.inputs import restored_inputs

STATE = "state.json"
_FOLDER = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"\.writing-\d{8,}(?:-of-(\d{5,}))?")
_PART = re.compile(r"state(?:-\d{5,}-of-\d{5,})?\.safetensors")
_EVERY = (0, 1 << 62)


PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
"""The parameters that every architecture has. States know them by number, further ones by name."""


def state_key(name: str) -> str:
    """What a parameter is called in the names of a state's tensors: `adam.0.exp_avg` is W_enc's."""
    return str(PARAMETERS.index(name)) if name in PARAMETERS else name


def latent_dim(sae: SAE, name: str, tensor: Tensor) -> int | None:
    """The dimension of a state's tensor that counts latents, None where there is none.

    >>> sae = SAE(SAEConfig(d_in=8, d_sae=64, k=2))
    >>> latent_dim(sae, "sae.W_enc", torch.zeros(8, 64)), latent_dim(sae, "adam.2.step", torch.zeros(()))
    (1, None)
    """
    if name == "silent_steps":
        return 0
    kind, _, of = name.partition(".")
    if kind not in ("sae", "ema", "adam", "rule") or not tensor.ndim:
        return None
    key = of if kind in ("sae", "ema") else of.rpartition(".")[0]
    dim = sae.latent_dim(PARAMETERS[int(key)] if key.isdigit() else key)
    return 0 if kind == "rule" and dim is not None else dim  # a rule's state is latent-major


def part_name(index: int, size: int) -> str:
    """The file of one of `size` processes.

    >>> part_name(2, 4), part_name(0, 1)
    ('state-00002-of-00004.safetensors', 'state.safetensors')
    """
    return f"state-{index:05d}-of-{size:05d}.safetensors" if size > 1 else "state.safetensors"


class Checkpoints:
    """The checkpoints of one run. With several processes, each has one of these and all call its methods together."""

    def __init__(self, folder: Path, keep: int, group: RankGroup | None = None, keep_also: int | None = None) -> None:
        """`keep` of them are kept, the newest, and that of step `keep_also`. `group` holds all processes of the run
        and, while one is written, is used by the thread alone."""
        self.folder, self.keep, self.group, self.keep_also = folder, keep, group or RankGroup(), keep_also
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def clear_unfinished(self) -> None:
        """Delete what a killed run was writing. For one process, before the others start."""
        for child in self.folder.iterdir():
            if (found := _UNFINISHED.fullmatch(child.name)) and child.is_dir():
                names = [part_name(index, int(found[1] or 1)) for index in range(int(found[1] or 1))]
                _remove(child, [STATE, *names])

    def remove(self, step: int) -> None:
        """Delete a checkpoint: the files that it lists, what lists them last."""
        folder = self.folder_of(step)
        with suppress(SteersmanError):  # one that cannot be read stays
            _remove(folder, [*(record["name"] for record in read_state(folder)["files"]), STATE])

    # Writing

    def save(self, step: int, tensors: dict[str, Tensor], latents: tuple[int, int], state: dict[str, Any]) -> None:
        """Take a copy of `tensors`, the part of the state that belongs to `latents`, and write it in a thread; neither
        is waited for, where the tensors are on a GPU.

        `state` is what else is to be known, with `axes`: which dimension of each tensor counts latents. Waits for the
        writing before this one, and raises what went wrong there.
        """
        self.wait()
        copied = self._copies.begin(tensors)
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
        """After the last checkpoint: wait for the thread, ignoring its error, because another is already being raised,
        or `wait` comes next."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._copies.release()

    def _write_safely(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # handed to the thread that trains, by `wait`
            self._error = error

    def _write(
        self,
        step: int,
        copied: Callable[[], dict[str, Tensor]],
        latents: tuple[int, int],
        state: dict[str, Any],
    ) -> None:
        index, n = self.group.index, self.group.size
        temporary = self.folder / (f".writing-{step:08d}" + (f"-of-{n:05d}" if n > 1 else ""))
        problem: Exception | None = None
        size = 0
        try:
            temporary.mkdir(exist_ok=True)
            file = temporary / part_name(index, n)
            save_tensors(file, copied())
            size = file.stat().st_size
        except (OSError, SteersmanError) as error:
            problem = error
        parts = self.group.all_gather(torch.tensor([problem is None, size, *latents])).tolist()
        written = all(part[0] for part in parts)
        try:
            if written and index == 0:
                self._commit(temporary, step, parts, state)
        except (OSError, SteersmanError) as error:
            problem = error
        if problem is not None or not written:
            failed = [rank for rank, part in enumerate(parts) if not part[0]]
            with suppress(OSError):
                _remove(temporary, [part_name(index, n), *([STATE] if index == 0 else [])])
            what = problem or f"rank {', '.join(map(str, failed))} could not write its part"
            raise SteersmanError(
                f"{self.folder}: checkpoint {step} could not be written: {getattr(what, 'strerror', None) or what}; "
                "earlier ones are intact: free space and run the same command again to resume"
            ) from problem

    def _commit(self, temporary: Path, step: int, parts: list[list[int]], state: dict[str, Any]) -> None:
        files = [
            {"name": part_name(index, len(parts)), "bytes": size, "latents": [start, stop]}
            for index, (_, size, start, stop) in enumerate(parts)
        ]
        write_json(temporary / STATE, seal(state | {"files": files}))
        final = self.folder_of(step)
        if os.path.lexists(final / STATE):
            self.remove(step)
        if final.exists():  # with something of the user's in it
            for record in [*files, {"name": STATE}]:
                os.replace(temporary / record["name"], final / record["name"])
            temporary.rmdir()
        else:
            os.replace(temporary, final)
        fsync_folder(self.folder)
        for old in self.steps()[: -self.keep]:
            if old != self.keep_also:
                self.remove(old)

    # Reading

    def folder_of(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, in order. One that lacks a file or has a damaged one counts: it is
        told of and not passed over."""
        found = ((_FOLDER.fullmatch(child.name), child) for child in self.folder.glob("step_*"))
        return sorted(int(match[1]) for match, child in found if match and any(child.glob("state*")))

    def load(
        self, latents: Callable[[str], tuple[int, int]], step: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors of a checkpoint, the newest if no step is given, of each the part of `latents(name)`, and its
        state; None if there is none.

        Each process compares the checksums of its share of the files. Raises a SteersmanError that names a file which
        is missing, cut short or damaged, on all of them.
        """
        steps = self.steps()
        if not steps:
            return None
        step = steps[-1] if step is None else step
        folder, problem = self.folder_of(step), None
        try:
            for number, record in enumerate(read_state(folder)["files"]):
                if number % self.group.size == self.group.index:
                    check_tensors(folder / record["name"])
        except SteersmanError as error:
            problem = error
        intact = self.group.all_gather(torch.tensor([problem is None])).flatten().tolist()
        with self.naming(step):
            if problem is not None:
                raise problem
            if not all(intact):
                raise SteersmanError(f"{folder}: a file of it that rank {intact.index(False)} read is damaged")
            return load_checkpoint(folder, latents, check=False)

    @contextmanager
    def naming(self, step: int) -> Iterator[None]:
        """The block reads the checkpoint of `step`: its errors say what to do about it."""
        try:
            with readable(self.folder_of(step)):
                yield
        except SteersmanError as error:
            before = [other for other in self.steps() if other < step]
            instead = f"resume from step {before[-1]}" if before else "begin again"
            raise SteersmanError(f"{error}; delete {self.folder_of(step)} to {instead}") from error


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What a checkpoint lacks, or holds in another form than expected, becomes a SteersmanError that names it."""
    try:
        yield
    except SteersmanError:
        raise
    except KeyError as error:
        raise SteersmanError(f"{folder} cannot be read: it lacks {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise SteersmanError(f"{folder} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint holds. Raises a SteersmanError, naming it, for anything but a state."""
    path = folder / STATE
    state = unseal(read_json_object(path), path)
    axes, files = state.get("axes"), state.get("files")
    well_formed = (
        _whole(state.get("step"))
        and isinstance(state.get("sae"), dict)
        and all(isinstance(state.get(name, 1.0), int | float) for name in ("scale", "scale_out"))
        and isinstance(state.get("inputs", ""), str)
        and isinstance(axes, dict)
        and all(axis in (0, 1) for axis in axes.values())
        and isinstance(files, list)
        and all(isinstance(record, dict) and _is_file_record(record) for record in files)
    )
    if not well_formed:
        raise SteersmanError(f"{path} is not the state of a checkpoint")
    return state


def _is_file_record(record: dict[str, Any]) -> bool:
    latents = record.get("latents")
    named = isinstance(record.get("name"), str) and _PART.fullmatch(record["name"]) is not None
    ranged = isinstance(latents, list) and len(latents) == 2 and all(map(_whole, latents)) and latents[0] <= latents[1]
    return named and ranged and _whole(record.get("bytes"))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _remove(folder: Path, names: list[str]) -> None:
    """Remove the files called `names`, whole or half written, and the folder if nothing else is in it."""
    remove_folder(folder, [one for name in names for one in (temporary_path(folder / name).name, name)])


def load_checkpoint(
    folder: Path, latents: Callable[[str], tuple[int, int]], *, check: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the parts of a checkpoint that belong to some latents, after comparing all checksums if `check` says so; see
    `Checkpoints.load`."""
    state = read_state(folder)
    parts: dict[str, list[Tensor]] = {}
    axes: dict[str, int] = state["axes"]
    with readable(folder):
        for record in sorted(state["files"], key=lambda record: record["latents"]):
            path = folder / record["name"]
            if not path.is_file():
                raise SteersmanError(f"{folder} cannot be read: {record['name']} is missing")
            if path.stat().st_size != record["bytes"]:
                raise SteersmanError(f"{folder} cannot be read: {record['name']} was cut short or altered")
            if check:
                check_tensors(path)
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
    tensors, state = load_checkpoint(folder, lambda _: _EVERY)
    with readable(folder), torch.no_grad():
        sae = SAE(SAEConfig.from_record(state["sae"]))
        for name, value in sae.state_dict().items():
            value.copy_(tensors.get(f"ema.{state_key(name)}", tensors[f"sae.{name}"]))
        sae.normalize_decoder()
        restored_inputs(sae.cfg, state, tensors).fold(sae)
    return sae
