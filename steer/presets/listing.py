"""Everything by which a model can be steered or a vector be made or taken apart, from the registries themselves."""

from dataclasses import dataclass

from steersman.steer.decompose.base import METHODS as DECOMPOSITIONS
from steersman.steer.methods.affine import AFFINE_METHODS
from steersman.steer.methods.base import METHODS
from steersman.steer.presets.base import PRESETS
from steersman.steer.scores.base import NEEDS, SCORES
from steersman.steer.training.edit_method import EDIT_METHODS

TESTED = "held to planted answers in the tests"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One way, as `steersman methods` lists it."""

    kind: str
    """vector, edit, affine, score, decomposition or preset."""
    name: str
    """What the library calls it."""
    source: str
    """Paper and code."""
    what: str
    """What it is, or the mechanism that a preset is a setting of."""
    needs: str
    """What it cannot do without."""
    certainty: str
    """How surely its formula and values were checked."""
    not_covered: str = ""
    """What of a published system is not here."""


def listing() -> list[Listed]:
    """All of them, kind by kind."""
    found = []
    for name, method in METHODS.items():
        needs = "positive and negative examples" if method.needs_negative else "positive examples"
        found.append(_listed("vector", name, method, needs))
    for name, edit in EDIT_METHODS.items():
        found.append(_listed("edit", name, edit, "examples of prompts and answers"))
    for name, affine in AFFINE_METHODS.items():
        found.append(_listed("affine", name, affine, "texts of a source and a target class"))
    for name, score in SCORES.items():
        needs = ", ".join(["an SAE", *(NEEDS[need] for need in score.needs)])
        found.append(_listed("score", name, score, needs))
    for name, decomposition in DECOMPOSITIONS.items():
        given = {"vector", "sae"} - ({"vector"} if decomposition.makes_vector else set())
        needs = ", ".join(["an SAE", *(["a vector"] if "vector" in given else []), *decomposition.reads])
        found.append(_listed("decomposition", name, decomposition, needs))
    for name, one in PRESETS.items():
        needs = ", ".join(f"{argument}: {need.what}" for argument, need in one.needs.items())
        found.append(
            Listed(
                kind="preset",
                name=name,
                source=one.source,
                what=f"{one.title}: {one.mechanism}",
                needs=needs or ("nothing" if one.available else "cannot be built"),
                certainty=one.certainty,
                not_covered=one.not_covered,
            )
        )
    return found


def _listed(kind: str, name: str, part: type, needs: str) -> Listed:
    what = (part.__doc__ or part.__name__).strip().splitlines()[0].rstrip(".")
    source = getattr(part, "source", "") or "says no source"
    certainty = TESTED if part.__module__.startswith("steersman.") else f"from outside: {part.__module__}"
    return Listed(kind=kind, name=name, source=source, what=what, needs=needs, certainty=certainty)


def markdown() -> str:
    """The presets as a table: system, source, mechanism, what it makes, how it was checked, what is not covered."""
    lines = ["| preset | system | mechanism | needs | checked | not covered |", "|---|---|---|---|---|---|"]
    for name, one in PRESETS.items():
        cells = [
            f"`{name}`", f"{one.title} ({one.source})", one.mechanism, ", ".join(f"`{need}`" for need in one.needs),
            one.certainty, one.not_covered,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
