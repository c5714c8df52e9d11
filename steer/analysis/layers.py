"""At which layers two sides of examples predict different tokens: the Jensen-Shannon divergence of their lenses.

The lens of a state is softmax(W_U ln_f(h)), what the model would predict if the layer were its last. For a positive
and a negative example, JS = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2, which lies between 0 and ln 2.

The trap: arXiv 2311.09433 chooses its layer by what it calls a JS divergence, but takes the softmax over hidden
dimensions and hands probabilities to a function that wants their logarithms; its value for two equal distributions is
not 0. Beside each mean here stands that of pairs from one side, the null: layers differ in how far any two texts lie
apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.evaluation.bootstrap import Estimate, bootstrap
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.methods.reading import Reader


@dataclass(frozen=True, kw_only=True)
class LayerDivergence:
    """How far apart the two sides' predictions are at one hook point."""

    hook_name: str
    """The hook point."""
    divergence: Estimate
    """Mean JS divergence of a positive and its negative, in nats, at most ln 2."""
    null: Estimate
    """The same of two neighbours on one side."""

    @property
    def excess(self) -> float:
        """The divergence above its null."""
        return self.divergence.mean - self.null.mean


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """[...] of log-probabilities p and q [..., V]: between 0, for equal ones, and ln 2, for disjoint ones.

    >>> one, other = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    >>> round(float(js_divergence(one, other)), 4), float(js_divergence(one, one))
    (0.6931, 0.0)
    """
    p, q = p.double(), q.double()
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=torch.float64))

    def kl(a: Tensor) -> Tensor:
        return torch.where(a == -torch.inf, 0.0, a.exp() * (a - m)).sum(-1)

    return ((kl(p) + kl(q)) / 2).clamp(min=0.0)


@torch.no_grad()
def layer_divergences(
    lm: LanguageModel,
    positive: ExamplesLike,
    negative: ExamplesLike,
    *,
    hooks: HookName | Sequence[HookName] | None = None,
    positions: str = "last",
    batch_size: int = 16,
) -> list[LayerDivergence]:
    """The divergence at each hook point (by default the output of every block), from paired examples.

    `positions`: the token that is read, as for a vector method; one per example. Raises SteersmanError for sides of
    different length, fewer than two pairs, and a model without an output layer.
    """
    examples = Examples(positive=as_examples(positive, "positive"), negative=as_examples(negative, "negative"))
    examples.check_pairs("layer_divergences")
    if len(examples.positive) < 2 or positions == "all":
        raise SteersmanError("give at least two pairs, and one position an example: not positions='all'")
    names = lm.resolve_hooks(
        hooks if hooks is not None else [f"blocks.{i}.hook_resid_post" for i in range(lm.n_layers)]
    )
    W_U, norm = lm.unembed()
    dtype = W_U.dtype

    def lens(h: Tensor) -> Tensor:
        h = h.to(W_U.device, dtype)
        return ((h if norm is None else norm(h)) @ W_U).float().log_softmax(-1)

    reader = Reader(lm, names, positions=positions, batch_size=max(2, batch_size))
    between: dict[str, list[float]] = {name: [] for name in names}
    within: dict[str, list[float]] = {name: [] for name in names}
    before: dict[str, Tensor] = {}
    for batch in reader.samples(examples, "pairs"):
        for name, h in batch.states.items():
            p = lens(h)
            between[name] += js_divergence(p[0::2], p[1::2]).tolist()
            chain = p if name not in before else torch.cat([before[name], p])  # a side's neighbours stand two apart
            within[name] += js_divergence(chain[:-2], chain[2:]).tolist()
            before[name] = p[-2:]
    found = []
    for name in names:
        divergence, null = bootstrap(between[name]), bootstrap(within[name])
        assert divergence is not None
        assert null is not None
        found.append(LayerDivergence(hook_name=name, divergence=divergence, null=null))
    return found
