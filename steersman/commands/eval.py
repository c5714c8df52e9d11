"""`steersman eval`."""

import logging
from dataclasses import dataclass, replace
from itertools import islice

from steersman.commands.options import ComputeOptions, PrintOptions, on_kernels
from steersman.config import part_of
from steersman.errors import SteersmanError
from steersman.files import write_json
from steersman.lm.origin import check_sae_fits
from steersman.text import TextSource, open_text
from steersman.train import ActivationStore
from steersman.train.capture.text_digest import is_of_text
from steersman.train.reports.evaluate import EvaluateConfig, evaluate_sae, no_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalCommand(EvaluateConfig, ComputeOptions, PrintOptions):
    """Measure an SAE on a store's held-out rows and, with --model and --text, its effect on the model's loss."""

    sae: str
    """Folder of the SAE."""
    store: str
    """Folder of a store of the SAE's hook point."""
    model: str | None = None
    """Folder or hub id of the model; without it only the reconstruction is measured."""
    text: str | None = None
    """Text to measure the model's loss on. Of the store's own text, the held-out documents are used."""
    documents: int = 200
    """Documents of the text, at most."""
    out: str | None = None
    """Also write the figures to this JSON file."""


@on_kernels
def run(config: EvalCommand) -> None:
    """`steersman eval`."""
    sae, store = config.load_sae(config.sae), ActivationStore.open(config.store)
    hook = store.hook_of(sae)
    lm, texts = None, None
    if config.model is not None:
        if config.text is None:
            raise SteersmanError("--model needs --text: the text to measure its loss on")
        as_cached = store.manifest.config.get("bos_token", 0) is not None
        lm = replace(config, bos=config.bos and as_cached).load_model(config.model)
        check_sae_fits(lm, sae, hook)
        if obstacle := no_loss(sae, lm):
            log.warning("the model's loss is not measured: %s", obstacle)
            lm = None
    if lm is not None and config.text is not None:
        source = open_text(config.text)
        texts = list(islice(source.documents(_first_document(store, source, config)), config.documents))
    result = evaluate_sae(sae, store, lm, texts, part_of(EvaluateConfig, config))
    config.show(result.to_text, result.to_json())
    if config.out is not None:
        write_json(config.out, result.to_json())


def _first_document(store: ActivationStore, text: TextSource, config: EvalCommand) -> int:
    """Of the text a store was made from, the first document held out from training; of another text, the first."""
    if not is_of_text(store.manifest, text):
        return 0
    start, stop = store.split_rows("heldout", config.heldout_fraction)
    return int(store.tokens(start, min(start + 1, stop)).doc_ids[0]) if stop > start else 0
