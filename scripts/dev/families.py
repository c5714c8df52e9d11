"""Print docs/families.md: what works in each family of the installed transformers that can be built small and random.

python scripts/dev/families.py > docs/families.md    # all
python scripts/dev/families.py --families llama granite    # these alone, on standard error

Every family is built and tried in a process of its own, with a time limit.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from steersman import LanguageModel, Steerer

V, D, LAYERS = 128, 32, 4
SMALL: dict[str, Any] = {
    "vocab_size": V, "vocab_size_per_layer_input": V, "pad_token_id": 3, "mask_token_id": 2,
    "bos_token_id": 0, "eos_token_id": 1,
    "hidden_size": D, "d_model": D, "n_embd": D, "dim": D, "embedding_size": D, "word_embed_proj_dim": D,
    "hidden_size_per_layer_input": 8, "laurel_rank": 8, "lru_width": D, "emb_dim": D, "dim_model": D,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_layers": LAYERS, "num_decoder_layers": LAYERS,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "swa_num_key_value_heads": 2,
    "swa_num_attention_heads": 4, "head_dim": 8, "global_head_dim": 8, "swa_head_dim": 8, "dim_head": 8,
    "attention_head_dim": 8, "kv_channels": 8, "v_head_dim": 8, "swa_v_head_dim": 8, "qk_head_dim": 12,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "rotary_dim": 4,
    "o_lora_rank": 8, "o_groups": 2, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "d_ff": 48, "dim_ff": 48,
    "hidden_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "d_inner": 48, "intermediate_size_mlp": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16, "block_auto_adjust_ff_dim": False,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "num_expert_groups": 1, "zero_expert_num": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_num_shared_experts": 1, "num_zero_experts": 1,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "n_ctx": 64, "sliding_window": 8,
    "window_size": 8, "attention_window": 8, "local_attention": 8, "attention_window_size": 8, "mamba_d_ssm": D,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_d_state": 8,
    "ssm_state_size": 8, "state_size": 8, "mamba_n_groups": 1, "n_groups": 1, "time_step_rank": 4, "mamba_dt_rank": 4,
    "chunk_size": 8, "mamba_chunk_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "conv_dim": D, "block_dim": D, "block_ff_dim": 48,
    "attention_hidden_size": D, "num_kv_shared_layers": 0, "relation_kv_dim": 4, "logits_soft_cap": 30.0,
}  # fmt: skip
ENCODERS = ("bert", "roberta", "electra", "camembert", "xlm-roberta", "big_bird", "rembert", "ernie")
"""Families with decoders and encoders that are encoders by default."""
ALWAYS = ("vocab_size", "pad_token_id", "mask_token_id")
MULTIPLIERS = {"residual_multiplier": 0.22, "scale_depth": 1.4, "mlp_bias": True}
"""Factors at values other than one, where they are part of what a block adds."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to try."""

    families: tuple[str, ...] = ()
    """Model types, such as llama; all where none is named."""
    seconds: float = 60.0
    """Time for each."""
    processes: int = 2
    """How many are tried at once."""


IDS = torch.randint(4, V, (2, 9), generator=torch.Generator().manual_seed(1))


def words() -> Any:
    """A tokenizer of words that every family can read: `<s>` 0, `</s>` 1, `<unk>` 2, `<pad>` 3, w4 ..."""
    ids = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3, **{f"w{i}": i for i in range(4, V)}}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def mapping_of(kind: str) -> Any:
    """The classes that a family's configurations are built with: decoders where there are any, else encoders."""
    encoder = kind in ENCODERS or kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return auto.MODEL_FOR_MASKED_LM_MAPPING if encoder else auto.MODEL_FOR_CAUSAL_LM_MAPPING


def small(config: Any, variant: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration, as small as SMALL says; lists over layers cut to the layers there are."""
    settings: dict[str, Any] = {}
    # names that the class maps to its own (`n_embd` for `hidden_size`) are given by their own
    mapped = dict(getattr(type(config), "attribute_map", {}))
    for name, value in {**SMALL, **MULTIPLIERS, **variant}.items():
        given = name in vars(config) and name not in mapped and value is not None
        if given and (vars(config)[name] is not None or name in ALWAYS):
            settings[name] = value
    if isinstance(getattr(config, "intermediate_size", None), list):
        settings["intermediate_size"] = [48] * LAYERS
    for name, value in vars(config).items():
        if isinstance(value, list) and name not in settings and len(value) == getattr(config, "num_hidden_layers", -1):
            settings[name] = value[-LAYERS:] if len({*map(str, value[-LAYERS:])}) > 1 else value[:LAYERS]
    if "num_experts_per_tok" in vars(config) and "top_k" in vars(config):
        settings["top_k"] = 2
    return settings


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},  # families without groups of heads, and those with latent heads
    {"num_key_value_heads": 4, "head_dim": None},  # and those that derive the width of a head
    {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None},
)
"""Changes to SMALL that are tried in turn; None leaves a setting as the family has it."""


def built(kind: str, mapping: Any) -> Any:
    """A small random model of the family, whose own pass over token ids runs."""
    first: Exception | None = None
    for variant in VARIANTS:
        try:
            model = random_model(kind, mapping, variant)
            with torch.no_grad():
                model(input_ids=IDS)
            return model
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def random_model(kind: str, mapping: Any, variant: dict[str, Any]) -> Any:
    """A model of the family, its weights drawn from one seed."""
    config_class: Any = transformers.CONFIG_MAPPING[kind]  # pyright: ignore[reportArgumentType]
    config = config_class()
    text = config.get_text_config()
    named = next((str(name) for name, value in vars(config).items() if value is text), None)
    if named is not None:
        config = config_class(**{named: {**small(text, variant), "model_type": text.model_type}})
    else:
        settings = small(config, variant)
        if mapping is auto.MODEL_FOR_CAUSAL_LM_MAPPING and "is_decoder" in vars(config):
            settings |= {"is_decoder": True, "is_encoder_decoder": False}
        config = config_class(**settings)
    torch.manual_seed(0)
    model = mapping[type(config)](config)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > 30_000_000:
        raise ValueError(f"{parameters / 1e6:.0f} million parameters with the settings that are known here")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point() and not any(part in name for part in ("A_log", "dt_bias", "a_param")):
                noise = torch.randn(p.shape, generator=generator) * 0.2
                p.copy_(1 + noise if p.ndim == 1 and "norm" in name.lower() and name.endswith("weight") else noise)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 3
    return model.float().eval()


def line(error: BaseException, n: int = 110) -> str:
    """An error in one line of the table."""
    said = " ".join(str(error).split()).replace("|", "/")
    said = said if len(said) <= n else said[: n - 3] + "..."
    return said if type(error).__name__ == "SteersmanError" else f"{type(error).__name__}: {said}"


def tried(kind: str, mapping: Any) -> dict[str, str]:
    """What the family was found to do."""
    try:
        model = built(kind, mapping)
    except Exception as error:
        return {"built": line(error)}
    row = {"built": "yes", "class": type(model).__name__}
    try:
        lm = LanguageModel(model, words(), name=kind)
        row["captured"] = captured(lm)
        row["adds up"] = adds_up(lm)
    except Exception as error:
        return {**row, "captured": f"refused: {line(error)}"}
    for what, check in {"steered": steered, "generated": generated}.items():
        try:
            row[what] = check(lm)
        except Exception as error:
            row[what] = ("refused: " if type(error).__name__ == "SteersmanError" else "") + line(error)
    return row


KINDS = (
    "resid_pre",
    "attn_in",
    "attn_mask",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_post",
    "mlp_out",
    "resid_post",
)


def captured(lm: LanguageModel) -> str:
    """The kinds of hook point that some block has, each read once with its shape."""
    names = lm.hook_names()
    lm.hook_point("blocks.1.hook_resid_post")  # refused where it holds no states
    states = [name for name in names if lm.hook_point(name).holds_states]
    got = lm.capture(IDS, hooks=states)
    assert all(h.shape == (2, 9, lm.hook_width(name)) for name, h in got.items())
    has = {kind: [name for name in names if name.endswith((f"hook_{kind}", f"_{kind}"))] for kind in KINDS}
    has["mlp_post"] = [name for name in names if name.endswith("mlp.hook_post")]
    if all(len(found) == lm.n_layers for found in has.values()):
        return "all"
    some = [f"{kind} ({len(found)} of {lm.n_layers})" for kind, found in has.items() if 0 < len(found) < lm.n_layers]
    none = [kind for kind, found in has.items() if not found]
    return "; ".join(part for part in ("no " + ", ".join(none) if none else "", ", ".join(some)) if part)


def adds_up(lm: LanguageModel) -> str:
    """Whether resid_pre + attn_out + mlp_out = resid_post, and in how many blocks."""
    right, offered, factors = 0, 0, set()
    for layer in range(lm.n_layers):
        hooks = [f"blocks.{layer}.hook_{kind}" for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        if not {*hooks} <= {*lm.hook_names()}:
            continue
        offered += 1
        pre, attn, mlp, post = lm.capture(IDS, hooks=hooks).values()
        factors |= {lm.hook_point(hook).factor for hook in hooks[1:3]} - {1.0}
        right += bool((pre + attn + mlp - post).norm() < 1e-4 * post.norm())
    if right == 0:
        return "normalised sums" if offered == lm.n_layers else "not offered"
    times = "".join(f", x {factor:.3g}" for factor in sorted(factors))
    return ("yes" if right == lm.n_layers else f"{right} of {lm.n_layers} blocks") + times


def steered(lm: LanguageModel) -> str:
    """An edit of one token changes what follows (and, in a decoder, nothing before it); scale 0 changes no bit."""
    hook = f"blocks.{lm.n_layers // 2 - 1}.hook_resid_post"
    push = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(2))

    def at_four(h: Tensor, fwd: Any) -> Tensor:
        return h + push * (fwd.positions == 4)[..., None]

    head = "logits" in lm.hook_names()
    last = f"blocks.{lm.n_layers - 1}.hook_resid_post"

    def read() -> Tensor:
        return lm.logits(IDS) if head else lm.capture(IDS, hooks=[last])[last]

    clean = read()
    with lm.edit(hook, at_four):
        changed = (read() - clean).abs().amax(-1) > 1e-4
    with Steerer(lm).vector(push, hook=hook, scale=0.0, include_bos=True):
        same = torch.equal(read(), clean)
    faults = []
    if not changed[:, 5:].any():
        faults.append("the edit does not reach later tokens")
    if lm.can_generate and changed[:, :4].any():
        faults.append("the edit changes earlier tokens")
    if not same:
        faults.append("scale 0 changes bits")
    return "; ".join(faults) or "yes"


def generated(lm: LanguageModel) -> str:
    """Steered generation with the cache and without it, and of a left-padded batch and of its rows alone."""
    if not lm.can_generate:
        return "an encoder"
    hook = f"blocks.{lm.n_layers // 2 - 1}.hook_resid_post"
    push = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(2))
    prompts = ["w5 w6 w7 w8 w9", "w10 w11"]

    def run(texts: list[str], **options: Any) -> list[list[int]]:
        with Steerer(lm).vector(push, hook=hook, scale=0.5, scope="generation"):
            out = lm.generate(texts, max_new_tokens=6, eos_token_id=None, **options)
        return out.new_tokens.tolist()

    faults = []
    alone = [run([prompt])[0] for prompt in prompts]
    for what, other in {
        "without the cache": lambda: [run([prompt], use_cache=False)[0] for prompt in prompts],
        "in a padded batch": lambda: run(prompts),
    }.items():
        try:
            if other() != alone:
                faults.append(f"other text {what}")
        except Exception as error:
            faults.append(f"{what}: {line(error, 80)}")
    return "; ".join(faults) or "yes"


def start(kind: str, mapping: Any, folder: str) -> int:
    """`tried`, in a child that leaves its answer in `folder`; returns the child's id."""
    child = os.fork()
    if child == 0:
        try:
            Path(folder, kind).write_text(json.dumps(tried(kind, mapping)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return child


def all_tried(kinds: list[str], config: Config) -> dict[str, dict[str, str]]:
    """The row of each of `kinds`, several at once."""
    waiting, running, rows = list(kinds), {}, {}
    tried("llama", mapping_of("llama"))  # imports once what every child would
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < config.processes:
                kind = waiting.pop(0)
                running[kind] = start(kind, mapping_of(kind), folder), time.monotonic() + config.seconds
            for kind, (child, until) in list(running.items()):
                ended, answer = os.waitpid(child, os.WNOHANG) != (0, 0), Path(folder, kind)
                if not ended and time.monotonic() < until:
                    continue
                if not ended:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                rows[kind] = {"built": "the process died" if ended else f"not done in {config.seconds:g} s"}
                if ended and answer.exists():
                    rows[kind] = json.loads(answer.read_text())
                del running[kind]
                print(kind, rows[kind], file=sys.stderr, flush=True)
            time.sleep(0.02)
    return rows


HEAD = """\
# Families

What works in each family of transformers {version} that can be built small and with random weights. Written by
`scripts/dev/families.py`, which builds each, wraps it in a `LanguageModel` and tries it; nothing here is typed.

- **captured**: the kinds of hook point that its blocks have, each read as `[batch, tokens, width]`. "all" are
  `resid_pre`, `attn_in`, `attn_mask`, `z`, `attn_out`, `resid_mid`, `mlp_in`, `mlp_post`, `mlp_out` and `resid_post`.
- **adds up**: `resid_pre + attn_out + mlp_out = resid_post`, and the factor that the block multiplies with, if any.
  "normalised sums" are of blocks that normalise what they added up: `attn_out` and `mlp_out` are what is added before.
- **steered**: an edit of one token changes the logits of later ones and of none before it, and scale 0 changes no bit.
- **generated**: steered greedy text with the cache equals that without, and of a padded batch that of its rows alone.
"""


def table_row(kind: str, row: dict[str, str]) -> str:
    """A family's line of the table."""
    cells = [row.get(name, "") for name in ("class", "captured", "adds up", "steered", "generated")]
    return f"| {kind} | " + " | ".join(cells) + " |"


def page(rows: dict[str, dict[str, str]]) -> Iterator[str]:
    yield HEAD.format(version=transformers.__version__)
    done = {kind: row for kind, row in rows.items() if row["built"] == "yes"}
    yield f"{len(done)} families:\n"
    yield "| family | class | captured | adds up | steered | generated |"
    yield "|---|---|---|---|---|---|"
    for kind, row in sorted(done.items()):
        yield table_row(kind, row)
    yield f"\n## Not built\n\n{len(rows) - len(done)} that the script's settings do not build:\n"
    yield "| family | why |"
    yield "|---|---|"
    for kind, row in sorted(rows.items()):
        if kind not in done:
            yield f"| {kind} | {row['built']} |"


def main(config: Config) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("steersman").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    kinds = config.families or sorted(
        {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    )
    rows = all_tried(list(kinds), config)
    if not config.families:
        print("\n".join(page(rows)))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
