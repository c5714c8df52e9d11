"""What a model is loaded from: a folder that is looked through before anything is built, or an id of the hub."""

import os
import re
import socket
import urllib.request
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import nn

from steersman.errors import SteersmanError
from steersman.reading import check_regular, read_json_object

MAX_LAYERS = 2_000
"""Layers that a configuration may ask for. Building a block takes milliseconds even where it has no weights yet."""
MAX_SIZE = 1 << 31
"""Largest whole number that a configuration may give for a size."""
CONFIG_BYTES = 16 << 20
_LAYERS = re.compile(r"(num_|n_|encoder_|decoder_)?(hidden_)?(layers?|blocks)")
_SIZES = re.compile(r".*(size|width|dim|d_model|n_embd|d_ff|heads|experts|positions|_len|_length)")
_READ = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
_SECONDS = 3.0
BUNDLED = "steersman-demo"
"""Names the bundled model, unless a folder here is called so."""


def local_folder(source: str) -> Path | None:
    """The folder `source` names, or None for a hub id. Raises SteersmanError for a path that holds no model."""
    try:
        folder = Path(source).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise SteersmanError(f"no model folder at {source[:80]!r}: {error}") from error
    if is_folder:
        if not (folder / "config.json").exists():
            raise SteersmanError(f"{source} holds no config.json: it is not a transformers model folder")
        return folder
    if exists:
        raise SteersmanError(f"{source} is a file: name the folder that holds config.json and the weights")
    if source == BUNDLED:
        return Path(str(files("steersman"))) / "demo" / BUNDLED
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or not source.strip():
        raise SteersmanError(f"no model folder at {source!r}: check the path, or give a hub id such as org/name")
    return None


def check_folder(folder: Path) -> None:
    """Refuse a model folder whose files are no files, or whose configuration asks for what no model has.

    Raises SteersmanError that names the file, or the field and its value.
    """
    for entry in sorted(folder.iterdir()):
        if entry.name.endswith(_READ) and not entry.is_dir():
            check_regular(entry)
    config = read_json_object(folder / "config.json", limit=CONFIG_BYTES)
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        for name, value in section.items():
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            layers = _LAYERS.fullmatch(name) is not None
            limit = MAX_LAYERS if layers else MAX_SIZE
            if (layers and value < 1) or ((layers or _SIZES.fullmatch(name)) and abs(value) > limit):
                wrong = "is less than 1" if value < 1 else f"is more than {limit:,}"
                raise SteersmanError(f"{folder / 'config.json'}: {name} {wrong}: {str(value)[:20]}")


def name_in_cache(path: str) -> str | None:
    """The hub id of a model whose path lies in the hub's cache; None for any other path.

    >>> name_in_cache("/cache/models--google--gemma-2-2b/snapshots/c5ebcd"), name_in_cache("/models/gpt2")
    ('google/gemma-2-2b', None)
    """
    found = re.search(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots(?:[/\\]|$)", path)
    return None if found is None else found[1].replace("--", "/")


def reachable() -> bool:
    """Whether the hub answers at all, within seconds: its client would try for half a minute to be sure."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    url = urlsplit(constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(url.scheme) or os.environ.get("ALL_PROXY")
    if proxy:
        url = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def check_reads_text(model: Any) -> None:
    """Refuse what is no transformers model of one stack of blocks over text. Raises SteersmanError saying why."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "get_text_config"):
        raise SteersmanError(
            f"a LanguageModel wraps a transformers model, this is a {kind}; LanguageModel.load('folder or hub id') "
            "loads one"
        )
    main = getattr(model, "main_input_name", "input_ids")
    if main not in ("input_ids", "inputs", "inputs_embeds"):
        raise SteersmanError(f"{kind} reads {main}, not text: only models over token ids have hook points here")
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise SteersmanError(
            f"{kind} is an encoder-decoder model: only decoders and encoders have one stack of blocks to read"
        )
    if not isinstance(getattr(config.get_text_config(), "hidden_size", None), int):
        raise SteersmanError(
            f"the configuration of {kind} has no hidden_size: there is no one stream of states to read"
        )
