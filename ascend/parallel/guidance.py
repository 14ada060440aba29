"""One picture on several devices: each rank computes its share of the batch of the UNet and of the VAE decoder.

With guidance the batch holds an unconditional and a conditional sample of each picture. Two ranks compute one half
each; one all_gather a step brings the predictions together, and guidance and scheduler then run alike on both, so that
the latents never leave their device. More pairs of ranks draw other prompts: `Mesh.data` of `Mesh.data_size`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ascend.parallel.mesh import Mesh, ParallelError
from ascend.parallel.shared_batch import SharedBatch, batched_arguments
from ascend.pipelines import models_at, parts_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def share_guidance(pipe: DiffusionPipeline, mesh: Mesh) -> None:
    """Let the ranks of a group compute a share of each batch of the models of `pipe` that `ascend.pipelines` names.

    Install attention processors, token merging and graphs before. DeepCache works: each rank keeps the cached
    feature of its own samples. All ranks return all pictures. The text encoder runs on every rank, which takes as
    long as running it on one. All ranks must make the same calls: give each a generator with the same seed, or the
    same latents; what they start a picture with is compared. `unshare_guidance` puts everything back. A second call
    with the same mesh changes nothing; with a mesh of one rank there is nothing to share.

    Raises:
        ParallelError: a component is of a class whose arguments are not known here, is shared with another mesh, or
            its forward was replaced since it was shared.
    """
    if mesh.group is None:
        return
    modules = _shared_modules(pipe)
    for name, module in modules.items():
        _require_shareable(name, module, mesh)
    for name, module in modules.items():
        _share(name, module, mesh, must_split=name == parts_of(pipe).each_step[0])


def share_model(model: nn.Module, mesh: Mesh) -> None:
    """As `share_guidance`, of a denoiser that is no component of a pipeline, as what refines; `unshare_model` ends it.

    Raises:
        ParallelError: it is of a class whose arguments are not known here, or shared with another mesh.
    """
    if mesh.group is None:
        return
    name = type(model).__name__
    _require_shareable(name, model, mesh)
    _share(name, model, mesh, must_split=True)


def unshare_model(model: nn.Module) -> None:
    """Undo `share_model`; does nothing where it was not called.

    Raises:
        ParallelError: the forward was replaced since it was shared.
    """
    shared = _shared_batch(type(model).__name__, model)
    if shared is not None:
        shared.restore(model)


def unshare_guidance(pipe: DiffusionPipeline) -> None:
    """Undo `share_guidance`: each rank computes whole batches again. Does nothing where nothing is shared.

    Raises:
        ParallelError: a forward was replaced since it was shared, by offloading for example: undo that first.
    """
    shared = {name: (module, _shared_batch(name, module)) for name, module in _shared_modules(pipe).items()}
    for module, batch in shared.values():
        if batch is not None:
            batch.restore(module)


def _require_shareable(name: str, module: nn.Module, mesh: Mesh) -> None:
    shared = _shared_batch(name, module)
    if shared is not None and shared.mesh is not mesh:
        raise ParallelError(f"the {name} is shared by other ranks already: call unshare_guidance first")
    if not batched_arguments(module):
        raise ParallelError(f"the {name} is a {type(module).__name__}, and it is not known how to share its batch")


def _share(name: str, module: nn.Module, mesh: Mesh, must_split: bool) -> None:
    """Does nothing where it is shared already."""
    if _shared_batch(name, module) is None:
        shared = SharedBatch(module, mesh, must_split=must_split)
        vars(module).update(forward=shared, _shared_batch=shared)


def _shared_modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return dict(models_at(pipe, parts_of(pipe).shared))


def _shared_batch(name: str, module: nn.Module) -> SharedBatch | None:
    """What shares the batch of `module`, when something does."""
    shared = vars(module).get("_shared_batch")
    if shared is not None and vars(module).get("forward") is not shared:
        raise ParallelError(f"{name}.forward was replaced after share_guidance: undo that first")
    return shared
