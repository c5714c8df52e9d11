"""The page of part 1, from its results."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing

from study.peers import PEERS
from study.report import COLOURS, STYLE, Figure, Page, Table, cell, listed, number
from study.saes_words import TITLES, Row, Words

QUALITY = ["FVU", "with huge rows", "L0", "dead, held out", "dead, training", "CE recovered", "KL"]
MADE_FROM = (
    "FVU is of ordinary rows, around their mean; the column beside it adds the rows of huge norm (attention sinks), "
    "which no trainer was given. `dead` is the share of the features that fire on none of the rows."
)


def page(results: Mapping[str, Any]) -> Page:
    """The page: every SAE by layer, architecture, L0 and width; the other trainers; seeds, baselines, probes, cost."""
    return Of(results).page()


class Of(Words):
    """What the page says of one file of results."""

    def page(self) -> Page:
        return Page(
            name="saes", title="SAEs of a real model", asked=self.asked(), how=self.how(), tables=self.tables(),
            figures=self.figures(), means=self.means(), change=self.change(), answer=self.answer(),
        )  # fmt: skip

    def asked(self) -> str:
        return (
            "How well do SAEs that this library trains rebuild a real model's activations, over layers, architectures, "
            "numbers of active features and widths? Do they learn more than random directions, would another seed find "
            "the same, and how do quality, speed and memory stand beside the trainers of SAELens and sparsify on the "
            "same rows?"
        )

    def how(self) -> str:
        at = self.rows["activations"][str(self.first["layer"])]
        loss = next((r for r in self.saes.values() if "n_predictions" in r), None)
        predicted = f"{loss['n_predictions']:,} predictions" if loss else "held-out texts"
        first = self.first
        return (
            f"{at['rows']:,} rows of each layer (width {at['width']}) were cached from a mix of texts, of which those "
            f"of the last documents, {at['heldout']:,} rows, are held out. Every SAE trains on "
            f"{first['n_steps'] * first['batch_size']:,} rows in the same order, in batches of {first['batch_size']}, "
            f"at its defaults. After layer {first['layer']}, {at['large_rows']:,} rows have a norm above ten times the "
            f"median and hold {number(at['large_share'], percent=True)} of the squared norm; training leaves them "
            "out.\n\n"
            f"FVU, L0 and dead features are of the held-out rows. CE recovered and KL are over {predicted} of "
            "texts that nothing was cached of: the reconstruction takes the place of the residual stream, and 0 of CE "
            "recovered is the loss with the stream at its mean. "
            f"The other trainers ({listed(list(PEERS))}) train TopK SAEs of the same width and k on the same rows in "
            "the same order and batches, with their own losses and optimisers, each at up to three learning rates: "
            "two, and a third on the side of the better. The rows of huge norm are taken out of their batches too. "
            "Their best is chosen by the held-out FVU that is reported, which favours them a little. Steps are timed "
            "in turn, as "
            "the machine may have other work, which times by the clock show more than processor time."
        )

    # Tables

    def tables(self) -> list[Table]:
        made = [self.table_of_layers(), self.table_of_architectures(), self.table_of_peers(), self.table_of_cost(),
                self.table_of_baselines(), self.table_of_probes()]  # fmt: skip
        return [table for table in made if table is not None and table.rows]

    def quality(self, row: Row) -> list[str]:
        """The cells under `QUALITY`."""
        shares = [number(row.get(key), percent=True) for key in ("dead_share", "dead_training")]
        loss = [number(row.get("ce_recovered"), 4), number(row.get("kl"))]
        return [number(row["fvu_ordinary"]), number(row["fvu"]), number(row["l0"]), *shares, *loss]

    def table_of_layers(self) -> Table:
        same = [r for r in self.ours.values() if self.alike(r, "layer", "d_sae")]
        same.sort(key=lambda r: (r["layer"], r["d_sae"]))
        return Table(
            caption=f"**Layers and widths**: {TITLES[self.first['architecture']]}, {self.first['l0_asked']} active. "
            + MADE_FROM,
            header=["layer", "features", *QUALITY],
            rows=[[str(r["layer"]), f"{r['d_sae']:,}", *self.quality(r)] for r in same],
        )

    def table_of_architectures(self) -> Table | None:
        same = [r for r in self.ours.values() if self.alike(r, "architecture", "l0_asked")]
        if len(same) == 1:
            return None
        same.sort(key=lambda r: r["l0_asked"])
        return Table(
            caption=f"**Architectures** after layer {self.first['layer']}, {self.first['d_sae']:,} features.",
            header=["architecture", "asked", *QUALITY],
            rows=[[TITLES[r["architecture"]], f"L0 {r['l0_asked']}", *self.quality(r)] for r in same],
        )

    def table_of_peers(self) -> Table | None:
        if not self.peers:
            return None
        rows = [["steersman, default", number(self.first["lr"], 2), *self.quality(self.first)]]
        rows += [[r["library"], number(r["lr"], 2), *self.quality(r)] for r in self.by_library()]
        return Table(
            caption=f"**Trainers**: TopK, {self.first['d_sae']:,} features, {self.first['l0_asked']} active, after "
            f"layer {self.first['layer']}, the same rows in the same order. Dead features on training rows are counted "
            "for each library's best.",
            header=["trainer", "rate", *QUALITY],
            rows=rows,
        )

    def by_library(self) -> list[dict[str, Any]]:
        """The other libraries' SAEs, by rate."""
        return sorted(self.peers.values(), key=lambda r: (list(PEERS).index(r["library"]), r["lr"]))

    def table_of_cost(self) -> Table | None:
        speeds = [self.rows[name] for name in ("speed 1", "speed 2") if name in self.rows]
        memory = {name.split()[1]: mb for name, mb in self.rows.items() if name.startswith("memory ")}
        names = list(speeds[0]["wall"]) if speeds else list(memory)
        if not names:
            return None
        rows = []
        for name in names:
            cells = [name]
            for speed in speeds:
                wall, used = speed["wall"][name], speed["processor"][name]
                cells += [number(wall["rows_per_second"]), number(wall["ratio"]), number(used["ratio"])]
            rows.append([*cells, number(memory.get(name))])
        header = ["trainer"]
        for speed in speeds:
            of = f"{speed['threads']} thread" + "s" * (speed["threads"] > 1)
            header += [f"rows/s, {of}", "time, ours = 1", "processor, ours = 1"]
        return Table(
            caption="**Speed and memory** of training steps on those rows, the trainers in turn in one process"
            + (f"; medians of {speeds[0]['rounds']} rounds" if speeds else "")
            + ". Memory is what five steps add to a process at its peak, MB.",
            header=[*header, "memory, MB"],
            rows=rows,
        )

    def table_of_baselines(self) -> Table | None:
        frozen = [r for r in self.saes.values() if "frozen" in r]
        again = [r for r in self.ours.values() if self.alike(r, "seed") and r["seed"] != self.first["seed"]]
        if not frozen and not again:
            return None
        named = [("trained", self.first), *((f"trained, seed {r['seed']}", r) for r in again),
                 *((r["frozen"], r) for r in frozen)]  # fmt: skip
        return Table(
            caption="**Baselines that learn no features** ([what they are](../concepts/judging-saes.md)): the same "
            "recipe with directions that stay random, beside another seed. The cosine is of decoder rows, over all "
            "pairs.",
            header=["SAE", *QUALITY, "decoder's cosine"],
            rows=[[name, *self.quality(r), number(r["decoder_cosine"])] for name, r in named],
        )

    def table_of_probes(self) -> Table | None:
        found = self.rows.get("probing")
        if found is None:
            return None
        names = {"raw": "raw activations", "random_sae": "an SAE that learned nothing",
                 "random_features": f"random features of {self.title(self.first)}"}  # fmt: skip
        of = {name: self.title(row) for name, row in self.ours.items()} | names
        scores: dict[str, dict[int | None, Row]] = {}
        for one in found["scores"]:
            scores.setdefault(one["of"], {})[one["k"]] = one
        return Table(
            caption=f"**Probes** after layer {self.first['layer']}: which of {found['concepts']} AxBench concepts an "
            f"evaluation text shows, from its largest activations; fitted on {found['training']} texts, measured on "
            f"{found['heldout']} others. AUROC averaged over the concepts, intervals over texts.",
            header=["probe of", "1 feature", "5 features", "all"],
            rows=[
                [of[name], *(cell(by[k]["auroc"]) if k in by else "-" for k in (1, 5, None))]
                for name, by in scores.items()
            ],
        )

    # Plots

    def figures(self) -> list[Figure]:
        if not any("ce_recovered" in row for row in self.saes.values()):
            return []
        alt = (
            "FVU of every SAE of that layer against the part of the loss that it recovers, by trainer and architecture"
        )
        return [Figure(name="quality", alt=alt, draw=self.draw)]

    def draw(self) -> Drawing:
        """FVU against CE recovered after the first SAE's layer."""
        points: dict[str, list[tuple[float, float, str]]] = {}
        for row in self.saes.values():
            if row["layer"] != self.first["layer"] or "ce_recovered" not in row:
                continue
            ours = row["library"] not in PEERS
            kind = "random baselines" if "frozen" in row else self.title(row) if ours else row["library"]
            text = "" if "frozen" in row else f"{row['l0_asked']}" if ours else f"rate {row['lr']:g}"
            text += f", {row['d_sae'] // 1024}k" if ours and row["d_sae"] != self.first["d_sae"] else ""
            points.setdefault(kind, []).append((row["fvu_ordinary"], row["ce_recovered"], text))
        with mpl.rc_context(STYLE):
            figure = Drawing(figsize=(7.2, 3.8), layout="constrained")
            axes = figure.subplots()
            for i, (kind, found) in enumerate(points.items()):
                axes.plot([x for x, _, _ in found], [y for _, y, _ in found], "os^Dvx*P"[i % 8], label=kind,
                          color=COLOURS[i % 8], markersize=6)  # fmt: skip
                for x, y, text in found:
                    axes.annotate(text, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
            axes.set(xlabel="FVU, held-out rows", ylabel="CE recovered")
            figure.legend(loc="outside right upper", fontsize=8)
        return figure
