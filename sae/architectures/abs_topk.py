"""AbsTopK (arXiv 2510.00404): the K pre-activations of largest magnitude, with their signs.

One latent then stands for both ends of a direction, where TopK needs two.
"""

from steersman.sae.architectures.topk import TopKSAE


class AbsTopKSAE(TopKSAE):
    """`f_j = z_j` where |z_j| is among the K largest of the token, else 0; `z = (x - b_dec) W_enc + b_enc` (the paper's
    hard-thresholding operator). SAELens has no such architecture."""

    name = "abs_topk"
    signed = True
