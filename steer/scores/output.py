"""`output`: does turning a feature up make the model say what the feature's decoder row writes?

With T_j the 20 tokens that the logit lens gives for d_j, and p the next-token distribution after a neutral prompt with
f_j turned up at its last token by `factor` (10) times its largest activation:

    S_j = (1 - r / |V|) max over T_j of p,   r the rank of that token in p, from 0

averaged over several prompts. Near 1 for a feature whose direction carries through to the output, near 0 for one that
only reads. Features of high S_j steer two to three times better than others (paper).

Traps: it depends on the factor and its unit, both of which are recorded; one prompt alone is a lottery; and where
prompts of different length share a batch, the last column is padding, so that here every pass holds one prompt.

The null turns up random directions of the features' strengths, each with lens tokens of its own; `null_max` is the
largest of those. Source: arXiv 2505.20063, with its authors' code.

Shape letters: R rows of a pass, D width, L features.
"""

import math

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.lens import lens_tokens
from steersman.sae import SAE
from steersman.steer.edits import VectorEdit
from steersman.steer.edits.feature import strength_unit
from steersman.steer.scores.base import Evidence, Score, ScoreConfig
from steersman.steer.scores.table import Column
from steersman.steer.steerer import Steerer

_ROWS = 4
"""Features of a pass, in multiples of `batch_size`: the prompts are short."""


class OutputScore(Score):
    """Whether the model says what the feature writes."""

    name = "output"
    source = "arXiv 2505.20063"
    unit = "(1 - rank/|V|) x probability"
    settings = ("prompts", "factor", "units", "n_tokens", "null_directions", "seed")

    def check(self, evidence: Evidence) -> None:
        for sae in evidence.saes:
            sae.check_residual("the output score")
        evidence.lm.unembed()

    @torch.no_grad()
    def measure(self, evidence: Evidence, at: int) -> Column:
        lm, sae, config, hook = evidence.lm, evidence.saes[at], evidence.config, evidence.hooks[at]
        wanted = config.feature or range(sae.cfg.d_sae)
        strengths = torch.full((sae.cfg.d_sae,), math.nan)
        for j in wanted:
            sae.check_feature(j)
            strengths[j] = _strength(sae, j, config)
        alive = strengths.isfinite().nonzero()[:, 0]
        if not len(alive):
            raise SteersmanError("no feature to score: in units='max_act' dead features have no strength")
        rows = sae.W_dec.detach().float().cpu()[alive]
        values = torch.full((sae.cfg.d_sae,), math.nan)
        values[alive] = output_scores(lm, sae, hook, rows, strengths[alive], config)
        null = torch.full((sae.cfg.d_sae,), math.nan)
        largest = math.nan
        if config.null_directions:
            generator = torch.Generator().manual_seed(config.seed)
            random = torch.randn(config.null_directions, rows.shape[1], generator=generator)
            random /= random.norm(dim=1, keepdim=True)
            lengths = (rows.norm(dim=1) * strengths[alive]).median().expand(len(random))
            by_chance = output_scores(lm, sae, hook, random, lengths, config)
            null[alive] = float(by_chance.double().quantile(config.level))
            largest = float(by_chance.max())
        return evidence.column(
            self, at, values, n=len(config.prompts), null=null, null_max=largest, strengths=strengths
        )


def _strength(sae: SAE, feature: int, config: ScoreConfig) -> float:
    """In raw activation units; not a number for a dead feature in `max_act` units."""
    if (
        config.units == "max_act"
        and sae.feature_stats is not None
        and not float(sae.feature_stats.max_act[feature]) > 0
    ):
        return math.nan
    return config.factor * strength_unit(sae, feature, "add", config.units)


def output_scores(
    lm: LanguageModel, sae: SAE, hook: str, directions: Tensor, strengths: Tensor, config: ScoreConfig
) -> Tensor:
    """S [n] fp32 of adding `strengths` [n] times `directions` [n, D] to the last token of the prompts at `hook`, with
    the tokens that the lens gives for the directions."""
    tokens = lens_tokens(lm, directions, config.n_tokens).raised
    added = directions * strengths[:, None]
    total, st = torch.zeros(len(added), dtype=torch.float64), Steerer(lm)
    rows = _ROWS * config.batch_size
    for prompt in config.prompts:
        ids = lm.encode(prompt).input_ids
        scale = _token_scale(lm, sae, hook, ids)
        for start in range(0, len(added), rows):
            part = added[start : start + rows]
            with st.edit(hook, VectorEdit(part * scale, 1.0), scope="last_prompt", include_bos=True):
                logits = lm.logits(ids.expand(len(part), -1))[:, -1]
            p = logits.float().softmax(-1).cpu()
            best = p.gather(1, tokens[start : start + rows]).amax(1)
            rank = (p > best[:, None]).sum(1)
            total[start : start + rows] += ((1 - rank / p.shape[1]) * best).double()
    return (total / len(config.prompts)).float()


def _token_scale(lm: LanguageModel, sae: SAE, hook: str, ids: Tensor) -> float:
    """What one unit of the decoder's output is at a prompt's last token: 1 but for SAEs that normalise their input."""
    if sae.cfg.input_norm == "none":
        return 1.0
    h = lm.capture(ids, torch.ones_like(ids), hooks=[hook])[hook][0, -1:]
    scale = sae.token_scale(h.to(sae.device).float())
    return 1.0 if scale is None else float(scale)
