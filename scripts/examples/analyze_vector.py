r"""Take a steering vector apart: which features of an SAE it is made of, and whether they do what it does.

    python scripts/examples/analyze_vector.py --vector calm.safetensors --sae runs/demo --model path/to/model \
        --text held_out.txt

loads the vector, decomposes it by matching pursuit (and by the encoder, to see what that would have said), names the
features, and checks that steering with the reconstruction keeps the effect.
"""

import argparse
from pathlib import Path

from steersman import SAE, LanguageModel, SteeringVector, decompose
from steersman.steer import load_labels, measure_retention, plot_decompositions


def main() -> None:
    """Load, decompose, name, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vector", required=True, help="vector file (safetensors or GGUF)")
    parser.add_argument("--sae", required=True, help="SAE folder, file or hub id, of the vector's hook point")
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--text", help="file with a held-out text on each line, for the retention")
    parser.add_argument("--labels", help="JSON with feature names; by default the tokens that each feature promotes")
    parser.add_argument("--features", type=int, default=16, help="features at most")
    parser.add_argument("--scale", type=float, default=1.0, help="multiples of the vector to steer with")
    parser.add_argument("--plot", default="decomposition.png", help="where to draw explained variance")
    args = parser.parse_args()

    lm, sae = LanguageModel.load(args.model), SAE.load(args.sae)
    v = SteeringVector.load(args.vector)
    labels = load_labels(args.labels) if args.labels else None

    pursuit = decompose(v, sae, method="omp", k=args.features, labels=labels, lm=lm)
    encoder = decompose(v, sae, method="encode", k=args.features, labels=labels, lm=lm)
    for found in (pursuit, encoder):
        print(found.to_text(), end="\n\n")
    plot_decompositions({"omp": pursuit, "encode": encoder}, args.plot)
    print(f"explained variance against the number of features: {args.plot}\n")

    if args.text:
        texts = [line.strip() for line in Path(args.text).read_text().splitlines() if line.strip()][:64]
        print(measure_retention(pursuit, lm, texts, scale=args.scale).to_text())


if __name__ == "__main__":
    main()
