"""`LanguageModel`: a transformers model with named hook points that can be read, edited and generated with.

Here it is loaded, copied and shown. The rest is in a module for each part: `model_points` (what it is, hook points),
`model_text` (tokens and conversations), `model_passes` (capture, edits, logits), `model_generation` and
`model_activations` (which features of an SAE fire on a text).
"""

import logging
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from steersman.device import pick_device
from steersman.errors import SteersmanError
from steersman.html import card
from steersman.lm.attached import without_hooks
from steersman.lm.clock import PassClock
from steersman.lm.final_norm import find_final_norm
from steersman.lm.hook_map import HookMap
from steersman.lm.load import Quantization, load_pretrained
from steersman.lm.model_activations import ModelActivations
from steersman.lm.model_generation import ModelGeneration
from steersman.lm.positions import own_offset
from steersman.lm.source import check_reads_text, name_in_cache
from steersman.lm.stand_ins import STAND_INS
from steersman.lm.tokens import TextEncoder
from steersman.lm.wrappers import innermost

log = logging.getLogger(__name__)

_UNKNOWN: Any = "not looked for"  # a norm; a text, so that copies and pickles know it again


class LanguageModel(ModelGeneration, ModelActivations):
    """A transformers model (decoder, or encoder for capture) and its tokenizer.

    `model` is set to evaluation mode and used as it is otherwise: with its own weights, dtype and device, and no hook
    stays on it. Of a model wrapped by torch.compile, PEFT or data parallelism the transformers model inside is used,
    and while something steers or reads it, compiled code of it runs as it is written. A copy (`copy.deepcopy`, pickle)
    is independent, and plain wherever it is made. For edits and threads see `edit`. `blocks` names the list of
    transformer blocks when it cannot be found (see `steersman.lm.hooks.find_blocks`). `bos=False` puts no BOS before
    any text: for families whose own tokenizer never does.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str = "",
        revision: str | None = None,
        blocks: str | None = None,
        bos: bool = True,
    ) -> None:
        self.model: Any = innermost(model)
        check_reads_text(self.model)
        model.eval()
        self.tokenizer = tokenizer
        self.revision = revision
        self.quantization: Quantization | None = None
        self.tensor_parallel = False
        config: Any = self.model.config
        origin = str(getattr(config, "_name_or_path", "") or "")
        self.name = name or name_in_cache(origin) or origin or type(self.model).__name__
        self.config = config.get_text_config()
        self.hooks = HookMap(self.model, self.config, blocks)
        self._norm: Any = _UNKNOWN
        self._first_position = own_offset(self.model)
        self.can_generate: bool = hasattr(self.model, "can_generate") and bool(self.model.can_generate())
        self._text = (
            None if tokenizer is None else TextEncoder(tokenizer, is_encoder=self._is_encoder(tokenizer), bos=bos)
        )
        self._clock = self._new_clock()
        self._reads_padding: bool | None = None

    def _new_clock(self) -> PassClock:
        return PassClock(self.model, None if self._text is None else self._text.known_bos)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but what is tied to the hooks on this model."""
        return {key: value for key, value in self.__dict__.items() if key not in ("hooks", "_clock")} | {
            "blocks_path": self.hooks.path
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        blocks = state.pop("blocks_path")
        self.__dict__.update(state)
        without_hooks(self.model, STAND_INS)
        self.hooks = HookMap(self.model, self.config, blocks)
        self._clock = self._new_clock()

    def _is_encoder(self, tokenizer: Any) -> bool:
        # An encoder's tokenizer frames the text itself; a decoder's [CLS], where it has one, is its BOS.
        return not self.can_generate and getattr(tokenizer, "cls_token_id", None) is not None

    @classmethod
    def load(
        cls,
        source: str | PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        name: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        tensor_parallel: bool = False,
        quantization: Quantization | None = None,
        bos: bool = True,
    ) -> "LanguageModel":
        """Load from a folder or from the Hugging Face hub.

        `dtype` None means float32 on the CPU and the checkpoint's own elsewhere; `device` "auto" takes an accelerator
        if there is one. `name` is what SAEs and stores record; by default the hub id or the folder's name. `bos=False`
        puts no BOS before any text.

        For models that one device does not hold: `device_map` ("auto", or {module: device}) spreads the layers over
        devices, the host's memory and disk (through accelerate); `quantization` keeps weights in "8bit" or "4bit"
        (through bitsandbytes); `tensor_parallel` splits every layer over the processes of a torchrun job, all of which
        must then make the same calls and see the same hidden states.

        Raises SteersmanError when the folder is missing or holds no model, when the hub has no such id, for a package
        that is not installed, and for tensor_parallel in a single process or with one of the others.
        """
        where = pick_device(device)
        model, tokenizer, found = load_pretrained(
            source,
            dtype=dtype,
            device=where,
            revision=revision,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            tensor_parallel=tensor_parallel,
            quantization=quantization,
        )
        lm = cls(model, tokenizer, name=name or found, revision=revision, bos=bos)
        lm.quantization, lm.tensor_parallel = quantization, tensor_parallel
        return lm

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.name!r}, {self.n_layers} layers, d_model={self.d_model}, {self.dtype}, {self.device})"
        )

    def _repr_html_(self) -> str:
        tokenizer = self._text.tokenizer if self._text is not None else None
        facts = [
            ("architecture", self.model.config.model_type), ("layers", self.n_layers), ("d_model", self.d_model),
            ("heads", getattr(self.config, "num_attention_heads", "unknown")), ("vocabulary", self.config.vocab_size),
            ("parameters", sum(p.numel() for p in self.model.parameters())), ("dtype", str(self.dtype)),
            ("device", str(self.device)),
            ("chat template", "yes" if getattr(tokenizer, "chat_template", None) else "no"),
        ]  # fmt: skip
        return card(f"LanguageModel({self.name!r})", facts)

    # Output layer

    def unembed(self) -> tuple[Tensor, nn.Module | None]:
        """(W_U [D, V], final norm or None): what turns the last residual stream into logits, for the logit lens.

        Raises SteersmanError for models without an output layer over a vocabulary.
        """
        head = self.model.get_output_embeddings()
        if head is not None and head.weight.device.type == "meta":
            raise SteersmanError(f"the output layer of {self.name} is kept elsewhere (offloaded): load it whole")
        if head is None or head.weight.shape[-1] != self.d_model:
            raise SteersmanError(f"{self.name} has no output layer over its vocabulary of width {self.d_model}")
        return head.weight.T, self.final_norm()

    def final_norm(self) -> nn.Module | None:
        """The norm between the last block and the output layer, or None where there is none (said once)."""
        if isinstance(self._norm, str):
            self._norm = find_final_norm(self.model, self.hooks.path, self.blocks, self.d_model)
            if self._norm is None and self.can_generate:
                log.info("%s has no norm before its output layer: its logit lens is the output layer alone", self.name)
        return self._norm
