"""From text to rows of activations: the part that caching and streaming share."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, Self

import numpy as np
import torch

from steersman.config import check_types
from steersman.conversations import ChatOptions, Document, is_blank
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.labels import LabelledText, TextTokens, TokenizedText
from steersman.lm import LanguageModel
from steersman.lm.chat_spans import PARTS, ChatPart, ChatRow, ChatSpans
from steersman.lm.load import Quantization, parse_dtype
from steersman.lm.tokens import bos_tokens, writing_of
from steersman.text import TextSource, open_text
from steersman.text_mixture import StoppingStrategy, named_texts
from steersman.text_sources import MESSAGES, OnBadText, TxtDocuments
from steersman.threads import usable_cores
from steersman.train.capture.contexts import ContextBatch, context_batches, documents_with_tokens
from steersman.train.capture.text_digest import DigestedText
from steersman.train.store.shards import DTYPES, check_choices

_LABELS_LOOKED_FOR = 100
"""Documents of which one must have a label, where labels are asked for."""

DEFAULT_CONTEXT = 256
"""Tokens of a context unless asked otherwise, or the model's limit if that is smaller."""


@renamed_fields(model_dtype="dtype")
@dataclass(frozen=True, kw_only=True)
class CaptureConfig(ChatOptions):
    """Which activations of which model over which text: what caching and streaming share."""

    hook: str | tuple[str, ...]
    """Hook point or points, such as blocks.2.hook_resid_post or model.layers.2."""
    model: str | None = None
    """Folder or hub id of the model; not needed when a loaded model is given."""
    text: str | tuple[str, ...] | None = None
    """File, folder or dataset id (see `open_text`); not needed when texts are given. Several, each as NAME=WEIGHT, are
    mixed: weights are their shares of the tokens."""
    stopping_strategy: StoppingStrategy = "first_exhausted"
    """Where a mixture of texts ends: with the first text that has no further document when it is its turn, or when all
    have ended once (all_exhausted), until when those that end begin again."""
    roles: tuple[str, ...] = ()
    """Of conversations, the parts whose tokens become rows, named as scopes: assistant, user, system, role:NAME,
    thinking or last_user; the other tokens are read and left out. None: all."""
    context_length: int | None = None
    """Tokens of a context, BOS included; the smaller of 256 and the model's limit if not given."""
    packing: bool = True
    """Pack documents into full contexts; otherwise one document a row, cut at context_length."""
    batch_size: int = 32
    """Contexts of a forward pass. Part of what the rows are: other shapes round differently."""
    dtype: str | None = None
    """Type to run the model in; float32 on the CPU and the checkpoint's own elsewhere if not given."""
    activation_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type of the activations, on disk or in the stream: if not given `dtype`, where that is said, else bfloat16."""
    bos: bool = True
    """Begin every document and context with the model's BOS, where it has one."""
    exclude_bos: bool = True
    """Leave out the rows of BOS, whose norm is often a hundred times that of other tokens."""
    exclude_eos: bool = False
    """Leave out the rows of EOS."""
    exclude_tokens: tuple[int, ...] = ()
    """Further token ids to leave out."""
    on_nonfinite: Literal["error", "skip"] = "error"
    """What to do about rows with NaN or infinity: stop, or leave them out (a store's manifest counts them)."""
    text_column: str = "text"
    """Field of .jsonl, .parquet and dataset records that holds the text, or a conversation for the model's chat
    template; `messages` where there is no text."""
    txt_documents: TxtDocuments = "line"
    """What a document is in .txt files: a line, a paragraph or the file."""
    on_bad_text: OnBadText = "error"
    """What to do about documents that are none, such as a line that is not JSON: stop and name it, or pass it over."""
    streaming: bool = True
    """Stream a Hugging Face dataset instead of downloading it first."""
    revision: str | None = None
    """Revision of the model on the hub."""
    device: str = "auto"
    """Device to run the model on."""
    device_map: str | None = None
    """Spread a model that one device does not hold over devices and the host's memory: auto, balanced, sequential."""
    quantization: Quantization | None = None
    """Keep the model's weights in 8bit or 4bit. Part of what the rows are: it changes the activations."""
    trust_remote_code: bool = False
    """Let transformers run code that comes with the model."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.dtype is not None:
            parse_dtype(self.dtype, torch.device("cpu"))  # refuses what is none
        check_choices(self.rows_dtype, self.on_nonfinite)

    @property
    def rows_dtype(self) -> str:
        """The type of the activations, settled."""
        name = str(parse_dtype(self.dtype or "auto", torch.device("cpu"))).removeprefix("torch.")
        return self.activation_dtype or (name if name in DTYPES else "bfloat16")


@dataclass(frozen=True, kw_only=True)
class CapturedRows:
    """The kept tokens of one forward batch."""

    activations: Mapping[str, torch.Tensor]
    """Hook point -> [n, D], on the model's device and in its type."""
    token_ids: np.ndarray
    """[n] int64."""
    doc_ids: np.ndarray
    """[n] int64."""
    positions: np.ndarray
    """[n] int64, place in the context."""
    cursor: Mapping[str, int]
    """Where in the text the batch starts."""
    marks: Mapping[int, str]
    """The text's digest after each document of the batch, where it is known."""
    labels: np.ndarray | None = None
    """[n] int8, where labels are read."""


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """How text becomes rows, settled for one model; all of it decides what the rows are."""

    hooks: tuple[str, ...]
    """Hook points by their canonical names."""
    context_length: int
    """Tokens of a context, BOS included."""
    batch_size: int
    """Contexts of a forward pass."""
    packing: bool
    """Whether documents are packed into full contexts, or kept one a row."""
    excluded: tuple[int, ...]
    """Token ids whose rows are left out."""
    bos_id: int | None
    """What every document and context begins with."""
    left_out_first: int | None = None
    """That of `excluded` whose rows are left out only where it begins a context or a document: the BOS."""
    labelled: bool = False
    """Whether the text has labels."""


def capture_settings(lm: LanguageModel, config: CaptureConfig, *, labelled: bool = False) -> CaptureSettings:
    """Check what a user asked for against the model. Raises `SteersmanError` naming the value and its limit."""
    if lm.tokenizer is None:
        raise SteersmanError(f"{lm.name} was wrapped without a tokenizer, so it cannot read text; give it one")
    names = tuple(lm.resolve_hooks(config.hook))
    if not names or len(set(names)) != len(names):
        raise SteersmanError(f"hook must name one or several different hook points, got {config.hook!r}")
    if rowless := [name for name in names if lm.hook_point(name).kind == "hook_attn_mask"]:
        raise SteersmanError(f"{rowless[0]} holds an attention mask, which has no row for each token: it is not stored")
    limit, length = lm.context_length, config.context_length
    length = min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT) if length is None else length
    if length < 2 or (limit is not None and length > limit):
        raise SteersmanError(f"context_length {length} is not between 2 and the {limit} positions of {lm.name}")
    if config.batch_size < 1:
        raise SteersmanError(f"batch_size {config.batch_size} must be at least 1 context")
    bos_id = lm.bos_token_id if config.bos else None
    also = {*config.exclude_tokens, *([lm.eos_token_id] * config.exclude_eos)}
    first = bos_id if config.exclude_bos and bos_id not in also else None
    excluded = tuple(sorted(token for token in {*also, first} if token is not None))
    return CaptureSettings(
        hooks=names,
        context_length=length,
        batch_size=config.batch_size,
        packing=config.packing,
        excluded=excluded,
        bos_id=bos_id,
        left_out_first=first,
        labelled=labelled,
    )


@dataclass(frozen=True)
class Capture:
    """A model, the text that it reads, and how that text becomes rows."""

    lm: LanguageModel
    text: DigestedText
    settings: CaptureSettings
    chat: Mapping[str, str] = field(default_factory=dict)
    """Where chats are read, under "chat_template" the digest of the template, under "system" the message before each,
    and under "roles" whose tokens become rows."""

    @classmethod
    def open(
        cls,
        lm: LanguageModel | None,
        texts: Any,
        config: CaptureConfig,
        *,
        tensor_parallel: bool = False,
        label_column: str | None = None,
    ) -> Self:
        """What `config` describes, with a model that is loaded and texts that are open in place of those it names;
        `label_column` is the field of the text's labels, which come beside the rows then.

        Raises a SteersmanError when there is no model, no text, or `capture_settings` refuses what was asked for.
        """
        if lm is None:
            if config.model is None:
                raise SteersmanError("no model given: pass a loaded one, or set model to a folder or hub id")
            lm = LanguageModel.load(
                config.model,
                dtype=config.dtype,
                device=config.device,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                device_map=config.device_map,
                quantization=config.quantization,
                tensor_parallel=tensor_parallel,
                bos=config.bos,
            )
        texts = named_texts(config.text, config.stopping_strategy) if texts is None else texts
        if texts is None:
            raise SteersmanError("no text given: pass texts, or set text to a file, folder or dataset id")
        if config.chat or config.system is not None or config.roles:
            _ = lm.chat_template  # there is none: said before anything is read
        write = _Writer(lm, config)
        settings = capture_settings(lm, config, labelled=label_column is not None)
        text = open_text(
            texts,
            text_column=config.text_column,
            streaming=config.streaming,
            txt_documents=config.txt_documents,
            on_bad_text=config.on_bad_text,
            write=write,
            label_column=label_column,
            measure=partial(_measured, lm, settings),
        )
        if label_column is not None:
            _check_labels(text, label_column)
        return cls(lm, DigestedText(text), settings, write.about(text))

    def rows(self, cursor: Mapping[str, int] | None = None) -> Generator[CapturedRows]:
        """Run the model over the text from `cursor` on and give the kept rows of each forward batch.

        The next batches are tokenized in another thread meanwhile. On an accelerator nothing here waits for the device.
        """
        with closing(self.batches(cursor)) as batches:
            for batch in batches:
                yield self.run(batch)

    def batches(self, cursor: Mapping[str, int] | None = None) -> Generator[ContextBatch]:
        """The forward batches of the text from `cursor` on, tokenized in another thread ahead of their use."""
        batches = context_batches(
            self.text,
            partial(_tokenize, self.lm),
            context_length=self.settings.context_length,
            batch_size=self.settings.batch_size,
            packing=self.settings.packing,
            bos_id=self.settings.bos_id,
            pad_id=self.lm.pad_token_id or 0,
            cursor=cursor,
            labelled=self.settings.labelled,
            choosing="roles" in self.chat,
        )
        return in_background(batches, side_executor(self.lm, "steersman-text"), ahead=4)

    def kept(self, batch: ContextBatch) -> np.ndarray:
        """Which tokens of a batch become rows: all but padding and those left out, [B, S] bool."""
        kept, first = batch.doc_ids >= 0, self.settings.left_out_first
        if batch.chosen is not None:
            kept &= batch.chosen
        if self.settings.excluded:
            kept &= ~np.isin(batch.input_ids, [i for i in self.settings.excluded if i != first])
        if first is not None:
            ids, docs = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.doc_ids)
            kept &= ~bos_tokens(ids, docs >= 0, first, docs).numpy()
        return kept

    def run(self, batch: ContextBatch) -> CapturedRows:
        """One forward pass, up to the last hook point, and the rows of its tokens that are not left out."""
        kept = self.kept(batch)
        mask = None if batch.full else torch.from_numpy(batch.attention_mask())
        with torch.inference_mode():
            found = self.lm.capture(torch.from_numpy(batch.input_ids), mask, hooks=self.settings.hooks)
            flat = {hook: x.reshape(-1, x.shape[-1]) for hook, x in found.items()}
            if not kept.all():
                index = torch.from_numpy(np.flatnonzero(kept))
                flat = {hook: x.index_select(0, index.to(x.device, non_blocking=True)) for hook, x in flat.items()}
        positions = np.broadcast_to(np.arange(kept.shape[1]), kept.shape)
        return CapturedRows(
            activations=flat,
            token_ids=batch.input_ids[kept],
            doc_ids=batch.doc_ids[kept],
            positions=positions[kept],
            cursor=batch.cursor,
            marks=batch.marks,
            labels=None if batch.labels is None else batch.labels[kept],
        )

    def expected_rows(self) -> int | None:
        """About how many rows the whole text gives, from its length and its first documents; None if it has no end."""
        total = self.text.n_characters()
        if total is None:
            return None
        sample = [document for document, _ in zip(self.text.text.documents(), range(32)) if document]
        characters = sum(map(len, sample))
        if not characters:
            return 0
        measured = _measured(self.lm, self.settings, iter(sample))
        return math.ceil(total * sum(n for _, n in measured) / characters)

    def show_token(self, token: int) -> str:
        """The text of one token."""
        return str(self.lm.tokenizer.decode([token]))


def _tokenize(lm: LanguageModel, texts: list[str]) -> list[list[int]]:
    """Ids of each text without special tokens."""
    return lm.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _measured(lm: LanguageModel, settings: CaptureSettings, documents: Iterator[str]) -> Iterator[tuple[str, int]]:
    """See `documents_with_tokens`."""
    limit = None if settings.packing else settings.context_length - (settings.bos_id is not None)
    return documents_with_tokens(documents, partial(_tokenize, lm), settings.bos_id, limit)


class _Writer:
    """Writes documents out: conversations, and texts that are to be a user's message, by the chat template. Where some
    roles alone are asked for, documents bring their tokens, and which of them are of those."""

    def __init__(self, lm: LanguageModel, config: CaptureConfig) -> None:
        self._lm, self._config, self._used = lm, config, False
        self._parts = [_part(lm, name) for name in config.roles]

    def __call__(self, document: Document, where: str) -> str:
        document = document if is_blank(document) else self._config.apply_to(document)
        if isinstance(document, str):
            if self._parts and document.strip():
                raise SteersmanError(
                    f"{where} is plain text, which has no roles: give conversations, chat=True for texts that are a "
                    "user's messages, or leave out roles"
                )
            return document
        self._used = True
        try:
            template = self._lm.chat_template
        except SteersmanError as error:
            raise SteersmanError(f"{where} is a conversation, and {error}") from error
        if not self._parts:
            return writing_of(document).render(template, document, f"{where}: ")
        row = ChatRow(template, document, writing_of(document), f"{where}: ")
        spans = ChatSpans([row])
        kept = torch.stack([spans.table(part, torch.device("cpu"))[0] for part in self._parts]).any(0)
        return TokenizedText(row.text, TextTokens(np.array(row.ids, dtype=np.int64), kept.numpy()))

    def about(self, text: TextSource) -> dict[str, str]:
        """The template that chats are written by, if the text is of chats, which its first document tells."""
        config = self._config
        if not (config.chat or config.system is not None or config.roles or config.text_column == MESSAGES):
            if getattr(text, "remote", False):
                return {}
            next(text.documents(), None)
            if not self._used:
                return {}
        found = {"chat_template": self._lm.chat_template.digest}
        found |= {} if config.system is None else {"system": config.system}
        return found | ({"roles": "+".join(sorted(set(config.roles)))} if config.roles else {})


def _part(lm: LanguageModel, role: str) -> ChatPart:
    """The part of conversations that `roles` names. Raises SteersmanError for what the template has not."""
    part = ChatPart.parse(role)
    if part is None or part.kind == "turn":
        raise SteersmanError(f"roles: {role!r} is none of {', '.join(PARTS)} or role:NAME")
    if part.kind == "role":
        lm.chat_template.check_role(part.role)
    if part.kind == "thinking":
        _ = lm.chat_template.think_markers
    return part


def _check_labels(text: TextSource, label_column: str) -> None:
    """Raise SteersmanError where the first documents have no label, as under a misspelt name none has."""
    if not any(isinstance(document, LabelledText) for document in islice(text.documents(), _LABELS_LOOKED_FOR)):
        raise SteersmanError(
            f"{text.name}: none of the first {_LABELS_LOOKED_FOR} documents has a {label_column!r}: name the field of "
            "the labels, with -1 where a label is not known"
        )


class InlineExecutor(Executor):
    """Runs what it is given at once, in the thread that gives it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def side_executor(lm: LanguageModel, name: str) -> Executor:
    """Where to do one thing at a time beside the model's passes: in a thread, if the passes leave a core for it.

    On a CPU whose every core computes the passes a thread more makes each of their parallel steps wait for the core
    that it took, which costs more than doing its work in between.
    """
    if lm.device.type == "cpu" and torch.get_num_threads() >= usable_cores():
        return InlineExecutor()
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)


def in_background(items: Iterator[Any], pool: Executor, ahead: int) -> Generator[Any]:
    """The same items, up to `ahead` of them made by `pool` before they are asked for."""
    end = object()
    pending: deque[Future[Any]] = deque(pool.submit(next, items, end) for _ in range(ahead))
    try:
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
