"""The part of `LanguageModel` that writes text: generation, streams and replies."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steersman.conversations import Conversation
from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.lm import chat as chats
from steersman.lm.generate import Generation, run_generation, sampling_settings
from steersman.lm.model_passes import ModelPasses
from steersman.lm.model_text import ModelText
from steersman.lm.streaming import Stream, streamed
from steersman.lm.tokens import Prompts, TokenBatch, as_prompts


class ModelGeneration(ModelText, ModelPasses):
    """Prompts and conversations continued by a model."""

    can_generate: bool

    def check_room(self, width: int, new_tokens: int) -> None:
        """Raise a SteersmanError unless a prompt of `width` tokens and so many new ones fit the model's context."""
        if self.context_length is not None and width + new_tokens > self.context_length:
            raise SteersmanError(
                f"a prompt of {width} tokens and {new_tokens} new ones exceed the context of {self.name}, "
                f"{self.context_length} tokens: shorten the prompt or lower max_new_tokens"
            )

    def check_decoder(self) -> None:
        """Raise a SteersmanError for a model that cannot generate text."""
        if not self.can_generate:
            raise SteersmanError(f"{self.name} ({type(self.model).__name__}) cannot generate text: it is not a decoder")

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

    def _prompts(self, prompts: Prompts | TokenBatch, bos: bool) -> tuple[TokenBatch, list[str]]:
        """Prompts to continue, as a left-padded batch and as they read."""
        self.check_decoder()
        if isinstance(prompts, TokenBatch):
            prompts.check_left_padded()
            rows = [row[real] for row, real in zip(prompts.input_ids, prompts.attention_mask.bool())]
            return prompts.to(self.device), [str(self.tokenizer.decode(row)) for row in rows]
        prompts = as_prompts(prompts)
        batch = self.encode(prompts, bos=bos, padding_side="left")
        return batch, [self.shown(prompt) for prompt in prompts]
