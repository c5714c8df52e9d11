"""`steersman vector sweep`."""

from dataclasses import asdict, dataclass

from steersman.commands.options import ComputeOptions, PrintOptions, examples_of, hook_points, on_kernels
from steersman.config import part_of
from steersman.conversations import ChatOptions
from steersman.errors import SteersmanError
from steersman.steer import LayerSweepConfig, sweep_layers
from steersman.steer.methods import read_examples
from steersman.steer.methods.examples import as_chats
from steersman.text import read_documents


@dataclass(frozen=True, kw_only=True)
class VectorSweepCommand(LayerSweepConfig, ChatOptions, ComputeOptions, PrintOptions):
    """Find the layer at which a vector method steers best: every layer at equal KL, on held-out items, beside random
    vectors and permuted labels. One half of the items chooses, the other reports."""

    model: str
    """Folder or hub id of the model."""
    out: str
    """JSON file of every figure; written as it goes, and the same command goes on from it."""
    hook: tuple[str, ...] = ()
    """Hook points to sweep; by default the output of every block."""
    layer: tuple[int, ...] = ()
    """Layers in place of hook points: the state after each, counted from 0; -1 is the last."""
    data: str | None = None
    """JSONL file of examples: positive and negative (with or without prompt), or text and label."""
    positive: str | None = None
    """File of positive texts, one per line (or .jsonl with text)."""
    negative: str | None = None
    """File of negative texts."""
    items: str | None = None
    """JSONL file of held-out pairs (prompt, positive, negative); without it every second pair of the examples is held
    out."""
    text: str | None = None
    """File of texts to measure the KL on; without it the model writes its own."""
    documents: int = 32
    """Documents of the text, at most."""
    vector: str | None = None
    """Also write the chosen vector here, scaled to the largest budget that was met."""


@on_kernels
def run(config: VectorSweepCommand) -> None:
    """`steersman vector sweep`."""
    examples = examples_of(config.data, config.positive, config.negative, config)
    if examples is None:
        raise SteersmanError("a sweep needs examples: give --data, or --positive and --negative")
    items = []
    if config.items is not None:
        pairs = as_chats(read_examples(config.items), config)
        pairs.check_pairs("--items")
        items = [(p.prompt, p.answer, n.answer) for p, n in zip(pairs.positive, pairs.negative)]
    texts = None if config.text is None else read_documents(config.text, config.documents, config)
    hooks = hook_points(config.hook, config.layer, config.model, config.revision)
    found = sweep_layers(
        config.load_model(config.model), examples.positive, examples.negative, items=items, hooks=hooks or None,
        texts=texts, out=config.out, config=part_of(LayerSweepConfig, config),
    )  # fmt: skip
    effects = [
        {"hook": hook, "budget": budget, "kl": found.cell(hook, budget).kl, **asdict(found.effect(hook, budget))}
        for hook in found.hooks
        for budget in config.budgets
    ]
    config.show(found.to_text, {"choices": list(map(asdict, found.choices.values())), "effects": effects})
    if config.vector is not None:
        found.vector().save(config.vector)
        config.note(f"the chosen vector is written to {config.vector}")
    config.note(f"written to {config.out}")
