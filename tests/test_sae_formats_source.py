"""Where files are: folders, single files, the hub over HTTP, its local cache, and paths that climb out."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import make_sae
from support.sae_files import write_files

from steersman.errors import SteersmanError
from steersman.sae import SAE, SAEConfig
from steersman.sae.formats import Format, convert
from steersman.sae.formats.base import Parts
from steersman.sae.formats.saelens import WEIGHTS
from steersman.sae.formats.source import Source, inside, open_source

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\\..\\..\\x", "a\x00b"])
def test_paths_that_climb_out_are_not_opened(name: str, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="leads out of the folder it belongs to"):
        inside(name)
    source = open_source(tmp_path)
    with pytest.raises(SteersmanError, match="leads out of the folder"):
        source.path(name)


@pytest.mark.parametrize(
    "name", ["org/repo/../../../etc", "org/repo/a/../../b@main", "org/repo@../../x", "org/repo/.."]
)
def test_hub_names_that_climb_out(name: str) -> None:
    with pytest.raises(SteersmanError, match="leads out of the folder it belongs to"):
        SAE.load(name)


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/such/folder", "~/none/x", "a b/c", "", "org/repo@"])
def test_names_that_are_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SteersmanError, match=r"holds no SAE"):
        SAE.load(name)
    with pytest.raises(SteersmanError, match="no such folder or file"):
        SAE.load(tmp_path / "none" / "x")


class Plain(Format):
    """A format from outside: `plain.safetensors` with the names of a TopK SAE."""

    name = "plain"
    needs = "plain.safetensors"

    def matches(self, source: Source) -> bool:
        return source.has("plain.safetensors")

    def read(self, source: Source) -> Parts:
        file = source.tensors("plain.safetensors")
        tensors = {name: file.entry(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        d_in, d_sae = tensors["W_enc"].shape
        return Parts(cfg=SAEConfig(d_in=d_in, d_sae=d_sae, k=5), tensors=tensors, file=file)

    def write(self, sae: SAE, path: Path) -> None:
        write_files(path, {"plain.safetensors": {n: t.contiguous() for n, t in sae.weights().items()}})


def test_a_format_from_outside_is_read_and_written_as_the_others_are(tmp_path: Path) -> None:
    sae, x = make_sae(), torch.randn(10, 8)
    convert(sae, tmp_path / "new", to="plain")
    back = SAE.load(tmp_path / "new")
    assert torch.equal(back(x), sae(x))
    assert back.cfg.metadata["origin"]["format"] == "plain"


def test_an_unrecognised_folder_says_what_it_has_and_what_formats_need(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    make_sae().save(tmp_path / "layers.3")
    with pytest.raises(SteersmanError) as error:
        SAE.load(tmp_path)
    message = str(error.value)
    assert "Found: layers.3/cfg.json, layers.3/sae_weights.safetensors, notes.txt" in message
    assert "SAEs may lie in its folders layers.3: name one" in message
    for format in (
        "saelens",
        "sparsify",
        "dictionary_learning",
        "gemma_scope",
        "gemma_scope_2",
        "llama_scope",
        "openai",
    ):
        assert f"{format} needs " in message
    with pytest.raises(SteersmanError, match="unknown format 'gguf'; have saelens, sparsify"):
        SAE.load(tmp_path, format="gguf")
    with pytest.raises(SteersmanError, match=r"cfg.json|sae.safetensors"):
        SAE.load(tmp_path / "layers.3", format="sparsify")


def test_origin_is_recorded_for_other_formats_only(tmp_path: Path) -> None:
    make_sae().save(tmp_path / "own")
    assert "origin" not in SAE.load(tmp_path / "own").cfg.metadata
    cfg = json.loads((tmp_path / "own" / "cfg.json").read_text())
    save_file(load_file(tmp_path / "own" / WEIGHTS), tmp_path / "own" / WEIGHTS)  # as another program writes them
    cfg["metadata"] = {"hook_name": "blocks.0.hook_resid_post", "prepend_bos": True}
    (tmp_path / "own" / "cfg.json").write_text(json.dumps(cfg))
    sae = SAE.load(tmp_path / "own")
    assert sae.cfg.metadata["origin"] == {"format": "saelens", "path": "own"}
    sae.save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "cfg.json").read_text())["metadata"]
    assert again["prepend_bos"] is True
    assert again["steersman"]["origin"]["format"] == "saelens"


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub as loading one SAE asks for, over the files below `root`."""

    root: ClassVar[Path]
    fetched: ClassVar[list[str]] = []
    repo = "org/saes"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0].replace(f"/{self.repo}/resolve/main/", f"/{self.repo}/resolve/{COMMIT}/")
        path = path.replace(f"/{self.repo}/resolve/v1/", f"/{self.repo}/resolve/{COMMIT}/")
        if path in (f"/api/models/{self.repo}", f"/api/models/{self.repo}/revision/v1"):
            return self.send(json.dumps({"id": self.repo, "sha": COMMIT}).encode(), body)
        tree = f"/api/models/{self.repo}/tree/{COMMIT}"
        if path.startswith(tree):
            below = path.removeprefix(tree).strip("/").replace("%2F", "/")
            files = [file for file in (self.root / below).rglob("*") if file.is_file()]
            listing = [
                {"type": "file", "path": f.relative_to(self.root).as_posix(), "size": f.stat().st_size, "oid": "a" * 40}
                for f in files
            ]
            return self.send(json.dumps(listing).encode(), body)
        resolve = f"/{self.repo}/resolve/{COMMIT}/"
        file = self.root / path.removeprefix(resolve)
        if path.startswith(resolve) and file.is_file():
            if body:
                self.fetched.append(path.removeprefix(resolve))
            return self.send(file.read_bytes(), body, ETag=f'"{file.stat().st_size:040x}"')
        self.send(b"{}", body, status=404, **{"X-Error-Code": "RepoNotFound" if "/api/" in path else "EntryNotFound"})

    def send(self, content: bytes, body: bool, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


PROGRAM = """
import json, sys
from steersman.errors import SteersmanError
from steersman.sae import SAE
from steersman.sae.formats.inspection import inspect
out = {}
for name in sys.argv[1:]:
    try:
        sae = SAE.load(name)
        out[name] = [sae.cfg.hook_name, sae.cfg.metadata["origin"], sae.W_dec.sum().item()]
    except SteersmanError as error:
        out[name] = str(error)
print(json.dumps(out))
"""


def load_elsewhere(names: list[str], **env: str) -> dict:
    """Load in a process of its own: the hub's client reads its settings once, on import."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_hub_and_its_cache(tmp_path: Path) -> None:
    sae = make_sae(hook_name="blocks.4.hook_resid_post")
    sae.save(tmp_path / "repo" / "a" / "layer_4")
    (tmp_path / "repo" / "a" / "layer_4" / "sparsity.safetensors").write_bytes(b"never fetched")
    make_sae().save(tmp_path / "repo" / "a" / "layer_5")
    FakeHub.root = tmp_path / "repo"
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    cache = str(tmp_path / "cache")
    names = ["org/saes/a/layer_4", "org/saes/a/layer_4@v1", "org/saes/a", "org/other"]
    online = load_elsewhere(names, HF_ENDPOINT=endpoint, HF_HUB_CACHE=cache, HF_HUB_OFFLINE="0")
    server.shutdown()
    server.server_close()
    hook, origin, total = online[names[0]]
    assert hook == "blocks.4.hook_resid_post"
    assert origin == {"format": "saelens", "repo_id": "org/saes", "folder": "a/layer_4", "revision": COMMIT}
    assert total == pytest.approx(sae.W_dec.sum().item(), rel=1e-4, abs=1e-4)
    assert online[names[1]] == online[names[0]]
    assert "SAEs may lie in its folders layer_4, layer_5: name one" in online[names[2]]
    assert "org/other is no local path and not on the hub" in online[names[3]]
    assert sorted(FakeHub.fetched) == ["a/layer_4/cfg.json", "a/layer_4/sae_weights.safetensors"]

    offline = load_elsewhere([names[0], names[3]], HF_ENDPOINT=endpoint, HF_HUB_CACHE=cache, HF_HUB_OFFLINE="1")
    assert offline[names[0]] == online[names[0]]
    assert "nor in the local cache, and the hub cannot be reached" in offline[names[3]]
