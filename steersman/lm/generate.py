"""Batched generation with left padding: settings that mean what they say, and text as well as tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from steersman.doors import number, whole_number
from steersman.errors import SteersmanError
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

    @classmethod
    def from_tokens(
        cls, tokenizer: Any, prompts: Sequence[str], prompt_mask: Tensor, tokens: Tensor, stop: list[int]
    ) -> Self:
        """What `model.generate` returned, `tokens` [B, S], for `prompts` and their mask [prompts, P]."""
        times, width = tokens.shape[0] // len(prompts), prompt_mask.shape[1]
        mask = prompt_mask.repeat_interleave(times, dim=0)
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
        )

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
