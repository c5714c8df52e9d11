"""What chat scopes steer in a ChatML model, held to the template's own tokens, and what they cost.

    python scripts/bench/chat.py --model path/to/SmolLM2-135M-Instruct

For every scope: a plain pass steers the tokens that a reading of the markers says, left- and right-padded; generation
steers the same with a KV cache and without, in a batch and row by row, and gives the same replies.
"""

import json
import time
from dataclasses import dataclass

import torch
import tyro

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


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    """Folder of a model with a ChatML template, such as SmolLM2-135M-Instruct."""
    layer: int = 12
    """Layer to steer at."""
    tokens: int = 24
    """Tokens of each reply."""


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


def main(args: Config) -> None:
    """Print what was compared, and tokens per second."""
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
        for use_cache in (True, False):
            with steerer.vector(v, hook=args.layer, scope=scope) as steering:
                made = lm.chat(TALKS, max_new_tokens=args.tokens, eos_token_id=None, use_cache=use_cache)
            found.append(positions(steering, 3))
            texts.append(made.new_tokens.tolist())
        rows = []
        for messages in TALKS:
            with steerer.vector(v, hook=args.layer, scope=scope) as steering:
                alone = lm.chat(messages, max_new_tokens=args.tokens, eos_token_id=None)
            rows.append((positions(steering, 1)[0], alone.new_tokens[0].tolist()))
        assert found[0] == found[1] == [where for where, _ in rows], scope
        assert texts[0] == texts[1] == [tokens for _, tokens in rows], scope
        counts = [[len(positions) for positions in part] for part in (want, found[0])]
        print(f"{scope:18} {counts[0]} prompt tokens, {counts[1]} with the replies")
    speed = {}
    for name, scope in (("plain", None), ("all", "all"), ("assistant", "assistant"), ("last_user", "last_user")):
        best = 0.0
        for _ in range(3):
            start = time.perf_counter()
            if scope is None:
                lm.chat(TALKS, max_new_tokens=args.tokens, eos_token_id=None)
            else:
                with steerer.vector(v, hook=args.layer, scope=scope):
                    lm.chat(TALKS, max_new_tokens=args.tokens, eos_token_id=None)
            best = max(best, 3 * args.tokens / (time.perf_counter() - start))
        speed[name] = round(best, 1)
    start = time.perf_counter()
    n = sum(
        1 for _ in lm.stream(lm.encode_chat(TALKS, padding_side="left"), max_new_tokens=args.tokens, eos_token_id=None)
    )
    speed["stream"] = round(n / (time.perf_counter() - start), 1)
    print(json.dumps({"model": lm.name, "device": str(lm.device), "tokens_per_second": speed}))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
