"""Presets that choose each token from several streams of one text: mixtures, and strength by need."""

from typing import Any

from steersman.lm import LanguageModel
from steersman.steer.decoding.dynamic import KLControl
from steersman.steer.decoding.mix import Mix, MixSource
from steersman.steer.presets.base import CODE, Decoder, Need, Preset


class _Mixes(Preset):
    """What mixtures share."""

    makes = "a decoder: decoder(prompts, max_new_tokens=...) gives a Generation"
    certainty = CODE

    def decoder(self, lm: LanguageModel, mix: Mix) -> Decoder:
        return Decoder(self.name, lambda prompts, **settings: mix.generate(lm, prompts, **settings))


class STEER(_Mixes):
    name = "steer_experts"
    title = "STEER: an expert against a base model and a negative prompt"
    source = "arXiv 2308.07645; a file with its logits processor, of an unknown repository"
    mechanism = "mixture of logits over three streams"
    values = {"g": 0.2, "eta": 0.2, "negative prompt": "10 earlier examples", "model": "a Falcon-7B fine-tune"}
    needs = {
        "base": Need(what="the model that lm was tuned from, with its tokenizer", how="LanguageModel.load(...)"),
        "negative": Need(what="what the text should not be like", how="a prompt, or one for each row"),
    }
    traps = (
        "without a mask a token that the base finds very unlikely gains without bound: plausible=0.1 leaves such "
        "tokens out (None: as published)",
        "one version never feeds the negative branch what is written, one takes row 0 of the batch alone: not here",
    )

    def make(
        self, lm: LanguageModel, *, base: Any, negative: Any, g: float = 0.2, eta: float = 0.2,
        plausible: float | None = 0.1,
    ) -> Decoder:  # fmt: skip
        source = base if isinstance(base, MixSource) else MixSource(lm=base)
        return self.decoder(lm, Mix.steer(source, negative, g=g, eta=eta, plausible=plausible))


class NegativePrompt(_Mixes):
    name = "negative_prompt"
    title = "Negative prompts"
    source = "arXiv 2306.17806 (classifier-free guidance for language models)"
    mechanism = "mixture of logits over two streams"
    certainty = "known in closed form"
    needs = {"negative": Need(what="what the text should not be like", how="a prompt, or one for each row")}

    def make(self, lm: LanguageModel, *, negative: Any, g: float = 0.5, plausible: float | None = 0.1) -> Decoder:
        return self.decoder(lm, Mix.negative_prompt(negative, g=g, plausible=plausible))


class Guidance(_Mixes):
    name = "classifier_free_guidance"
    title = "Classifier-free guidance"
    source = "arXiv 2306.17806"
    mechanism = "mixture of logits over two streams"
    certainty = "known in closed form"
    values = {"g": 1.5}
    needs = {"unconditional": Need(what="the prompt without its condition", how="a prompt, or one for each row")}

    def make(self, lm: LanguageModel, *, unconditional: Any, g: float = 1.5) -> Decoder:
        return self.decoder(lm, Mix.guidance(unconditional, g=g))


class VISTATokens(_Mixes):
    name = "vista_tokens"
    title = "VISTA's token augmentation"
    source = "arXiv 2502.03628, LzVv123456/VISTA dc62252"
    mechanism = "mixture of logits with the lenses of late layers"
    values = {"g": 0.3, "layers": "25 to 30 of 32"}
    traps = ("late layers go through the output layer without the final norm there: here every one has it",)

    def make(self, lm: LanguageModel, *, g: float = 0.3, layers: tuple[float, float] = (0.8, 0.97)) -> Decoder:
        ends = [round(x * (lm.n_layers - 1)) for x in layers]
        return self.decoder(lm, Mix.lens([f"blocks.{i}.hook_resid_post" for i in range(ends[0], ends[1] + 1)], g=g))


class DAC(Preset):
    name = "dac"
    title = "Dynamic activation composition"
    source = "arXiv 2406.17563, DanielSc4/Dynamic-Activation-Composition d5431bc"
    mechanism = "strength by need: KL of the steered from the unsteered next token, one stream a property"
    certainty = CODE
    values = {
        "strongest": 2.0, "top_p": ".4 to .95", "steps": 30, "site": "head outputs of every layer, last position",
        "examples": "4 shots, 30 support examples", "model": "Mistral-7B-Instruct",
    }  # fmt: skip
    needs = {
        "properties": Need(
            what="what to steer towards, one or several",
            how="contrast(lm, positive, negative, hook=[every hook_z], method='diffmean', table=30), or any vector",
        )
    }
    makes = "a decoder: decoder(prompts) gives the text and the strength at each step"
    traps = (
        "the code divides the KL by the size of the nucleus, the paper does not: per_token=True divides",
        "the KL is unsteered from steered, clipped to [0, 2] in the code and to [0.5, 2] in its comment",
        "whole sequences were run again for every token, one text at a time: here every stream has its cache",
    )

    def make(
        self, lm: LanguageModel, *, properties: Any, strongest: float = 2.0, top_p: float = 0.9, per_token: bool = False
    ) -> Decoder:
        several = list(properties) if isinstance(properties, list | tuple) else [properties]
        control = KLControl(properties=several, strongest=strongest, top_p=top_p, per_token=per_token)
        return Decoder(self.name, lambda prompts, **settings: control.generate(lm, prompts, **settings))
