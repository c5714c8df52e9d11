"""The arithmetic of a sparse autoencoder on raw tensors.

`reference` defines the results, `torch_ops` computes them fast with PyTorch, `dispatch` chooses, `autograd` gives them
gradients.
"""

from steersman.kernels.autograd import Order, sparse_decode, topk_encode, with_gradient
from steersman.kernels.dispatch import choose

__all__ = ["Order", "choose", "sparse_decode", "topk_encode", "with_gradient"]
