"""What fires on a text: the active features of each token, and of the text, for people and programs.

Shape letters: S tokens of a text, K active features a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.terminal import PALETTE, Painted, highlighted
from steersman.visible import visible

__all__ = ["Activations", "FeatureValue", "TextActivations", "TopFeature", "token_texts"]

Units = Literal["raw", "max_act"]
"""What values are in: activations as they are, or shares of each feature's largest in training."""
_UNITS = {"raw": "raw activations", "max_act": "shares of each feature's largest activation in training"}
_LONGEST = 8  # tokens of one character


@dataclass(frozen=True, kw_only=True)
class FeatureValue:
    """A feature active on a token."""

    feature: int
    """Feature id."""
    value: float
    """Its activation there."""
    label: str
    """Its label; empty where it has none."""


@dataclass(frozen=True, kw_only=True)
class TopFeature:
    """A feature active in a text."""

    feature: int
    """Feature id."""
    value: float
    """Its largest activation in the text (largest in size, where activations have signs)."""
    n_tokens: int
    """Tokens on which it is active."""
    position: int
    """Position of the token with that activation."""
    token: str
    """That token."""
    label: str
    """Its label; empty where it has none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextActivations:
    """The active features of one text's tokens. What is not counted (padding is never there, a BOS only if asked for)
    has tokens and codes, and no features."""

    tokens: list[str]
    """S tokens as the text they add; of a character made of several tokens the last has all of it."""
    token_ids: list[int]
    """Their ids."""
    counted: Tensor
    """[S] bool: tokens whose features count."""
    values: Tensor
    """[S, K] fp32 on the CPU, in `units`; 0 for entries that are not active or not counted."""
    indices: Tensor
    """[S, K] int64: the features' ids."""
    hook_name: str
    """Where they were read."""
    units: Units = "raw"
    """What values are in."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """Labels of the features that occur and have one."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        n = len(self.indices[self.values != 0].unique())
        return f"TextActivations({len(self)} tokens, {n} features at {self.hook_name})"

    @property
    def text(self) -> str:
        """The text: all tokens together."""
        return "".join(self.tokens)

    def label(self, feature: int) -> str:
        """A feature's label, empty where it has none."""
        return self.labels.get(feature, "")

    def of(self, feature: int) -> Tensor:
        """The activations [S] of one feature."""
        return torch.where(self.indices == feature, self.values, 0.0).sum(dim=1)

    def per_token(self, n: int = 5) -> list[list[FeatureValue]]:
        """The `n` strongest features of each token, strongest first."""
        order = self.values.abs().argsort(dim=1, descending=True, stable=True)[:, : max(n, 0)]
        rows = zip(self.values.gather(1, order).tolist(), self.indices.gather(1, order).tolist())
        return [
            [
                FeatureValue(feature=feature, value=value, label=self.label(feature))
                for value, feature in zip(values, features)
                if value
            ]
            for values, features in rows
        ]

    def top(self, n: int = 10) -> list[TopFeature]:
        """The `n` features with the largest activations in the text, largest first."""
        rows, columns = self.values.nonzero(as_tuple=True)
        values, features = self.values[rows, columns], self.indices[rows, columns]
        counts = dict(zip(*(part.tolist() for part in features.unique(return_counts=True))))
        found: dict[int, TopFeature] = {}
        for i in values.abs().argsort(descending=True, stable=True).tolist():
            if len(found) >= n:
                break
            feature, position = int(features[i]), int(rows[i])
            if feature not in found:
                found[feature] = TopFeature(
                    feature=feature, value=float(values[i]), n_tokens=counts[feature], position=position,
                    token=self.tokens[position], label=self.label(feature),
                )  # fmt: skip
        return list(found.values())

    def to_json(self, n_token: int = 5, n_text: int = 10) -> dict[str, Any]:
        """Plain values: the text, its strongest features, and each token with its own."""
        tokens = zip(self.tokens, self.token_ids, self.counted.tolist(), self.per_token(n_token))
        return {
            "text": self.text,
            "hook_name": self.hook_name,
            "units": self.units,
            "features": [asdict(found) for found in self.top(n_text)],
            "tokens": [
                {"token": token, "id": token_id, "counted": counted, "features": [asdict(one) for one in features]}
                for token, token_id, counted, features in tokens
            ],
        }

    def to_text(self, n_token: int = 3, n_text: int = 10, *, colour: bool = False) -> str:
        """For a terminal: the strongest features, the text, and each token's features (none with `n_token` 0). With
        `colour` each of the first features has its own, on the tokens where it is the strongest of them."""
        strongest = self.top(n_text)
        hues = {found.feature: i for i, found in enumerate(strongest[: len(PALETTE)])} if colour else {}
        width = max([7, *(len(str(found.feature)) for found in strongest)])
        lines = [f"{'feature':>{width}}  {'largest':>9}  {'tokens':>6}  on"] if strongest else ["no feature is active"]
        for found in strongest:
            number = f"{found.feature:>{width}}"
            number = highlighted(number, hues[found.feature]) if found.feature in hues else number
            where = _quoted(found.token)
            label = f"   {visible(found.label)}" if found.label else ""
            lines.append(f"{number}  {found.value:>9.3g}  {found.n_tokens:>6}  {where}{label}")
        lines += ["", "".join(self._painted(hues)), ""]
        per_token = self.per_token(n_token) if n_token > 0 else []
        column = min(24, max([len(_quoted(token)) for token in self.tokens], default=0))
        for token, features in zip(self.tokens, per_token):
            shown = "   ".join(map(_described, features))
            lines.append(f"{_quoted(token):<{column}}  {shown}".rstrip())
        return Painted("\n".join(lines).rstrip("\n"))

    def _painted(self, hues: Mapping[int, int]) -> Iterator[str]:
        """The tokens, each coloured as the strongest of the features of `hues` on it."""
        shares = torch.stack([self.of(feature).abs() for feature in hues]) if hues else torch.zeros(1, len(self))
        best = shares.max(dim=0)
        order = list(hues.values())
        for token, value, which in zip(self.tokens, best.values.tolist(), best.indices.tolist()):
            text = visible(token, newline="\n")
            yield highlighted(text, order[which]) if value and text.strip("\n") else text

    def _repr_html_(self) -> str:
        """For a notebook: see `Activations`."""
        return Activations([self])._repr_html_()


class Activations(Sequence[TextActivations]):
    """The active features of several texts, one entry each, as `LanguageModel.activations` reads them.

    In a notebook each text is shown with its tokens coloured by their strongest feature, which hovering names.
    """

    def __init__(self, texts: Sequence[TextActivations]) -> None:
        self._texts = list(texts)

    @overload
    def __getitem__(self, index: int) -> TextActivations: ...
    @overload
    def __getitem__(self, index: slice) -> "Activations": ...
    def __getitem__(self, index: int | slice) -> "TextActivations | Activations":
        return Activations(self._texts[index]) if isinstance(index, slice) else self._texts[index]

    def __len__(self) -> int:
        return len(self._texts)

    def __repr__(self) -> str:
        hook = f" at {self._texts[0].hook_name}" if self._texts else ""
        return f"Activations({len(self)} texts, {sum(map(len, self)):,} tokens{hook})"

    def top(self, n: int = 10) -> list[TopFeature]:
        """The `n` features with the largest activations in any of the texts; each as it is in the text where it is
        strongest, with the tokens of all texts."""
        counts: dict[int, int] = {}
        best: dict[int, TopFeature] = {}
        for text in self._texts:
            for found in text.top(text.values.numel()):
                counts[found.feature] = counts.get(found.feature, 0) + found.n_tokens
                if found.feature not in best or abs(found.value) > abs(best[found.feature].value):
                    best[found.feature] = found
        strongest = sorted(best.values(), key=lambda found: -abs(found.value))[: max(n, 0)]
        return [TopFeature(**{**asdict(found), "n_tokens": counts[found.feature]}) for found in strongest]

    def to_json(self, n_token: int = 5, n_text: int = 10) -> list[dict[str, Any]]:
        """`TextActivations.to_json` of each."""
        return [text.to_json(n_token, n_text) for text in self._texts]

    def to_text(self, n_token: int = 3, n_text: int = 10, *, colour: bool = False) -> str:
        """`TextActivations.to_text` of each, with a line between."""
        shown = [text.to_text(n_token, n_text, colour=colour) for text in self._texts]
        heads = [f"text {i} of {len(shown)}\n" if len(shown) > 1 else "" for i in range(1, len(shown) + 1)]
        return Painted("\n\n".join(head + text for head, text in zip(heads, shown)))

    def _repr_html_(self, n_text: int = 10) -> str:
        from steersman.html import fragment

        return fragment("activations.html", texts=[_shown(text, i, n_text) for i, text in enumerate(self._texts, 1)])


def _shown(text: TextActivations, number: int, n: int) -> dict[str, Any]:
    """What the template shows of a text, the `number`th."""
    from steersman.html import Token

    strongest, per_token = text.top(n), text.per_token(5)
    overall = [
        Token(token, features[0].value if features else 0.0, "\n".join(map(_described, features)))
        for token, features in zip(text.tokens, per_token)
    ]
    return {
        "about": f"{len(text)} tokens at {text.hook_name}; {_UNITS[text.units]}",
        "caption": f"strongest features of text {number}",
        "tokens": overall,
        "largest": max((abs(token.value) for token in overall), default=0.0),
        "header": ["feature", *(["label"] if text.labels else []), "largest", "tokens", "on"],
        "top": [
            [str(one.feature), *([one.label] if text.labels else []), one.value, one.n_tokens, _quoted(one.token)]
            for one in strongest
        ],
        "features": [
            (
                f"feature {found.feature}" + (f": {found.label}" if found.label else ""),
                [Token(token, value) for token, value in zip(text.tokens, text.of(found.feature).tolist())],
                abs(found.value),
            )
            for found in strongest
        ],
    }


def _described(found: FeatureValue) -> str:
    label = f" {visible(found.label)}" if found.label else ""
    return f"{found.feature}:{found.value:.3g}{label}"


def _quoted(token: str) -> str:
    return f"'{visible(token)}'"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it, so that all together are the text. A character that several
    tokens make stands at the last of them, and the others are empty."""

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), clean_up_tokenization_spaces=False))

    found: list[str] = []
    start = shown = 0  # ids[start:shown] are there already, and say whether a word has a space before it
    for end in range(1, len(ids) + 1):
        now = decode(ids[start:end])
        if now.endswith("\ufffd") and end < len(ids) and end - shown < _LONGEST:
            found.append("")
            continue
        before = decode(ids[start:shown])
        found.append(now[len(before) :] if now.startswith(before) else decode(ids[shown:end]))
        start, shown = shown, end
    return found


def labels_of(sae: Any, features: Sequence[int]) -> dict[int, str]:
    """The labels of those features that have one, of an SAE that has labels."""
    labels = getattr(sae, "labels", None)
    found = {} if not labels else {feature: labels.text(feature) for feature in features}
    return {feature: text for feature, text in found.items() if text}


def factors_of(sae: Any, units: Units, max_density: float | None) -> Tensor | None:
    """[L] what values are multiplied by to be in `units`, 0 for features that are left out; None where they are as they
    are.

    Raises SteersmanError for unknown units, a density that is none, and an SAE without the statistics that are needed.
    """
    if units not in get_args(Units):
        raise SteersmanError(f"activations are in units {' or '.join(get_args(Units))}, not {units!r}")
    if max_density is not None and not 0 < max_density <= 1:
        raise SteersmanError(f"max_density is a share of tokens, above 0 and at most 1, not {max_density}")
    if units == "raw" and max_density is None:
        return None
    stats = getattr(sae, "feature_stats", None)
    if stats is None:
        raise SteersmanError(
            "units max_act and max_density need the SAE's statistics: run `steersman features` on it first"
        )
    largest, density = stats.max_act.cpu(), stats.density.cpu()
    factors = torch.where(largest > 0, 1 / largest, 0.0) if units == "max_act" else torch.ones_like(largest)
    return factors if max_density is None else torch.where(density > max_density, 0.0, factors)
