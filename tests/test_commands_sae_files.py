"""`steersman inspect | convert`."""

from pathlib import Path

import pytest
import torch
from support.helpers import make_sae

from steersman.cli import main
from steersman.sae import SAE
from steersman.sae.formats.inspection import inspect


def test_inspect_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = make_sae("topk", hook_name="blocks.3.hook_resid_post", model_name="m")
    sae.save(tmp_path / "ours")
    main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "sparsify"])
    assert capsys.readouterr().out == f"{tmp_path}/theirs: topk of 64 features as sparsify\n"
    main(["inspect", str(tmp_path / "theirs")])
    out = capsys.readouterr().out
    lines = {line[:15].strip(): line[15:].strip() for line in out.splitlines()}
    assert lines["format"] == "sparsify"
    assert lines["architecture"] == "topk"
    assert lines["widths"] == "d_in 8, d_sae 64"
    assert lines["k"] == "5"
    assert lines["hook point"] == "blocks.3.hook_resid_post"
    assert lines["model"] == "m"
    assert lines["weights"] == "1,096 (float32, 4.38 kB)"
    assert lines["|W_dec| rows"].startswith("min 1")
    assert "warning" not in out


def test_norms_and_warnings(tmp_path: Path) -> None:
    sae = make_sae("relu", transcoder=True, d_out=5)
    with torch.no_grad():
        sae.W_dec[0] = 0
        sae.W_dec[1] *= 4
    sae.save(tmp_path)
    found = inspect(tmp_path)
    rows, columns = sae.W_dec.detach().norm(dim=1), sae.W_enc.detach().norm(dim=0)
    assert found.decoder_norms == pytest.approx((0, float(rows.median()), float(rows.max())))
    assert found.encoder_norms == pytest.approx((float(columns.min()), float(columns.median()), float(columns.max())))
    assert found.b_dec_norm == pytest.approx(float(sae.b_dec.detach().norm()))
    said = "\n".join(found.warnings)
    for part in (
        "1 latents have a decoder row of zeros",
        "not unit vectors",
        "no hook point",
        "no model",
        "transcoder",
    ):
        assert part in said
    assert "d_out 5" in found.to_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect"], "required"),
        (["inspect", "{tmp}/none"], "no such folder or file"),
        (["inspect", "{tmp}/sae", "--format", "x"], "unknown format 'x'"),
        (["convert", "{tmp}/sae", "{tmp}/new", "--to", "gguf"], "gguf"),
        (["convert", "{tmp}/sae", "{tmp}/new", "--to", "sparsify"], "sparsify cannot express activation 'jumprelu'"),
        (["convert", "{tmp}/sae", "--to", "sparsify"], "required"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sae("jumprelu").save(tmp_path / "sae")
    with pytest.raises(SystemExit) as stop:
        main([part.replace("{tmp}", str(tmp_path)) for part in argv])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("steersman: ")
    assert line.count("\n") == 1
    assert message in line
    assert SAE.load(tmp_path / "sae").cfg.d_sae == 64
