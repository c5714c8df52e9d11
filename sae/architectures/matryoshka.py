"""Matryoshka BatchTopK (arXiv 2503.17547): groups of features whose first ones are SAEs of their own. Inference
only."""

from dataclasses import replace
from itertools import accumulate

from torch import nn

from steersman.errors import SteersmanError
from steersman.sae.architectures.batch_topk import BatchTopKSAE
from steersman.sae.base import SAE


class MatryoshkaSAE(BatchTopKSAE):
    """Encodes as BatchTopK does, by one threshold; `cfg.group_sizes` says where each nested SAE ends."""

    name, saelens_name = "matryoshka", "jumprelu"
    uses_groups = True
    trainable = False
    encode_training = SAE.encode_training  # which refuses

    def nested(self, n_groups: int) -> SAE:
        """The SAE of the first `n_groups` groups of features. It shares its weights with this one.

        >>> from steersman.sae import SAEConfig
        >>> sae = MatryoshkaSAE(SAEConfig(d_in=4, d_sae=12, k=2, architecture="matryoshka", group_sizes=(2, 4, 6)))
        >>> sae.nested(2).cfg.d_sae
        6
        """
        ends = list(accumulate(self.cfg.group_sizes))
        if not 1 <= n_groups <= len(ends):
            raise SteersmanError(f"there are {len(ends)} groups of features, not {n_groups}")
        width = ends[n_groups - 1]
        cfg = replace(self.cfg, d_sae=width, k=min(self.cfg.k, width), architecture="batch_topk", group_sizes=())
        sae = BatchTopKSAE(cfg)
        sae.W_enc, sae.W_dec = nn.Parameter(self.W_enc[:, :width]), nn.Parameter(self.W_dec[:width])
        sae.b_enc, sae.b_dec, sae.threshold = nn.Parameter(self.b_enc[:width]), self.b_dec, self.threshold
        return sae
