"""What chat scopes steer in a ChatML model, held to the template's own tokens, and what they cost.

    python scripts/bench/chat.py --model path/to/SmolLM2-135M-Instruct

For every scope: a plain pass steers the tokens that a reading of the markers says, left- and right-padded; generation
steers the same with a KV cache and without, in a batch and row by row, and gives the same replies.
"""

import argparse
import json
import time

import torch

from steersman import LanguageModel, Steerer
from steersman.device import pick_device

TALKS = [
    [{"role": "user", "content": "Name a colour."}],
    [
        {"role": "system", "content": "  You answer in one word. "},
        {"role": "user", "content": "What is the capital of France?\n\nThink first: naïve café 日本."},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And of Spain?"},
    ],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi! How can I help you today?"},
        {"role": "user", "content": "Tell me a joke about <|im_end|> tokens. It may be long: " + "well, " * 20},
    ],
]
SCOPES = ("assistant", "user", "system", "last_user", "turn:1", "turn:-1", "user+last_prompt")


def by_markers(lm: LanguageModel, messages: list[dict[str, str]]) -> list[tuple[str, int]]:
    """(role, turn) of each token, by reading the lengths of the messages written one at a time."""
    known, given = [], [m["content"] for m in messages]
    if messages[0]["role"] != "system":
        ids = lm.encode_chat(messages[:1], add_generation_prompt=False).input_ids[0].tolist()
        own = len(lm.token_ids(f"<|im_start|>user\n{given[0]}<|im_end|>\n"))
        known += [("system", -1)] * (len(ids) - own)
    for turn, message in enumerate(messages):
        written = f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
        known += [(message["role"], turn)] * len(lm.token_ids(written))
    return known + [("assistant", len(messages))] * len(lm.token_ids("<|im_start|>assistant\n"))


def expected(known: list[tuple[str, int]], scope: str, n: int) -> set[int]:
    """The positions of a scope, the BOS at 0 left alone."""
    if "+" in scope:
        return set.union(*(expected(known, part, n) for part in scope.split("+")))
    if scope == "last_prompt":
        return {len(known) - 1}
    if scope == "last_user":
        scope = f"turn:{max(turn for role, turn in known if role == 'user')}"
    if scope.startswith("turn:"):
        turn = int(scope[5:])
        found = {p for p, (_, t) in enumerate(known) if t == (turn if turn >= 0 else n + 1 + turn)}
    else:
        found = {p for p, (role, _) in enumerate(known) if role == scope}
    return found - {0}


def main() -> None:
    """Print what was compared, and tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    torch.manual_seed(0)
    lm = LanguageModel.load(args.model, device=pick_device("auto"), dtype="float32")
    v = torch.randn(lm.d_model) * 2
    steerer = Steerer(lm)

    def positions(steering, rows: int) -> list[set[int]]:
        return [{p for row, p in steering.trace.pairs() if row == i} for i in range(rows)]

    known = [by_markers(lm, messages) for messages in TALKS]
    for scope in SCOPES:
        want = [expected(k, scope, len(messages)) for k, messages in zip(known, TALKS)]
        for side in ("left", "right"):
            batch = lm.encode_chat(TALKS, padding_side=side)
            assert batch.lengths.tolist() == [len(k) for k in known]
            with steerer.vector(v, hook=args.layer, scope=scope) as steering:
                lm.logits(batch)
            assert positions(steering, 3) == want, (scope, side)
        found, texts = [], []
        for options in ({}, {"use_cache": False}):
            with steerer.vector(v, hook=args.layer, scope=scope) as steering:
                made = lm.chat(TALKS, max_new_tokens=args.tokens, eos_token_id=None, **options)
            found.append(positions(steering, 3))
            texts.append(made.new_tokens.tolist())
        rows = []
        for messages in TALKS:
            with steerer.vector(v, hook=args.layer, scope=scope) as steering:
                alone = lm.chat(messages, max_new_tokens=args.tokens, eos_token_id=None)
            rows.append((positions(steering, 1)[0], alone.new_tokens[0].tolist()))
        assert found[0] == found[1] == [where for where, _ in rows], scope
        assert texts[0] == texts[1] == [tokens for _, tokens in rows], scope
        print(f"{scope:18} {[len(w) for w in want]} prompt tokens, {[len(f) for f in found[0]]} with the replies")
    speed = {}
    for name, scope in (("plain", None), ("all", "all"), ("assistant", "assistant"), ("last_user", "last_user")):
        best = 0.0
        for _ in range(3):
            start = time.perf_counter()
            if scope is None:
                lm.chat(TALKS, max_new_tokens=64, eos_token_id=None)
            else:
                with steerer.vector(v, hook=args.layer, scope=scope):
                    lm.chat(TALKS, max_new_tokens=64, eos_token_id=None)
            best = max(best, 3 * 64 / (time.perf_counter() - start))
        speed[name] = round(best, 1)
    start = time.perf_counter()
    n = sum(1 for _ in lm.stream(lm.encode_chat(TALKS, padding_side="left"), max_new_tokens=64, eos_token_id=None))
    speed["stream"] = round(n / (time.perf_counter() - start), 1)
    print(json.dumps({"model": lm.name, "device": str(lm.device), "tokens_per_second": speed}))


if __name__ == "__main__":
    main()
