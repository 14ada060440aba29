"""What a pipeline will take of memory, said before anything is loaded, and where its models are to be."""

from ascend.planner.memory_plan import apply_plan, plan_memory
from ascend.planner.plan import MemoryPlan, PlanError

__all__ = ["MemoryPlan", "PlanError", "apply_plan", "plan_memory"]
