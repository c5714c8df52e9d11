"""The page of part 1, from its results."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing

from study.peers import PEERS
from study.report import COLOURS, STYLE, Figure, Page, Table, cell, listed, number

Row = Mapping[str, Any]
TITLES = {
    "topk": "TopK", "batch_topk": "BatchTopK", "matryoshka": "Matryoshka", "jumprelu": "JumpReLU", "relu": "ReLU",
    "gated": "Gated", "matryoshka_topk": "Matryoshka TopK", "abs_topk": "AbsTopK",
}  # fmt: skip
QUALITY = ["FVU", "with huge rows", "L0", "dead, held out", "dead, training", "CE recovered", "KL"]
MADE_FROM = (
    "FVU is of ordinary rows, around their mean; the column beside it adds the rows of huge norm (attention sinks), "
    "which no trainer was given. `dead` is the share of the features that fire on none of the rows."
)


def page(results: Mapping[str, Any]) -> Page:
    """The page: every SAE by layer, architecture, L0 and width; the other trainers; seeds, baselines, probes, cost."""
    return Of(results).page()


class Of:
    """What the page says of one file of results."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.rows: Mapping[str, Any] = results["rows"]
        self.settings = results["settings"]
        self.saes: dict[str, dict[str, Any]] = {n: dict(r) for n, r in self.rows.items() if isinstance(r, dict) and "fvu" in r}
        """Of every SAE its figures, with what it does to the model where that was measured."""
        for name, row in self.rows.items():
            for sae, loss in row.items() if name.startswith("loss, ") else ():
                if sae in self.saes:
                    self.saes[sae] |= loss
        self.ours = {n: r for n, r in self.saes.items() if r["library"] not in PEERS and "frozen" not in r}
        self.peers = {n: r for n, r in self.saes.items() if r["library"] in PEERS}
        for library in PEERS:
            known = self.rows.get(f"{library} on training rows")
            if known:
                self.saes[known["name"]] |= {"dead_training": known["dead_training"]}
        self.first = next(iter(self.ours.values()))
        """The SAE that the study steers with."""

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
            f"of the last documents, {at['heldout']:,} rows, are held out. Every SAE trains once over "
            f"{first['n_steps'] * first['batch_size']:,} rows in the same order, in batches of {first['batch_size']}, at "
            f"its defaults. After layer {first['layer']}, {at['large_rows']:,} rows have a norm above ten times the median "
            f"and hold {number(at['large_share'], percent=True)} of the squared norm; training leaves them out.\n\n"
            f"FVU, L0 and dead features are of the held-out rows. CE recovered and KL are over {predicted} of "
            "texts that nothing was cached of: the reconstruction takes the place of the residual stream, and 0 of CE "
            "recovered is the loss with the stream at its mean. "
            f"The other trainers ({listed(list(PEERS))}) train TopK SAEs of the same width and k on the same rows in the "
            "same order and batches, with their own losses and optimisers, each at three learning rates: two, and a "
            "third on the side of the better. The rows of huge norm are taken out of their batches too. Their best is "
            "chosen by the held-out FVU that is reported, which favours them a little."
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

    def alike(self, row: Row, *free: str) -> bool:
        """Whether an SAE is the first but for some of what tells SAEs apart."""
        keys = {"architecture", "layer", "d_sae", "l0_asked", "seed"} - set(free)
        return all(row[key] == self.first[key] for key in keys)

    def table_of_architectures(self) -> Table:
        same = [r for r in self.ours.values() if self.alike(r, "architecture", "l0_asked")]
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
            caption=f"**Trainers**: TopK, {self.first['d_sae']:,} features, {self.first['l0_asked']} active, after layer "
            f"{self.first['layer']}, the same rows in the same order. Dead features on training rows are counted for "
            "each library's best.",
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
            header += [f"rows/s, {of}", "time of ours", "processor time of ours"]
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
            "recipe with directions that stay random, beside another seed. The decoder's mean cosine is over all pairs.",
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

    def title(self, row: Row) -> str:
        return TITLES[row["architecture"]]

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

    # Words

    def best_peers(self) -> dict[str, dict[str, Any]]:
        """Each library's best by FVU."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.peers.values():
            best = found.get(row["library"])
            if best is None or row["fvu_ordinary"] < best["fvu_ordinary"]:
                found[row["library"]] = row
        return found

    def answer(self) -> str:
        return self.means().split("\n\n")[0]

    def means(self) -> str:
        told = [self.of_the_first(), self.of_peers(), self.of_speed(), self.of_architectures(), self.of_layers(),
                self.of_baselines(), self.of_seeds(), self.of_probes()]  # fmt: skip
        return "\n\n".join(filter(None, told))

    def of_the_first(self) -> str:
        row = self.first
        loss = ""
        if "ce_recovered" in row:
            loss = (
                f" and recovers {number(row['ce_recovered'], percent=True)} of the loss that setting the stream to its "
                f"mean costs (KL {number(row['kl'])} nats a token)"
            )
        dead = f"{number(row['dead_share'], percent=True)} of its features fire on none of the {row['n_tokens']:,} held-out rows"
        if "dead_training" in row:
            dead += f", {number(row['dead_training'], percent=True)} on none of {row['training_rows']:,} training rows"
        return (
            f"With {row['l0_asked']} of {row['d_sae']:,} features a token the {self.title(row)} SAE after layer "
            f"{row['layer']} leaves {number(row['fvu_ordinary'], percent=True)} of the variance of ordinary rows "
            f"unexplained{loss}. {dead}."
        )

    def of_peers(self) -> str:
        best = self.best_peers()
        if not best:
            return ""
        first, parts = self.first, []
        for library, row in best.items():
            rates = sorted(r["lr"] for r in self.peers.values() if r["library"] == library)
            edge = len(rates) > 1 and row["lr"] in (rates[0], rates[-1])
            at = f"{library} at its best rate of {len(rates)} ({row['lr']:g}" + (", the last tried)" if edge else ")")
            part = f"{at} has an FVU of {number(row['fvu_ordinary'])}"
            part += f" and recovers {number(row['ce_recovered'], 4)} of the loss" if "ce_recovered" in row else ""
            parts.append(f"{part}, with {number(row['dead_share'], percent=True)} silent on the held-out rows")
        fvu = min(row["fvu_ordinary"] for row in best.values())
        lower = "lower than" if first["fvu_ordinary"] < fvu else "not lower than"
        text = f"{'. '.join(parts)}. Ours, at its default rate, has {number(first['fvu_ordinary'])}, {lower} both"
        text = text if len(best) > 1 else text.removesuffix(" both") + " that"
        every = [r["ce_recovered"] for r in self.peers.values() if "ce_recovered" in r]
        if "ce_recovered" in first and every:
            above = "above" if first["ce_recovered"] > max(every) else "not above"
            text += f", and recovers {number(first['ce_recovered'], 4)}, {above} the best of all their rates"
            text += f" ({number(max(every), 4)})"
        return text + "."

    def of_speed(self) -> str:
        speed = self.rows.get("speed 2") or self.rows.get("speed 1")
        if speed is None:
            return ""
        others = {name: one for name, one in speed["wall"].items() if name in PEERS}
        fastest = min(others, key=lambda name: others[name]["ratio"])
        slower = [f"{name}'s takes {number(one['ratio'])} times as long" for name, one in others.items()]
        one = self.rows.get("speed 1")
        used = f" ({number(one['processor'][fastest]['ratio'])} times on one thread, in processor time)" if one else ""
        memory = {name.split()[1]: mb for name, mb in self.rows.items() if name.startswith("memory ") and mb}
        told = f" In memory our steps add {number(memory['steersman'])} MB" if "steersman" in memory else ""
        beside = [f"{name}'s {number(memory[name])}" for name in others if name in memory]
        told += f", {listed(beside)}." if told and beside else "." if told else ""
        return (
            f"Of a training step on these rows with {speed['threads']} threads, {listed(slower)}; the faster of them, "
            f"{fastest}, has no AuxK loss by default{used}.{told}"
            if fastest == "eai-sparsify"
            else f"Of a training step on these rows with {speed['threads']} threads, {listed(slower)}{used}.{told}"
        )

    def of_architectures(self) -> str:
        parts = []
        for asked in sorted({r["l0_asked"] for r in self.ours.values()}):
            same = [
                r for r in self.ours.values() if self.alike(r, "architecture", "l0_asked") and r["l0_asked"] == asked
            ]
            if len(same) > 1:
                order = sorted(same, key=lambda r: r["fvu_ordinary"])
                text = [f"{self.title(r)} {number(r['fvu_ordinary'])} (L0 {number(r['l0'])})" for r in order]
                parts.append(f"Asked for an L0 of {asked}, FVU rises in this order: {', '.join(text)}.")
        if parts:
            parts.append(
                "They differ in the L0 they keep on held-out rows, so compare points of the plot, not rows alone."
            )
        return " ".join(parts)

    def of_layers(self) -> str:
        same = sorted((r for r in self.ours.values() if self.alike(r, "layer")), key=lambda r: r["layer"])
        text = []
        if len(same) > 1:
            text.append(
                "Over the layers "
                + ", ".join(f"{r['layer']}: {number(r['fvu_ordinary'])}" for r in same)
                + " of the variance stays unexplained at equal width and L0."
            )
        for row in (r for r in self.ours.values() if self.alike(r, "d_sae") and r["d_sae"] != self.first["d_sae"]):
            less = row["fvu_ordinary"] < self.first["fvu_ordinary"]
            text.append(
                f"{row['d_sae']:,} features in place of {self.first['d_sae']:,} {'lower' if less else 'do not lower'} FVU "
                f"on these rows: {number(row['fvu_ordinary'])}."
            )
        return " ".join(text)

    def of_baselines(self) -> str:
        frozen = [r for r in self.saes.values() if "frozen" in r]
        if not frozen:
            return ""
        best = min(frozen, key=lambda r: r["fvu_ordinary"])
        times = best["fvu_ordinary"] / self.first["fvu_ordinary"]
        learned = (
            f"the best of the random baselines ({best['frozen']}) leaves {number(times)} times as much unexplained"
            if times > 1
            else f"a random baseline ({best['frozen']}) explains as much"
        )
        return (
            f"What was learned: {learned}"
            + ", so FVU says something of the features here." * (times > 1.1)
            + (", so FVU says little of the features here." * (times <= 1.1))
        )

    def of_seeds(self) -> str:
        found = self.rows.get("seeds")
        if found is None:
            return ""
        again = next((r for r in self.ours.values() if self.alike(r, "seed") and r["seed"] != self.first["seed"]), None)
        differ = (
            f" FVU of the two differs by {number(abs(again['fvu_ordinary'] - self.first['fvu_ordinary']), 2)}."
            if again
            else ""
        )
        return (
            f"Another seed shares {number(found['shared'], percent=True)} of the features above a cosine of 0.7; MCC "
            f"{number(found['mcc'])}, {number(found['chance'])} by chance.{differ}"
        )

    def of_probes(self) -> str:
        found = self.rows.get("probing")
        if found is None:
            return ""
        scores = {(one["of"], one["k"]): one["auroc"]["mean"] for one in found["scores"]}
        own = {name: value for (name, k), value in scores.items() if k == 1 and name in self.ours}
        best = max(own, key=lambda name: own[name])
        raw, nothing = scores.get(("raw", None)), scores.get(("random_sae", 1))
        beside = [f"{number(raw)} from all raw activations"] if raw is not None else []
        beside += [f"{number(nothing)} from one feature of an SAE that learned nothing"] if nothing is not None else []
        return f"One feature tells a concept best in the {self.title(self.ours[best])} SAE, AUROC {number(own[best])}, beside {listed(beside)}."

    def change(self) -> str:
        rows = self.first["n_steps"] * self.first["batch_size"]
        return (
            f"More rows first of all: {rows:,} are few, and every trainer is still learning; rates tuned for long runs, "
            "such as the other libraries' defaults, come into their own there. One model of 135M parameters, one seed of "
            "most SAEs, one kind of hook point (the residual stream) and held-out texts of the same sources were tried. "
            "What the model loses is measured on few texts, so that small differences of CE recovered mean little."
        )
