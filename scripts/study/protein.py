"""6: a protein language model, from sequences to a steered model: ESM-2 8M's shape with random weights.

    python scripts/study protein

The weights are not in the package registry, so they are drawn at random: what is measured is whether every step works
on an encoder of residues, and nothing about proteins. Sequences are drawn too: stretches rich in the residues of
helices, of strands or of loops, of lengths as in proteins.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

from steersman import SAE, LanguageModel, Steerer, evaluate_sae
from steersman.steer import bootstrap, calibrate
from steersman.train import Mixture
from study.common import Results, Study, StudyConfig, chosen
from study.features import MEANS, NULL, OURS, averages, every, look, random_sae
from study.material import Concept, Example, bundled
from study.report import Page, Table, cell, number, side
from study.vectors import vector

RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
VOCABULARY = ("<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, "<null_1>", "<mask>")
"""The tokens of ESM-2, in its order."""
KINDS = {"helix": "AELKMQRH", "strand": "VIYFWTC", "loop": "GPNSD"}
"""Residues that are frequent in each kind of structure (Chou and Fasman 1974)."""
LOOK = "features"
METHODS = ("feature", "diffmean", "probe", "random")
"""Ways to make a vector that are tried."""
OFTEN = 0.8
"""Share of a stretch's residues that are of its kind."""


@dataclass(frozen=True, kw_only=True)
class Config(StudyConfig):
    """Settings of the protein model; no data are read."""

    model: str = "esm2-8m-shape"
    """Name of what is made; no other model is read."""
    tokens: int = 100_000
    """Rows of activations to cache and to train the SAE on."""
    d_sae: int = 1024
    """Features."""
    k: int = 16
    """Active features."""
    sequences: int = 24
    """Sequences of the masked-residue loss."""
    budgets: tuple[float, ...] = (0.01, 0.1)
    """KL in nats a residue that vectors are calibrated to."""
    looked_at: int = 30
    """Features that are looked at."""


def proteins(config: Config) -> Study:
    """The study's ground for residues: its model, sequences, activations and SAE below WORK/protein."""
    config = replace(config, work=config.work / "protein", small=False)
    drawn = [one for one, _ in draw(config.tokens // 120, config.seed)]
    material = replace(
        bundled(small=True), name="proteins", mixture=Mixture([(drawn, 1.0)]), shares={"sequences": 1.0},
        context_length=256,
    )  # fmt: skip
    return Study(config, esm(config.work / "esm2-8m-shape", config.device, config.seed), material)


def esm(folder: Path, device: str, seed: int) -> LanguageModel:
    """The model in a folder, made unless it is there."""
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
        config = EsmConfig(
            vocab_size=len(VOCABULARY), hidden_size=320, num_hidden_layers=6, num_attention_heads=20,
            intermediate_size=1280, max_position_embeddings=1026, position_embedding_type="rotary", token_dropout=True,
            mask_token_id=32, pad_token_id=1, layer_norm_eps=1e-5,
        )  # fmt: skip
        torch.manual_seed(seed)
        EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        EsmForMaskedLM(config).save_pretrained(folder)
    return LanguageModel.load(str(folder), device=device, name="ESM-2 8M's shape, random weights")


def draw(n: int, seed: int) -> Iterator[tuple[str, str]]:
    """Sequences and the kind of each residue (h, s, l)."""
    rng = random.Random(seed)
    for _ in range(n):
        sequence, kinds = "", ""
        while len(sequence) < rng.randint(80, 200):
            kind = rng.choice(list(KINDS))
            length = rng.randint(5, 16)
            for _ in range(length):
                own = rng.random() < OFTEN
                sequence += rng.choice(KINDS[kind] if own else "".join(KINDS.values()))
            kinds += kind[0] * length
        yield sequence, kinds


def concept(n: int, seed: int) -> Concept:
    """Sequences of helices alone against sequences of strands alone, n of each side to make vectors from."""
    sides = [[only(kind, 60, seed + i) for i in range(2 * n)] for kind in ("helix", "strand")]
    plus, minus = ([Example(prompt="", text=text) for text in side] for side in sides)
    return Concept(
        name="helix", group="structure", positive=plus[:n], negative=minus[:n], eval_positive=plus[n:],
        eval_negative=minus[n:],
    )  # fmt: skip


def only(kind: str, length: int, seed: int) -> str:
    """A sequence of one kind."""
    rng = random.Random(f"{kind} {seed}")
    every_one = "".join(KINDS.values())
    return "".join(rng.choice(KINDS[kind] if rng.random() < OFTEN else every_one) for _ in range(length))


def main(config: Config) -> None:
    """All of it."""
    config = replace(config, **chosen(config, tokens=20_000, d_sae=512, sequences=8, looked_at=10))
    results = Results(config, "protein")
    methods = ["unsteered", *METHODS]
    results.planned(["model", "sae", LOOK, *methods])
    p = proteins(config)
    results.row("model", lambda: told(p.lm))
    sae = p.sae()
    ids = every(sae.cfg.d_sae, config.looked_at)
    both = {OURS: sae, NULL: random_sae(p, sae)}
    results.row("sae", lambda: {name: quality(p, one) for name, one in both.items()})
    results.row(LOOK, lambda: {name: look(p, one, ids) for name, one in both.items()})
    masked = Masked([text for text, _ in draw(config.sequences, config.seed + 1)], p.lm, config.seed)
    helix = concept(48, config.seed)
    results.row("unsteered", lambda: {"nll": masked.nll(masked.read()).tolist()})
    for method in METHODS:
        results.row(method, partial(steered, p, helix, method, masked, config.budgets))


def told(lm: LanguageModel) -> dict[str, Any]:
    """What the model is."""
    kinds = [name.removeprefix("blocks.0.") for name in lm.hook_names() if name.startswith("blocks.0.")]
    return {"parameters": sum(p.numel() for p in lm.model.parameters()), "layers": lm.n_layers, "hooks": kinds}


def quality(p: Study, sae: SAE) -> dict[str, float]:
    """What the SAE explains of rows that it was not trained on."""
    found = evaluate_sae(sae, p.store()).reconstruction
    return {"fvu": found.fvu, "l0": found.l0, "dead": found.dead_fraction}


class Masked:
    """Sequences with 15 % of their residues masked, as the model is trained on."""

    def __init__(self, texts: list[str], lm: LanguageModel, seed: int) -> None:
        self.lm, self.texts = lm, texts
        self.batch = lm.encode(texts)
        ids = self.batch.input_ids
        residue = (ids >= VOCABULARY.index(RESIDUES[0])) & (ids < VOCABULARY.index(RESIDUES[-1]))
        drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.15
        self.where = residue & drawn
        self.ids = ids.masked_fill(self.where, VOCABULARY.index("<mask>"))

    @torch.no_grad()
    def read(self) -> Tensor:
        """Log-probabilities [B, S, V]."""
        return self.lm.logits(self.ids, self.batch.attention_mask).float().log_softmax(-1)

    def per_sequence(self, values: Tensor) -> Tensor:
        """The mean of values [B, S] over each sequence's masked residues, [B]."""
        return (values * self.where).sum(1) / self.where.sum(1).clamp_min(1)

    def nll(self, logp: Tensor) -> Tensor:
        """Nats a masked residue, [B]."""
        return self.per_sequence(-logp.gather(-1, self.batch.input_ids[..., None])[..., 0])

    def odds(self, logp: Tensor) -> Tensor:
        """Log-odds of a helix's residues against a strand's at masked ones, [B]."""
        plus, minus = ([VOCABULARY.index(one) for one in KINDS[kind]] for kind in ("helix", "strand"))
        return self.per_sequence(logp[..., plus].logsumexp(-1) - logp[..., minus].logsumexp(-1))


def steered(p: Study, topic: Concept, method: str, masked: Masked, budgets: tuple[float, ...]) -> dict[str, Any]:
    """By budget: what the calibration of a vector reached, and what steering does at masked residues."""
    v, st, found = vector(p, topic, method), Steerer(p.lm), {}
    plain = masked.read()
    with st.vector(v, scale=0.0):
        unchanged = torch.equal(masked.read(), plain)
    for budget in budgets:
        search = calibrate(v, st, texts=masked.texts, target_kl=budget).search
        with st.vector(v, scale=search.scale):
            logp = masked.read()
        kl = masked.per_sequence((logp.exp() * (logp - plain)).sum(-1))
        figures = {
            "kl": kl,
            "nll": masked.nll(logp) - masked.nll(plain),
            "odds": masked.odds(logp) - masked.odds(plain),
        }
        estimates = {name: interval(value) for name, value in figures.items()}
        found[f"{budget:g}"] = {"scale": search.scale, "reached": search.value, "reason": search.reason, **estimates}
    return {"unchanged_at_0": unchanged, "budgets": found}


def interval(values: Tensor) -> dict[str, float]:
    """The mean of values [B] with its interval over sequences."""
    found = bootstrap(values.tolist())
    assert found is not None
    return asdict(found)


# The page


def page(results: dict[str, Any]) -> Page:
    """The page of the results."""
    rows = results["rows"]
    model, both = rows["model"], rows[LOOK]
    means = {name: averages(found["features"]) for name, found in both.items()}
    tried = {name: rows[name] for name in METHODS if name in rows}
    return Page(
        name="protein",
        title="A protein model's shape",
        asked=(
            "Do the same steps work on a masked language model of residues: activations of an encoder, an SAE of them, "
            "its features, vectors calibrated to a KL, a masked-residue loss under steering?"
        ),
        how=HOW.format(
            parameters=number(model["parameters"]), layers=model["layers"], hook=both[OURS]["hook"],
            rows=number(both[OURS]["rows"]), d_sae=number(both[OURS]["d_sae"]), k=both[OURS]["k"],
            n=len(both[OURS]["features"]), sequences=len(rows["unsteered"]["nll"]), kinds=len(model["hooks"]),
        ),
        tables=[
            Table(
                caption="The SAE on held-out rows, and its features by the measures of the part `features`, beside "
                "random directions. Intervals over features.",
                header=["", *both],
                rows=[
                    *([name, *(number(rows["sae"][one][name]) for one in both)] for name in ("fvu", "l0")),
                    ["dead", *(number(rows["sae"][one]["dead"], percent=True) for one in both)],
                    *([text, *(cell(means[one][key], percent=share) for one in both)] for key, text, share in MEANS),
                ],
            ),
            Table(
                caption="Steered after the middle layer by a vector from helix sequences against strand sequences, "
                "calibrated to a KL per residue of unmasked sequences. At masked residues: the KL, the change of the "
                "loss (nats) and of the log-odds of a helix's residues. 95 % intervals over sequences.",
                header=["vector", "asked", "reached", "KL, masked", "loss", "log-odds"],
                rows=[
                    [name, budget, number(one["reached"]), cell(one["kl"]), cell(one["nll"], signed=True),
                     cell(one["odds"], signed=True)]
                    for name, found in tried.items()
                    for budget, one in found["budgets"].items()
                ],
            ),
        ],
        means=meaning(rows, tried),
        change=CHANGE,
        not_run=["the trained weights of ESM-2 8M, which no package of the registry has, and anything about proteins"],
    )  # fmt: skip


HOW = """\
ESM-2 8M's configuration ({parameters} parameters, {layers} layers, its 33 tokens) with weights drawn from the seed.
{rows} residues of drawn sequences: stretches of 5 to 16 residues of which most are those frequent in helices, in
strands or in loops. An SAE of {d_sae} features ({k} active) on `{hook}`, one of {kinds} kinds of hook point that are
there; {n} of its features looked at, every k-th by id. {sequences} further sequences have 15 % of their residues
masked."""
CHANGE = """\
Weights: `python scripts/study protein` reads none, but `LanguageModel.load` opens a folder with ESM-2's, and the rest
is the same. Then the sequences should be real ones, the sides of the contrast annotated residues, and the loss a
statement."""


def meaning(rows: dict[str, Any], tried: dict[str, Any]) -> str:
    """What the figures say."""
    trained, null = rows["sae"][OURS]["fvu"], rows["sae"][NULL]["fvu"]
    met = [one["reason"] == "converged" for found in tried.values() for one in found["budgets"].values()]
    exact = all(found["unchanged_at_0"] for found in tried.values())
    clear = [side(one["odds"]) for name in tried if name != "random" for one in tried[name]["budgets"].values()]
    nll = bootstrap(rows["unsteered"]["nll"])
    return "\n\n".join(
        [
            f"Every step {'runs' if trained < null and exact and all(met) else 'runs, with gaps'}: the SAE leaves "
            f"{number(trained, percent=True)} of the variance unexplained (random directions "
            f"{number(null, percent=True)}), {sum(met)} of {len(met)} calibrations reached their KL"
            + ("" if all(met) else ", the others say how far they came at the largest scale allowed")
            + f", and scale 0 {'changes no bit' if exact else 'changes the output'}.",
            f"The masked-residue loss is {cell(nll)} nats, and log 33 = {number(math.log(33))} is a uniform guess: the "
            f"model knows nothing, as its weights are random. Of {len(clear)} steered settings {clear.count(1)} raise "
            f"the log-odds of a helix's residues and {clear.count(-1)} lower them beyond their interval, which says "
            "that vectors reach the output, and not what they mean.",
        ]
    )
