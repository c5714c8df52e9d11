"""`steersman quickstart`."""

from dataclasses import dataclass
from pathlib import Path

from steersman.commands.options import PrintOptions
from steersman.config import part_of
from steersman.demo.quickstart import QuickstartConfig, figures, quickstart, summary


@dataclass(frozen=True, kw_only=True)
class QuickstartCommand(QuickstartConfig, PrintOptions):
    """See features, steer by them and read a report: on the bundled model, or on --model with --text."""


def run(config: QuickstartCommand) -> None:
    """`steersman quickstart`."""
    results = quickstart(part_of(QuickstartConfig, config))
    report = Path(config.out) / "report.html"
    config.show(lambda: summary(results), {"report": report, **figures(results)})
    config.note(f"\nreport: {report}   ({results.seconds:.0f} s)")
