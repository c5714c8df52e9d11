"""`steersman probe`."""

from dataclasses import dataclass, field
from pathlib import Path

from steersman.commands.options import ComputeOptions, LabelOptions, PrintOptions, on_kernels
from steersman.config import part_of
from steersman.errors import SteersmanError
from steersman.files import write_json
from steersman.steer import ProbingConfig, probe_features
from steersman.steer.probing.labels import read_labelled


@dataclass(frozen=True, kw_only=True)
class ProbeCommand(ProbingConfig, ComputeOptions, LabelOptions, PrintOptions):
    """Probe labelled texts with few features of an SAE, beside raw activations, random features and an SAE that learned
    nothing."""

    model: str
    """Folder or hub id of the model."""
    sae: str
    """Folder, file or hub id of the SAE."""
    data: str
    """JSONL file of texts with labels: one for a text, a list with one for each token, or a list of spans
    [start, end, label]."""
    label_column: str = "label"
    """Field of a record that holds its label."""
    text_column: str = "text"
    """Field of a record that holds its text."""
    beside: tuple[str, ...] = field(default=())
    """Further SAEs of the same hook point, to be probed on the same samples."""
    out: str | None = None
    """Also write everything found to this JSON file."""


@on_kernels
def run(config: ProbeCommand) -> None:
    """`steersman probe`."""
    texts, labels = read_labelled(config.data, label_column=config.label_column, text_column=config.text_column)
    sae = config.load_sae(config.sae, config.labels)
    beside = {Path(name).name or name: config.load_sae(name) for name in config.beside}
    if len(beside) < len(config.beside):
        raise SteersmanError("two SAEs of --beside have the same name: rename a folder")
    found = probe_features(
        config.load_model(config.model), sae, texts, labels, part_of(ProbingConfig, config), beside=beside
    )
    config.show(found.to_text, found.to_json())
    if config.out is not None:
        write_json(config.out, found.to_json())
        config.note(f"written to {config.out}")
