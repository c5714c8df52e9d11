"""Activations of conversations: written out by the model's template, which the store records."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.chat_toys import chat_model, talk

from steersman import LanguageModel, cache_activations, stream_activations
from steersman.errors import SteersmanError
from steersman.text import read_documents, read_texts

HOOK = "blocks.1.hook_resid_post"
TALKS = [talk("w1 w2", "w3", system="w0"), talk("w4", "w5 w6"), talk("w7")]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return chat_model("llama3")


def cached(lm: LanguageModel, texts: Any, out: Path, **settings: Any) -> tuple[list[int], dict[str, Any]]:
    """The tokens of a store's rows, and what its manifest says of its making."""
    how = {"packing": False, "exclude_bos": False, "activation_dtype": "float32", "tokens": None, **settings}
    store = cache_activations(lm, texts, hook=HOOK, out=str(out), **how)
    ids = [int(token) for token in store.tokens(0, store.n_rows).token_ids]
    return ids, json.loads((out / "manifest.json").read_text())["config"]


def expected(lm: LanguageModel, talks: Any, **settings: Any) -> list[int]:
    batch = lm.encode_chat(talks, **settings)
    return batch.input_ids[batch.attention_mask.bool()].tolist()


def test_conversations_from_lists_and_files_give_the_same_rows(
    lm: LanguageModel, tmp_path: Path, no_progress: None
) -> None:
    want = expected(lm, TALKS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    pq.write_table(pa.table({"messages": TALKS, "n": [1, 2, 3]}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"chat": talk}) + "\n" for talk in TALKS))
    for number, (source, how) in enumerate(
        [(TALKS, {}), (str(tmp_path / "a.jsonl"), {}), (str(tmp_path / "b.parquet"), {}),
         (str(tmp_path / "c.jsonl"), {"text_column": "chat"})]
    ):  # fmt: skip
        ids, config = cached(lm, source, tmp_path / str(number), **how)
        assert ids == want, source
        assert config["chat_template"] == lm.template_digest
        assert "system" not in config


def test_texts_as_messages(lm: LanguageModel, tmp_path: Path, no_progress: None) -> None:
    ids, config = cached(lm, ["w1 w2", "w3"], tmp_path / "a", chat=True)
    assert ids == expected(lm, ["w1 w2", "w3"])
    assert config["chat_template"] == lm.template_digest
    ids, config = cached(lm, ["w1 w2", "w3"], tmp_path / "b", system="w0")
    assert ids == expected(lm, ["w1 w2", "w3"], system="w0")
    assert config["system"] == "w0"
    _, config = cached(lm, ["w1 w2", "w3"], tmp_path / "c")
    assert "chat_template" not in config
    with pytest.raises(SteersmanError, match=r"holds a store of another configuration: .*system"):
        cached(lm, ["w1 w2", "w3"], tmp_path / "b", system="w9")


def test_another_template_is_another_store(tmp_path: Path, no_progress: None) -> None:
    lm = chat_model("llama3")
    cached(lm, TALKS, tmp_path / "a")
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace("<|eot|> ", "<|eot|> w9 ")
    with pytest.raises(SteersmanError, match="chat_template"):
        cached(lm, TALKS, tmp_path / "a")


def test_a_stream_reads_the_same_text(lm: LanguageModel, no_progress: None) -> None:
    many = [talk(f"w{i % 20} w{i % 7}", "w3") for i in range(60)]
    how: dict[str, Any] = {"hook": HOOK, "context_length": 16, "heldout_rows": 8, "buffer_rows": 64}
    stream = stream_activations(lm, many, **how)
    texts = [lm.chat_template.render(given) for given in many]
    plain = stream_activations(lm, texts, **how)
    assert stream.contents()["text"] == plain.contents()["text"]
    assert stream.contents()["settings"] != plain.contents()["settings"]  # the template is part of them
    assert stream.fingerprint != plain.fingerprint
    first, other = next(iter(stream.batches(32))), next(iter(plain.batches(32)))
    assert torch.equal(first.x, other.x)


def test_what_cannot_be_written(lm: LanguageModel, tmp_path: Path, no_progress: None) -> None:
    bare = chat_model("llama3")
    bare.tokenizer.chat_template = None
    with pytest.raises(SteersmanError, match=r"document 0 is a conversation, and the tokenizer has no chat template"):
        cached(bare, TALKS, tmp_path / "a")
    with pytest.raises(SteersmanError, match="has no chat template"):
        cached(bare, ["w1"], tmp_path / "b", chat=True)
    gemma = chat_model("gemma")
    bad = [talk("w1"), [{"role": "user", "content": "w1"}] * 2]
    with pytest.raises(SteersmanError, match=r"document 1: the chat template refuses .*must alternate.*on_bad_text"):
        cached(gemma, bad, tmp_path / "c")
    ids, _ = cached(gemma, bad, tmp_path / "d", on_bad_text="skip")
    assert ids == expected(gemma, bad[:1])
    with pytest.raises(SteersmanError, match="has a system message of its own"):
        cached(lm, TALKS, tmp_path / "e", system="w9")


def test_documents_are_texts_or_conversations(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"text": "w1"}\n{"messages": [{"role": "user", "content": "w2"}]}\n')
    assert read_documents(file) == ["w1", [{"role": "user", "content": "w2"}]]
    with pytest.raises(SteersmanError, match=r"line 2: 'messages' is a conversation"):
        read_texts(file)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("roles", [("assistant",), ("user", "system"), ("last_user",)])
def test_only_the_rows_of_the_roles_asked_for_are_stored(
    lm: LanguageModel, tmp_path: Path, no_progress: None, packing: bool, roles: tuple[str, ...]
) -> None:
    talks = [*TALKS, talk("w1", "w2 w3", "w4", "w5")]
    how: dict[str, Any] = {"packing": packing, "context_length": 12}
    every, _ = cached(lm, talks, tmp_path / "all", **how)
    ids, config = cached(lm, talks, tmp_path / "some", roles=roles, **how)
    want = []
    for one in talks:  # whose each token is, as `encode_chat` says; one a row is cut at the length of a context
        batch = lm.encode_chat(one)
        mask = torch.stack([batch.mask(role)[0] for role in roles]).any(0)
        want += batch.input_ids[0, : None if packing else 12][mask[: None if packing else 12]].tolist()
    assert ids == want
    assert len(ids) < len(every)
    assert config["roles"] == "+".join(sorted(roles))
    whole, some = (cache_activations(out=str(tmp_path / name), lm=lm, texts=talks, hook=HOOK, tokens=None,
                                     exclude_bos=False, activation_dtype="float32", roles=given, **how)
                   for name, given in (("all", ()), ("some", roles)))  # fmt: skip
    info, kept = whole.tokens(0, whole.n_rows), some.tokens(0, some.n_rows)
    places = {(int(d), int(p)): i for i, (d, p) in enumerate(zip(info.doc_ids, info.positions))}
    if not packing:  # the rows are those of whole conversations: the others' tokens were read
        rows = torch.tensor([places[int(d), int(p)] for d, p in zip(kept.doc_ids, kept.positions)])
        torch.testing.assert_close(some.activations(torch.arange(some.n_rows)), whole.activations(rows))


def test_roles_that_cannot_be(lm: LanguageModel, tmp_path: Path, no_progress: None) -> None:
    for roles, message in [
        (("asistant",), r"roles: 'asistant' is none of assistant, user, system, thinking, last_user or role:NAME"),
        (("turn:0",), "roles: 'turn:0' is none of"),
        (("thinking",), "has no markers of thinking"),
    ]:
        with pytest.raises(SteersmanError, match=message):
            cached(lm, TALKS, tmp_path / "a", roles=roles)
    with pytest.raises(SteersmanError, match=r"document 1 is plain text, which has no roles"):
        cached(lm, [TALKS[0], "w1 w2"], tmp_path / "b", roles=("assistant",))
    ids, _ = cached(lm, ["w1 w2", TALKS[1]], tmp_path / "c", roles=("assistant",), on_bad_text="skip")
    assert ids == [
        i for i, role in zip(*(expected(lm, TALKS[1:2]), lm.encode_chat(TALKS[1]).roles[0])) if role == "assistant"
    ]
