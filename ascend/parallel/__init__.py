"""Several devices: the ranks of a run, and the batch that a group of them shares."""

from ascend.parallel.guidance import share_guidance, unshare_guidance
from ascend.parallel.mesh import Mesh, ParallelError, choose_branch_size, process_group, world_size

__all__ = [
    "Mesh",
    "ParallelError",
    "choose_branch_size",
    "process_group",
    "share_guidance",
    "unshare_guidance",
    "world_size",
]
