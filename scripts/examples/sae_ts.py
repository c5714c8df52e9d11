"""SAE-Targeted Steering from start to end: measure effects, fit the map, make a vector for a feature, check it.

    python scripts/examples/sae_ts.py --sae runs/demo --out effects --feature 12
    torchrun --nproc-per-node 2 scripts/examples/sae_ts.py --sae runs/demo --out effects --feature 12  # shared out

Without --model the bundled one is used and held-out text comes from its grammar. The first run measures (and resumes
when interrupted), later ones take the measured effects from the folder. The vector is then compared
with the feature's own decoder row, at the same rise in loss: what each does to the feature, and to all others.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from steersman import SAE, LanguageModel, Steerer, SteeringVector, collect_effects
from steersman.demo import MODEL_PATH, texts
from steersman.parallel import rank_and_world_size
from steersman.steer import EffectsConfig
from steersman.text import open_text


@dataclass(frozen=True, kw_only=True)
class Config:
    sae: str
    """SAE folder, such as `steersman train` or `steersman quickstart` leaves one."""
    out: str = "effects"
    """Folder for the effects, the map and the vector."""
    feature: int | None = None
    """Feature to raise; the one with the clearest signal in the map if not given."""
    model: str | None = None
    """Model folder or hub id; the bundled model if not given."""
    text: str | None = None
    """Held-out text: file, folder or dataset id. Needed with --model."""
    vectors: int = 2048
    """Vectors to measure: 8 or more for each dimension of the residual stream."""
    rollouts: int = 32
    """Texts sampled for each. Many vectors with few texts make a better map than few with many."""
    prompt: str = "Once upon a time"
    """Prompt for the sample texts."""
    device: str = "auto"
    """Where to run."""


def main(args: Config) -> None:
    """Measure, fit, solve, verify, write."""
    lm = LanguageModel.load(args.model or str(MODEL_PATH), device=args.device)
    sae = SAE.load(args.sae, lm.device)
    if args.model is not None and args.text is None:
        raise SystemExit("--model needs --text: held-out text for the scales")
    heldout = texts(16, seed=3) if args.text is None else list(islice(open_text(args.text).documents(0), 16))

    config = EffectsConfig(out=args.out, vectors="pairs", n_vectors=args.vectors, rollouts=args.rollouts)
    effects = collect_effects(lm, sae, heldout, config)
    if rank_and_world_size()[0]:
        return  # the other ranks have measured their part
    print(effects.to_text())

    effect_map = effects.fit()
    effect_map.save(Path(args.out) / "map.safetensors")
    print(effect_map.to_text())

    feature = int(effect_map.signal.argmax()) if args.feature is None else args.feature
    targeted = effect_map.solve({feature: 1.0})
    targeted.save(Path(args.out) / f"feature_{feature}.safetensors")
    plain = SteeringVector.of(
        sae.W_dec[feature].detach(), hook_name=effect_map.hook_name, model_name=lm.name, method="decoder_row"
    )
    for name, vector in (("SAE-TS", targeted), ("decoder row", plain)):
        found = effect_map.verify(lm, sae, vector, {feature: 1.0}, texts=heldout, rollouts=512)
        print(f"\n{name} for feature {feature}, cosine to its decoder row {vector.cosine(plain):+.3f}")
        print(found.to_text())
        with Steerer(lm).vector(vector.normalized(), scale=found.scale):
            print("text: " + lm.generate(args.prompt, max_new_tokens=32, seed=0).texts[0])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
