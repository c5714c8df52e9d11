r"""Steer a model by one feature of an SAE, from the feature's id to text and to what the steering cost.

Shows what to copy: load a model and an SAE, steer by a feature in a batch of strengths, see what that did to the
feature and the others, and make it a vector that costs a known amount.

    python scripts/examples/steer_by_feature.py --sae runs/demo --feature 12
    python scripts/examples/steer_by_feature.py --model google/gemma-2-2b --sae runs/gemma --feature 1234 \
        --prompt "I think"
"""

import argparse

from steersman import SAE, LanguageModel, Steerer, SteeringVector
from steersman.demo import MODEL_PATH


def main() -> None:
    """Steer, print the texts, and calibrate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_PATH), help="model folder or hub id (default: the bundled model)")
    parser.add_argument("--sae", required=True, help="SAE folder or file")
    parser.add_argument("--feature", type=int, required=True)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--strength", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5], help="x largest activation")
    parser.add_argument("--target-kl", type=float, default=0.3, help="nats per token that the vector may cost")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="save the calibrated vector here (.safetensors or .gguf)")
    args = parser.parse_args()

    lm = LanguageModel.load(args.model)
    sae = SAE.load(args.sae, lm.device)
    st = Steerer(lm)

    # Each row of the batch has a strength of its own: a dose-response curve in one call.
    rows = [{args.feature: strength} for strength in args.strength]
    units = "max_act" if sae.feature_stats is not None else "raw"
    with st.features(sae, rows, mode="add", units=units, scope="generation"):
        made = lm.generate([args.prompt] * len(rows), max_new_tokens=args.new_tokens, do_sample=True, seed=args.seed)
    for strength, text in zip(args.strength, made.texts):
        print(f"{strength:>5g} {units}  {text}")

    # What did the edit do to the feature itself, and to the others?
    strongest = {args.feature: args.strength[-1]}
    print(st.measure(sae, strongest, made.texts[0], units=units))

    # The same direction as a vector, scaled to what it may cost, and kept.
    v = SteeringVector.of_feature(sae, args.feature).calibrate(st, target_kl=args.target_kl)
    record = v.metadata["calibration"]
    print(f"{v!r}: KL {record['value']:.3f} nats per token after {len(record['evaluations'])} evaluations")
    with st.vector(v):
        print(lm.generate(args.prompt, max_new_tokens=args.new_tokens, do_sample=True, seed=args.seed).texts[0])
    if args.out:
        v.save(args.out)


if __name__ == "__main__":
    main()
