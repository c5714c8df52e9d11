"""What several commands share: loading what their flags name."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor

from steersman.config import setting
from steersman.conversations import ChatOptions
from steersman.device import pick_device
from steersman.errors import SteersmanError
from steersman.kernels import Implementation, using
from steersman.lm import LanguageModel
from steersman.lm.load import local_folder
from steersman.sae import SAE
from steersman.steer.labels.read import read_labels
from steersman.steer.methods import Examples, as_examples, read_examples
from steersman.steer.methods.examples import as_chats
from steersman.terminal import Painted
from steersman.text import read_documents
from steersman.visible import visible


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and how a command computes: the same flags, with the same meaning, of each that loads a model or an SAE."""

    device: str = setting("auto", identity=False)
    """Where to run: auto (the accelerator there is; under torchrun each process its own), cpu, cuda, cuda:1, ..."""
    dtype: str | None = None
    """Dtype of the model: float32, bfloat16, ...; by default float32 on the CPU and the checkpoint's own elsewhere."""
    revision: str | None = None
    """Revision of the model on the hub."""
    bos: bool = True
    """Begin texts with the family's BOS, also where its tokenizer does not. As the activations were cached."""
    kernels: Implementation = setting("auto", identity=False)
    """Implementation of the SAE's arithmetic: triton (NVIDIA GPUs), torch, or auto, the faster that the device has."""

    def load_model(self, name: str) -> LanguageModel:
        """The language model `name`, a folder or hub id."""
        return LanguageModel.load(name, device=self.device, dtype=self.dtype, revision=self.revision, bos=self.bos)

    def load_sae(self, name: str, labels: str | None = None) -> SAE:
        """The SAE `name`, a folder, file or hub id, with the labels in a file over those beside it."""
        sae = SAE.load(name, pick_device(self.device))
        if labels is not None:
            sae.labels = sae.labels.merged(read_labels(labels, sae.cfg)).of(sae.cfg)
        return sae


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Whose words a command shows for features."""

    labels: str | None = setting(None, identity=False)
    """Labels of the SAE's features, over those beside it: a labels.jsonl of `steersman label`, an export of
    Neuronpedia's explanations, or JSON as {id: name}."""


@dataclass(frozen=True, kw_only=True)
class PrintOptions:
    """How results are printed."""

    json: bool = setting(False, identity=False)
    """Print the results as JSON, for programs, in place of the table."""

    def show(self, text: Callable[[], str], record: Any) -> None:
        """Print the results: as `text()`, or `record` as JSON."""
        if self.json:
            print(as_json(record))
            return
        shown = text()
        print(shown if isinstance(shown, Painted) else visible(shown, newline="\n"))

    def note(self, line: str) -> None:
        """Print a line beside the results, which is none of them."""
        if not self.json:
            print(visible(line, newline="\n"))


def as_json(record: Any) -> str:
    """A result as JSON that every parser reads and that moves no terminal: numbers that are not finite are null."""
    return json.dumps(_plain(record), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def hook_points(
    hook: str | Sequence[str] | None, layer: int | Sequence[int] | None, model: str | None, revision: str | None = None
) -> tuple[str, ...]:
    """The hook points that `--hook` and `--layer` name together: layer N is `blocks.N.hook_resid_post`, the state after
    it, and -1 the last one of the model, a folder or hub id, whose configuration alone is read."""
    named = [hook] if isinstance(hook, str) else list(hook or ())
    layers = [layer] if isinstance(layer, int) else list(layer or ())
    if isinstance(layer, int) and hook:
        raise SteersmanError("give either --hook or --layer, not both")
    return (*named, *(f"blocks.{_layer(number, model, revision)}.hook_resid_post" for number in layers))


def hook_point(hook: str | None, layer: int | None, model: str | None, revision: str | None = None) -> str | None:
    """The one hook point that `--hook` or `--layer` names; None where neither is given."""
    found = hook_points(hook, layer, model, revision)
    return found[0] if found else None


def _layer(number: int, model: str | None, revision: str | None) -> int:
    if number >= 0:
        return number
    if model is None:
        raise SteersmanError(
            f"--layer {number} counts from a model's last layer, and there is no --model: count from 0"
        )
    n_layers = model_config(model, revision).get_text_config().num_hidden_layers
    if n_layers + number < 0:
        raise SteersmanError(f"--layer {number}: {model} has {n_layers} layers, so -{n_layers} to {n_layers - 1}")
    return n_layers + number


def model_config(model: str, revision: str | None = None) -> Any:
    """The configuration of a model, a folder or hub id, without its weights."""
    from transformers import AutoConfig

    folder = local_folder(model)
    try:
        return AutoConfig.from_pretrained(model if folder is None else str(folder), revision=revision)
    except Exception as error:  # whatever transformers makes of a damaged or missing file
        raise SteersmanError(f"the configuration of {model} cannot be read: {error}") from error


def on_kernels(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """A command that computes with the implementation that its `kernels` asks for, or fails at once."""

    @wraps(run)
    def run_with(config: Any) -> None:
        with using(config.kernels, pick_device(config.device)):
            run(config)

    return run_with


def examples_of(
    data: str | None, positive: str | None, negative: str | None, chat: ChatOptions | None = None
) -> Examples | None:
    """The examples that these flags name, as `chat` makes them; None where none is named."""
    examples = _examples(data, positive, negative)
    return examples if examples is None or chat is None else as_chats(examples, chat)


def _examples(data: str | None, positive: str | None, negative: str | None) -> Examples | None:
    if data is not None:
        if positive or negative:
            raise SteersmanError("give either --data, or --positive and --negative, not both")
        return read_examples(data)
    if positive is None and negative is None:
        return None
    if positive is None:
        raise SteersmanError("--negative needs --positive")
    sides = [as_examples(read_documents(path), side) if path else [] for path, side in
             ((positive, "positive"), (negative, "negative"))]  # fmt: skip
    return Examples(positive=sides[0], negative=sides[1])


def training_record(sae: SAE, path: Any) -> dict[str, Any]:
    """What `--json` says of a trained SAE."""
    metadata = sae.cfg.metadata
    return {"path": path, "hook": sae.cfg.hook_name, "d_sae": sae.cfg.d_sae, "architecture": sae.cfg.architecture,
            "heldout": metadata["heldout"], "dead_in_training": dead_in_training(sae),
            "rows_left_out": metadata.get("rows_left_out") or 0}  # fmt: skip


def features_file(sae: str, given: str | None = None) -> Path | None:
    """The file of features that is named, else features.json beside the SAE; None where there is none."""
    beside = Path(sae) / "features.json"
    return Path(given) if given is not None else beside if beside.is_file() else None


def heldout_line(sae: SAE) -> str:
    """What a trained SAE measured on the rows held out of its training."""
    heldout = sae.cfg.metadata["heldout"]
    ordinary = f" ({_fvu(heldout['fvu_ordinary'])} on ordinary rows)" if heldout.get("n_large") else ""
    dead, stats, in_training = f"dead {100 * heldout['dead_share']:.2f} %", sae.feature_stats, dead_in_training(sae)
    if heldout["dead_share"] and stats is not None and in_training is not None:  # a rare feature is silent on few rows
        dead += f" ({100 * in_training:.2f} % on {stats.n_tokens:,} training rows)"
    return f"FVU {_fvu(heldout['fvu'])}{ordinary}, L0 {heldout['l0']:.1f}, {dead}"


def dead_in_training(sae: SAE) -> float | None:
    """Which share of the features fired on none of the training rows that their statistics are over."""
    return None if sae.feature_stats is None else float((sae.feature_stats.density == 0).double().mean())


def _fvu(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def left_out_line(sae: SAE) -> str:
    """How many rows of huge norm its training left out; nothing where it left out none."""
    metadata = sae.cfg.metadata
    rows = metadata.get("rows_left_out")
    if not rows:
        return ""
    training = metadata["training"]
    share = 100 * rows / (training["n_steps"] * training["batch_size"])
    return f"{rows:,} rows ({share:.2g} %) above {training['max_norm_ratio']:g} x the median norm were left out"
