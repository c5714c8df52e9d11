"""Tiny models that chat: templates in the shape of those of the families, on a tokenizer of words."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from steersman.lm import LanguageModel

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|> system Be helpful <|im_end|> ' }}{% endif %}"
    "{{ '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
"""Of SmolLM2: the BOS is the turn's token, and a system prompt is added where none is given."""
LLAMA3 = (
    "{% for m in messages %}"
    "{% set written = '<|header|> ' + m.role + ' <|end_header|> ' + m.content | trim + ' <|eot|> ' %}"
    "{% if loop.first %}{% set written = bos_token + ' ' + written %}{% endif %}{{ written }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|> assistant <|end_header|> ' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token + ' ' }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + ' ' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}"
    "{% endif %}{{ '<start_of_turn> ' + ('model' if m.role == 'assistant' else m.role) + ' ' + "
    "(first if loop.first else '') + m.content | trim + ' <end_of_turn> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn> model ' }}{% endif %}"
)
GEMMA2 = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{{ bos_token + ' ' }}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{% if loop.last and system is defined %}{{ '[INST] ' + system + ' ' + m.content + "
    "' [/INST] ' }}{% else %}{{ '[INST] ' + m.content + ' [/INST] ' }}{% endif %}"
    "{% else %}{{ m.content | trim + ' ' + eos_token + ' ' }}{% endif %}{% endfor %}"
)
"""The system message is written before the last user's."""
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].strip() %}{% endif %}{% endif %}"
    "{{ '<|im_start|> ' + m.role + ' ' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think> ' + thought + ' </think> ' }}{% endif %}{{ content + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% if enable_thinking is defined and not "
    "enable_thinking %}{{ '<think> </think> ' }}{% endif %}{% endif %}"
)
"""Thinking is written after the last message of a user only."""
ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m.role + '|> ' + m.content + ' ' + eos_token }}\n{% if loop.last and "
    "add_generation_prompt %}\n{{ '<|assistant|> ' }}\n{% endif %}\n{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "qwen3": QWEN3, "zephyr": ZEPHYR,
}  # fmt: skip
MARKS = (
    "<|im_start|>", "<|im_end|>", "<|header|>", "<|end_header|>", "<|eot|>", "<start_of_turn>", "<end_of_turn>",
    "[INST]", "[/INST]", "<think>", "</think>", "<|user|>", "<|assistant|>", "<|system|>",
)  # fmt: skip
WORDS = ("system", "user", "assistant", "model", "Be", "helpful", *(f"w{i}" for i in range(30)))


def chat_tokenizer(template: str, bos: str | None = "<s>") -> Any:
    """A tokenizer of words whose markers are tokens of their own."""
    names = ["<s>", "</s>", "<unk>", "<pad>", *MARKS, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if bos is not None:
        special["bos_token"] = bos
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = template
    return made


def chat_model(template: str = "chatml", **special: Any) -> LanguageModel:
    """A random Llama of three blocks that chats with a template of `TEMPLATES`, or one given."""
    source = TEMPLATES.get(template, template)
    tokenizer = chat_tokenizer(source, **({"bos": "<|im_start|>"} if template == "chatml" else {}) | special)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=128, eos_token_id=1, pad_token_id=3, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # default initialisation leaves the sublayers near zero, where nothing shows
            p.copy_(torch.randn_like(p) * 0.3)
    model.generation_config.eos_token_id = 1
    return LanguageModel(model, tokenizer, name=f"toy {template}" if template in TEMPLATES else "toy")


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation: of the user and the assistant in turn."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return before + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
