"""Damage files of every kind that Steersman reads, by the thousand, and count what its readers make of them.

A specimen of each kind is made first: SAE folders of every format, vectors, GGUF vectors, effect maps, effects, stores,
checkpoints, work that was cut short, settings, texts, models. Each try copies one, damages one of its files, and opens
it in a worker process that is held to a time, and to twice the specimen's size in memory beyond what a process has
anyway. What opens is compared with the undamaged specimen. Right is: refused in one line, or equal. A file that carries
no checksum, of another program or plain text, may also be read as what it now says.

    python scripts/soak/damaged_files.py --files 10000
    python scripts/soak/damaged_files.py --files 500 --kinds sae vector --seed 7
    python scripts/soak/damaged_files.py --kinds store --case 1234
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

import steersman.config
import steersman.sae.formats.inspection
import steersman.steer.effects.folder
import steersman.steer.labels.read
import steersman.steer.methods.examples
import steersman.train.run.checkpoints
from steersman import (
    SAE,
    ActivationStore,
    EffectMap,
    LanguageModel,
    SAEConfig,
    SteeringVector,
    TrainConfig,
    cache_activations,
    collect_effects,
    train_sae,
)
from steersman.demo import MODEL_PATH, texts
from steersman.errors import SteersmanError
from steersman.sae import FeatureStats
from steersman.sae.formats import convert
from steersman.text import read_texts

HOOK = "blocks.1.hook_resid_post"
MB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Config:
    files: int = 10_000
    """Damaged files in all."""
    kinds: tuple[str, ...] = ()
    """Kinds to damage; all if none is named."""
    jobs: int = 2
    """Worker processes."""
    seed: int = 0
    """Seed of what is damaged, and how."""
    seconds: float = 20.0
    """Seconds of its own computing after which a try counts as hung, and six times as many by the clock."""
    base_mb: int = 96
    """Memory that a try may take beside twice the size of its specimen."""
    case: int | None = None
    """Try this one alone, in this process, with its traceback."""
    worker: str = ""
    """Used by the processes that this one starts."""


# What is read, and what it comes to


def digest(*parts: Any) -> str:
    """Of tensors and of whatever JSON can hold."""
    sums = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            sums.update(str((part.dtype, tuple(part.shape))).encode())
            part = part.detach().cpu().contiguous().reshape(-1)
            sums.update(part.view(torch.uint8).numpy().tobytes() if len(part) else b"")
        else:
            sums.update(json.dumps(part, sort_keys=True, default=str).encode())
    return sums.hexdigest()


def of_sae(sae: SAE) -> str:
    """Its function, origin and statistics (if it still has them)."""
    cfg = {name: value for name, value in vars(sae.cfg).items() if name != "metadata"}
    stats = sae.feature_stats
    figures = () if stats is None else (stats.max_act, stats.density, stats.mean_act, stats.n_tokens)
    expected = (1.0, 2.5) if stats is None else (1.0, stats.median_norm)
    return digest(cfg, *(value for _, value in sorted(sae.state_dict().items()))) + (
        "" if stats is None else digest(*figures, *expected)
    )


def of_store(store: ActivationStore) -> str:
    parts: list[Any] = [store.hook_names, store.model_name, store.n_rows]
    for hook in store.hook_names:
        stats = store.stats(hook)
        parts += [store.activations(torch.arange(store.n_rows), hook), stats.mean, stats.median_norm]
    tokens = store.tokens(0, store.n_rows)
    return digest(*parts, torch.as_tensor(tokens.token_ids), torch.as_tensor(tokens.doc_ids))


def of_effects(effects: steersman.steer.effects.folder.Effects) -> str:
    parts = [part for shard in effects.iterate() for part in (shard.vectors, shard.effect, shard.scale)]
    return digest(*parts, effects.baseline.mean, effects.baseline.median_norm)


def of_text(path: Path) -> str:
    if "examples" in path.name:
        return digest(str(steersman.steer.methods.examples.read_examples(path)))
    if "labels" in path.name:
        return digest(str(dict(steersman.steer.labels.read.read_labels(path))))
    return digest(read_texts(path))


def of_model(folder: Path) -> str:
    lm = LanguageModel.load(str(folder), device="cpu")
    return digest(lm.logits(lm.encode("Once upon a time").input_ids))


def converted(path: Path) -> str:
    target = path.parent / "converted"
    convert(path, target, to="saelens")
    return of_sae(SAE.load(target))


_LM: list[LanguageModel] = []


def demo() -> LanguageModel:
    if not _LM:
        _LM.append(LanguageModel.load(str(MODEL_PATH), device="cpu"))
    return _LM[0]


def cache(out: Path) -> ActivationStore:
    return cache_activations(demo(), STORIES, hook=HOOK, out=out, tokens=1200, shard_rows=400, batch_size=2)


def train(store: Path, out: Path) -> SAE:
    config = TrainConfig(
        d_sae=64, k=4, batch_size=64, tokens=1280, device="cpu", checkpoint_every=5, keep_checkpoints=2, log_every=5,
        statistics_tokens=256,
    )  # fmt: skip
    train_sae(ActivationStore.open(store), config, out)
    return SAE.load(out)


def measure(out: Path) -> steersman.steer.effects.folder.Effects:
    sae = SAE(SAEConfig(d_in=demo().d_model, d_sae=32, k=4, hook_name=HOOK), torch.Generator().manual_seed(0))
    return collect_effects(
        demo(), sae, vectors="random", n_vectors=6, scale_rule="fixed", scale_target=2.0, rollouts=4, new_tokens=4,
        shard_vectors=2, prompts=("Once upon a time",), out=str(out),
    )  # fmt: skip


READERS: dict[str, Callable[[Path], str]] = {
    "sae": lambda path: of_sae(SAE.load(path)),
    "inspect": lambda path: digest(steersman.sae.formats.inspection.inspect(path).to_text().replace(str(path), "")),
    "convert": converted,
    "vector": lambda path: (lambda v: digest(v.provenance(), v.hook_names, *v.directions.values()))(
        SteeringVector.load(path)
    ),
    "map": lambda path: (lambda m: digest(m.hook_name, m.model_name, m.M, m.b, m.median_scale))(EffectMap.load(path)),
    "effects": lambda path: of_effects(steersman.steer.effects.folder.Effects.open(path)),
    "store": lambda path: of_store(ActivationStore.open(path)),
    "checkpoint": lambda path: of_sae(steersman.train.run.checkpoints.checkpoint_to_sae(path)),
    "resume_cache": lambda path: of_store(cache(path)),
    "resume_train": lambda path: of_sae(train(path / "store", path / "run")),
    "resume_effects": lambda path: of_effects(measure(path)),
    "yaml": lambda path: digest(steersman.config.read_yaml(path, TrainConfig)),
    "text": of_text,
    "model": of_model,
}  # fmt: skip
WEIGHTS = {"resume_cache": 0.15, "resume_train": 0.1, "resume_effects": 0.1, "model": 0.15, "convert": 0.5}
"""How often a kind is tried against the others, which are quicker."""
OURS = {"map", "effects", "store", "checkpoint", "resume_cache", "resume_train", "resume_effects"}
"""Kinds whose files all carry checksums; of the others those that are called so."""
STORIES = texts(40, seed=21)


# Specimens


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({key: value.clone().contiguous() for key, value in content.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{key: value.contiguous().numpy() for key, value in content.items()})
    elif path.suffix == ".pt":
        torch.save(content, path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def make_saes(folder: Path) -> None:
    """SAE folders: ours of several architectures, and one of each foreign format."""
    g = torch.Generator().manual_seed(0)
    D, L = 16, 48
    options: dict[str, dict[str, Any]] = {
        "topk": {"k": 4}, "batch_topk": {"k": 4}, "jumprelu": {}, "gated": {}, "relu": {},
        "matryoshka": {"k": 4, "group_sizes": (16, 32)},
    }  # fmt: skip
    made: dict[str, SAE] = {}
    for name, option in options.items():
        cfg = SAEConfig(d_in=D, d_sae=L, architecture=name, hook_name=HOOK, model_name="m", **option)
        sae = made[name] = SAE(cfg, g)
        with torch.no_grad():
            for part in (*sae.parameters(), *sae.buffers()):
                part.add_(torch.rand(part.shape, generator=g) * 0.1)
        arrays = {key: torch.rand(L, generator=g) for key in ("max_act", "density", "mean_act")}
        sae.feature_stats = FeatureStats(**arrays, n_tokens=500, median_norm=2.5)
        sae.save(folder / f"own_{name}")
    for name in ("topk", "gated", "batch_topk", "matryoshka"):
        convert(made[name], folder / f"dictionary_learning_{name}", to="dictionary_learning")
    convert(made["topk"], folder / "sparsify", to="sparsify")
    e, d, b, c = made["relu"].W_enc.detach(), made["relu"].W_dec.detach(), torch.rand(L), torch.rand(D)
    fields = {"d_in": D, "d_sae": L, "apply_b_dec_to_input": True, "normalize_activations": "none", "k": 4}
    plain = {"W_enc": e, "b_enc": b, "W_dec": d, "b_dec": c}
    for kind in ("standard", "topk", "jumprelu"):
        tensors = plain | ({"threshold": b} if kind == "jumprelu" else {})
        write(folder / f"saelens_{kind}", "sae_weights.safetensors", tensors)
        metadata = {"hook_name": HOOK, "model_name": "m"}
        write(folder / f"saelens_{kind}", "cfg.json", fields | {"architecture": kind, "metadata": metadata})
    write(folder / "saelens_topk", "activation_scaler.json", {"scaling_factor": 1.5})
    write(folder / "gemma_scope", "params.npz", plain | {"threshold": b})
    lower = {"w_enc": e, "w_dec": d, "b_enc": b, "b_dec": c, "threshold": b}
    write(folder / "gemma_scope_2", "params.safetensors", lower)
    write(folder / "gemma_scope_2", "config.json", {"architecture": "jump_relu", "model_name": "m"})
    linear = {"encoder.weight": e.T, "encoder.bias": b, "decoder.weight": d.T, "decoder.bias": c}
    scope = {"d_model": D, "d_sae": L, "hook_point_in": HOOK, "jump_relu_threshold": 0.2}
    write(folder / "llama_scope", "checkpoints/final.safetensors", linear)
    write(folder / "llama_scope", "hyperparams.json", scope | {"dataset_average_activation_norm": {"in": 4.0}})
    square = {"W_E": e, "b_E": b, "W_D": d, "b_D": c, f"dataset_average_activation_norm.{HOOK}": torch.tensor(3.0)}
    config = {
        "sae_type": "sae",
        "d_model": D,
        "act_fn": "relu",
        "hook_point_in": HOOK,
        "norm_activation": "dataset-wise",
    }
    for name, content in {"sae_weights.safetensors": square, "sae_weights.pt": {"sae": square}}.items():
        write(folder / f"llamascopium_{Path(name).suffix[1:]}", name, content)
        write(folder / f"llamascopium_{Path(name).suffix[1:]}", "config.json", config)
    pickled = {"pre_bias": c, "encoder.weight": e.T, "latent_bias": b, "decoder.weight": d.T, "activation": "TopK"}
    write(folder / "openai", "6.pt", pickled | {"activation_state_dict": {"k": 4, "postact_fn": "ReLU"}})


def interrupted(work: Callable[[Path], Any], out: Path, after: str) -> None:
    """Do `work` in a process that is killed once a file that matches `after` is there."""
    command = [sys.executable, __file__, "--worker", f"{work.__name__}:{out}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(out.rglob(after)):
        time.sleep(0.002)
    process.kill()
    process.wait()


def make(folder: Path, kinds: Iterable[str]) -> None:
    """All specimens of these kinds, as `folder/kind/name`."""
    kinds = set(kinds)
    for kind in kinds & {"sae", "inspect", "convert"}:
        make_saes(folder / kind)
    if kinds & {"vector"}:
        v = SteeringVector(directions={f"blocks.{i}.hook_resid_post": torch.randn(32) for i in (1, 2)}, method="pca")
        for name in ("own_v.safetensors", "own_v.gguf"):
            v.save(folder / "vector" / name)
        import gguf

        writer = gguf.GGUFWriter(folder / "vector" / "foreign.gguf", "controlvector")
        writer.add_string("controlvector.model_hint", "llama")
        writer.add_array("controlvector.trained", [1, 2, 3])
        writer.add_tensor("direction.1", np.ones(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    if kinds & {"map", "effects", "resume_effects"}:
        measure(folder / "measured").fit(ridge=1.0).save(folder / "measured_map.safetensors")
    if "effects" in kinds:
        shutil.copytree(folder / "measured", folder / "effects" / "effects")
    if "resume_effects" in kinds:
        target = shutil.copytree(folder / "measured", folder / "resume_effects" / "effects")
        (target / "00002.safetensors").unlink()
    if "map" in kinds:
        (folder / "map").mkdir()
        shutil.copy(folder / "measured_map.safetensors", folder / "map" / "map.safetensors")
    if kinds & {"store", "checkpoint", "resume_train"}:
        cache(folder / "cached")
        train(folder / "cached", folder / "trained")
    if "store" in kinds:
        shutil.copytree(folder / "cached", folder / "store" / "store")
    if "checkpoint" in kinds:
        shutil.copytree(folder / "trained" / "checkpoints", folder / "checkpoint" / "run" / "checkpoints")
    if "resume_train" in kinds:
        target = folder / "resume_train" / "both"
        shutil.copytree(folder / "cached", target / "store")
        shutil.copytree(folder / "trained", target / "run")
        for name in ("cfg.json", "sae_weights.safetensors", "feature_stats.safetensors"):
            (target / "run" / name).unlink()
    if "resume_cache" in kinds:
        interrupted(cache, folder / "resume_cache" / "store", "00000.safetensors")
    write(folder / "yaml", "train.yaml", "d_sae: 64\nk: 4\ntokens: 1e6\nbetas: [0.9, 0.99]\narchitecture: topk\n")
    lines = "\n".join(json.dumps({"text": text}) for text in STORIES[:20])
    write(folder / "text", "stories.jsonl", lines)
    write(folder / "text", "stories.txt", "\n".join(STORIES[:20]))
    write(folder / "text", "examples.jsonl", json.dumps({"positive": "I love it", "negative": "I hate it"}) + "\n")
    write(folder / "text", "labels.json", {"1": "fog", "2": "rain"})
    if "model" in kinds:
        shutil.copytree(MODEL_PATH, folder / "model" / "model")


# Damage


def flip(r: random.Random, content: bytearray) -> None:
    for _ in range(r.choice((1, 1, 1, 4))):
        if content:
            content[r.randrange(len(content))] ^= 1 << r.randrange(8)


def cut(r: random.Random, content: bytearray) -> None:
    del content[r.randrange(len(content) + 1) :]


def zero(r: random.Random, content: bytearray) -> None:
    start = r.randrange(len(content) + 1)
    stop = min(len(content), start + r.choice((1, 8, 64, 4096)))
    content[start:stop] = bytes(stop - start)


def junk(r: random.Random, content: bytearray) -> None:
    start = r.randrange(len(content) + 1)
    content[start:start] = r.randbytes(r.choice((1, 3, 8, 500)))


def repeat(r: random.Random, content: bytearray) -> None:
    start = r.randrange(len(content) + 1)
    content[start:start] = content[start : start + r.choice((1, 16, 300))]


def noise(r: random.Random, content: bytearray) -> None:
    content[:] = r.randbytes(min(len(content), 5000))


def head(r: random.Random, content: bytearray) -> None:
    """A length at the beginning of the file, or near it, that says something else."""
    place = r.choice((0, 0, 4, 8, 16, 24))
    content[place : place + 8] = r.choice((0, 1, 255, 1 << 31, 1 << 40, (1 << 64) - 1)).to_bytes(8, "little")


BYTES: tuple[Callable[[random.Random, bytearray], None], ...] = (flip, flip, flip, cut, zero, junk, repeat, noise, head)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, 1e308, -1e-320, float("nan"), float("inf"), 10**30, "", "x", "false", "1" * 5000,
    "\u0000", "\ud800", [], {}, [1, [2]], {"a": {}}, "../../etc/passwd", 1 << 62, 5,
)  # fmt: skip
TEXTS = (
    "[" * 50_000, '{"a":' * 50_000, "9" * 5000, "\ufeff{}", "", "null", "[]", "\ud800", "a: &a [*a, *a]",
    "x: [&a [1,1,1,1]" + "".join(f", &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij")) + "]",
    "k: 2020-99-99", "k: " + "[" * 3000, "? [a]\n: b", "x" * 100_000,
)  # fmt: skip


def change_json(r: random.Random, content: bytearray) -> None:
    """Another value or key somewhere in a JSON text."""
    value = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, below in entries:
            places.append((node, key))
            collect(below)

    collect(value)
    node, key = r.choice(places)
    how = r.randrange(5)
    if how == 0 and isinstance(node, dict):
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[str(key) + "_"] = node.pop(key)
    elif how == 2 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = r.choice((node[key] + 1, -node[key], node[key] * 10**9, str(node[key]), [node[key]]))
    else:
        node[key] = r.choice(VALUES)
    with contextlib.suppress(UnicodeEncodeError):
        content[:] = json.dumps(value, ensure_ascii=r.random() < 0.5).encode()


def replace_file(r: random.Random, path: Path) -> None:
    """Something else in the place of a file."""
    path.unlink()
    how = r.choice(("gone", "gone", "pipe", "folder", "nowhere", "loop", "/dev/zero", "/dev/urandom", "parent"))
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "gone":
        path.symlink_to({"nowhere": "gone/gone", "loop": path.name, "parent": "."}.get(how, how))


def damage(r: random.Random, specimen: Path) -> str:
    """Damage one file of a specimen; returns which, and how."""
    files = [specimen] if specimen.is_file() else sorted(file for file in specimen.rglob("*") if file.is_file())
    path = r.choice(files)
    text = path.suffix in (".json", ".yaml", ".jsonl", ".txt")
    how = r.random()
    if how < 0.12:
        replace_file(r, path)
        return f"{path.name}: in its place"
    content = bytearray(path.read_bytes())
    if text and how < 0.24:
        content[:] = r.choice(TEXTS).encode("utf-8", "surrogatepass")
        name = "text"
    elif path.suffix == ".json" and how < 0.65:
        change_json(r, content)
        name = "value"
    elif path.suffix == ".safetensors" and how < 0.3:
        length = int.from_bytes(content[:8], "little")
        header = bytearray(content[8 : 8 + length])
        change_json(r, header)
        content[: 8 + length] = len(header).to_bytes(8, "little") + header
        name = "header"
    else:
        operation = r.choice(BYTES)
        operation(r, content)
        name = operation.__name__
    path.write_bytes(content)
    return f"{path.name}: {name}"


# Tries


class Hung(BaseException):
    """A try took too long."""


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Tries:
    """Damages and opens specimens, in this process."""

    def __init__(self, specimens: Path, config: Config) -> None:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        self.specimens, self.config = specimens, config
        kinds = sorted(config.kinds or READERS)
        self.all = {kind: sorted((specimens / kind).iterdir()) for kind in kinds}
        self.weights = [WEIGHTS.get(kind, 1.0) for kind in kinds]
        self.whole: dict[Path, str] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="damaged-"))

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def copy(self, original: Path) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        target = self.folder / original.name
        return Path((shutil.copytree if original.is_dir() else shutil.copy)(original, target))

    def pick(self, number: int) -> tuple[random.Random, str, Path]:
        r = random.Random(f"{self.config.seed}/{number}")
        kind = r.choices(list(self.all), self.weights)[0]
        return r, kind, r.choice(self.all[kind])

    def one(self, number: int, raising: bool = False) -> tuple[str, str, str]:
        """Kind, outcome and what was done, for try `number`."""
        r, kind, original = self.pick(number)
        if original not in self.whole:  # also warms up what is imported and made at first use
            self.whole[original] = READERS[kind](self.copy(original))
        specimen = self.copy(original)
        size = sum(file.stat().st_size for file in ([specimen] if specimen.is_file() else specimen.rglob("*")))
        done = f"{original.parent.name}/{original.name} {damage(r, specimen)}"
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is that of now
        before = memory("VmRSS")
        outcome, said = self.open(kind, specimen, raising)
        if outcome == "opened":
            checked = kind in OURS or original.name.startswith("own_")
            if said.startswith(self.whole[original]) or self.whole[original].startswith(said):
                outcome = "equal"  # the statistics of an SAE may be gone
            else:
                outcome = "silently wrong" if checked else "as it says now"
            said = ""
        if (grown := memory("VmHWM") - before) > 2 * size + self.config.base_mb * MB:
            outcome, said = "over memory", f"{grown / MB:.0f} MB for {size / MB:.2f} MB; {outcome} {said}"
        return kind, outcome, f"{done}; {said}"

    def open(self, kind: str, specimen: Path, raising: bool) -> tuple[str, str]:
        signal.setitimer(signal.ITIMER_PROF, self.config.seconds)  # its own: other work may slow it down
        signal.setitimer(signal.ITIMER_REAL, 6 * self.config.seconds)
        try:
            return "opened", READERS[kind](specimen)
        except Hung:
            return "hung", ""
        except SteersmanError as error:
            if raising:
                print(f"refused: {error}")
            if "\n" in str(error) or len(str(error)) > 3000:
                return "other errors", f"a message of several lines, or without end: {str(error)[:200]!r}"
            return "refused", ""
        except Exception as error:
            if raising:
                raise
            return "other errors", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)


def hang(*_: Any) -> None:
    raise Hung


def worker(specimens: Path, config: Config) -> None:
    """Numbers of tries on standard input, their results on standard output."""
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, hang)
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed is no result
    tries = Tries(specimens, config)
    for line in sys.stdin:
        results.write(json.dumps(tries.one(int(line))) + "\n")
        results.flush()
    tries.close()


class Worker:
    """A worker process; one that hangs where no signal reaches it is killed and another takes its place."""

    def __init__(self, specimens: Path, config: Config) -> None:
        self.command = [sys.executable, __file__, "--worker", str(specimens), "--seed", str(config.seed)]
        self.command += ["--seconds", str(config.seconds), "--base-mb", str(config.base_mb)]
        self.command += ["--kinds", *config.kinds] if config.kinds else []
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "STEERSMAN_PROGRESS": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment | {"TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip

    def give(self, number: int) -> None:
        assert self.process.stdin is not None
        self.number, self.since = number, time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()


def run(specimens: Path, config: Config) -> list[tuple[int, str, str, str]]:
    """(number, kind, outcome, what was done) of every try."""
    results: list[tuple[int, str, str, str]] = []
    numbers = iter(range(config.files))
    selector = selectors.DefaultSelector()
    tries, workers = Tries(specimens, config), [Worker(specimens, config) for _ in range(config.jobs)]

    def go_on(one: Worker) -> None:
        if (number := next(numbers, None)) is None:
            assert one.process.stdin is not None
            one.process.stdin.close()
            one.process.wait()
        else:
            selector.register(one.process.stdout, selectors.EVENT_READ, one)  # pyright: ignore[reportArgumentType]
            one.give(number)

    for one in workers:
        go_on(one)
    while selector.get_map():
        ready = [key.data for key, _ in selector.select(timeout=1.0)]
        late = [
            key.data for key in selector.get_map().values()
            if key.data not in ready and time.monotonic() - key.data.since > 6 * config.seconds + 60
        ]  # fmt: skip
        for one in (*ready, *late):
            selector.unregister(one.process.stdout)
            line = one.process.stdout.readline() if one in ready else ""
            if line:
                results.append((one.number, *json.loads(line)))
            else:
                kind = tries.pick(one.number)[1]
                outcome = "hung" if one in late else "other errors"
                results.append((one.number, kind, outcome, "" if one in late else "the process died"))
                one.process.kill()
                one.process.wait()
                one.start()
            go_on(one)
    tries.close()
    return results


OUTCOMES = ("refused", "equal", "as it says now", "silently wrong", "other errors", "hung", "over memory")
BAD = OUTCOMES[3:]


def report(results: list[tuple[int, str, str, str]]) -> int:
    """Print the counts by kind, and each bad try with its number; returns how many there are."""
    counts = {kind: Counter[str]() for kind in sorted({kind for _, kind, _, _ in results})}
    for _, kind, outcome, _ in results:
        counts[kind][outcome] += 1
    print("| kind | files | " + " | ".join(OUTCOMES) + " |\n" + "|---" * (len(OUTCOMES) + 2) + "|")
    for kind, found in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
        print(f"| {kind} | {found.total()} | " + " | ".join(str(found[outcome]) for outcome in OUTCOMES) + " |")
    bad = sorted(result for result in results if result[2] in BAD)
    for number, _, outcome, done in bad[:100]:
        print(f"case {number}: {outcome}: {done}")
    return len(bad)


def main(args: Config) -> None:
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, hang)
    if args.worker.startswith(("cache:",)):
        cache(Path(args.worker.partition(":")[2]))
        return
    if args.worker:
        worker(Path(args.worker), args)
        return
    unknown = sorted(set(args.kinds) - set(READERS))
    if unknown:
        raise SystemExit(f"no kinds {', '.join(unknown)}; there are {', '.join(READERS)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="specimens-") as folder:
        logging.disable(logging.WARNING)
        make(Path(folder), args.kinds or READERS)
        if args.case is not None:
            tries = Tries(Path(folder), args)
            print(tries.one(args.case, raising=True))
            tries.close()
            return
        made = time.monotonic()
        bad = report(run(Path(folder), args))
    spent = time.monotonic() - made
    print(
        f"{args.files:,} files in {spent:.0f} s ({args.files / spent:.0f} a second), specimens in {made - began:.0f} s"
    )
    if bad:
        raise SystemExit(f"{bad} tries were neither refused, nor equal, nor read as what they say now")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
