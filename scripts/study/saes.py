"""Part 1: SAEs of several layers, widths, architectures and numbers of active features, beside other trainers.

Every SAE sees the same rows in the same order. FVU, L0 and dead features are measured on the held-out rows of the
store, the model's loss on held-out texts. Other libraries' trainers run where they are installed (the extra `peers`);
their rows stay open where they are not, and running the part again where they are fills them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steersman import SAE, compare_saes, evaluate_sae
from steersman.steer import probe_features
from steersman.train import HookView, random_baselines, resolve
from study.common import Results, Study, StudyConfig, chosen, sae_name, train_config
from study.peers import PEERS, PeerConfig, installed, train_peer
from study.saes_page import page
from study.steps import OURS, Steps, compared, peak_mb

__all__ = ["Config", "main", "page"]

Make = Callable[[], Any]
BASELINES = ("frozen decoder", "soft-frozen decoder", "frozen encoder")
"""Those of `random_baselines`."""


@dataclass(frozen=True, kw_only=True)
class Config(StudyConfig):
    """Settings of the part."""

    architectures: tuple[str, ...] = ("topk", "batch_topk", "matryoshka", "jumprelu")
    """Architectures; the first is that of the SAE that is steered with."""
    more_active: int = 64
    """Active features of a second SAE of each architecture."""
    wider: int = 16_384
    """Features of a wider SAE."""
    peers: tuple[str, ...] = tuple(PEERS)
    """Libraries to train beside, where they are installed."""
    model_tokens: int = 6000
    """Tokens of held-out texts on which the model's loss is measured, at most."""
    rounds: int = 30
    """Timed steps of each trainer."""
    probed: int = 16
    """Concepts that are probed for."""
    probe_texts: int = 24
    """Evaluation texts of each."""


def main(config: Config) -> None:
    """Train and measure what is not known yet."""
    small = chosen(config, more_active=32, wider=1024, model_tokens=1500, rounds=4, probed=4, probe_texts=12)
    part = Part(replace(config, **small))
    rows = dict(part.rows())
    part.results.planned(rows)
    if missing := [name for name in config.peers if name not in installed()]:
        print(f"saes: {' and '.join(missing)} not installed, their rows stay open (pip install steersman[peers])")
    for name, make in rows.items():
        if make is not None:
            part.results.row(name, make)


@dataclass(frozen=True, kw_only=True)
class Item:
    """An SAE of the part."""

    name: str
    """That of its row."""
    about: Mapping[str, Any]
    """What tells it from the others."""
    make: Callable[[], SAE]
    """Trains it, or reads it."""


class Part:
    """The rows of the part, in the order in which they are worth knowing."""

    def __init__(self, config: Config) -> None:
        self.config, self.study = config, Study(config)
        self.results = Results(config, "saes")
        self.store = self.study.store()
        self.recipe = resolve(train_config(self.study), self.source().d_in, self.store.n_batches(1))

    def source(self, layer: int | None = None) -> HookView:
        """The rows after a layer."""
        return HookView(self.store, self.study.hook(layer))

    def rows(self) -> Iterator[tuple[str, Make | None]]:
        """Name and maker of every row; None for one that cannot be made here."""
        config, layer = self.config, self.study.layer
        kinds, there = config.architectures, installed()
        yield "activations", lambda: {str(at): self.activations(at) for at in self.study.layers}
        first = self.ours()
        yield from self.group("first", [first])
        known = [name for name in config.peers if name in there]
        for threads in (1, 2):
            yield f"speed {threads}", partial(self.speed, known, threads) if known else None
        for name in (OURS, *config.peers):
            yield f"memory {name}", partial(self.memory, name) if known and name in (OURS, *known) else None
        peers = {name: [self.peer(name, number) for number in (1, 2, 3)] for name in config.peers}
        for number in range(3):
            for name, items in peers.items():
                yield from self.group(items[number].name, [items[number]], able=name in there)
        others = [self.ours(architecture=name) for name in kinds[1:]]
        yield from self.group("architectures", others)
        again = self.ours(seed=config.seed + 1)
        baselines = [self.baseline(name) for name in BASELINES]
        yield from self.group("baselines", [again, *baselines])
        yield "seeds", lambda: self.agreement(first, again)
        yield "probing", lambda: self.probing([first, *others])
        for at in self.study.layers:
            if at != layer:
                yield from self.group(f"layer {at}", [self.ours(at)])
        active = {"k": config.more_active}
        yield from self.group(f"L0 {config.more_active}", [self.ours(architecture=name, **active) for name in kinds])
        yield from self.group(f"width {config.wider}", [self.ours(d_sae=config.wider)])
        for name, items in peers.items():
            make = partial(self.best_on_training_rows, items)
            yield f"{name} on training rows", make if name in there else None

    def group(self, name: str, items: Sequence[Item], able: bool = True) -> Iterator[tuple[str, Make | None]]:
        """A row for each SAE, then one of what they do to the model, for which its other passes are shared."""
        for item in items:
            yield item.name, partial(self.quality, item) if able else None
        if items:
            yield f"loss, {name}", partial(self.losses, items) if able else None

    # The SAEs

    def ours(self, layer: int | None = None, **settings: Any) -> Item:
        """One of ours; `settings` as of `Study.sae`."""
        layer = self.study.layer if layer is None else layer
        config = train_config(self.study, **settings)
        about = {
            "library": OURS, "architecture": config.architecture, "layer": layer, "d_sae": config.d_sae,
            "l0_asked": round(config.target_l0 or config.k), "seed": config.seed,
        }  # fmt: skip
        name = " ".join(str(part) for part in sae_name(layer, config))
        return Item(name=name, about=about, make=partial(self.study.sae, layer, **settings))

    def baseline(self, name: str) -> Item:
        """One of the random baselines of the first SAE; they are trained together."""
        first = self.ours()

        def make() -> SAE:
            folder = self.config.work / "saes" / "baselines"
            return random_baselines(first.make(), self.store, folder, device=self.config.device)[name]

        return Item(name=name, about={**first.about, "frozen": name}, make=make)

    def peer(self, library: str, number: int) -> Item:
        """One of another library's: at its two rates, and at a third on the side of the better of them."""
        first = self.ours()

        def make() -> SAE:
            return train_peer(self.source(), self.peer_config(library, number), self.folder(library, number))

        return Item(name=f"{library} {number}", about={**first.about, "library": library}, make=make)

    def folder(self, library: str, number: int) -> Path:
        return self.config.work / "saes" / f"{library}-{self.peer_config(library, number).lr:g}"

    def peer_config(self, library: str, number: int) -> PeerConfig:
        first, rates = train_config(self.study), PEERS[library].rates
        if number < 3:
            rate = rates[number - 1]
        else:
            fvu = {rate: self.results.rows[f"{library} {i}"]["fvu_ordinary"] for i, rate in enumerate(rates, 1)}
            better, worse = sorted(fvu, key=lambda rate: fvu[rate])
            rate = better * better / worse
        return PeerConfig(
            library=library, d_sae=first.d_sae, k=first.k, lr=float(f"{rate:.1e}"), seed=first.seed,
            batch_size=self.recipe.batch_size, n_steps=self.recipe.n_steps,
        )  # fmt: skip

    # The rows

    def activations(self, layer: int) -> dict[str, Any]:
        """What is known of a layer's activations."""
        stats = self.store.stats(self.study.hook(layer))
        heldout = self.store.n_batches(1, split="heldout")
        return {
            "rows": stats.n_rows, "heldout": heldout, "width": self.source(layer).d_in, "large_rows": stats.n_large,
            "large_share": stats.large_share, "median_norm": stats.median_norm,
        }  # fmt: skip

    def quality(self, item: Item) -> dict[str, Any]:
        """Train one and measure how it rebuilds held-out rows."""
        sae = item.make()
        training = sae.cfg.metadata.get("training", {})
        made = {name: training.get(name) for name in ("lr", "batch_size", "n_steps")}
        if item.about["library"] != OURS:
            used = self.peer_config(item.about["library"], int(item.name.split()[-1]))
            made = {"lr": used.lr, "batch_size": used.batch_size, "n_steps": used.n_steps}
        found = evaluate_sae(sae, self.store)
        assert found.dictionary is not None
        figures = {
            "decoder_cosine": found.dictionary.decoder_cosine,
            "by_frequency": [[one.at_least, one.n_tokens, one.fvu] for one in found.by_frequency],
        }
        if sae.feature_stats is not None:
            silent = float((sae.feature_stats.density == 0).float().mean())
            figures |= {"dead_training": silent, "training_rows": sae.feature_stats.n_tokens}
        return {**item.about, **made, **found.reconstruction.record(), **figures}

    def losses(self, items: Sequence[Item]) -> dict[str, Any]:
        """The model's loss with each of them in place, by name."""
        first, *rest = (item.make() for item in items)
        texts = self.study.material.held_out
        found = evaluate_sae(
            first, self.store, self.study.lm, texts, batch_size=4, model_tokens=self.config.model_tokens,
            baselines={item.name: sae for item, sae in zip(items[1:], rest)},
        )  # fmt: skip
        every = {items[0].name: found, **found.baselines}
        return {name: one.loss.record() for name, one in every.items() if one.loss is not None}

    def speed(self, peers: Sequence[str], threads: int) -> dict[str, Any]:
        """Steps of every trainer in turn on the store's rows."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return compared(self.steps(), [self.peer_config(name, 1) for name in peers], self.config.rounds)
        finally:
            torch.set_num_threads(before)

    def memory(self, name: str) -> float | None:
        """MB that steps of a trainer add to a process."""
        return peak_mb(self.steps(), None if name == OURS else self.peer_config(name, 1))

    def steps(self) -> Steps:
        """What the trainers that are timed train on."""
        return Steps(store=self.store.path, hook=self.study.hook(), config=train_config(self.study))

    def agreement(self, one: Item, other: Item) -> dict[str, Any]:
        """How many features two seeds share."""
        found = compare_saes(one.make(), other.make())[0, 1]
        return {"mcc": found.mcc, "chance": found.chance, "shared": found.shared, "mean_max": list(found.mean_max)}

    def probing(self, items: Sequence[Item]) -> dict[str, Any]:
        """What one and five features tell about the concepts of evaluation texts, which no SAE was trained on."""
        config = self.config
        concepts = self.study.material.concepts[: config.probed]
        given = [(one, concept.name) for concept in concepts for one in concept.eval_positive[: config.probe_texts]]
        first, *rest = items
        found = probe_features(
            self.study.lm, first.make(), [one.pair for one, _ in given], [name for _, name in given], k=(1, 5),
            pool="max", max_length=96, seed=config.seed, beside={item.name: item.make() for item in rest},
        )  # fmt: skip
        names = {"sae": first.name}
        return {
            "concepts": len(concepts), "training": found.n_training, "heldout": found.n_heldout,
            "scores": [
                {"of": names.get(one.of, one.of), "k": one.k, "auroc": asdict(one.auroc), "f1": one.f1}
                for one in found.means
            ],
        }  # fmt: skip

    def best_on_training_rows(self, items: Sequence[Item]) -> dict[str, Any]:
        """Dead features of a library's best, on the rows that it was trained on."""
        best = min(items, key=lambda item: self.results.rows[item.name]["fvu_ordinary"])
        found = evaluate_sae(best.make(), self.store, split="train").reconstruction
        return {"name": best.name, "dead_training": found.dead_fraction, "training_rows": found.n_tokens}
