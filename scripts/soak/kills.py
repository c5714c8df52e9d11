"""Kill jobs at random moments, again and again, and compare what comes out with undisturbed jobs, byte for byte.

Jobs of one, two and three processes cache activations of the bundled model, train an SAE on them or straight from the
model, and measure effects. In each round one of these happens to a job after a random time:

- `SIGKILL`, `SIGTERM`, `SIGINT`: to one of its processes or to all;
- `SIGSTOP`: a process stands still for a moment, and the job goes on;
- `hang`: a process stands still for good, and the others must end;
- `disk`: the disk is full (a small file system in memory, where this may be mounted);
- `text`, `model`: it is killed, and the text or the model, of the same name, size and date, is another when it resumes.

Then the same command runs again until it ends, and every file that two undisturbed jobs wrote alike must have their
bytes; no other file may be there. Processes are forked from this one, which has loaded all libraries, with RANK and
WORLD_SIZE set as a scheduler's launcher does; some jobs are started by `torchrun` instead.

    python scripts/soak/kills.py --kills 100 --seed 0

The table counts, for each event: `equal`, the same bytes in the end; `refused`, the same, and on the way a process
ended with one line that says why; and what must not be: `wrong` bytes, a `traceback`, a `hang`. The script fails where
there is one of these.
"""

import contextlib
import hashlib
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"STEERSMAN_PROGRESS": "0", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import matplotlib.figure  # noqa: F401 (loaded here, so that every job has it)
import torch
import tyro
from safetensors.torch import load_file, save_file

from steersman import LanguageModel, train_sae  # noqa: F401
from steersman.demo import MODEL_PATH, texts

HOOK = "blocks.1.hook_resid_post"
RANKS = {"cache": (1, 2), "train": (1, 2), "stream": (1, 3), "effects": (1, 2)}
"""Job -> how many processes it is started with; of three that stream, one runs the model."""
READS_TEXT = ("cache", "stream", "effects")
EVENTS = {"SIGKILL": 5, "SIGTERM": 3, "SIGINT": 3, "SIGSTOP": 2, "hang": 1, "disk": 2, "text": 2, "model": 2}
"""Event -> how often it is drawn."""
DISK_MB = 48
FRESH = torch.get_rng_state()
"""What a process starts with, and a forked one too."""
ENDS = {0, 2, 75, 130, -signal.SIGKILL, -signal.SIGTERM}
"""Exit codes that a process may have: done, refused, to be resumed, interrupted, killed."""


@dataclass(frozen=True, kw_only=True)
class Config:
    kills: int = 100
    """Events in all."""
    seed: int = 0
    """Seed of what happens, to whom and when."""
    folder: Path = Path("soak")
    """Where the jobs write; a folder `kills` in it is made, and deleted at the end."""
    jobs: tuple[str, ...] = ()
    """Of cache, train, stream and effects, those to run; all if none is named."""
    events: tuple[str, ...] = ()
    """Of the events, those to let happen; all if none is named."""
    torchrun: float = 0.1
    """Share of the jobs of several processes that torchrun starts."""
    timeout_seconds: float = 15.0
    """How long the processes of a job wait for one another."""
    limit_seconds: float = 90.0
    """How long a job may take to end after an event, above which it hangs."""


@dataclass
class Job:
    """A started job: its processes, and where their standard errors go."""

    pids: list[int]
    errors: Path
    launcher: subprocess.Popen[bytes] | None = None
    codes: dict[int, int] = field(default_factory=dict)

    def alive(self) -> list[int]:
        """The processes that have not ended."""
        if self.launcher is not None:
            return [] if self.launcher.poll() is not None else self.workers() or self.pids
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.codes]

    def workers(self) -> list[int]:
        """The processes that torchrun started."""
        with contextlib.suppress(OSError):
            parent = self.pids[0]
            return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        return []

    def wait(self, seconds: float) -> bool:
        """Whether all end in time."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        if self.launcher is not None:
            self.codes[self.pids[0]] = self.launcher.returncode
        return True

    def send(self, pids: list[int], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def said(self) -> str:
        """What its processes wrote to standard error; of torchrun's jobs, the workers."""
        pattern = "**/stderr.log" if self.launcher is not None else "*.txt"
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.errors.glob(pattern)))


class Place:
    """Where a job's inputs and output lie: a text and a model of its own, which may change."""

    def __init__(self, folder: Path, inputs: Path) -> None:
        self.folder, self.inputs, self.out = folder, inputs, folder / "disk" / "out"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(inputs / "model", folder / "model")
        shutil.copy2(inputs / "texts.txt", folder / "texts.txt")
        (folder / "disk").mkdir()

    def command(self, job: str, ranks: int, timeout: float) -> list[str]:
        text = ["--model", str(self.folder / "model"), "--text", str(self.folder / "texts.txt")]
        width = ["--context-length", "64", "--device", "cpu", "--out", str(self.out), "--timeout-seconds", str(timeout)]
        steps = ["--d-sae", "256", "--k", "8", "--batch-size", "256", "--checkpoint-every", "8", "--log-every", "8"]
        if job == "cache":
            rows = ["--hook", HOOK, "--tokens", "12000", "--shard-rows", "1500", "--batch-size", "4"]
            return ["cache", *text, *width, *rows]
        if job == "train":
            return ["train", "--store", str(self.inputs / "store"), *width[2:], *steps, "--tokens", "20000"]
        if job == "stream":
            model_ranks = ["--model-ranks", "1"] if ranks > 1 else []
            rows = ["--hook", HOOK, "--tokens", "6000", "--buffer-rows", "2048"]
            return ["train", *text, *width, *steps, *model_ranks, *rows]
        vectors = ["--vectors", "random", "--n-vectors", "18", "--shard-vectors", "2", "--ridge", "1"]
        rollouts = ["--rollouts", "6", "--base-rollouts", "14", "--new-tokens", "5"]
        rule = ["--scale-rule", "kl", "--scale-target", "0.2", "--heldout-texts", "4"]
        return ["effects", *text, *width[2:], "--sae", str(self.inputs / "sae"), *vectors, *rollouts, *rule]

    def digests(self) -> dict[str, str]:
        files = [file for file in sorted(self.out.rglob("*")) if file.is_file()]
        return {str(f.relative_to(self.out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    @contextlib.contextmanager
    def changed(self, what: str) -> Iterator[None]:
        """Within the block the text or the model is another of the same name, size and date."""
        path = self.folder / ("texts.txt" if what == "text" else "model/model.safetensors")
        content, date = path.read_bytes(), path.stat()
        if what == "text":
            path.write_bytes(content.replace(b"the", b"tha", 40))
        else:
            tensors = load_file(path)
            name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
            tensors[name] = tensors[name] * 1.25
            save_file(tensors, path, metadata={"format": "pt"})
        os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))
        yield
        path.write_bytes(content)
        os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))

    @contextlib.contextmanager
    def small_disk(self) -> Iterator[bool]:
        """Within the block the output lies on a small file system, unless that may not be mounted."""
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self.folder / "disk")]
        mounted = subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode == 0
        try:
            yield mounted
        finally:
            if mounted:
                subprocess.run(["umount", str(self.folder / "disk")], check=True)

    def fill(self) -> None:
        """Leave no room on the small disk."""
        with contextlib.suppress(OSError), open(self.folder / "disk" / "filler", "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * (1 << 16))


def start(command: list[str], ranks: int, errors: Path, *, torchrun: bool = False) -> Job:
    """Start a job of `ranks` processes."""
    shutil.rmtree(errors, ignore_errors=True)
    errors.mkdir(parents=True)
    if torchrun:
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0", "--redirects=3"]
        line += [f"--log-dir={errors}", f"--nproc-per-node={ranks}", "-m", "steersman", *command]
        with open(errors / "torchrun", "wb") as out:
            launcher = subprocess.Popen(line, stdout=out, stderr=out, start_new_session=True)
        return Job([launcher.pid], errors, launcher)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            os.setsid()
            torch.set_num_threads(1)  # its pool of threads did not come along, and is made anew while there is one
            torch.set_rng_state(FRESH)
            for stream, name in ((1, "out"), (2, "txt")):
                os.dup2(os.open(errors / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.argv = ["steersman", *command]
            runpy.run_module("steersman", run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Job(pids, errors)


class Soak:
    """The rounds, and what came out of them."""

    def __init__(self, config: Config) -> None:
        self.config, self.rng = config, random.Random(config.seed)
        self.folder = config.folder / "kills"
        self.inputs = self.folder / "inputs"
        self.whole: dict[tuple[str, int], dict[str, str]] = {}
        self.seconds: dict[tuple[str, int], float] = {}
        self.counts: dict[str, Counter[str]] = {}
        self.messages: Counter[str] = Counter()
        self.how = ""
        self.kinds = [(job, n) for job in config.jobs or RANKS for n in RANKS[job]]

    def run(self) -> bool:
        """All rounds; whether nothing was wrong."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.prepare()
        done, turn = 0, 0
        names = list(self.config.events or EVENTS)
        while done < self.config.kills:
            job, ranks = self.kinds[turn % len(self.kinds)]
            turn += 1
            event = self.rng.choices(names, [EVENTS[name] for name in names])[0]
            if (event in ("text", "model") and job not in READS_TEXT) or (event == "hang" and ranks == 1):
                event = "SIGKILL"
            outcome = self.round(job, ranks, event)
            self.counts.setdefault(event, Counter())[outcome.split(":")[0]] += 1
            done += outcome not in ("too late", "skipped")
            print(f"{done:4d}  {job:8} x {ranks}  {event:8} {outcome}{self.how}", flush=True)
            if not set(self.counts[event]) - {"skipped"} and self.counts[event]["skipped"] > 3:
                names.remove(event)  # nothing can be mounted here
        return self.report()

    def prepare(self) -> None:
        """Make the inputs, and for each kind of job two undisturbed results: files that differ are not compared."""
        self.inputs.mkdir(parents=True)
        shutil.copytree(MODEL_PATH, self.inputs / "model")
        (self.inputs / "texts.txt").write_text("\n".join(texts(400, seed=3)) + "\n")
        LanguageModel.load(str(self.inputs / "model"), device="cpu")  # so that jobs find every module loaded
        for job, n in (("cache", 1), ("train", 1)):
            place = self.undisturbed(job, n, f"input_{job}")
            os.replace(place.out, self.inputs / ("store" if job == "cache" else "sae"))
        for job, n in self.kinds:
            began = time.monotonic()
            one = self.undisturbed(job, n, f"undisturbed_{job}_{n}").digests()
            self.seconds[job, n] = time.monotonic() - began
            other = self.undisturbed(job, n, "other").digests()
            self.whole[job, n] = {name: digest if other.get(name) == digest else "" for name, digest in one.items()}
            differ = [name for name, digest in self.whole[job, n].items() if not digest]
            assert one.keys() == other.keys()
            print(f"{job} x {n}: {self.seconds[job, n]:.1f} s; {len(one)} files", end="")
            print(f", of which not compared: {', '.join(differ)}" if differ else "", flush=True)

    def undisturbed(self, job: str, n: int, name: str) -> Place:
        place = Place(self.folder / name, self.inputs)
        started = start(self.command(place, job, n), n, place.folder / "errors")
        assert started.wait(300), f"{job} x {n} does not end"
        assert set(started.codes.values()) == {0}, started.said()
        return place

    def command(self, place: Place, job: str, n: int) -> list[str]:
        return place.command(job, n, self.config.timeout_seconds)

    def round(self, job: str, n: int, event: str) -> str:
        """Let `event` happen to a job, then run it to its end; what came of it."""
        place = Place(self.folder / "chain", self.inputs)
        with place.small_disk() if event == "disk" else contextlib.nullcontext(True) as possible:
            if not possible:
                return "skipped"
            torchrun = n > 1 and event not in ("hang", "disk") and self.rng.random() < self.config.torchrun
            self.how = " (torchrun)" if torchrun else ""
            command, errors = self.command(place, job, n), place.folder / "errors"
            running = start(command, n, errors, torchrun=torchrun)
            time.sleep(self.rng.uniform(0.05, 1.0) * self.seconds[job, n] + (8.0 if torchrun else 0.0))
            if not (alive := running.alive()):
                return "too late" if self.ended(running, 5) is None else "traceback: before the event"
            self.happen(event, running, alive, place)
            problem = self.ended(running, self.config.limit_seconds)
            refused = 2 in running.codes.values()
            if problem is None and event in ("text", "model"):
                with place.changed(event):
                    problem, refused, fresh = self.on_changed(place, job, n, errors)
                if fresh:
                    return fresh
            if problem is not None:
                return problem
            if event == "disk":
                (place.folder / "disk" / "filler").unlink(missing_ok=True)
            final = start(command, n, errors)
            if (problem := self.ended(final, self.config.limit_seconds)) is not None:
                return problem
            if set(final.codes.values()) != {0}:
                return f"wrong: does not resume: {_last(final.said())}"
            if wrong := _compared(place.digests(), self.whole[job, n]):
                shutil.copytree(place.out, self.folder / f"wrong_{job}_{n}", dirs_exist_ok=True)
            return wrong or ("refused" if refused else "equal")

    def happen(self, event: str, running: Job, alive: list[int], place: Place) -> None:
        some = alive if self.rng.random() < 0.4 else [self.rng.choice(alive)]
        if event == "disk":
            place.fill()
        elif event == "SIGSTOP":
            running.send(some, signal.SIGSTOP)
            time.sleep(self.rng.uniform(0.3, 2.0))
            running.send(some, signal.SIGCONT)
        elif event == "hang":
            one = [self.rng.choice(alive)]
            running.send(one, signal.SIGSTOP)
            end = time.monotonic() + self.config.limit_seconds
            while set(running.alive()) - set(one) and time.monotonic() < end:
                time.sleep(0.05)
            if not set(running.alive()) - set(one):
                running.send(one, signal.SIGKILL)
        elif event in ("text", "model"):
            running.send(alive, signal.SIGKILL)
        else:
            number = getattr(signal, event)
            whole = running.pids if running.launcher is not None and number != signal.SIGKILL else some
            running.send(whole, number)

    def on_changed(self, place: Place, job: str, n: int, errors: Path) -> tuple[str | None, bool, str]:
        """Run a job whose text or model was changed: a problem, whether it was refused, and where it ran to its end,
        what came of it: that is right if nothing of the first was kept, so that all is of the second."""
        other = start(self.command(place, job, n), n, errors)
        if (problem := self.ended(other, self.config.limit_seconds)) is not None:
            return problem, False, ""
        if set(other.codes.values()) != {0}:
            return None, 2 in other.codes.values(), ""
        found, out = place.digests(), place.out
        shutil.rmtree(out)
        afresh = start(self.command(place, job, n), n, errors)
        if (problem := self.ended(afresh, self.config.limit_seconds)) is not None:
            return problem, False, ""
        compared = {name: self.whole[job, n].get(name) and digest for name, digest in place.digests().items()}
        mixed = _compared(found, {name: digest or "" for name, digest in compared.items()})
        return None, False, f"wrong: a mixture: {mixed}" if mixed else "equal"

    def ended(self, running: Job, seconds: float) -> str | None:
        """Wait for a job; what must not be, or None."""
        if not running.wait(seconds if running.launcher is None else 3 * seconds):  # torchrun loads all libraries
            for pid in {*running.alive(), *running.pids}:
                running.send([pid], signal.SIGKILL)
            running.wait(10)
            return f"hang: {_last(running.said())}"
        said = running.said()
        for line in said.splitlines():
            if line.startswith("steersman: "):
                self.messages[_kind(line)] += 1
        if "Traceback" in said:
            return f"traceback: {_last(said)}"
        odd = [] if running.launcher is not None else sorted(set(running.codes.values()) - ENDS)
        return f"traceback: exit code {odd[0]}: {_last(said)}" if odd else None

    def report(self) -> bool:
        columns = ("equal", "refused", "wrong", "traceback", "hang", "too late", "skipped")
        print(f"\n{'event':10}" + "".join(f"{name:>11}" for name in columns))
        total: Counter[str] = Counter()
        for event in EVENTS:
            counts = self.counts.get(event, Counter())
            total += counts
            print(f"{event:10}" + "".join(f"{counts[name]:11d}" for name in columns))
        print(f"{'all':10}" + "".join(f"{total[name]:11d}" for name in columns))
        print("\nlines that processes ended with:")
        for message, n in self.messages.most_common():
            print(f"{n:5d}  {message}")
        return not any(total[name] for name in ("wrong", "traceback", "hang"))


def _compared(found: dict[str, str], wanted: dict[str, str]) -> str:
    """In what two results differ; empty if in nothing."""
    parts = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    parts += [f"{name} is left" for name in found.keys() - wanted.keys()]
    parts += [f"{name} differs" for name in wanted.keys() & found.keys() if wanted[name] not in ("", found[name])]
    return f"wrong: {', '.join(sorted(parts)[:4])}" if parts else ""


def _last(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1][:240] if lines else "nothing was said"


def _kind(line: str) -> str:
    """A message without its numbers, names of folders and values."""
    line = re.sub(r"/\S+", "PATH", line.removeprefix("steersman: "))
    return re.sub(r"'[0-9a-f]{8,}'|\d[\d.,e+-]*", "N", line)[:150]


def main(args: Config) -> None:
    """Run the rounds; fails where something was wrong."""
    torch.set_num_threads(1)
    began = time.monotonic()
    soak = Soak(args)
    good = soak.run()
    print(f"\n{args.kills} events in {(time.monotonic() - began) / 60:.0f} minutes")
    if not good:
        raise SystemExit(1)
    shutil.rmtree(soak.folder, ignore_errors=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
