"""`steersman plan`."""

from steersman.train.reports.plan import PlanConfig, plan_run


def run(config: PlanConfig) -> None:
    """`steersman plan`."""
    print(plan_run(config).to_text())
