r"""Steer a model by one feature of an SAE, from the feature's id to text and to what the steering cost.

Shows what to copy: load a model and an SAE, steer by a feature in a batch of strengths, see what that did to the
feature and the others, and make it a vector that costs a known amount.

    python scripts/examples/steer_by_feature.py --sae runs/demo --feature 12
    python scripts/examples/steer_by_feature.py --model google/gemma-2-2b --sae runs/gemma --feature 1234 \
        --prompt "I think"
"""

from dataclasses import dataclass

import tyro

from steersman import SAE, LanguageModel, Steerer, SteeringVector
from steersman.demo import MODEL_PATH


@dataclass(frozen=True, kw_only=True)
class Config:
    sae: str
    """SAE folder or file."""
    feature: int
    """Feature to steer by."""
    model: str = str(MODEL_PATH)
    """Model folder or hub id; the bundled model if not given."""
    prompt: str = "Once upon a time"
    """Text to continue."""
    strength: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)
    """Strengths, in multiples of the feature's largest activation; one text for each."""
    target_kl: float = 0.3
    """Nats per token that the vector may cost."""
    new_tokens: int = 40
    """Tokens of each text."""
    seed: int = 0
    """Seed of the sampling."""
    out: str | None = None
    """Save the calibrated vector here (.safetensors or .gguf)."""


def main(args: Config) -> None:
    """Steer, print the texts, and calibrate."""
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
    main(tyro.cli(Config, description=__doc__))
