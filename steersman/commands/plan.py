"""`steersman plan`."""

from dataclasses import asdict, dataclass

from steersman.commands.options import PrintOptions
from steersman.config import part_of
from steersman.train.reports.plan import PlanConfig, plan_run


@dataclass(frozen=True, kw_only=True)
class PlanCommand(PlanConfig, PrintOptions):
    """See what a training run needs: memory per rank by item, network per step, and the time of a step."""


def run(config: PlanCommand) -> None:
    """`steersman plan`."""
    found = plan_run(part_of(PlanConfig, config))
    config.show(found.to_text, asdict(found))
