"""Train the bundled demo model: its tokenizer, then a Llama-style model of about a million parameters, on our stories.

    python scripts/dev/train_demo_model.py --out steersman/demo/steersman-demo

Everything follows from the seed: the stories come from the grammar in `steersman.demo`, so there is nothing to
download. Takes about 20 minutes on two CPU cores. Prints the loss on fresh stories beside the grammar's entropy, which
no model can beat on average, and the fraction of sampled sentences that the grammar allows.
"""

import json
import math
import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steersman.demo import CONCEPT_OF_WORD, Story, stories, story, texts
from steersman.demo.measure import sample_report, story_loss

TRAIN_SEED, FRESH_SEED = 1, 2
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The bundled model and how it is trained."""

    out: Path = Path("runs/demo-model")
    """Folder to write the model and tokenizer to."""
    vocab_size: int = 1728
    """Tokens of the byte-level BPE; enough for every concept word to be one token."""
    width: int = 128
    """Width of the residual stream."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads per block."""
    mlp_width: int = 384
    """Width of the gated MLP."""
    context: int = 256
    """Tokens per packed row: stories one after the other, each with BOS and EOS."""
    batch: int = 8
    """Packed rows per step; a batch of single stories has about as many tokens."""
    single_only: float = 0.5
    """Fraction of the steps in which every row is one story. What a word refers to is quickest to find where there is
    only one story; afterwards every other batch is packed, as activations are usually cached."""
    steps: int = 3000
    """Optimiser steps."""
    lr: float = 4e-3
    """Peak learning rate of AdamW, for the embedding and the norms' gains."""
    matrix_lr: float = 0.02
    """Peak learning rate of Muon, for the matrices of the blocks."""
    warmup: int = 50
    """Steps of warm-up."""
    weight_decay: float = 0.1
    """Decay of the embedding: it removes what tells interchangeable words apart."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    """Seed of the initial weights."""
    report_every: int = 250
    """Steps between printed losses."""


def train_tokenizer(vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which any text has an encoding and a decoding; adds BOS, not EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Each concept word is shown often enough to become one token, however rare it is in the stories.
    often = [f" {word}" for word in CONCEPT_OF_WORD] * 500
    bpe.train_from_iterator(chain(texts(12_000, TRAIN_SEED), often), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encoded(source: Iterator[Story], tokenizer: PreTrainedTokenizerFast, n: int) -> list[list[int]]:
    """The next `n` stories as token ids, each with BOS and EOS."""
    rows = tokenizer([tale.text for tale in islice(source, n)])["input_ids"]
    return [[*row, tokenizer.vocab[EOS]] for row in rows]


def single_rows(
    source: Iterator[Story], tokenizer: PreTrainedTokenizerFast, batch_tokens: int
) -> Iterator[torch.Tensor]:
    """Endless batches of one story a row, rows of similar length together, padded at the end."""
    order = random.Random(TRAIN_SEED)
    pad = tokenizer.vocab[PAD]
    while True:
        rows = sorted(encoded(source, tokenizer, 1024), key=len)
        size = max(1, batch_tokens // len(rows[len(rows) // 2]))
        groups = [rows[at : at + size] for at in range(0, len(rows), size)]
        order.shuffle(groups)
        for group in groups:
            yield torch.tensor([row + [pad] * (len(group[-1]) - len(row)) for row in group])


def packed_rows(
    source: Iterator[Story], tokenizer: PreTrainedTokenizerFast, batch: int, context: int
) -> Iterator[torch.Tensor]:
    """Endless batches [batch, context] of stories one after the other, cut wherever a row ends."""
    held: list[int] = []
    while True:
        while len(held) < batch * context:
            held += [token for row in encoded(source, tokenizer, 256) for token in row]
        yield torch.tensor(held[: batch * context]).view(batch, context)
        del held[: batch * context]


class Muon(torch.optim.Optimizer):
    """Momentum whose step on every matrix is made orthogonal (Jordan et al. 2024, "Muon"), with decoupled decay.

    In fp32, unlike `torch.optim.Muon`, because bf16 products are slow on most CPUs. It needs less than half of
    AdamW's steps here: looking back to an earlier word is what a small model learns last.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]))
                scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values pushed towards 1, by five Newton-Schulz steps."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def rate(step: int, config: Config) -> float:
    """The fraction of the peak learning rate at a step: linear warm-up, then a cosine to a hundredth."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def train(config: Config, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The trained model, in fp32."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.vocab[BOS],
            eos_token_id=tokenizer.vocab[EOS],
            pad_token_id=tokenizer.vocab[PAD],
        )
    )
    table = model.model.embed_tokens.weight
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizers = [
        torch.optim.AdamW([table], lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay),
        torch.optim.AdamW(gains, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0),
        Muon([p for p in model.parameters() if p.ndim == 2 and p is not table], lr=config.matrix_lr),
    ]
    schedules = [LambdaLR(optimizer, lambda step: rate(step, config)) for optimizer in optimizers]
    fresh = [story(FRESH_SEED, index) for index in range(64)]
    began, tokens = time.monotonic(), 0
    source = stories(TRAIN_SEED)
    single = single_rows(source, tokenizer, config.batch * config.context)
    packed = packed_rows(source, tokenizer, config.batch, config.context)
    for step in range(config.steps):
        rows = next(packed if step >= config.single_only * config.steps and step % 2 else single)
        labels = rows.masked_fill(rows == tokenizer.vocab[PAD], -100)
        loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        tokens += rows.numel()
        if (step + 1) % config.report_every == 0 or step + 1 == config.steps:
            report = story_loss(model, tokenizer, fresh)
            speed = tokens / (time.monotonic() - began)
            print(
                f"step {step + 1}/{config.steps}  train {loss.item():.4f}  fresh {report.loss:.4f}"
                f"  entropy {report.entropy:.4f}  {speed:,.0f} tokens/s",
                flush=True,
            )
    return model.eval()


def main(config: Config) -> None:
    """Train, save in bf16, load what was saved and report on that."""
    torch.set_num_threads(config.threads)
    print(json.dumps(asdict(config), default=str))
    tokenizer = train_tokenizer(config.vocab_size, config.context)
    split = [word for word in CONCEPT_OF_WORD if len(tokenizer.tokenize(" " + word)) > 1]
    print(f"{len(CONCEPT_OF_WORD) - len(split)} of {len(CONCEPT_OF_WORD)} concept words are one token; split: {split}")
    model = train(config, tokenizer)
    config.out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    # Without its indentation the tokenizer's JSON is half the size.
    path = config.out / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf8")), ensure_ascii=False, separators=(",", ":")), "utf8")

    saved = AutoModelForCausalLM.from_pretrained(config.out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    report = story_loss(saved, tokenizer, [story(FRESH_SEED, index) for index in range(1000)])
    print(
        f"loss {report.loss:.4f} nats/token on {report.tokens:,} tokens of fresh stories, entropy of the grammar on"
        f" them {report.entropy:.4f}: {report.loss - report.entropy:.4f} above"
    )
    samples = sample_report(saved, tokenizer, n=256)
    print(
        f"samples: {samples.sentences:.1%} of sentences are the grammar's, {samples.sentences_in_place:.1%} in their"
        f" place; {samples.stories:.1%} are whole stories"
    )
    print("\n".join(samples.texts[:3]))
    size = sum(file.stat().st_size for file in config.out.iterdir())
    print(f"{sum(p.numel() for p in saved.parameters()):,} parameters, {size / 1e6:.2f} MB in {config.out}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(tyro.cli(Config, description=__doc__))
