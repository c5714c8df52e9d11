"""Vectors made from the outputs of chosen heads: inference-time intervention and function vectors.

Shape letters: N examples, H query heads, d width of a head, D width of the residual stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.config import check_types, merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.analysis.heads import Head, HeadProfile, HeadStates, mean_heads, probe_heads
from steersman.steer.edits.file import EditSet
from steersman.steer.edits.heads import HeadEdit, z_hook
from steersman.steer.methods.examples import ExamplesLike
from steersman.steer.methods.logistic import fit_logistic
from steersman.steer.vectors.vector import SteeringVector
from steersman.steer.weights.linear import output_layer


@dataclass(frozen=True, kw_only=True)
class ITIConfig:
    """Inference-time intervention (arXiv 2306.03341)."""

    k: int = 48
    """Heads that are edited: those whose probes are the most accurate. Theirs for the 32 x 32 of LLaMA-7B."""
    alpha: float = 15.0
    """Standard deviations of the states along its direction by which each head is moved."""
    direction: str = "mean"
    """mean: between the sides' means; probe: the weight of the logistic probe."""
    positions: str = "last"
    """Which token of each example is read: last, answer, mean or index:N."""
    l2: float = 0.01
    """Weight of |w|^2 / 2 in the probes."""
    batch_size: int = 16
    """Texts per forward pass."""
    max_length: int | None = None
    """Cut texts to this many tokens, BOS included."""
    seed: int = 0
    """Seed of the null."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.direction not in ("mean", "probe"):
            raise SteersmanError(f"direction must be mean or probe, got {self.direction!r}")
        if self.k < 1 or not self.l2 > 0:
            raise SteersmanError("k must be at least 1 and l2 above 0")


def intervene_on_heads(
    lm: LanguageModel,
    positive: ExamplesLike,
    negative: ExamplesLike,
    *,
    config: ITIConfig | None = None,
    **settings: Any,
) -> tuple[EditSet, HeadProfile]:
    """Inference-time intervention: z_n + alpha sigma_n u_n at the k heads n that know best which side a text is on.

    u_n is the unit vector between the means of head n's outputs on the two sides (or along its probe's weight), sigma_n
    the standard deviation of its outputs along u_n. The edits are meant for the last position of every step, as in the
    authors' code. Source: arXiv 2306.03341, section 3. The trap is in the choice: of a thousand heads the best look
    good by chance, so read the profile that comes with them (`significant`, and the held-out column).

    Raises SteersmanError for fewer than four examples of a side, and for more heads than there are.
    """
    config = merged(ITIConfig, config, settings)
    reading = {"positions": config.positions, "batch_size": config.batch_size, "max_length": config.max_length}
    states = HeadStates(lm, positive, negative, **reading)
    profile = probe_heads(states, l2=config.l2, seed=config.seed)
    vectors: dict[int, dict[int, Tensor]] = {}
    for layer, head in profile.top(config.k):
        vectors.setdefault(layer, {})[head] = torch.empty(0)
    for layer, heads in vectors.items():
        x, side = states.of(layer)
        if config.direction == "probe":
            directions = fit_logistic(lambda x=x, side=side: [(x, side)], l2=config.l2).weight
        else:
            directions = x[side].double().mean(0) - x[~side].double().mean(0)
        for head in heads:
            u = directions[head] / directions[head].norm()
            heads[head] = (config.alpha * (x[:, head].double() @ u).std() * u).float()
    edits = {z_hook(layer): HeadEdit.of(lm, z_hook(layer), heads) for layer, heads in sorted(vectors.items())}
    metadata = {
        "source": "arXiv 2306.03341",
        "k": config.k,
        "alpha": config.alpha,
        "direction": config.direction,
        "heads": [[*head, *profile.of(head)] for head in profile.top(config.k)],
        "null": profile.null,
    }
    made = EditSet(edits=edits, scope="last_prompt+generation", model_name=lm.name, method="iti", metadata=metadata)
    return made, profile


def function_vector(
    lm: LanguageModel,
    prompts: Sequence[str],
    heads: Sequence[Head],
    *,
    hook: HookName,
    means: Mapping[int, Tensor] | None = None,
) -> SteeringVector:
    """The sum of what chosen heads write, on average, at the last token of prompts that show a task in context.

    Args:
        lm: the model, unsteered.
        prompts: in-context prompts of the task (100 of ten examples each in the source).
        heads: those of the largest indirect effect, `patch_heads(...).top(k)`: 10 for GPT-J, 20 for Llama-2-7B.
        hook: where it will be added: a block's output, about a third of the way up in the source, at the last token.
        means: those of `mean_heads(lm, prompts)`, where they are known.

    Source: arXiv 2310.15213, equation 6. Raises SteersmanError where what a head writes cannot be told from the others'
    (a norm stands behind the attention), and for a hook point that does not hold the residual stream.
    """
    if not heads:
        raise SteersmanError("a function vector needs at least one head")
    name = lm.resolve_hook(hook)
    if not name.endswith(("hook_resid_pre", "hook_resid_mid", "hook_resid_post")):
        raise SteersmanError(f"a function vector is added to the residual stream, not at {name}")
    layers = sorted({layer for layer, _ in heads})
    known = mean_heads(lm, prompts, layers=layers) if means is None else means
    total = torch.zeros(lm.d_model, dtype=torch.float64)
    for layer in layers:
        chosen = [head for at, head in heads if at == layer]
        write, mean = output_layer(lm, layer, "attn"), known[layer].double()
        alone = torch.zeros_like(mean)
        alone[chosen] = mean[chosen]
        total += write.factor * (write.matrix().detach().cpu().double() @ alone.flatten())
    metadata = {"source": "arXiv 2310.15213", "heads": [list(head) for head in heads], "n_prompts": len(prompts)}
    return SteeringVector(
        directions={name: total.float()}, model_name=lm.name, method="function_vector", metadata=metadata
    )
