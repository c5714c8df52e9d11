"""The part of `LanguageModel` that says what the model is and what its hook points are called."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from steersman.errors import SteersmanError
from steersman.lm.digest import model_digest
from steersman.lm.hook_map import HookMap
from steersman.lm.hooks import MASKED_ATTENTION, SPLIT_KINDS, HookName, HookPoint, several_hooks
from steersman.lm.origin import same_model
from steersman.lm.positions import context_length
from steersman.lm.probe import module_device


class ModelPoints:
    """A transformers model, its dimensions and its hook points by name."""

    model: Any
    name: str
    config: Any
    hooks: HookMap
    tensor_parallel: bool

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and so where token ids go; of offloaded ones, where they are brought to."""
        embeddings = self.model.get_input_embeddings()
        return module_device(embeddings, embeddings.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of hidden states."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order."""
        return self.hooks.blocks

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.hooks.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def context_length(self) -> int | None:
        """Largest number of tokens the model was built for, or None where its configuration names none."""
        return context_length(self.model, self.config)

    def matches(self, model_name: str) -> bool:
        """Whether `model_name`, as an SAE or a store recorded it, means this model: see `same_model`."""
        return same_model(model_name, self.name)

    def digest(self) -> str:
        """Sixteen hexadecimal digits of the configuration and the weights as they are now; see `lm/digest.py`."""
        return model_digest(self.model, self.config)

    # Hook points

    def hook_names(self) -> list[str]:
        """Every hook point, in the order of the pass."""
        return list(self.hooks.points)

    def resolve_hook(self, name: HookName) -> str:
        """The TransformerLens name of a hook point given by that name, by a module path such as `model.layers.6`, or by
        a layer's number, which means what its block returns; -1 is the last layer.

        Raises SteersmanError: a layer that does not exist (naming the number of layers) or an unknown name (listing
        near ones).
        """
        return self.hooks.resolve(name).name

    def resolve_hooks(self, names: HookName | Sequence[HookName]) -> list[str]:
        """`resolve_hook` of one hook point or of several."""
        return [self.resolve_hook(name) for name in several_hooks(names)]

    def hook_point(self, name: HookName) -> HookPoint:
        """The hook point of a name, as for `resolve_hook`: points compare, `a < b` where a is reached earlier."""
        return self.hooks.resolve(name)

    def hook_width(self, name: HookName) -> int:
        """Width of what a hook point holds: of its hidden states, the vocabulary, or the heads of an attention mask."""
        return self.hooks.resolve(name).width

    def hook_layer(self, name: HookName) -> int:
        """Index of the block a hook point belongs to; the number of blocks for the logits."""
        return self.hooks.resolve(name).layer

    def _reachable(self, name: HookName) -> HookPoint:
        """The hook point, after checking that the model as it is loaded holds there what the name says."""
        point = self.hooks.resolve(name)
        if self.tensor_parallel and point.kind in SPLIT_KINDS:
            raise SteersmanError(
                f"{point.name} is split over the ranks of a tensor-parallel model: load it without tensor_parallel"
            )
        attention = getattr(self.config, "_attn_implementation", None) or "eager"
        if point.kind == "hook_attn_mask" and attention not in MASKED_ATTENTION:
            raise SteersmanError(
                f"{point.name}: the attention implementation {attention!r} takes no bias: load the model with "
                "attn_implementation='sdpa' or 'eager', or call lm.model.set_attn_implementation('sdpa')"
            )
        return point
