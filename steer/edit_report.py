"""What a feature edit achieved: the features it aimed at, encoded again, and the others that moved with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass
from steersman.sae.feature_labels import named_feature
from steersman.steer.edits import FeatureEdit

CHUNK = 256  # tokens encoded densely at a time: [CHUNK, L] fp32 is 64 MiB for 65,536 latents
MOVED = 1e-6  # a change below this is round-off, not movement


@dataclass(frozen=True, kw_only=True)
class FeatureOutcome:
    """One edited feature at the steered tokens, in raw activation units."""

    feature: int
    """Feature id."""
    strength: float
    """The strength asked for, in raw units, mean over the tokens that asked for it."""
    before: float
    """Mean activation before the edit."""
    achieved: float
    """Mean activation of the edited state, encoded again. It need not be the value asked for."""
    lowest: float
    """Smallest achieved activation."""
    highest: float
    """Largest achieved activation."""
    n_tokens: int
    """Steered tokens in rows that name the feature."""
    label: str = ""
    """What the SAE's labels say of it."""


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """Achieved activations and collateral of a feature edit, at the hook point itself, over the steered tokens."""

    features: list[FeatureOutcome]
    """One entry per edited feature."""
    n_tokens: int
    """Steered tokens that were measured."""
    moved: float
    """Mean number of other features per token whose activation changed."""
    moved_amount: float
    """Mean over tokens of the summed absolute change of those features, in raw activation units."""
    largest: list[tuple[int, float]]
    """The other features that moved most: (id, mean signed change over all steered tokens)."""

    def __str__(self) -> str:
        lines = []
        for o in self.features:
            told = f"{o.before:.3g} -> {o.achieved:.3g} (asked {o.strength:.3g}; {o.n_tokens} tokens)"
            lines.append(f"{named_feature(o.feature, o.label)}: {told}")
        lines.append(f"collateral: {self.moved:.1f} other features moved per token, by {self.moved_amount:.3g} in all")
        return "\n".join(lines)


class Meter:
    """Encodes the steered states before and after an edit and keeps sums, never the states."""

    def __init__(self, edit: FeatureEdit) -> None:
        self.edit = edit
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        n_features = len(self.edit.ids)
        self.n = 0
        self.count = torch.zeros(n_features)
        self.asked, self.before, self.after = (torch.zeros(n_features) for _ in range(3))
        self.low = torch.full((n_features,), torch.inf)
        self.high = torch.full((n_features,), -torch.inf)
        self.moved, self.amount = 0.0, 0.0
        self.change = torch.zeros(self.edit.sae.cfg.d_sae)

    def record(self, h: Tensor, new: Tensor, fwd: ForwardPass, where: Tensor | bool) -> None:
        """Measure the steered tokens of one pass: h and h' [B, S, D]."""
        everywhere = torch.ones(fwd.batch, fwd.length, dtype=torch.bool, device=h.device)
        rows, places = (everywhere if isinstance(where, bool) else where).nonzero(as_tuple=True)
        if not len(rows):
            return
        for part in torch.arange(len(rows), device=rows.device).split(CHUNK) if len(rows) else ():
            r, s = rows[part], places[part]
            self._add(h[r, s].float(), new[r, s].float(), fwd, r)

    def _add(self, x: Tensor, y: Tensor, fwd: ForwardPass, row: Tensor) -> None:
        edit = self.edit
        with torch.no_grad():
            f, g = edit.sae.encode(x), edit.sae.encode(y)
        named = edit.per_token(edit.asked, fwd, row).expand(len(row), -1)
        amount = edit.per_token(edit.amount, fwd, row).expand(len(row), -1)
        here, there = f[:, edit.ids], g[:, edit.ids]
        self.n += len(row)
        self.count += named.sum(0).cpu()
        for total, value in ((self.asked, amount), (self.before, here), (self.after, there)):
            total += (value * named).sum(0).cpu()
        self.low = torch.minimum(self.low, there.masked_fill(~named, torch.inf).amin(0).cpu())
        self.high = torch.maximum(self.high, there.masked_fill(~named, -torch.inf).amax(0).cpu())
        # A feature edited in another row only is collateral in this one.
        change = (g - f).index_put(
            (torch.arange(len(row), device=f.device)[:, None], edit.ids), (there - here) * ~named
        )
        self.change += change.sum(0).cpu()
        self.moved += float((change.abs() > MOVED).sum())
        self.amount += float(change.abs().sum())

    def report(self) -> EditReport:
        """The means over everything recorded. Raises SteersmanError when no token was steered."""
        if self.n == 0:
            raise SteersmanError("no token was steered, so there is nothing to report: check the scope")
        count = self.count.clamp(min=1)
        table = zip(
            self.edit.ids.tolist(),
            (self.asked / count).tolist(),
            (self.before / count).tolist(),
            (self.after / count).tolist(),
            self.low.tolist(),
            self.high.tolist(),
            self.count.tolist(),
        )
        outcomes = [
            FeatureOutcome(
                feature=j,
                strength=s,
                before=b,
                achieved=a,
                lowest=lo,
                highest=hi,
                n_tokens=int(n),
                label=self.edit.sae.labels.text(j),
            )
            for j, s, b, a, lo, hi, n in table
            if n
        ]
        top = self.change.abs().topk(min(5, len(self.change))).indices.tolist()
        largest = [(j, float(self.change[j]) / self.n) for j in top if abs(float(self.change[j])) > MOVED]
        return EditReport(
            features=outcomes,
            n_tokens=self.n,
            moved=self.moved / self.n,
            moved_amount=self.amount / self.n,
            largest=largest,
        )
