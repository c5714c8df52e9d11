"""`LanguageModel`: a transformers model with named hook points that can be read, edited and generated with."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from steersman.conversations import Conversation
from steersman.device import pick_device
from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.lm import chat as chats
from steersman.lm.attached import without_hooks
from steersman.lm.chat_spans import ChatSpans
from steersman.lm.clock import PassClock, PassDone, PromptLength, not_reached
from steersman.lm.digest import model_digest
from steersman.lm.final_norm import find_final_norm
from steersman.lm.generate import Generation, run_generation, sampling_settings
from steersman.lm.hook_map import HookMap
from steersman.lm.hooks import LOGITS, MASKED_ATTENTION, SPLIT_KINDS, HookName, HookPoint, several_hooks
from steersman.lm.load import Quantization, load_pretrained
from steersman.lm.origin import same_model
from steersman.lm.passes import ForwardPass
from steersman.lm.positions import context_length, own_offset
from steersman.lm.probe import module_device
from steersman.lm.source import check_reads_text, name_in_cache
from steersman.lm.streaming import Stream, streamed
from steersman.lm.template import ChatTemplate
from steersman.lm.tokens import ChatBatch, Prompt, Prompts, TextEncoder, TokenBatch, as_prompts, writing_of
from steersman.lm.unwinding import Unwinding
from steersman.lm.wrappers import eager, innermost, is_compiled

log = logging.getLogger(__name__)

_UNKNOWN: Any = object()  # a norm that has not been looked for


class LanguageModel:
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
        without_hooks(self.model)
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

    # What it is

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

    @property
    def bos_token_id(self) -> int | None:
        """The token put before every text ([CLS] for encoders), or None in families that use none and with
        `bos=False`."""
        return None if self._text is None else self._text.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence token, or None."""
        return None if self.tokenizer is None else self.tokenizer.eos_token_id

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills short rows: the tokenizer's own, else its eos or unk token."""
        return None if self._text is None else self._text.pad_token_id

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.name!r}, {self.n_layers} layers, d_model={self.d_model}, {self.dtype}, {self.device})"
        )

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
        if self._norm is _UNKNOWN:
            self._norm = find_final_norm(self.model, self.hooks.path, self.blocks, self.d_model)
            if self._norm is None and self.can_generate:
                log.info("%s has no norm before its output layer: its logit lens is the output layer alone", self.name)
        return self._norm

    # Text

    def _texts(self) -> TextEncoder:
        if self._text is None:
            raise SteersmanError(f"{self.name} was wrapped without a tokenizer: pass token ids, or give it one")
        return self._text

    def encode(
        self,
        texts: Prompts,
        *,
        bos: bool = True,
        padding_side: str = "right",
        max_length: int | None = None,
    ) -> TokenBatch:
        """Texts as one padded batch on the model's device. `bos` adds the family's special tokens, never twice.

        A text may also be given as token ids, taken as they are, or as a conversation (a list of messages), written out
        by the tokenizer's chat template.
        """
        return self._texts().batch(texts, bos, padding_side, max_length).to(self.device)

    def token_ids(self, text: Prompt, bos: bool = False) -> list[int]:
        """The ids of one text, without special tokens unless `bos`."""
        return self._texts().ids(text, bos)

    def shown(self, text: Prompt) -> str:
        """A prompt as a string, whatever it was given as."""
        return self._texts().shown(text)

    @property
    def chat_template(self) -> ChatTemplate:
        """The tokenizer's chat template. Raises SteersmanError where there is none."""
        return self._texts().current_template()

    @property
    def template_digest(self) -> str | None:
        """Sixteen hexadecimal digits of the chat template, which whatever is made from chats records; None without."""
        return None if self._text is None or not self._text.has_template else self.chat_template.digest

    def written(self, messages: Conversation) -> str:
        """A conversation as the text that the chat template makes of it, with the header of the reply unless its last
        message is the assistant's."""
        return writing_of(messages).render(self.chat_template, messages)

    def encode_chat(
        self,
        conversations: str | Conversation | Sequence[str | Conversation],
        *,
        system: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        padding_side: str = "right",
        max_length: int | None = None,
        **settings: Any,
    ) -> ChatBatch:
        """Conversations as one padded batch, written out by the model's own chat template, that knows whose each token
        is: `roles`, `turns`, `content`, `mask("last_user")`. No BOS is added to what the template writes.

        A conversation is a list of messages; a string is a user's message. `system` puts a system message before each.
        Each ends with the header of the assistant's turn, unless its last message is one or `add_generation_prompt` is
        False; `continue_final_message` ends with the last message's text, open. `settings` are the template's
        variables, such as `enable_thinking` or `tools`.

        Raises SteersmanError for a tokenizer without a template, and for conversations that the template refuses;
        whose tokens are whose is found when it is asked for, and may be refused then (see `docs/chat.md`).
        """
        writing = chats.Asked(system, add_generation_prompt, continue_final_message, settings)
        return chats.encode(self._texts(), conversations, writing, padding_side, max_length).to(self.device)

    def chat(
        self,
        conversations: str | Conversation | Sequence[str | Conversation],
        *,
        system: str | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool | None = None,
        template: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generation:
        """The assistant's reply to each conversation: see `Generation.replies` and `Generation.conversations`.

        Conversations as for `encode_chat`, `template` its settings, and `options` those of `generate`. With
        `continue_final_message` the reply begins with the last message. Steering contexts apply as in `generate`, with
        scopes such as `assistant` or `last_user` beside.

        Raises SteersmanError where the last message is the assistant's and is not to be continued.
        """
        asked = chats.Asked(system, add_generation_prompt, continue_final_message, template or {})
        return self.generate(chats.encode(self._texts(), conversations, asked, "left", None, to_reply=True), **options)

    def check_room(self, width: int, new_tokens: int) -> None:
        """Raise a SteersmanError unless a prompt of `width` tokens and so many new ones fit the model's context."""
        if self.context_length is not None and width + new_tokens > self.context_length:
            raise SteersmanError(
                f"a prompt of {width} tokens and {new_tokens} new ones exceed the context of {self.name}, "
                f"{self.context_length} tokens: shorten the prompt or lower max_new_tokens"
            )

    # Passes

    @property
    def clock(self) -> PassClock:
        """What tells edits where a pass stands; for decoders that make passes of their own (see `lm.session`)."""
        return self._clock

    @property
    def cache_name(self) -> str:
        """What the model's forward calls its KV cache."""
        return self._clock.cache_name

    def accepts(self, argument: str) -> bool:
        """Whether the model's forward takes an argument of this name."""
        return argument in self._clock.parameters

    def _inputs(self, input_ids: Tensor | TokenBatch, attention_mask: Tensor | None) -> dict[str, Any]:
        if isinstance(input_ids, TokenBatch):
            input_ids, attention_mask = input_ids.input_ids, input_ids.attention_mask
        ids = torch.as_tensor(input_ids, device=self.device)
        if ids.ndim == 1:
            ids = ids[None]
        if ids.ndim != 2 or ids.numel() == 0:
            raise SteersmanError(f"input_ids must be [batch, sequence] and not empty, got {tuple(ids.shape)}")
        inputs: dict[str, Any] = {"input_ids": ids}
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask, device=self.device).long().reshape(ids.shape)
            inputs["attention_mask"] = mask
            if bool((mask[:, 0] == 0).any()):
                self.check_left_padding()
                inputs |= self.padded_inputs(mask, ids.shape[1])
        if self.accepts("use_cache"):
            inputs["use_cache"] = False
        return inputs

    def padded_inputs(self, mask: Tensor, n: int) -> dict[str, Tensor]:
        """What a pass over the last n columns of text padded on the left is given beside its tokens: `mask` [B, S], of
        all columns so far, and positions that start where they do without padding, as in generate."""
        inputs = {"attention_mask": mask}
        if self.accepts("position_ids"):
            inputs["position_ids"] = ((mask.cumsum(1) - 1).clamp(min=0) + self._first_position)[:, -n:]
        return inputs

    def check_left_padding(self) -> None:
        """Refuse left padding for a recurrent model that reads it, which is measured once."""
        if not getattr(self.model, "_is_stateful", False):
            return
        if self._reads_padding is None:
            self._reads_padding = False  # for the passes that follow
            ids = torch.arange(1, 4, device=self.device)[None] % int(self.config.vocab_size)
            padded, mask = torch.cat([ids[:, :2], ids], 1), torch.tensor([[0, 0, 1, 1, 1]])
            with self.unedited():
                hook = f"blocks.{self.n_layers - 1}.hook_resid_post"
                alone, behind = (self.capture(*given, hooks=hook)[hook][:, -3:] for given in ((ids,), (padded, mask)))
            self._reads_padding = bool((behind - alone).norm() > 0.01 * alone.norm())
        if self._reads_padding:
            raise SteersmanError(
                f"{self.name} is recurrent and reads padding on the left as text: give prompts of one length, or one "
                "at a time"
            )

    @torch.no_grad()
    def capture(
        self,
        input_ids: Tensor | TokenBatch,
        attention_mask: Tensor | None = None,
        *,
        hooks: HookName | Sequence[HookName],
        prompt_length: PromptLength | None = None,
    ) -> dict[Any, Tensor]:
        """What the named hook points hold, from one pass that stops after the last one needed: hidden states [B, S, D]
        (D as `hook_width` says), attention masks [B, H, S, S], logits [B, S, V].

        `input_ids` [B, S] and `attention_mask` [B, S] as from `encode`, or the batch itself, which also knows whose
        the tokens of conversations are. The keys are the names as given. Inside an edit the edited states are read;
        `prompt_length` is then as for `prompt_length()`. Padding is included as it comes.
        """
        points = {name: self._reachable(name) for name in several_hooks(hooks)}
        if not points:
            raise SteersmanError("capture needs at least one hook point")
        inputs = self._inputs(input_ids, attention_mask)
        shape = inputs["input_ids"].shape
        waiting = {point.name for point in points.values()}
        states: dict[str, Tensor] = {}

        here = threading.get_ident()

        def reader(point: HookPoint) -> Callable[[Tensor], None]:
            # Falcon adds the attention's output into the MLP's in place: keep what a sublayer takes and returns apart.
            name, own = point.name, point.kind.startswith("hook_resid") or point.kind == LOGITS

            def read(h: Tensor) -> None:
                if threading.get_ident() != here:
                    return
                h = point.states(h, *shape)
                states[name] = h if own else h.clone()
                waiting.discard(name)
                if not waiting:
                    raise PassDone

            return read

        def detach(point: HookPoint, read: Callable[[Tensor], None]) -> None:
            handle = handles.get(read)
            point.release(read) if handle is None else handle.remove()

        handles: dict[Any, Any] = {}
        with Unwinding() as stack:
            stack.enter_context(self._clock.declare(prompt_length, spans=_spans_of(input_ids)))
            self._prepare(stack)
            if is_compiled(self.model):
                eager.hold(stack)
            for point in {p.name: p for p in points.values()}.values():
                read = reader(point)
                stack.undo(detach, point, read)
                with self._clock.locked():
                    handles[read] = point.attach(read)
            with suppress(PassDone):
                self.model(**inputs)
        for point in points.values():
            if point.name in waiting:
                raise not_reached(point.name)
        return {name: states[point.name] for name, point in points.items()}

    def _prepare(self, stack: Unwinding) -> None:
        """Keep the model in evaluation mode until the stack unwinds: dropout has no place in what is read."""
        if self.model.training:
            training = [module for module in self.model.modules() if module.training]
            stack.undo(_set_training, training, True)
            _set_training(training, False)

    def edit(
        self, hook: HookName, fn: Callable[[Tensor, ForwardPass], Tensor], *, for_all_threads: bool = False
    ) -> AbstractContextManager[Any]:
        """While the context is open, `fn(h, fwd)` replaces what is at `hook` in every pass: a hidden state [B, S, D],
        an attention mask [B, H, S, K], or logits [B, n, V] (n < S where the pass computes the last tokens' only).

        `fwd` (a `ForwardPass`) says which tokens and absolute positions the pass holds; at the logits, those that have
        logits. `fn` returns a new tensor of h's shape, or h itself to change nothing; it must not write into h. Edits
        nest, apply in the order they were entered, and are gone when the context closes, by an exception too.

        An edit is of the thread or asyncio task that opened it, and of the tasks that are started inside. Others may
        open edits of their own at the same time; a pass of one that has none is an error meanwhile, as it cannot be
        told whether it should be edited. `for_all_threads` edits their passes as well, as a server needs.

        A pass that does not come to `hook` (a block that is skipped or replaced) is an error, and so is one under
        gradient checkpointing with gradients, which would run blocks again without the edit.

        Raises SteersmanError for an unknown hook point, and for one that the model as it is loaded does not have:
        attention masks where the implementation takes none, heads and neurons that tensor parallelism splits.
        """
        point = self._reachable(hook)

        def apply(h: Tensor) -> Tensor | None:
            fwd = self._clock.now()
            x = point.states(h, fwd.batch, fwd.length)
            new = fn(x, fwd.last(x.shape[1]) if point.kind == LOGITS else fwd)
            if new is x:
                return None
            if not isinstance(new, Tensor) or new.shape != x.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise SteersmanError(f"the edit at {point.name} returned {got}, expected a tensor {tuple(x.shape)}")
            return new.to(h.dtype).reshape(h.shape)

        return self._clock.editing(point, apply, for_all_threads)

    def unedited(self) -> AbstractContextManager[Any]:
        """A context in which passes are made without the edits that are open around it, here and in other threads. An
        edit may open it in the middle of a pass, to make another that the first knows nothing of."""
        return self._clock.declare(None, unedited=True)

    def prompt_length(self, lengths: PromptLength) -> AbstractContextManager[Any]:
        """Declare how many real tokens (BOS included) of each row are its prompt, for passes outside `generate`.

        Without it every token of a plain forward pass is prompt; with it, teacher forcing a generated text steers the
        same positions as generating it did.
        """
        return self._clock.declare(lengths)

    def chat_spans(self, spans: ChatSpans | TokenBatch | Generation) -> AbstractContextManager[Any]:
        """Declare whose the tokens of the passes inside are, row by row and by absolute position, for scopes such as
        `assistant`: of `encode_chat`'s batch, a generation, or their `spans`. `chat` and `generate` do it themselves,
        and so do `logits` and `capture` for a batch; calls of `lm.model` need it."""
        found = spans if isinstance(spans, ChatSpans) else spans.spans
        if found is None:
            raise SteersmanError("these are no conversations: encode them with lm.encode_chat")
        return self._clock.declare(spans=found)

    def logits(
        self,
        input_ids: Tensor | TokenBatch,
        attention_mask: Tensor | None = None,
        *,
        prompt_length: PromptLength | None = None,
        grad: bool = False,
    ) -> Tensor:
        """Logits [B, S, V] of one pass without a cache, of ids or a batch as for `capture`; `prompt_length` as for
        `prompt_length()`. `grad` keeps the graph, for whoever optimises what an edit adds, unless gradients are off
        outside too."""
        inputs = self._inputs(input_ids, attention_mask)
        with Unwinding() as stack:
            stack.enter_context(self._clock.declare(prompt_length, spans=_spans_of(input_ids)))
            if not grad:
                self._prepare(stack)
            before = self._clock.state.passes
            with nullcontext() if grad else torch.no_grad():
                output = self.model(**inputs)
            self._clock.check_seen(before)
        if not hasattr(output, "logits"):
            raise SteersmanError(f"{self.name} has no output layer over its vocabulary: it has hidden states only")
        return output.logits

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts | TokenBatch,
        *,
        max_new_tokens: int = 40,
        do_sample: bool | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_cache: bool = True,
        bos: bool = True,
        **options: Any,
    ) -> Generation:
        """Continue each prompt by up to `max_new_tokens` tokens, in one left-padded batch. Prompts as for `encode`, or
        a batch of it that is padded on the left.

        Greedy unless `do_sample`, a temperature other than 0 or 1, `top_k`, `top_p` or a `seed` asks for sampling.
        `seed` leaves the global generators as they were; `bos` is as for `encode`. Further `options` (`num_beams`,
        `num_return_sequences`, `stop_strings`, ...) go to transformers.
        Raises SteersmanError for encoders, when prompt and new tokens exceed the model's context, for options that
        transformers refuses or that would be passed over, and for prompts of several lengths where the model reads
        the padding before them, as some recurrent models do.
        """
        return run_generation(
            self,
            *self._prompts(prompts, bos),
            max_new_tokens=max_new_tokens,
            sampling=sampling_settings(
                do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
            ),
            seed=seed,
            use_cache=use_cache,
            options=options,
        )

    def stream(
        self,
        prompts: Prompts | TokenBatch,
        *,
        max_new_tokens: int = 40,
        do_sample: bool | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_cache: bool = True,
        bos: bool = True,
        **options: Any,
    ) -> Stream:
        """The tokens of `generate` one by one as they are made: an iterator of `StreamedToken`s, each with its row, id,
        piece of text and whether it ends its row.

        Arguments as for `generate`, without beams. The steering that is open where the first token is asked for
        applies to all. Leaving the iterator early (`close()`, or a `with` block) leaves nothing on the model.
        """
        if options.get("num_beams") not in (None, 1):
            raise SteersmanError("beams change what was written before: tokens of a beam search cannot be streamed")
        sampling = sampling_settings(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        batch, shown = self._prompts(prompts, bos)
        return streamed(
            self,
            batch,
            shown,
            max_new_tokens=whole_number(max_new_tokens, "max_new_tokens", at_least=1),
            sampling=sampling,
            seed=seed,
            use_cache=use_cache,
            options=options,
        )

    def _prompts(self, prompts: Prompts | TokenBatch, bos: bool) -> tuple[TokenBatch, list[str]]:
        """Prompts to continue, as a left-padded batch and as they read."""
        if not self.can_generate:
            raise SteersmanError(f"{self.name} ({type(self.model).__name__}) cannot generate text: it is not a decoder")
        if isinstance(prompts, TokenBatch):
            if bool((prompts.attention_mask[:, -1] == 0).any()):
                raise SteersmanError("prompts to continue are padded on the left: encode them with padding_side='left'")
            rows = [row[real] for row, real in zip(prompts.input_ids, prompts.attention_mask.bool())]
            return prompts.to(self.device), [str(self.tokenizer.decode(row)) for row in rows]
        prompts = as_prompts(prompts)
        batch = self.encode(prompts, bos=bos, padding_side="left")
        return batch, [self.shown(prompt) for prompt in prompts]


def _spans_of(given: object) -> ChatSpans | None:
    return given.spans if isinstance(given, TokenBatch) else None


def _set_training(modules: Sequence[nn.Module], mode: bool) -> None:
    for module in modules:
        module.training = mode
