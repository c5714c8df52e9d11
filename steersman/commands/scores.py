"""`steersman scores`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from steersman.commands.options import ComputeOptions, LabelOptions, PrintOptions, examples_of, on_kernels
from steersman.config import part_of
from steersman.errors import SteersmanError
from steersman.sae import FeatureLabels
from steersman.steer import FeatureScores, ScoreConfig, score_features, select
from steersman.steer.scores import read_rewarded
from steersman.steer.scores.base import check_given
from steersman.text import read_texts


@dataclass(frozen=True, kw_only=True)
class ScoresCommand(ScoreConfig, ComputeOptions, LabelOptions, PrintOptions):
    """Score an SAE's features, each score with its null beside it, and select those to steer by."""

    model: str
    """Folder or hub id of the model."""
    sae: tuple[str, ...]
    """Folder, file or hub id of the SAE; several, at different hook points, are scored together."""
    score: tuple[str, ...]
    """What to score by: output, input, correlation, f_statistic, contrast or flow; several make one table."""
    data: str | None = None
    """JSONL file of examples for correlation, f_statistic and contrast: positive and negative (with or without prompt),
    or text and label."""
    positive: str | None = None
    """File of positive texts, one per line (or .jsonl with text)."""
    negative: str | None = None
    """File of negative texts."""
    rewarded: str | None = None
    """JSONL file of answers in place of examples: prompt, answer and reward (1 or 0)."""
    text: str | None = None
    """File of texts to read the features on, for input."""
    top: int = 10
    """Features shown of each score."""
    select: int = 0
    """Features to select by the first score, over all SAEs; printed as `--feature` of `steersman steer` takes them."""
    sign: Literal["positive", "negative", "both"] = "positive"
    """What is shown and selected: the highest scores, the lowest, or the largest in size."""
    strength: float | None = None
    """Strength of those selected; by default the score's own."""
    per_hook: bool = False
    """Select so many at each hook point."""
    above_null: bool = False
    """Select only what exceeds the null of the best of all features."""
    out: str | None = None
    """Folder to write the tables to, HOOK.safetensors for each SAE."""


@on_kernels
def run(config: ScoresCommand) -> None:
    """`steersman scores`."""
    examples = examples_of(config.data, config.positive, config.negative)
    if examples is not None and config.rewarded is not None:
        raise SteersmanError("give either examples or --rewarded answers, not both")
    texts = None if config.text is None else read_texts(config.text)
    labelled = examples is not None or config.rewarded is not None
    check_given(config.score, {"labelled": labelled, "texts": texts is not None, "saes": len(config.sae) > 1})
    if config.labels is not None and len(config.sae) > 1:
        raise SteersmanError("--labels are those of one SAE, and several are scored: put a labels.jsonl beside each")
    saes = [config.load_sae(name, config.labels) for name in config.sae]
    lm = config.load_model(config.model)
    tables = score_features(
        lm,
        saes,
        config.score,
        positive=None if examples is None else examples.positive,
        negative=None if examples is None else examples.negative,
        rewarded=None if config.rewarded is None else read_rewarded(lm, config.rewarded),
        texts=texts,
        config=part_of(ScoreConfig, config),
    )
    chosen = None
    if config.select:
        chosen = select(
            tables, config.score[0], config.select, sign=config.sign, strength=config.strength,
            per_hook=config.per_hook, above_null=config.above_null,
        )  # fmt: skip
    record = {
        "scores": {
            table.hook_name: {name: _top(table, name, config, sae.labels) for name in table}
            for table, sae in zip(tables, saes)
        },
        "selected": None if chosen is None else dict(chosen),
    }
    shown = [table.to_text(config.top, sign=config.sign, labels=sae.labels) for table, sae in zip(tables, saes)]
    config.show(lambda: "\n\n".join(shown if chosen is None else [*shown, "selected\n" + chosen.to_text()]), record)
    for table in tables if config.out is not None else []:
        path = Path(config.out or "") / f"{table.hook_name}.safetensors"
        table.save(path)
        config.note(f"written to {path}")


def _top(table: FeatureScores, name: str, config: ScoresCommand, labels: FeatureLabels) -> list[dict[str, object]]:
    found = table.top(name, config.top, sign=config.sign)
    return [{**asdict(one), "label": labels.text(one.feature)} for one in found]
