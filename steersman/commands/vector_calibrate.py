"""`steersman vector calibrate`."""

from dataclasses import dataclass

from steersman.commands.options import ComputeOptions, PrintOptions, on_kernels
from steersman.config import part_of
from steersman.conversations import ChatOptions
from steersman.deprecation import renamed_fields
from steersman.steer import CalibrateConfig, load_steering
from steersman.steer.calibrate import calibrate, check_budget, refuse_unmet
from steersman.text import read_documents


@renamed_fields(texts="documents")
@dataclass(frozen=True, kw_only=True)
class VectorCalibrateCommand(CalibrateConfig, ChatOptions, ComputeOptions, PrintOptions):
    """Scale a vector so that steering with it costs a budget: --target-kl, --target-loss or --target-norm."""

    vector: str
    """File of a vector, or of edits."""
    model: str
    """Folder or hub id of the model."""
    out: str
    """File to write the scaled vector to."""
    text: str | None = None
    """File of held-out texts, one per line (or .jsonl with text or messages); without it the model writes its own."""
    documents: int = 64
    """Documents of the text, at most."""


@on_kernels
def run(config: VectorCalibrateCommand) -> None:
    """`steersman vector calibrate`."""
    v = load_steering(config.vector)
    settings = part_of(CalibrateConfig, config)
    check_budget(settings, v)
    texts = None if config.text is None else read_documents(config.text, config.documents, config)
    found = calibrate(v, config.load_model(config.model), texts=texts, config=settings)
    refuse_unmet(found).save(config.out)
    for scale, value in found.search.evaluations:
        config.note(f"  scale {scale:.4g}: {found.budget} {value:.4g}")
    figures = {"budget": found.budget, "n_tokens": found.n_tokens, "search": found.search, "out": config.out}
    config.show(lambda: f"{found}\nwritten to {config.out}", figures)
