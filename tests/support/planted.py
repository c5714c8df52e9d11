"""A planted SAE on which the encoder misleads: what was put into a vector is known."""

from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.sae import SAE, SAEConfig
from steersman.steer.decompose import Decomposition

D, L, K = 128, 1024, 16
ALWAYS_ON, TRUE, BACKGROUND = 8, 3, 4


@dataclass(frozen=True, eq=False)
class Planted:
    """A top-k SAE, a vector of 3 positive and 3 negative features, and activations that contrast them."""

    seed: int
    """What it was made from."""
    sae: SAE
    v: Tensor
    """[D]: the six features with coefficients of size 0.5 to 1.5."""
    signs: dict[int, int]
    """The six features and their signs."""
    positive: Tensor
    """[N, D] activations with the positive features on."""
    negative: Tensor
    """[N, D] with the negative ones on."""

    def __repr__(self) -> str:
        return f"planted({self.seed})"

    def recovered(self, found: Decomposition) -> int:
        """How many of the six are among the six largest coefficients, with the right sign."""
        top = found.coefficients.abs().argsort(descending=True)[: len(self.signs)]
        pairs = zip(found.features[top].tolist(), found.coefficients[top].tolist())
        return sum(c * self.signs.get(feature, 0) > 0 for feature, c in pairs)


def _clear(rows: Tensor, order: Tensor) -> bool:
    """Whether the first six of `order` are apart from one another, and each three together from any other row."""
    six, others = rows[order[: 2 * TRUE]], rows[order[2 * TRUE :]]
    apart = (six @ six.T).fill_diagonal_(0).abs().max() < 0.2
    return bool(apart) and bool((others @ torch.stack([six[:TRUE].sum(0), six[TRUE:].sum(0)]).T).abs().max() < 0.55)


def planted(seed: int, n: int = 400) -> Planted:
    """The bias of 8 features keeps them on for any input, and that of the others off for small ones, so that the code
    of a small vector is decided by the biases."""
    g = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig(d_in=D, d_sae=L, k=K), g)
    order = torch.randperm(L, generator=g)
    while not _clear(sae.W_dec.detach(), order):  # 6 of 6 can be asked for then
        order = torch.randperm(L, generator=g)
    plus, minus, on, others = order.split([TRUE, TRUE, ALWAYS_ON, L - ALWAYS_ON - 2 * TRUE])
    with torch.no_grad():
        q = torch.linalg.qr(sae.W_dec[torch.cat([plus, minus])].T).Q
        sae.W_dec[on] -= (sae.W_dec[on] @ q) @ q.T  # what is always on has no part in the six
        sae.normalize_decoder()
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(-3.5)
        sae.b_enc[on] = 5.0
        sae.b_dec.copy_(torch.randn(D, generator=g))
    rows, b_dec = sae.W_dec.detach(), sae.b_dec.detach()
    sizes = (0.5 + torch.rand(6, generator=g)) * torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])

    def activations(true: Tensor) -> Tensor:
        code = torch.zeros(n, L)
        code[:, on] = 1 + torch.rand(n, ALWAYS_ON, generator=g)
        for i in range(n):
            some = others[torch.randint(0, len(others), (BACKGROUND,), generator=g)]
            code[i, some] = 4 + 2 * torch.rand(BACKGROUND, generator=g)
        code[:, true] = 7 + 2 * torch.rand(n, TRUE, generator=g)
        return b_dec + code @ rows

    return Planted(
        seed=seed,
        sae=sae,
        v=sizes @ rows[torch.cat([plus, minus])],
        signs=dict.fromkeys(plus.tolist(), 1) | dict.fromkeys(minus.tolist(), -1),
        positive=activations(plus),
        negative=activations(minus),
    )
