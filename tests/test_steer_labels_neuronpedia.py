"""Neuronpedia's explanations: what its export holds is read, and what is written is read again as it was."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.label_server import planted_examples

from steersman.errors import SteersmanError
from steersman.sae import SAE, FeatureLabel, FeatureLabels, SAEConfig
from steersman.steer import FeatureExamples, read_labels, read_neuronpedia, write_dashboards, write_neuronpedia
from steersman.steer.scores import OutputTokens

CFG = SAEConfig(d_in=4, d_sae=8, k=2, hook_name="blocks.6.hook_resid_pre", model_name="gpt2")
ROW = {"id": "c1", "modelId": "gpt2-small", "layer": "6-res-jb", "index": "3", "authorId": "a",
       "description": " words about\nweather", "embedding": "[0.1,0.2]", "typeName": "oai_token-act-pair",
       "explanationModelName": "gpt-4o-mini", "umap_x": 0.0}  # fmt: skip
LABELS = FeatureLabels({
    3: FeatureLabel(text="<b>weather 👩‍🚀 שלום</b>", source="contexts+vocab", scores={"agreement": 0.5}),
    5: FeatureLabel(text="the sea", source="neuronpedia:oai_token-act-pair/gpt-4o-mini"),
    6: FeatureLabel(text="by hand"),
})  # fmt: skip


def write(path: Path, *rows: Any) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["export.jsonl", "export.jsonl.gz", "list.json", "explanations/batch-0.jsonl.gz"])
def test_an_export_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    second = ROW | {"index": 3, "description": "another", "explanationModelName": None}
    if name == "list.json":
        path.write_text(json.dumps([ROW, second]))
    else:
        write(path, ROW, second)
    read = read_neuronpedia(tmp_path if "batch" in name else path, CFG)
    assert dict(read) == {
        3: FeatureLabel(text="words about weather", source="neuronpedia:oai_token-act-pair/gpt-4o-mini")
    }
    assert read.about["d_sae"] == 8


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "folder"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    write_neuronpedia(LABELS, tmp_path / name, model_id="gpt2-small", source_id="6-res-jb")
    assert read_neuronpedia(tmp_path / name, CFG) == LABELS
    file = tmp_path / name / "explanations" / "batch-0.jsonl.gz" if name == "folder" else tmp_path / name
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    assert [row["index"] for row in rows] == ["3", "5", "6"], "the site's column is text"
    assert rows[1]["typeName"] == "oai_token-act-pair"
    assert rows[1]["explanationModelName"] == "gpt-4o-mini"
    assert rows[0]["typeName"] is None, "the site knows no such method"
    assert len({row["id"] for row in rows}) == 3


@pytest.mark.parametrize(
    ("change", "cfg", "words"),
    [({"index": "8"}, CFG, "feature 8, and the SAE has features 0 to 7"),
     ({"layer": "7-res-jb"}, CFG, "explains layer 7"),
     ({}, replace(CFG, metadata={"neuronpedia_id": "gpt2-small/6-att-kk"}), "this SAE is gpt2-small/6-att-kk"),
     ({"index": "-1"}, CFG, "line 1: index is '-1'"),
     ({"description": None}, CFG, "line 1: a row needs")],
)  # fmt: skip
def test_an_export_of_something_else_is_refused(
    tmp_path: Path, change: dict[str, Any], cfg: SAEConfig, words: str
) -> None:
    with pytest.raises(SteersmanError, match=words):
        read_neuronpedia(write(tmp_path / "e.jsonl", ROW | change), cfg)


@pytest.mark.parametrize("content", [b"", b"{", b"3\n", b"[1]", b'"x"\n', b"\xff\n", b"[" * 100_000])
def test_what_is_no_export_is_one_error(tmp_path: Path, content: bytes) -> None:
    for name, data in (("e.jsonl", content), ("e.jsonl.gz", gzip.compress(content)), ("cut.jsonl.gz", content)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SteersmanError, match=name):
            read_neuronpedia(tmp_path / name)


def test_features_are_written_for_dashboards(tmp_path: Path) -> None:
    sae, examples = SAE(replace(CFG, d_sae=300)), {j: planted_examples(j, 4) for j in range(299)}
    examples[299] = FeatureExamples(active=[], inactive=[])
    tokens = [OutputTokens(feature=j, raised=(" mist", ""), raised_by=(2.0, 1.0), lowered=(" dry",), lowered_by=(-1.0,))
              for j in range(300)]  # fmt: skip
    write_dashboards(tmp_path, sae, examples, tokens, LABELS, model_id="GPT2-small", source_id="6-res-jb")
    files = [json.loads((tmp_path / "dashboards" / f"batch-{n}.json").read_text()) for n in range(3)]
    assert [len(file["features"]) for file in files] == [128, 128, 44]
    assert (files[0]["model_id"], files[0]["layer"], files[0]["sae_set"]) == ("GPT2-small", 6, "res-jb")
    first = files[0]["features"][0]
    assert first["feature_index"] == 0
    strongest = first["activations"][0]
    assert strongest["tokens"][strongest["qualifying_token_index"]] == " fog0"
    assert strongest["values"][strongest["qualifying_token_index"]] == strongest["bin_max"] == 9.0
    uploads = [json.loads((tmp_path / "upload" / f"batch-{n}.json").read_text()) for n in range(3)]
    assert uploads[0]["modelId"] == "gpt2-small"
    assert sum(len(file["features"]) for file in uploads) == 299, "the site takes no feature without a text"
    third = uploads[0]["features"][3]
    assert third["explanations"] == [{"text": LABELS.text(3)}]
    assert third["topLogits"] == [{"token": " mist", "value": 2.0}]
    assert len(third["activations"]) == 4


def test_sources_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="line 2: a row of gpt2-small/7-res-jb"):
        read_neuronpedia(write(tmp_path / "e.jsonl", ROW, ROW | {"layer": "7-res-jb"}))


def test_every_kind_of_file_gives_labels(tmp_path: Path) -> None:
    LABELS.of(CFG).save(tmp_path / "labels.jsonl")
    assert read_labels(tmp_path / "labels.jsonl", CFG) == LABELS
    assert read_labels(write(tmp_path / "e.jsonl.gz", ROW), CFG).text(3) == "words about weather"
    (tmp_path / "names.json").write_text('{"3": "fog"}')
    assert read_labels(tmp_path / "names.json", CFG).text(3) == "fog"
    features = [{"id": 3, "fires_on": [" rain", "Rain"], "promotes": [" wet"]}, {"id": 4, "label": "mine"}]
    (tmp_path / "features.json").write_text(json.dumps(features))
    read = read_labels(tmp_path / "features.json", CFG)
    assert [read.text(3), read.text(4)] == ["rain -> wet", "mine"]
    (tmp_path / "names.json").write_text('{"9": "fog"}')
    with pytest.raises(SteersmanError, match=r"names.json has a label of feature 9"):
        read_labels(tmp_path / "names.json", CFG)
