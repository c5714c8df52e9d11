"""The README's picture: what the model writes without steering and with, its tokens coloured by a feature.

    python scripts/study picture --model runs/smollm2 --data DATA --work runs/study

The vector is the difference of the means of a goal's training prompts, at scales that cost as many nats of KL a token.
The feature is the one that tells these prompts apart best; a token's colour is its activation where the model reads the
text unsteered. Beside the texts: how often the feature fires in what is written, and what the steering costs.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from steersman import SAE, LanguageModel, Steerer
from steersman.figures import svg
from steersman.steer import CostMeter, calibrate
from study.common import Study, StudyConfig
from study.report import GREY, INK
from study.vectors import best_features, vector

PROMPT = "The most important thing about my day is"
WIDTH = 64
"""Characters of a line."""
COLOUR = "#e8710a"


@dataclass(frozen=True, kw_only=True)
class Config(StudyConfig):
    """Settings of the picture."""

    out: Path = Path(__file__).parents[2] / "docs" / "picture.svg"
    """The picture."""
    goal: int = 7
    """The goal, by its place among the study's; the picture is an example, and this one was chosen for it."""
    shown: tuple[float, ...] = (0.0, 0.3, 0.5)
    """KL whose texts are shown, nats a token."""
    budgets: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5)
    """KL of the curves."""
    samples: int = 16
    """Texts for each point of the curves; the first is the one that is shown."""


@dataclass(frozen=True)
class Read:
    """Texts as the unsteered model reads them, the tokens behind the prompt alone."""

    tokens: list[list[str]]
    values: list[list[float]]
    """Activations of the feature."""
    nll: float
    """Nats per token."""


def read(lm: LanguageModel, sae: SAE, feature: int, texts: list[str]) -> Read:
    batch = lm.encode(texts)
    hook = sae.cfg.hook_name
    n_prompt = len(lm.token_ids(PROMPT, bos=True))
    values = sae.encode(lm.capture(batch, hooks=[hook])[hook].float())[..., feature]
    picked = lm.logits(batch).log_softmax(-1)[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    tokens, kept, losses = [], [], []
    for ids, mask, row, loss in zip(batch.input_ids, batch.attention_mask.bool(), values, -picked):
        inside = mask.nonzero()[n_prompt:, 0]  # the padding is on the left
        tokens.append([lm.tokenizer.decode([int(i)]) for i in ids[inside]])
        kept.append(row[inside].tolist())
        losses.append(loss[inside - 1])
    return Read(tokens, kept, float(torch.cat(losses).mean()))


def draw_text(axes: Axes, top: float, title: str, tokens: list[str], values: list[float], scale: float) -> float:
    """One text below `top`, each token on its colour; returns where the next may begin. Units are characters."""
    axes.text(0, top, title, fontsize=9.5, color=GREY, va="center", weight="bold")
    x, y, width = 0.0, top + 1.45, WIDTH
    for token, value in [(f"{PROMPT}", 0.0), *zip(tokens, values)]:
        shown = " ".join(token.replace("\n", " ").split(" ")) or " "
        for word in [shown] if token != PROMPT else shown.split(" "):
            word = word if token != PROMPT or x == 0 else f" {word}"
            if x + len(word) > width:
                x, y, word = 0.0, y + 1.35, word.lstrip()
            if value > 0:
                strength = min(1.0, 0.15 + 0.85 * value / scale)
                box = Rectangle((x, y - 0.6), len(word), 1.2, color=COLOUR, alpha=0.75 * strength, linewidth=0)
                axes.add_patch(box)
            ink = GREY if token == PROMPT else INK
            axes.text(x, y, word, fontsize=9.2, family="DejaVu Sans Mono", color=ink, va="center")
            x += len(word)
    return y + 2.0


def main(config: Config) -> None:
    """Steer, read, draw."""
    study = Study(config)
    sae, goals = study.sae(), study.material.goals
    goal = goals[config.goal % len(goals)]
    v, feature = vector(study, goal, "diffmean"), best_features(study, goal)[0]
    steerer, meter = Steerer(study.lm), CostMeter(study.lm, study.material.held_out[:8], max_length=64)
    found: dict[float, Read] = {}
    for budget in sorted({*config.shown, *config.budgets}):
        scale = calibrate(v, steerer, texts=meter, target_kl=budget).search.scale if budget else 0.0
        with steerer.vector(v, scale=scale, scope="generation"):
            written = study.lm.generate([PROMPT] * config.samples, max_new_tokens=32, seed=config.seed)
        found[budget] = read(study.lm, sae, feature, written.texts)
    largest = max(value for one in found.values() for row in one.values for value in row) or 1.0
    with mpl.rc_context({"axes.spines.top": False}):
        figure = Figure(figsize=(8.6, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2.15, 1))
        left.set_axis_off()
        top = 0.0
        for budget in config.shown:
            title = f"towards {goal.name}, KL {budget:g} a token" if budget else "unsteered"
            top = draw_text(left, top, title, found[budget].tokens[0], found[budget].values[0], largest)
        left.set(xlim=(0, WIDTH), ylim=(top - 1, -1))
        fires = [
            100 * sum(v > 0 for row in found[b].values for v in row) / max(1, sum(map(len, found[b].values)))
            for b in config.budgets
        ]
        right.plot(config.budgets, fires, color=COLOUR, marker="o", markersize=4)
        right.set(xlabel="KL, nats a token", ylim=(0, None))
        right.set_ylabel(f"tokens on which feature {feature} fires, %", color=COLOUR)
        cost, losses = right.twinx(), [found[b].nll for b in config.budgets]
        cost.plot(config.budgets, losses, color=GREY, marker="s", markersize=3.5, ls="--")
        cost.set_ylabel("unsteered loss of the text, nats a token", color=GREY)
        cost.set_ylim(0, None)
    config.out.write_bytes(svg(figure))
    print(f"{config.out}: {goal.name}, feature {feature}, {config.out.stat().st_size / 1e3:.0f} kB")
