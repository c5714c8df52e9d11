"""Time and size of the site of a wide SAE's features, on a real store.

    python scripts/bench/site.py --store acts --model MODEL [--d-sae 16384] [--k 32] [--out site] [--profile]

Each encoder row is the centred state of a row of the store drawn at random, so that features fire where the text is
alike. Prints one JSON object: seconds (of the clock, and of the processor, which others on the machine do not lengthen)
of a pass that encodes the rows of the store and nothing else, of `detail_features`, which holds such a pass, and of
`write_site`; bytes and files of the site; first paint of its index page where there is a Chromium and playwright.
"""

import cProfile
import json
import pstats
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from steersman import SAE, ActivationStore, LanguageModel, SAEConfig
from steersman.train import detail_features
from steersman.ui.site import write_site


@dataclass(frozen=True, kw_only=True)
class Config:
    store: str
    """Folder of the store."""
    model: str
    """Its model."""
    d_sae: int = 16384
    """Features."""
    k: int = 32
    """Active features a token."""
    out: str = ""
    """Folder of the site; a temporary one if none is named."""
    profile: bool = False
    """Print where the time went on standard error."""


def wide_sae(store: ActivationStore, d_sae: int, k: int) -> SAE:
    """A top-k SAE whose rows are centred states of the store."""
    sae = SAE(SAEConfig(d_in=store.d_in, d_sae=d_sae, k=k, hook_name=store.hook_name, model_name=store.model_name))
    rows = torch.randint(0, store.n_rows, (d_sae,), generator=torch.Generator().manual_seed(0))
    mean = store.stats().mean
    states = torch.nn.functional.normalize(store.activations(rows).float() - mean, dim=1)
    with torch.no_grad():
        sae.W_enc.copy_(states.T)
        sae.W_dec.copy_(states)
        sae.b_dec.copy_(mean)
    return sae


def first_paint(page: Path) -> float | None:
    """Milliseconds to the first paint of a page from disk, or None without a browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if browser is None:
        return None
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        opened = started.new_page()
        opened.goto(page.resolve().as_uri())
        opened.wait_for_selector("#table tbody tr")
        paint = opened.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        started.close()
    return paint


class Clock:
    """Seconds between one reading and the next, by the clock and by the processor."""

    def __init__(self) -> None:
        self.times = time.monotonic(), time.process_time()

    def __call__(self) -> dict[str, float]:
        before, self.times = self.times, (time.monotonic(), time.process_time())
        return {name: round(now - then, 1) for name, now, then in zip(("clock", "processor"), self.times, before)}


def main(args: Config) -> dict[str, Any]:
    store, lm = ActivationStore.open(args.store), LanguageModel.load(args.model, device="cpu")
    out = Path(args.out or tempfile.mkdtemp() + "/site")
    sae = wide_sae(store, args.d_sae, args.k)
    clock = Clock()
    for batch in store.batches(8192, split="all", shuffle=False, drop_last=False):
        sae.encode_sparse(batch.x)
    passed = clock()
    report = detail_features(sae, store, lm)
    detailed = clock()
    index = write_site(report, out, name=f"an SAE of {args.d_sae} features")
    written = clock()
    files = [file for file in out.rglob("*") if file.is_file()]
    return {
        "d_sae": args.d_sae, "k": args.k, "rows": store.n_rows, "pass_s": passed, "detail_features_s": detailed,
        "write_site_s": written, "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1),
        "files": len(files), "features_that_fired": int((report.stats.max_act > 0).sum()),
        "pairs_share": report.details.share, "first_paint_ms": first_paint(index),
    }  # fmt: skip


if __name__ == "__main__":
    given = tyro.cli(Config, description=__doc__)
    profile = cProfile.Profile()
    if given.profile:
        profile.enable()
    print(json.dumps(main(given)))
    if given.profile:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(45)
