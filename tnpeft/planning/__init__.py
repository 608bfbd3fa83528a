"""IN WHICH ORDER: two-operand plans of a network, what they cost, and the best one for every number of tokens."""

from tnpeft.planning.planner import OBJECTIVES, plan
from tnpeft.planning.steps import Plan, Step
from tnpeft.planning.table import PlanTable, plan_table

__all__ = ["OBJECTIVES", "Plan", "PlanTable", "Step", "plan", "plan_table"]
