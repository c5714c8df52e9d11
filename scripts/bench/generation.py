"""Generation with an edit against generation without: tokens per second, side by side.

Runs every variant in turn, round after round, so that a busy machine slows all of them alike, and prints each variant's
median rate and its ratio to the unsteered run of the same round. The ratio of what makes k passes for each token
(mixtures of k streams, KL-controlled strength) is to a kth of the unsteered rate.

    python scripts/bench/generation.py --model path/to/model --batch 8 --new-tokens 100
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from steersman import SAE, LanguageModel, SAEConfig, Steerer
from steersman.demo import MODEL_PATH
from steersman.lm import Generation
from steersman.steer import Condition, Feature, KLControl, Mix, MixSource, TokenGate, VectorEdit

PROMPT = "Once upon a time"


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str = str(MODEL_PATH)
    """Model folder or hub id; the bundled model if not given."""
    sae: str | None = None
    """SAE folder; without it a random one of --d-sae and --k."""
    d_sae: int = 1024
    """Features of the random SAE."""
    k: int = 16
    """Its active features a token."""
    batch: int = 8
    """Texts generated together."""
    new_tokens: int = 100
    """Tokens of each."""
    rounds: int = 9
    """Timed rounds, after one that is not."""
    scope: str = "all"
    """Where the edits apply."""
    only: tuple[str, ...] = ()
    """Variants to run beside the unsteered one: those whose names hold one of these; all if not given."""
    cpu_time: bool = False
    """Measure the process's own time instead of the wall's: for one thread of a machine that others use too."""
    device: str = "auto"
    """Where to run."""
    threads: int | None = None
    """CPU threads; torch's own number if not given."""


def variants(lm: LanguageModel, sae: SAE, hook: str, batch: int, scope: str) -> dict[str, Callable[[], Any]]:
    """A fresh context for each thing to compare."""
    st, v = Steerer(lm), torch.randn(lm.d_model, device=lm.device)
    rows = [{(7 * i) % sae.cfg.d_sae: 1.0} for i in range(batch)]
    found: dict[str, Callable[[], Any]] = {"unsteered": nullcontext}
    found["vector"] = lambda: st.vector(v, hook=hook, scope=scope)
    found["vector per row"] = lambda: st.vector(v.expand(batch, -1), scale=[0.5] * batch, hook=hook, scope=scope)
    for mode in ("add", "clamp", "floor", "scale", "project_out"):
        # 0.5 is no mode's neutral strength: every edit does its work
        found[mode] = lambda mode=mode: st.features(sae, {3: 0.5, 11: 0.5}, mode=mode, scope=scope)
    u = torch.randn(lm.d_model, device=lm.device)
    early = f"blocks.{max(0, lm.hook_layer(hook) - 1)}.hook_resid_post"
    directions: dict[str, dict[str, Any]] = {
        "set": {"rule": "set", "value": 1.0},
        "cap": {"rule": "cap", "value": 0.5},
        "mirror": {"rule": "mirror", "value": 1.0, "threshold": 0.5},
        "keep_norm": {"value": 0.05, "keep_norm": True},
        "opposed": {"value": 0.05, "keep_norm": "opposed"},
        "rotate": {"rule": "rotate", "write": u, "value": 30.0},
        "per row": {"rule": "set", "value": [0.5] * batch},
        "token gate": {"rule": "set", "gate": TokenGate(u)},
        "feature gate": {"gate": TokenGate(Feature(sae, 3))},
        "condition": {"rule": "set", "gate": Condition(early, u, -1e6)},
        "second pass": {"rule": "set", "gate": Condition(early, u, -1e6, prompt="second_pass")},
        "schedule": {"schedule": "diminishing:50"},
    }
    for name, given in directions.items():
        found[f"direction: {name}"] = lambda given=given: st.direction(hook, read=v, scope=scope, **given)
    found["add per row"] = lambda: st.features(sae, rows, scope=scope)
    found["clamp per row"] = lambda: st.features(sae, rows, mode="clamp", scope=scope)
    found["attention bias"] = lambda: st.highlight([PROMPT] * batch, ["upon"] * batch)
    return found


def several_streams(lm: LanguageModel, batch: int, n: int) -> dict[str, tuple[int, Callable[[], Generation]]]:
    """What makes several passes for each token: how many, and a run of it."""
    prompts, others = [PROMPT] * batch, ["One day there was"] * batch
    st, v = Steerer(lm), 0.1 * torch.randn(lm.d_model, device=lm.device)
    steered = MixSource(steering=st.vector(v, hook=lm.n_layers // 2))
    mixtures = {
        "mixture of 1": Mix([(1.0, MixSource())]),
        "mixture of 2": Mix.guidance(others),
        "mixture of 3": Mix.steer(steered, others),
    }
    control = KLControl(properties=[{lm.resolve_hook(lm.n_layers // 2): VectorEdit(v)}])
    found: dict[str, tuple[int, Callable[[], Generation]]] = {
        name: (len(mix.sources), lambda mix=mix: mix.generate(lm, prompts, max_new_tokens=n))
        for name, mix in mixtures.items()
    }
    found["KL control"] = (3, lambda: control.generate(lm, prompts, max_new_tokens=n).generation)
    return found


def main(args: Config) -> None:
    """Measure and print the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    lm = LanguageModel.load(args.model, device=args.device)
    hook = f"blocks.{lm.n_layers // 2}.hook_resid_post"
    if args.sae:
        sae = SAE.load(args.sae, device=lm.device)
        hook = sae.cfg.hook_name or hook
    else:
        sae = SAE(SAEConfig(d_in=lm.d_model, d_sae=args.d_sae, k=args.k, architecture="topk", hook_name=hook))
        sae = sae.to(lm.device)
    prompts = [PROMPT] * args.batch
    clock = time.process_time if args.cpu_time else time.perf_counter

    def generate(make: Callable[[], AbstractContextManager[object]]) -> Callable[[], Generation]:
        def run() -> Generation:
            with make():
                return lm.generate(prompts, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens)

        return run

    runs = {name: (1, generate(make)) for name, make in variants(lm, sae, hook, args.batch, args.scope).items()}
    runs |= several_streams(lm, args.batch, args.new_tokens)
    wanted = ("unsteered", *args.only) if args.only else ("",)
    runs = {name: run for name, run in runs.items() if any(part in name for part in wanted)}

    rates: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(args.rounds + 1):
        for name, (_, run) in runs.items():
            start = clock()
            out = run()
            out.tokens.sum().item()  # waits for the device
            rate = out.new_tokens.numel() / (clock() - start)
            if round_number:  # the first round warms up
                rates[name].append(rate)
    print(
        f"{lm.name} on {lm.device} ({lm.dtype}), d_sae {sae.cfg.d_sae}, k {sae.cfg.k}, batch {args.batch}, "
        f"{args.new_tokens} new tokens, scope {args.scope}, {args.rounds} rounds, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    print(f"{'variant':<24} {'tokens/s':>10} {'ratio':>7} {'lowest':>7} {'highest':>8}")
    for name, found in rates.items():
        ratios = [runs[name][0] * a / b for a, b in zip(found, rates["unsteered"])]
        print(
            f"{name:<24} {statistics.median(found):>10.0f} {statistics.median(ratios):>7.3f} "
            f"{min(ratios):>7.3f} {max(ratios):>8.3f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
