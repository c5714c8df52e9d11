"""What `steersman inspect` says of each kind of thing: a record of plain values, in the order shown."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from steersman.commands.options import model_config
from steersman.commands.vector_show import edits_record
from steersman.commands.vector_show import record as vector_record
from steersman.errors import SteersmanError
from steersman.files import format_bytes
from steersman.lm import LanguageModel
from steersman.lm.hooks import KINDS
from steersman.lm.layout import block_parts, find_blocks
from steersman.lm.load import local_folder, model_class
from steersman.lm.tokens import TextEncoder
from steersman.reading import read_json_object
from steersman.sae import SAE
from steersman.sae.formats.inspection import inspect
from steersman.steer import EditSet, EffectMap, Effects, SteeringVector
from steersman.steer.effects.folder import finished_shards
from steersman.steer.effects.map import WEAK
from steersman.steer.effects.map_file import NAME as MAP_NAME
from steersman.steer.effects.measured import FORMAT as EFFECTS_FORMAT
from steersman.steer.effects.measured import EffectsManifest
from steersman.train import ActivationStore
from steersman.train.run.checkpoints import Checkpoints, checkpoint_to_sae
from steersman.train.run.run_folder import METRICS, RECORD
from steersman.train.store.manifest import FORMAT as STORE_FORMAT
from steersman.train.store.manifest import MANIFEST

Record = dict[str, Any]


def kind_of(path: str) -> str:
    """What is named: model, store, run, vector, edits, effects, effect map or SAE, which hub ids are taken for."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / MANIFEST).is_file():
            kinds = {STORE_FORMAT: "store", EFFECTS_FORMAT: "effects"}
            return kinds.get(read_json_object(folder / MANIFEST).get("format", ""), "SAE")
        if (folder / "parts").is_dir() and not any(folder.glob("*.json")):
            return "store"  # several processes were writing it when they were stopped
        if (folder / RECORD).is_file():
            known = read_json_object(folder / RECORD)
            return "run" if "training" in known and "recipe" in known else "model" if "model_type" in known else "SAE"
        return "effect map" if (folder / MAP_NAME).is_file() else "SAE"
    if folder.suffix == ".gguf":
        return "vector"
    if folder.suffix == ".safetensors" and folder.is_file():
        kinds = {"steersman.vector": "vector", "steersman.edits": "edits", "steersman.effect_map": "effect map"}
        return kinds.get(_format(folder), "SAE")
    return "SAE"


def _format(path: Path) -> str:
    """The `format` in a safetensors file's metadata; empty for a file that has none or is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("format", "")
    except (SafetensorError, OSError):
        return ""


def look(path: str, kind: str, *, format: str | None = None, verify: bool = False) -> Record:
    """What is known of it, named in the order to show. With `verify` everything in it is read and compared with its
    checksums. Raises SteersmanError for what cannot be read."""
    looks: Mapping[str, Callable[[], Record]] = {
        "model": lambda: look_at_model(path, verify=verify),
        "store": lambda: look_at_store(path, verify=verify),
        "run": lambda: look_at_run(path),
        "vector": lambda: look_at_vector(path),
        "edits": lambda: edits_record(EditSet.load(path)),
        "effects": lambda: look_at_effects(path),
        "effect map": lambda: look_at_map(path),
        "SAE": lambda: look_at_sae(path, format),
    }
    record = {"kind": kind, "path": path, **looks[kind]()}
    if verify and kind == "run":
        checkpoint_to_sae(path)  # reads the newest checkpoint with its checksums
    elif verify and kind == "SAE" and Path(path).exists():
        SAE.load(path, format=format)
    elif verify and kind == "effects":
        for _ in Effects.open(path).iterate():
            pass
    return {**record, "verified": True} if verify else record


def look_at_sae(path: str, format: str | None) -> Record:
    """An SAE of any format."""
    found = inspect(path, format)
    return {**asdict(found), "text": found.to_text()}


def look_at_model(path: str, revision: str | None = None, *, verify: bool = False) -> Record:
    """A model by its configuration and tokenizer. Its weights are read with `verify`, which tries the hook points."""
    from transformers import AutoTokenizer

    config = model_config(path, revision)
    text = config.get_text_config()
    folder = local_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if folder is None else str(folder), revision=revision)
    except Exception as error:  # whatever transformers makes of a damaged or missing file
        raise SteersmanError(f"the tokenizer of {path} cannot be read: {error}") from error
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    if verify:
        names = LanguageModel.load(path, revision=revision, dtype="auto", bos=False).hook_names()
    else:
        blocks = enumerate(find_blocks(model, text.num_hidden_layers)[1])
        names = [f"blocks.{layer}.{KINDS[kind][0]}" for layer, block in blocks for kind in block_parts(block)]
    counts = Counter(name.split(".", 2)[2] for name in names if name.startswith("blocks."))
    bos = tokenizer.bos_token
    adds = bos is not None and TextEncoder(tokenizer, is_encoder=False, bos=False).adds_bos
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")] if folder else []
    return {
        "type": config.model_type,
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "heads": getattr(text, "num_attention_heads", None),
        "vocabulary": text.vocab_size,
        "tokens in the tokenizer": len(tokenizer),
        "context length": getattr(text, "max_position_embeddings", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(getattr(config, "dtype", None) or "not recorded").removeprefix("torch."),
        "weights": format_bytes(sum(file.stat().st_size for file in files)) if files else "not here",
        "BOS": bos,
        "tokenizer adds BOS": adds,
        "EOS": tokenizer.eos_token,
        "chat template": bool(getattr(tokenizer, "chat_template", None)),
        "hook points" if verify else "hook points by its layout (--verify tries them)": [
            f"blocks.{{0..{text.num_hidden_layers - 1}}}.{name}"
            + ("" if count == text.num_hidden_layers else f" ({count} of the layers)")
            for name, count in counts.items()
        ],
    }


def look_at_store(path: str, *, verify: bool) -> Record:
    """A store of activations, finished or not."""
    store = ActivationStore.open(path, allow_partial=True, verify=verify)
    config = store.manifest.config
    hooks: Record = {}
    for hook in store.hook_names:
        hooks[hook] = {"width": store.width(hook), **((store.manifest.statistics or {}).get(hook) or {})}
        if store.complete:
            hooks[hook] |= {"large rows": store.stats(hook).large_rows() or "none"}
    wanted = config.get("tokens")
    return {
        "complete": store.complete,
        "rows": store.n_rows,
        "rows asked for": wanted,
        "rows left out as not finite": store.manifest.n_skipped,
        "shards": len(store.manifest.shards),
        "size": format_bytes(store.n_bytes),
        "dtype": store.manifest.dtype,
        "model": store.model_name or "not recorded",
        "text": config.get("text"),
        "context length": config.get("context_length"),
        "hook points": hooks,
        "settings": {k: v for k, v in config.items() if k not in ("text", "tokens", "context_length", "hooks")},
    }


def look_at_run(path: str) -> Record:
    """A training run, finished or not: its configuration, how far it is, its checkpoints; of a finished one the SAE."""
    folder = Path(path)
    known = read_json_object(folder / RECORD)
    training, recipe = known["training"], known["recipe"]
    finished = (folder / "cfg.json").is_file()
    steps = Checkpoints(folder / "checkpoints", 1).steps() if (folder / "checkpoints").is_dir() else []
    last = _last_line(folder / METRICS)
    record: Record = {
        "finished": finished,
        "steps": recipe.get("n_steps"),
        "last step logged": last.get("step"),
        "checkpoints": steps,
        "architecture": training.get("architecture", training.get("activation")),
        "last figures": {name: value for name, value in last.items() if name != "step"},
        "data": known.get("data"),
        "recipe": recipe,
        "settings": {name: value for name, value in training.items() if value is not None},
    }
    return {**record, "SAE": look_at_sae(path, None)} if finished else record


def _last_line(path: Path) -> Record:
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 65_536))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # cut short, by a kill or by the beginning of what was read
        return found if isinstance(found, dict) else {}
    return {}


def look_at_vector(path: str) -> Record:
    """A steering vector, safetensors or GGUF."""
    return vector_record(SteeringVector.load(path))


def look_at_effects(path: str) -> Record:
    """A folder of measured effects, finished or not."""
    folder = Path(path)
    manifest = EffectsManifest.load(folder)
    done = len(finished_shards(folder, manifest))
    record: Record = {
        "complete": done == manifest.n_shards,
        "vectors": manifest.n_vectors,
        "shards": f"{done} of {manifest.n_shards}",
        "model": manifest.model_name,
        "hook point": manifest.hook_name,
        "SAE": dict(manifest.sae),
        "settings": dict(manifest.settings),
    }
    has_map = (folder / MAP_NAME).is_file()
    return {**record, "map": look_at_map(str(folder / MAP_NAME))} if has_map else record


def look_at_map(path: str) -> Record:
    """An effect map."""
    found = EffectMap.load(path)
    return {
        "model": found.model_name,
        "hook point": found.hook_name,
        "width": found.d_in,
        "features": found.d_sae,
        "features with a signal": int((found.signal >= WEAK).sum()),
        "median scale": found.median_scale,
        "provenance": dict(found.provenance),
        "SAE": dict(found.sae),
    }
