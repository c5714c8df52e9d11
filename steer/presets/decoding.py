"""Presets that steer how text is decoded: particles, critics, evolution."""

from typing import Any

from steersman.config import merged
from steersman.lm import LanguageModel
from steersman.steer.decoding.darwin import DarwinConfig, darwin
from steersman.steer.decoding.particles import ParticleConfig, best_of_n, particles
from steersman.steer.decoding.potentials import Reward, RolloutValue
from steersman.steer.presets.base import CODE, Decoder, Need, Preset

REWARD = Need(
    what="a function of a list of texts that returns a number for each", how="any callable, or a classifier's"
)


class _Decodes(Preset):
    """What decoders share."""

    certainty = CODE
    makes = "a decoder: decoder(prompts) gives a ParticleSet for each"


class SMC(_Decodes):
    name = "smc"
    title = "Sequential Monte Carlo steering"
    source = "arXiv 2306.03081, probcomp/hfppl c5e9747"
    mechanism = "particle decoder: masks and conditions, resampled at low effective sample size or without replacement"
    values = {"resampling": "ESS < N/2 multinomial, or every step without replacement after copying each `beam` times"}
    needs = {
        "mask": Need(what="a constraint", how="a regular expression of the whole text, or a function of the tokens")
    }
    traps = (
        "temperature and top-k change the target unless p/q enters the weight: it does (corrected=True)",
        "all weights -inf gave NaN: here an error names the constraint",
        "finished particles keep their weight and take part",
    )

    def make(self, lm: LanguageModel, *, mask: Any, n: int = 8, resampler: Any = "multinomial", **rest: Any) -> Decoder:
        settings = _checked(ParticleConfig, n=n, resampler=resampler, **rest)
        return Decoder(self.name, lambda prompts, **more: particles(lm, prompts, mask=mask, **settings | more))


class FK(_Decodes):
    name = "fk"
    title = "Feynman-Kac steering, its analogue for autoregressive models"
    source = "arXiv 2501.06848, zacharyhorvitz/Fk-Diffusion-Steering 9413005"
    mechanism = "particle decoder: potentials of the reward so far, multinomial every 20 tokens"
    values = {"k": "4 to 8", "lam": 10.0, "every": 20, "potentials": "diff, max, add, rt"}
    needs = {"reward": REWARD}
    traps = (
        "its adaptive branch overwrites the rewards and drops the pending weight, which is biased: not here",
        "it returns the argmax, which is no sample: here the weighted set, whose best() is the argmax",
    )
    not_covered = "the diffusion model of the paper: on an autoregressive model this is an analogue"

    def make(
        self, lm: LanguageModel, *, reward: Any, n: int = 4, lam: float = 10.0, kind: str = "diff", every: int = 20,
        rollouts: int = 0, **rest: Any,
    ) -> Decoder:  # fmt: skip
        settings = _checked(ParticleConfig, n=n, every=every, **rest)

        def run(prompts: Any, **more: Any) -> Any:
            potential = RolloutValue(reward, lam, samples=rollouts) if rollouts else Reward(reward, lam, kind=kind)  # pyright: ignore
            return particles(lm, prompts, potential=potential, **settings | more)

        return Decoder(self.name, run)


class CriticControl(_Decodes):
    name = "critic_control"
    title = "CriticControl"
    source = "arXiv 2212.10938, minbeomkim/CriticControl d8efaa8"
    mechanism = "particle decoder with one particle and a proposal twisted by a trained critic"
    values = {
        "gamma": 0.99, "td_lambda": 0.95, "lr": "1.41e-5 (topic 2.82e-6)", "batch": "128 (32)", "epochs": 4,
        "rollouts": "25 (80) tokens at temperature 2.0 (2.8)", "top": 10,
    }  # fmt: skip
    needs = {
        "critic": Need(
            what="a trained critic of the model", how="train_critic(lm, prompts, reward), or TrainedCritic.load(FILE)"
        )
    }
    traps = (
        "one path applies softmax twice and hands probabilities to top-p: not here",
        "tokens outside the ten likeliest keep unscaled probabilities there: here the proposal is of the ten",
        "greedy choice with V over-optimises: sampling is the default",
    )

    def make(self, lm: LanguageModel, *, critic: Any, n: int = 1, **rest: Any) -> Decoder:
        settings = _checked(ParticleConfig, n=n, resampler="never", **rest)
        return Decoder(self.name, lambda prompts, **more: particles(lm, prompts, critic=critic, **settings | more))


class Darwin(_Decodes):
    name = "darwin"
    title = "DARWIN"
    source = "arXiv 2406.15193, declare-lab/darwin"
    mechanism = "particle decoder over mutated instructions, truncation every 40 tokens"
    values = {"iterations": 3, "beams": 5, "block": 40, "keep": 3, "temperature": 0.7, "top_k": 40}
    needs = {"reward": REWARD}
    makes = "a decoder: decoder(instruction) gives what it found"
    traps = (
        "texts are written out and read again at each exchange: here tokens are exchanged",
        "finished beams are never replaced there: here they take part",
        "the largest reward over all iterations is best-of-n in kind: its cost is counted, a second reward reported",
    )

    def make(self, lm: LanguageModel, *, reward: Any, second: Any = None, mutate: Any = None, **rest: Any) -> Decoder:
        settings = _checked(DarwinConfig, **rest)

        def run(instruction: Any, **more: Any) -> Any:
            return darwin(lm, instruction, reward, second=second, mutate=mutate, **settings | more)

        return Decoder(self.name, run)


class BestOfN(_Decodes):
    name = "best_of_n"
    title = "Best of n"
    source = "the baseline of reward-guided decoding"
    mechanism = "particle decoder, reward at the end alone"
    certainty = "known in closed form"
    values = {"n": "as many as the other method asks its reward"}
    needs = {"reward": REWARD}

    def make(self, lm: LanguageModel, *, reward: Any, n: int = 8, **rest: Any) -> Decoder:
        settings = _checked(ParticleConfig, n=n, **rest)
        return Decoder(self.name, lambda prompts, **more: best_of_n(lm, prompts, reward, **settings | more))


def _checked(kind: type[Any], **settings: Any) -> dict[str, Any]:
    """The settings, refused at once where the decoder has none of the name."""
    merged(kind, None, settings)
    return settings
