"""`steersman plan`."""

from steersman.train.reports.plan import PlanConfig, plan_run

__all__ = ["PlanConfig"]


def run_plan(config: PlanConfig) -> None:
    """`steersman plan`."""
    print(plan_run(config).to_text())
