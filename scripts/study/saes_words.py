"""What the figures of part 1 mean, in words that they choose."""

from collections.abc import Mapping
from typing import Any

from study.peers import PEERS
from study.report import listed, number
from study.steps import NO_AUXK, OURS, PRODUCT

Row = Mapping[str, Any]
TITLES = {
    "topk": "TopK", "batch_topk": "BatchTopK", "matryoshka": "Matryoshka", "jumprelu": "JumpReLU", "relu": "ReLU",
    "gated": "Gated", "matryoshka_topk": "Matryoshka TopK", "abs_topk": "AbsTopK",
}  # fmt: skip


class Words:
    """The SAEs of one file of results, and what is to be said of them."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.rows: Mapping[str, Any] = results["rows"]
        self.settings = results["settings"]
        self.saes: dict[str, dict[str, Any]] = {
            n: dict(r) for n, r in self.rows.items() if isinstance(r, dict) and "fvu" in r
        }
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

    def alike(self, row: Row, *free: str) -> bool:
        """Whether an SAE is the first but for some of what tells SAEs apart."""
        keys = {"architecture", "layer", "d_sae", "l0_asked", "seed"} - set(free)
        return all(row[key] == self.first[key] for key in keys)

    def title(self, row: Row) -> str:
        return TITLES[row["architecture"]]

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
        dead = (
            f"{number(row['dead_share'], percent=True)} of its features fire on none of the {row['n_tokens']:,} "
            "held-out rows"
        )
        if "dead_training" in row:
            dead += f", {number(row['dead_training'], percent=True)} on none of {row['training_rows']:,} training rows"
        return (
            f"With {row['l0_asked']} of {row['d_sae']:,} features a token the {self.title(row)} SAE after layer "
            f"{row['layer']} leaves {number(row['fvu_ordinary'], percent=True)} of the variance of ordinary rows "
            f"unexplained{loss}. {dead}."
        )

    def of_peers(self) -> str:
        best, first, parts = self.best_peers(), self.first, []
        for library, row in best.items():
            rates = sorted(r["lr"] for r in self.peers.values() if r["library"] == library)
            at = f"at {row['lr']:g}, the better of {len(rates)} rates,"
            if len(rates) == 1:
                at = f"at {row['lr']:g}, the one rate that was run,"
            elif len(rates) > 2:
                edge = " and the last on its side" if row["lr"] in (rates[0], rates[-1]) else ""
                at = f"at {row['lr']:g}, the best of {len(rates)} rates{edge},"
            part = f"{library} {at} has an FVU of {number(row['fvu_ordinary'])}"
            part += f" and recovers {number(row['ce_recovered'], 4)} of the loss" if "ce_recovered" in row else ""
            parts.append(f"{part}, with {number(row['dead_share'], percent=True)} silent on the held-out rows")
        if not best:
            return ""
        lower = first["fvu_ordinary"] < min(row["fvu_ordinary"] for row in best.values())
        than = "that" if len(best) == 1 else "both" if lower else "the better of them"
        text = f"{'. '.join(parts)}. Ours, at its default rate, has {number(first['fvu_ordinary'])}"
        text += f", {'lower' if lower else 'not lower'} than {than}"
        every = [r["ce_recovered"] for r in self.peers.values() if "ce_recovered" in r]
        if "ce_recovered" in first and every:
            above = "above" if first["ce_recovered"] > max(every) else "not above"
            text += f", and recovers {number(first['ce_recovered'], 4)}, {above} the best of those of theirs that were "
            text += f"measured ({number(max(every), 4)})"
        huge = min(row["fvu"] for row in self.peers.values())
        text += (
            f". With the rows of huge norm counted, which no trainer was given, FVU is {number(first['fvu'])} for ours "
            f"and {number(huge)} for the best of theirs."
        )
        few = [name for name in best if sum(r["library"] == name for r in self.peers.values()) < 3]
        if few:
            text += (
                f" Of {listed(few)} fewer than three rates were run, so that this does not say what "
                f"{'it reaches' if len(few) == 1 else 'they reach'} at the best one."
            )
        return text

    def of_speed(self) -> str:
        speeds = [self.rows[name] for name in ("speed 1", "speed 2") if name in self.rows]
        told = []
        for speed in speeds:
            others = {name: one["ratio"] for name, one in speed["wall"].items() if name in PEERS}
            fastest = min(others, key=lambda name: others[name])
            slower = [f"{name}'s {number(ratio)} times as long" for name, ratio in others.items()]
            of = "one thread" if speed["threads"] == 1 else f"{speed['threads']} threads"
            ratio = others[fastest]
            reached = "at least twice as fast as" if ratio >= 2 else "faster than, but not twice as fast as,"
            reached = reached if ratio > 1 else "slower than"
            told.append(
                f"With {of} a step of ours is {reached} the faster of the others, {fastest}'s: "
                f"{listed(slower)} as ours."
            )
        if speeds:
            used = {name: one["ms"] for name, one in speeds[0]["processor"].items()}
            others = {name: ms for name, ms in used.items() if name in PEERS}
            fastest = min(others, key=lambda name: others[name])
            half = others[fastest] / 2
            aux, rest = used[OURS] - used[NO_AUXK], used[NO_AUXK] - used[PRODUCT]
            whole = f"Of {number(used[OURS])} ms of processor time on one thread"
            dead = "dead features (AuxK, which eai-sparsify's trainer leaves out by default)"
            told.append(
                f"{whole} the product of rows and encoder, which all have, takes {number(used[PRODUCT])}, {dead} "
                f"{number(aux)} and the rest {number(rest)};"
                if rest > 0
                else f"{whole} {dead} take {number(aux)}. All else is less than the fp32 product of rows and encoder, "
                f"{number(used[PRODUCT])}: where a processor multiplies bf16 faster, candidates are found in bf16 and "
                "decided in fp32;"
            )
            told[-1] += (
                f" half of {fastest}'s is {number(half)}, {'less' if half < used[PRODUCT] else 'more'} than the "
                "product alone."
            )
        memory = {name.split()[1]: mb for name, mb in self.rows.items() if name.startswith("memory ") and mb}
        if len(memory) > 1:
            told.append(f"Peak memory: {listed([f'{name} {number(mb)} MB' for name, mb in memory.items()])}.")
        return " ".join(told)

    def of_architectures(self) -> str:
        parts = []
        for asked in sorted({r["l0_asked"] for r in self.ours.values()}):
            every = [r for r in self.ours.values() if self.alike(r, "architecture", "l0_asked")]
            same = [r for r in every if r["l0_asked"] == asked]
            if len(same) > 1:
                order = sorted(same, key=lambda r: r["fvu_ordinary"])
                text = [f"{self.title(r)} {number(r['fvu_ordinary'])} (L0 {number(r['l0'])})" for r in order]
                parts.append(f"Asked for an L0 of {asked}, FVU rises in this order: {', '.join(text)}.")
        if parts:
            parts.append("They differ in the L0 they keep on held-out rows, which counts in any comparison.")
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
                f"{row['d_sae']:,} features in place of {self.first['d_sae']:,} {'lower' if less else 'do not lower'} "
                f"FVU on these rows: {number(row['fvu_ordinary'])}."
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
        differ = ""
        if again is not None:
            apart = abs(again["fvu_ordinary"] - self.first["fvu_ordinary"])
            differ = f" FVU of the two differs by {number(apart, 2)}."
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
        return (
            f"One feature tells a concept best in the {self.title(self.ours[best])} SAE, AUROC {number(own[best])}, "
            f"beside {listed(beside)}."
        )

    def change(self) -> str:
        rows = self.first["n_steps"] * self.first["batch_size"]
        return (
            f"More rows first of all: {rows:,} are few, and every trainer is still learning; rates tuned for long "
            "runs, such as the other libraries' defaults, come into their own there. One model of 135M parameters, one "
            "seed of most SAEs, one kind of hook point (the residual stream) and held-out texts of the same sources "
            "were tried. What the model loses is measured on few texts, so that small differences of CE recovered mean "
            "little."
        )
