"""`steersman eval`."""

import logging
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from steersman.commands.options import ComputeOptions, PrintOptions, on_kernels
from steersman.config import part_of
from steersman.errors import SteersmanError
from steersman.files import write_json
from steersman.lm.origin import check_sae_fits
from steersman.text import TextSource, open_text
from steersman.train import ActivationStore
from steersman.train.capture.text_digest import is_of_text
from steersman.train.reports.baselines import random_baselines
from steersman.train.reports.evaluate import EvaluateConfig, evaluate_sae
from steersman.train.reports.spliced import no_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalCommand(EvaluateConfig, ComputeOptions, PrintOptions):
    """Measure an SAE on a store's held-out rows, what its features are like, and, with --model and --text, its effect
    on the model's loss; beside baselines that have learned no features."""

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
    baseline: Literal["random"] | None = None
    """Measure beside it what its own recipe reaches with a random decoder or encoder that stays as it is, or nearly
    (arXiv 2602.14111): three runs as long as the SAE's own, kept and used again."""
    baselines: str | None = None
    """Folder of the baselines' runs; by default the SAE's own name with `-baselines`."""
    tokens: int | None = None
    """Rows to train each baseline on; by default as many as the SAE was."""
    out: str | None = None
    """Also write the figures to this JSON file."""


@on_kernels
def run(config: EvalCommand) -> None:
    """`steersman eval`."""
    sae, store = config.load_sae(config.sae), ActivationStore.open(config.store)
    hook = store.hook_of(sae)
    if config.baseline is None and (config.baselines is not None or config.tokens is not None):
        raise SteersmanError("--baselines and --tokens are for --baseline random")
    lm, texts = None, None
    if config.model is not None:
        if config.text is None:
            raise SteersmanError("--model needs --text: the text to measure its loss on")
        as_cached = store.manifest.config.get("bos_token", 0) is not None
        lm = replace(config, bos=config.bos and as_cached).load_model(config.model)
        check_sae_fits(lm, sae, hook)
        if obstacle := no_loss(lm):
            log.warning("the model's loss is not measured: %s", obstacle)
            lm = None
    if lm is not None and config.text is not None:
        source = open_text(config.text)
        texts = list(islice(source.documents(_first_document(store, source, config)), config.documents))
    baselines = {}
    if config.baseline is not None:
        folder = config.baselines or f"{Path(config.sae)}-baselines"
        baselines = random_baselines(sae, store, folder, tokens=config.tokens, device=config.device)
    result = evaluate_sae(sae, store, lm, texts, part_of(EvaluateConfig, config), baselines=baselines)
    config.show(result.to_text, result.to_json())
    if config.out is not None:
        write_json(config.out, result.to_json())


def _first_document(store: ActivationStore, text: TextSource, config: EvalCommand) -> int:
    """Of the text a store was made from, the first document held out from training; of another text, the first."""
    if not is_of_text(store.manifest, text):
        return 0
    start, stop = store.split_rows("heldout", config.heldout_fraction)
    return int(store.tokens(start, min(start + 1, stop)).doc_ids[0]) if stop > start else 0
