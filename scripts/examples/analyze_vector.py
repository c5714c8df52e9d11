r"""Take a steering vector apart: which features of an SAE it is made of, and whether they do what it does.

    python scripts/examples/analyze_vector.py --vector calm.safetensors --sae runs/demo --model path/to/model \
        --text held_out.txt

loads the vector, decomposes it by matching pursuit (and by the encoder, to see what that would have said), names the
features, and checks that steering with the reconstruction keeps the effect.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from steersman import SAE, LanguageModel, SteeringVector, decompose
from steersman.steer import measure_retention, plot_decompositions, read_labels


@dataclass(frozen=True, kw_only=True)
class Config:
    vector: str
    """Vector file (safetensors or GGUF)."""
    sae: str
    """SAE folder, file or hub id, of the vector's hook point."""
    model: str
    """Model folder or hub id."""
    text: Path | None = None
    """File with a held-out text on each line, for the retention."""
    labels: str | None = None
    """JSON with feature names; by default the tokens that each feature promotes."""
    features: int = 16
    """Features at most."""
    scale: float = 1.0
    """Multiples of the vector to steer with."""
    plot: str = "decomposition.png"
    """Where to draw explained variance."""


def main(args: Config) -> None:
    """Load, decompose, name, check."""
    lm, sae = LanguageModel.load(args.model), SAE.load(args.sae)
    v = SteeringVector.load(args.vector)
    labels = read_labels(args.labels) if args.labels else None

    pursuit = decompose(v, sae, method="omp", k=args.features, labels=labels, lm=lm)
    encoder = decompose(v, sae, method="encode", k=args.features, labels=labels, lm=lm)
    for found in (pursuit, encoder):
        print(found.to_text(), end="\n\n")
    plot_decompositions({"omp": pursuit, "encode": encoder}).savefig(args.plot, dpi=110)
    print(f"explained variance against the number of features: {args.plot}\n")

    if args.text:
        texts = [line.strip() for line in args.text.read_text().splitlines() if line.strip()][:64]
        print(measure_retention(pursuit, lm, texts, scale=args.scale).to_text())


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
