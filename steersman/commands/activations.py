"""`steersman activations`."""

from dataclasses import dataclass
from pathlib import Path

from steersman.commands.options import ComputeOptions, LabelOptions, PrintOptions, on_kernels
from steersman.conversations import ChatOptions, Document
from steersman.errors import SteersmanError
from steersman.lm.activations import Units
from steersman.terminal import in_colour
from steersman.text import read_documents
from steersman.text_sources import SUFFIXES


@dataclass(frozen=True, kw_only=True)
class ActivationsCommand(ChatOptions, ComputeOptions, LabelOptions, PrintOptions):
    """See which features fire on a text: the strongest of the text, and those of each token."""

    model: str
    """Folder or hub id of the model."""
    sae: str
    """Folder, file or hub id of the SAE."""
    text: tuple[str, ...]
    """A text, or a file of texts: .txt (one a line), .jsonl or .parquet (text or messages). Several are read."""
    top: int = 10
    """Features shown of each text."""
    per_token: int = 3
    """Features shown of each token; 0 leaves out the list of tokens."""
    units: Units = "raw"
    """What values are in: raw activations, or max_act, shares of each feature's largest activation in training, which
    compare features of unlike scale."""
    max_density: float | None = None
    """Leave out features that fired on a larger share of the tokens in training, such as 0.1: they say little of one
    text."""
    include_bos: bool = False
    """Count what fires on the BOS too, which in most models says nothing of the text."""
    limit: int = 20
    """Texts read of each file."""
    batch_size: int = 16
    """Texts per pass."""
    max_length: int | None = None
    """Cut texts to this many tokens, BOS included."""

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("per_token", 0), ("limit", 1)):
            if getattr(self, name) < least:
                raise SteersmanError(f"{name} is too small: {getattr(self, name)}")


@on_kernels
def run(config: ActivationsCommand) -> None:
    """`steersman activations`."""
    texts = [document for text in config.text for document in _documents(text, config)]
    if not texts:
        raise SteersmanError("no text to read: give --text")
    sae, lm = config.load_sae(config.sae, config.labels), config.load_model(config.model)
    found = lm.activations(
        sae, texts, units=config.units, max_density=config.max_density, include_bos=config.include_bos,
        batch_size=config.batch_size, max_length=config.max_length,
    )  # fmt: skip
    shown = (config.per_token, config.top)
    config.show(lambda: found.to_text(*shown, colour=in_colour()), found.to_json(*shown) if config.json else None)


def _documents(text: str, config: ActivationsCommand) -> list[Document]:
    """The texts that one `--text` names."""
    path = Path(text).expanduser()
    if path.suffix in SUFFIXES and not any(mark in text for mark in "\n\0"):
        return read_documents(path, config.limit, chat=config)
    if not text.strip():
        raise SteersmanError("--text is empty: there is nothing to read")
    return [config.apply_to(text)]
