"""Several devices: the ranks of a run, and the batch that a group of them shares."""

from ascend.parallel.guidance import share_guidance, share_model, unshare_guidance, unshare_model
from ascend.parallel.mesh import Mesh, ParallelError, choose_branch_size, process_group, world_size

__all__ = [
    "Mesh",
    "ParallelError",
    "choose_branch_size",
    "process_group",
    "share_guidance",
    "share_model",
    "unshare_guidance",
    "unshare_model",
    "world_size",
]
