"""Make the picture of the README: what a model writes without steering and with, its tokens coloured by a feature.

    python scripts/dev/picture.py --model path/to/SmolLM2-135M-Instruct --sae runs/smollm2 --out docs/picture.svg

The vector is the difference of the means of texts on food and texts on other things. The feature is the one whose mean
activation on them differs most; a token's colour is its activation where the model reads the text unsteered. Beside the
texts: how often the feature fires in what is written, and what the steering costs, over the strength.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from steersman import SAE, LanguageModel, Steerer, SteeringVector

FOOD = [
    "She baked bread and a cake in the kitchen",
    "The soup had garlic, onions and butter",
    "They ate pasta with cheese for dinner",
    "The chef fried the fish in olive oil",
    "A bowl of rice with sweet sauce",
    "He spread jam on warm toast",
]
OTHER = [
    "The ship sailed across the sea in a storm",
    "Waves broke over the deck of the boat",
    "The sailor looked at the ocean and the harbour",
    "The band played a song on the guitar",
    "The orchestra tuned their violins",
    "He wrote the lyrics of the album",
]
PROMPT = "The most important thing about my day is"
WIDTH = 64
"""Characters of a line."""
COLOUR, INK, GREY = "#e8710a", "#1f2328", "#6e7781"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Make the picture of the README."""

    model: str
    """The model: SmolLM2-135M-Instruct in the README's picture."""
    sae: str
    """An SAE of it."""
    out: Path = Path("docs/picture.svg")
    """The picture."""
    shown: tuple[float, ...] = (0.0, 1.0, 1.5)
    """Strengths whose texts are shown."""
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)
    """Strengths of the curves."""
    samples: int = 16
    """Texts for each point of the curves."""
    sample: int = 0
    """Which of them is shown."""
    seed: int = 3
    """Seed of the generation."""


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


def feature_of(lm: LanguageModel, sae: SAE) -> int:
    """The feature whose mean activation differs most between the two sides."""
    hook = sae.cfg.hook_name

    def mean(texts: list[str]) -> Tensor:
        rows = [lm.capture(lm.encode([text]), hooks=[hook])[hook][0, 1:].float() for text in texts]
        return torch.stack([sae.encode(x).mean(0) for x in rows]).mean(0)

    return int((mean(FOOD) - mean(OTHER)).argmax())


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


def main(settings: Settings) -> None:
    lm, sae = LanguageModel.load(settings.model), SAE.load(settings.sae)
    vector = SteeringVector.contrast(lm, FOOD, OTHER, hook=sae.cfg.hook_name, method="diffmean")
    steerer, feature = Steerer(lm), feature_of(lm, sae)
    found: dict[float, Read] = {}
    for strength in sorted({*settings.shown, *settings.strengths}):
        with steerer.vector(vector, scale=strength, scope="generation"):
            written = lm.generate([PROMPT] * settings.samples, max_new_tokens=32, seed=settings.seed)
        found[strength] = read(lm, sae, feature, written.texts)
    scale = max(value for f in found.values() for row in f.values for value in row)

    mpl.rcParams.update({"svg.hashsalt": "steersman", "axes.spines.top": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.5), width_ratios=(2.15, 1), layout="constrained")
    left.set_axis_off()
    top = 0.0
    for strength in settings.shown:
        title = f"strength {strength:g}" if strength else "unsteered"
        top = draw_text(
            left, top, title, found[strength].tokens[settings.sample], found[strength].values[settings.sample], scale
        )
    left.set(xlim=(0, WIDTH), ylim=(top - 1, -1))

    fires = [
        100 * sum(v > 0 for r in found[s].values for v in r) / sum(map(len, found[s].values))
        for s in settings.strengths
    ]
    right.plot(settings.strengths, fires, color=COLOUR, marker="o", markersize=4)
    right.set(xlabel="strength of the food vector", ylim=(0, None))
    right.set_ylabel(f"tokens on which feature {feature} fires, %", color=COLOUR)
    cost = right.twinx()
    cost.plot(
        settings.strengths, [found[s].nll for s in settings.strengths], color=GREY, marker="s", markersize=3.5, ls="--"
    )
    cost.set_ylabel("unsteered loss of the text, nats a token", color=GREY)
    cost.set_ylim(0, None)
    figure.savefig(settings.out, metadata={"Date": None, "Creator": None})
    print(f"{settings.out}: feature {feature}, {settings.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
