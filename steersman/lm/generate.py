"""Batched generation with left padding: settings that mean what they say, and text as well as tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from steersman.doors import number, whole_number
from steersman.errors import SteersmanError
from steersman.lm.chat_spans import ChatSpans
from steersman.lm.tokens import TokenBatch
from steersman.lm.unwinding import Opened, Unwinding


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a language model wrote, one entry per returned row (prompts x `num_return_sequences`)."""

    prompts: list[str]
    """The prompt of each row."""
    completions: list[str]
    """The generated text of each row, without the prompt and without special tokens."""
    texts: list[str]
    """Prompt and completion of each row."""
    tokens: Tensor
    """[B, S] int64: left-padded prompt and generated tokens; after the end of a row, padding."""
    attention_mask: Tensor
    """[B, S] int64: 1 for prompt tokens and generated tokens up to and including the first end token."""
    prompt_length: Tensor
    """[B] int64: real tokens in each prompt, the BOS included."""
    prompt_columns: int
    """Width of the padded prompt: generated tokens start at this column of `tokens`."""
    spans: ChatSpans | None = None
    """Whose the tokens are, where prompts were given as conversations; what was generated is the assistant's."""

    @classmethod
    def from_tokens(
        cls, tokenizer: Any, prompts: Sequence[str], batch: TokenBatch, tokens: Tensor, stop: list[int]
    ) -> Self:
        """What `model.generate` returned, `tokens` [B, S], for a batch of `prompts`."""
        times, width = tokens.shape[0] // len(prompts), batch.input_ids.shape[1]
        mask = batch.attention_mask.repeat_interleave(times, dim=0)
        spans = batch.spans
        if spans is not None and times > 1:
            spans = spans[[i for i in range(len(prompts)) for _ in range(times)]]
        new = tokens[:, width:]
        real = real_generated(new, stop)
        whole = torch.cat([mask, real], dim=1)

        def decode(ids: Tensor, kept: Tensor) -> list[str]:
            return [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(ids, kept.bool())]

        texts = decode(tokens, whole)
        # Cut from the whole text: tokens decoded by themselves lose the space before their first word.
        completions = [
            text[len(start) :] if text.startswith(start) else alone
            for text, start, alone in zip(texts, decode(tokens[:, :width], mask), decode(new, real))
        ]
        return cls(
            prompts=[prompt for prompt in prompts for _ in range(times)],
            completions=completions,
            texts=texts,
            tokens=tokens,
            attention_mask=whole,
            prompt_length=mask.sum(1),
            prompt_columns=width,
            spans=spans,
        )

    @property
    def batch(self) -> TokenBatch:
        """Prompts and generated tokens, for `lm.logits` and `lm.capture`; with `prompt_length` a steered pass over it
        steers what generating it did."""
        return TokenBatch(input_ids=self.tokens, attention_mask=self.attention_mask, spans=self.spans)

    @property
    def replies(self) -> list[str]:
        """The assistant's message of each row, without white space around it; where the last message was continued,
        with what it began with. Raises SteersmanError where a prompt was no conversation."""
        return [str(conversation[-1]["content"]) for conversation in self.conversations]

    @property
    def conversations(self) -> list[list[dict[str, Any]]]:
        """The conversation of each row with the reply as its last message, to go on from."""
        if self.spans is None:
            raise SteersmanError("the prompts were texts: replies are to conversations (lm.chat)")
        return [row.with_reply(text) for row, text in zip(self.spans.conversations, self.completions)]

    @property
    def new_tokens(self) -> Tensor:
        """[B, T] int64: the generated part of `tokens`."""
        return self.tokens[:, self.prompt_columns :]

    @property
    def new_mask(self) -> Tensor:
        """[B, T] int64: the generated part of `attention_mask`."""
        return self.attention_mask[:, self.prompt_columns :]


def sampling_settings(
    *, do_sample: bool | None, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> dict[str, Any]:
    """Arguments for `model.generate`. Sampling is on when `do_sample` says so or, when it is None, when a setting asks.

    Every value is explicit, so that a model's own generation defaults (Gemma's top_k = 64, say) do not slip in.

    >>> sampling_settings(do_sample=None, temperature=1.0, top_k=None, top_p=None, seed=None)["do_sample"]
    False
    """
    number(temperature, "temperature")
    if top_p is not None:
        number(top_p, "top_p")
    if top_k is not None:
        whole_number(top_k, "top_k")
    if seed is not None:
        whole_number(seed, "seed")
    if temperature < 0:
        raise SteersmanError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise SteersmanError(f"top_p must lie in (0, 1], got {top_p}")
    if top_k is not None and top_k < 1:
        raise SteersmanError(f"top_k must be at least 1, got {top_k}")
    asked = temperature not in (0.0, 1.0) or top_k is not None or top_p is not None
    if do_sample is None:
        do_sample = temperature != 0 and (asked or seed is not None)
    if not do_sample:
        if asked:
            raise SteersmanError("temperature, top_k and top_p need sampling: drop them or set do_sample=True")
        return {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers' neutral values
    if temperature == 0:
        raise SteersmanError("temperature 0 is greedy decoding: use do_sample=False, or a temperature above 0")
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k or 0,
        "top_p": 1.0 if top_p is None else top_p,
    }


@torch.no_grad()
def run_generation(
    lm: Any,
    batch: TokenBatch,
    shown: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Mapping[str, Any],
    seed: int | None,
    use_cache: bool,
    options: Mapping[str, Any],
    streamer: Any = None,
) -> Generation:
    """What `LanguageModel.generate` does with prompts, a left-padded batch that reads as `shown`. `streamer` is given
    the tokens as they come, as transformers does it."""
    max_new_tokens = whole_number(max_new_tokens, "max_new_tokens", at_least=1)
    check_options(options, len(batch.input_ids))
    if bool((batch.attention_mask == 0).any()):
        lm.check_left_padding()
    lm.check_room(batch.input_ids.shape[1], max_new_tokens)
    defaults: dict[str, Any] = {"pad_token_id": lm.pad_token_id, "disable_compile": True}
    if options.get("stop_strings"):
        defaults["tokenizer"] = lm.tokenizer
    if streamer is not None:
        defaults["streamer"] = streamer
    with Unwinding() as stack:
        lm._prepare(stack)
        stack.enter_context(lm._clock.declare(spans=batch.spans or False))
        stack.enter_context(seeded(seed, lm.device))
        try:
            out = lm.model.generate(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=max_new_tokens,
                use_cache=use_cache,
                **sampling,
                **{**defaults, **options},
            )
        except (TypeError, ValueError) as error:
            if not options:
                raise
            reason = " ".join(str(error).split())[:300]
            raise SteersmanError(f"transformers cannot generate with {', '.join(options)}: {reason}") from error
    tokens: Tensor = out if isinstance(out, Tensor) else out.sequences
    return Generation.from_tokens(lm.tokenizer, shown, batch, tokens, end_tokens(lm, options))


def end_tokens(lm: Any, options: Mapping[str, Any]) -> list[int]:
    """The ids that end a row of a generation with these options."""
    return stop_ids(options.get("eos_token_id", lm.model.generation_config.eos_token_id))


OPTIONS_ELSEWHERE = {
    "max_length": "say max_new_tokens, which does not count the prompt",
    "generation_config": "give its settings one by one",
    **dict.fromkeys(
        ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache"),
        "prompts are texts here: call lm.model.generate, which contexts steer as well",
    ),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states", "output_attentions"),
        "only tokens and text are returned here: call lm.model.generate, which contexts steer as well",
    ),
}
"""What `LanguageModel.generate` cannot honour of transformers' options, and what does instead."""


def check_options(options: Mapping[str, Any], rows: int) -> None:
    """Raise SteersmanError for options of transformers' `generate` that would be passed over for `rows` prompts."""
    for name, value in options.items():
        if name in OPTIONS_ELSEWHERE and value is not None and value is not False:
            raise SteersmanError(f"generate does not take {name}: {OPTIONS_ELSEWHERE[name]}")
        if name in ("stopping_criteria", "stop_strings") and value and rows > 1:
            raise SteersmanError(
                f"{name} end the rows of a batch at places that its padding does not show: give one prompt at a time"
            )


class seeded(Opened):
    """Random numbers from `seed` inside, the caller's generators untouched afterwards; None changes nothing."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        super().__init__()
        self.seed, self.devices = seed, [device] if device.type == "cuda" else []

    def _open(self, stack: Unwinding) -> None:
        if self.seed is not None:
            stack.enter_context(torch.random.fork_rng(devices=self.devices))
            torch.manual_seed(self.seed)


def stop_ids(eos: Any) -> list[int]:
    """The ids that end a row, from a configuration's `eos_token_id`: None, one, or several."""
    return [] if eos is None else [int(e) for e in torch.as_tensor(eos).flatten().tolist()]


def real_generated(new: Tensor, stop_ids: list[int]) -> Tensor:
    """[B, T] int64: 1 up to and including the first token of `stop_ids` in each row of `new` [B, T], 0 after it."""
    hit = torch.zeros_like(new, dtype=torch.bool)
    for stop in stop_ids:
        hit = hit | (new == stop)
    return (hit.cumsum(1) - hit.long() == 0).long()
