"""Evolution over instructions and blocks of text (DARWIN, arXiv 2406.15193), on the particle decoder.

Shape letters: I instructions, B beams of each, N = I B rows.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from steersman.config import merged
from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.generate import stop_ids as ids_of
from steersman.steer.decoding.decoder import decode
from steersman.steer.decoding.particles import writer_of
from steersman.steer.decoding.population import Cost, ParticleSet
from steersman.steer.decoding.potentials import Reward
from steersman.steer.decoding.proposals import Proposal
from steersman.steer.decoding.resampling import Truncation
from steersman.steer.decoding.sources import ExchangeSource

Mutate = Callable[[str, int, int], Sequence[str]]
"""(instruction, how many, seed) -> that many variants of it."""


@dataclass(frozen=True, kw_only=True)
class DarwinConfig:
    """How `darwin` searches; the defaults are the authors'."""

    iterations: int = 3
    """Times that an instruction of the archive is mutated and decoded."""
    variants: int = 3
    """Mutated instructions of an iteration, beside the one they come from."""
    beams: int = 5
    """Beams of each instruction."""
    block: int = 40
    """Tokens between two exchanges."""
    keep: int = 3
    """Texts that stay at an exchange."""
    archive: int = 2
    """Instructions that an iteration leaves in the archive."""
    max_new_tokens: int = 200
    """Tokens of a text."""
    temperature: float = 0.7
    """Of the beams and the mutations."""
    top_k: int | None = 40
    """Of the beams and the mutations."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        for name in ("iterations", "beams", "block", "keep", "archive", "max_new_tokens"):
            whole_number(getattr(self, name), name, at_least=1)
        whole_number(self.variants, "variants", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Evolved:
    """What `darwin` found."""

    instruction: str
    """The instruction that was asked."""
    best: str
    """The text with the largest reward over all iterations."""
    reward: float
    """Its reward: what the search maximised, so no measure of how good it is."""
    second: float | None
    """A second reward of it, which the search never saw."""
    sets: list[ParticleSet]
    """The final texts of each iteration; the log potentials are the rewards."""
    instructions: list[list[str]]
    """The instructions of each iteration, `beams` rows each."""
    archive: list[str]
    """The instructions that were left in the archive at the end."""
    cost: Cost
    """Everything: passes and rows of mutations and beams, and reward calls. Grant best-of-n as many reward calls."""


def darwin(
    lm: LanguageModel,
    instruction: str,
    reward: Callable[[list[Any]], Any],
    *,
    mutate: Mutate | None = None,
    second: Callable[[list[Any]], Any] | None = None,
    config: DarwinConfig | None = None,
    **settings: Any,
) -> Evolved:
    """Search the answer to `instruction` with the largest reward, by mutated instructions whose beams exchange texts.

    Each iteration mutates an instruction of the archive, gives it and each variant `beams` beams, and every `block`
    tokens keeps the `keep` best texts; each other beam keeps its own instruction and takes a random one of those texts
    over, as tokens (the authors' code writes them out and reads them again). Finished texts take part. The archive then
    takes the instructions from which most of the final texts descend.

    `reward` takes whole partial answers, judged against the original instruction; `second` is reported for the winner
    alone. `mutate` defaults to asking the model itself. Instructions are written out by the chat template where there
    is one. The maximum over all iterations is best-of-n in kind: compare at equal reward calls.
    """
    config = merged(DarwinConfig, config, settings)
    rng = random.Random(config.seed)
    mutating = mutate or _AskModel(lm, config)
    archive, sets, used, cost = [instruction], [], [], Cost(forward_passes=0, rows=0, reward_calls=0)
    score = Reward(reward)
    for i in range(config.iterations):
        parent = rng.choice(archive)
        variants = list(mutating(parent, config.variants, config.seed + i)) if config.variants else []
        if len(variants) != config.variants or not all(isinstance(v, str) and v for v in variants):
            raise SteersmanError(f"mutate must return {config.variants} instructions, got {str(variants)[:120]}")
        asked = [parent, *variants]
        found = _decoded(lm, instruction, asked, score, config, config.seed + i)
        archive = _archived(found, asked, config)
        cost = cost + found.cost
        sets.append(found)
        used.append(asked)
    if isinstance(mutating, _AskModel):
        cost = cost + mutating.cost
    where = max(range(len(sets)), key=lambda i: float(sets[i].log_potential.max()))
    winner = sets[where].best()
    best = sets[where].completions[winner]
    return Evolved(
        instruction=instruction,
        best=best,
        reward=float(sets[where].log_potential[winner]),
        second=None if second is None else float(next(iter(second([best])))),
        sets=sets,
        instructions=used,
        archive=archive,
        cost=cost,
    )


def _decoded(
    lm: LanguageModel, instruction: str, asked: Sequence[str], score: Reward, config: DarwinConfig, seed: int
) -> ParticleSet:
    rows = [_written(lm, text) for text in asked for _ in range(config.beams)]
    lm.check_room(max(map(len, rows)), config.max_new_tokens)
    [found] = decode(
        ExchangeSource(lm, rows),
        writer_of(lm, [_written(lm, instruction)]),
        len(rows),
        max_new_tokens=config.max_new_tokens,
        proposal=Proposal(temperature=config.temperature, top_k=config.top_k, corrected=False),
        potentials=[score],
        resampler=Truncation(config.keep),
        every=config.block,
        stop_ids=ids_of(lm.model.generation_config.eos_token_id),
        seeds=[seed],
    )
    return found


def _archived(found: ParticleSet, asked: Sequence[str], config: DarwinConfig) -> list[str]:
    """The instructions whose first blocks most of the final texts descend from."""
    counts: Counter[str] = Counter(asked[int(row) // config.beams] for row in found.roots.tolist())
    return [text for text, _ in counts.most_common(config.archive)]


def _written(lm: LanguageModel, instruction: str) -> list[int]:
    if getattr(lm.tokenizer, "chat_template", None) is None:
        return lm.token_ids(instruction, bos=True)
    return lm.token_ids([{"role": "user", "content": instruction}], bos=True)


class _AskModel:
    """Variants of an instruction from the model itself, one line each."""

    REQUEST = (
        "Rewrite the following instruction in other words. Keep what it asks for. Write one line.\n\n"
        "Instruction: {instruction}\nRewritten instruction:"
    )

    def __init__(self, lm: LanguageModel, config: DarwinConfig) -> None:
        self.lm, self.config = lm, config
        self.cost = Cost(forward_passes=0, rows=0, reward_calls=0)

    def __call__(self, instruction: str, n: int, seed: int) -> list[str]:
        made = self.lm.generate(
            [_written(self.lm, self.REQUEST.format(instruction=instruction))],
            max_new_tokens=64,
            num_return_sequences=n,
            do_sample=True,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            seed=seed,
        )
        passes = made.new_tokens.shape[1]
        self.cost = self.cost + Cost(forward_passes=passes, rows=passes * n, reward_calls=0)
        lines = [text.strip().partition("\n")[0].strip().strip('"') for text in made.completions]
        return [line or instruction for line in lines]
