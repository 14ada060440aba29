"""What a pipeline will take of memory, said before anything is loaded, and where its models are to be."""

from ascend.planner.calls import Request
from ascend.planner.memory_plan import MODES, apply_plan, plan_memory
from ascend.planner.plan import MemoryPlan, PlanError

__all__ = ["MODES", "MemoryPlan", "PlanError", "Request", "apply_plan", "plan_memory"]
