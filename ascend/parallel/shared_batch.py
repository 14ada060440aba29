"""A module of which each rank computes its rows of the batch."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ascend.parallel.agreement import differences, fingerprint
from ascend.parallel.mesh import Mesh, ParallelError, all_gather

PROMPT = "encoder_hidden_states"  # as the UNet calls it
HIDREAM_PROMPTS = ("encoder_hidden_states_t5", "encoder_hidden_states_llama3")

# The arguments of forward with a row for each sample, or one for all, by the class of the module.
_CONTROLNET = {
    "sample",
    "timestep",
    PROMPT,
    "controlnet_cond",
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "added_cond_kwargs",
}
BATCHED_ARGUMENTS = {
    "UNet2DConditionModel": {
        "sample",
        "timestep",
        PROMPT,
        "projected_prompt",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs[gligen]",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
        "cached_feature",
    },
    "HiDreamImageTransformer2DModel": {
        "hidden_states",
        "timesteps",
        *HIDREAM_PROMPTS,
        "pooled_embeds",
        "img_ids",
        "hidden_states_masks",
        "image_rotary_emb",
        "padding_columns",
    },
    "Decoder": {"sample", "latent_embeds"},
    **dict.fromkeys(("ControlNetModel", "MultiControlNetModel"), _CONTROLNET),
}
# What these give goes to a model that is shared too, and stays with its rank.
LOCAL_RESULTS = ("ControlNetModel", "MultiControlNetModel")
WHOLE_ARGUMENTS = {"cross_attention_kwargs[ip_adapter_masks]"}  # a row for each adapter
LAYERED_ARGUMENTS = {"encoder_hidden_states_llama3"}  # of several layers, with the samples in the second dimension
# The same objects in all steps of a picture.
CONSTANT_ARGUMENTS = (PROMPT, "projected_prompt", *HIDREAM_PROMPTS, "controlnet_cond")


def batched_arguments(module: nn.Module) -> set[str]:
    """The names of its forward's arguments that have a row for each sample; empty where that is not known."""
    classes = [kind.__name__ for kind in type(module).__mro__]
    return next((names for kind, names in BATCHED_ARGUMENTS.items() if kind in classes), set())


class SharedBatch:
    """Calls the forward of `module` with this rank's rows of the batch and gathers the first result of all ranks.

    The batch is the first argument's first dimension. Which other arguments have a row for each sample is declared in
    `BATCHED_ARGUMENTS`; these are split alike, in tuples, lists and dicts too, but for scalars and a single row, which
    is for all samples. Rows are dealt out as evenly as possible, the first ranks get one more. A ControlNet's results
    are not gathered, as the UNet wants this rank's rows of them.

    Args:
        module: its forward returns a tensor, or a tuple or an output class of one and of tensors that stay with their
            rank.
        must_split: raise ParallelError for fewer rows than ranks; otherwise each rank computes all of them, as of a
            shallow step of one branch, which is a small part of a full one.

    A module that takes a prompt begins a picture when that is another object than before, and the ranks then compare
    what they were given.
    """

    def __init__(self, module: nn.Module, mesh: Mesh, must_split: bool) -> None:
        self.replaced = vars(module).get("forward")  # None: the method of the class
        self.forward: Callable[..., Any] = module.forward
        self.signature = inspect.signature(types.MethodType(type(module).forward, module))
        self.batched = batched_arguments(module)
        self.is_local = any(kind.__name__ in LOCAL_RESULTS for kind in type(module).__mro__)
        self.mesh = mesh
        self.must_split = must_split
        # Of steps with as many rows, what is the same in all: what ranks agreed on, and this rank's rows of it.
        self.agreed: dict[int, list[Any]] = {}
        self.constant: dict[tuple[str, int], tuple[Any, Any]] = {}

    def restore(self, module: nn.Module) -> None:
        """Give `module` the forward that it had."""
        del vars(module)["_shared_batch"], vars(module)["forward"]
        if self.replaced is not None:
            module.forward = self.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.signature.bind(*args, **kwargs).arguments
        batch = next(iter(arguments.values()))
        is_whole = bool(arguments.get("guess_mode"))  # whose results are filled up with rows of zeros
        if not is_whole and not {PROMPT, *HIDREAM_PROMPTS}.isdisjoint(self.signature.parameters):
            self._require_agreement(batch, arguments)
        rows, ranks = len(batch), self.mesh.branch_size
        is_small = arguments.get("cached_feature") is not None
        if rows < ranks and self.must_split and not is_small:
            raise ParallelError(f"{ranks} devices cannot share a batch of {rows}: there is no guidance to split")
        if rows < ranks or is_whole:
            return self.forward(**arguments)
        results = self.forward(**{name: self._share(name, value, rows) for name, value in arguments.items()})
        if self.is_local:
            return pytree.tree_map(lambda mine: LocalRows(mine, rows, self._gather), results)
        if isinstance(results, torch.Tensor):
            return self._gather(results, rows)
        first, *others = results.values() if isinstance(results, dict) else results
        gathered = self._gather(first, rows), *(LocalRows(other, rows, self._gather) for other in others)
        # An output class of diffusers leaves out what is None.
        return type(results)(**dict(zip(results, gathered, strict=True))) if isinstance(results, dict) else gathered

    def _require_agreement(self, batch: torch.Tensor, arguments: dict[str, Any]) -> None:
        given = [arguments.get(name) for name in CONSTANT_ARGUMENTS]
        known = self.agreed.pop(len(batch), [None] * len(given))
        if all(value is before for value, before in zip(given, known, strict=True)):
            self.agreed[len(batch)] = given
            return
        *prompts, condition = given
        timestep = arguments["timestep" if "timestep" in arguments else "timesteps"]
        mine = fingerprint(batch, timestep, prompts, condition)
        everyone = mine.new_empty(self.mesh.branch_size * len(mine))
        all_gather(everyone, mine, self.mesh.group)
        first = self.mesh.rank - self.mesh.branch
        expected, *others = everyone.view(self.mesh.branch_size, -1).cpu()
        for branch, theirs in enumerate(others, 1):
            different = differences(expected, theirs)
            if different:
                raise ParallelError(
                    f"ranks {first} and {first + branch} cannot share a picture, as their {' and '.join(different)} "
                    "differ: give each rank a generator with the same seed, and the same arguments"
                )
        self.agreed[len(batch)] = given

    def _share(self, name: str, value: Any, rows: int) -> Any:
        """This rank's rows of an argument."""
        known = self.constant.get((name, rows))
        if known is not None and value is known[0]:
            return known[1]
        if name == "cross_attention_kwargs" and value:
            return {key: self._share(f"{name}[{key}]", item, rows) for key, item in value.items()}
        share = pytree.tree_map(functools.partial(self._rows_of_tensor, name, rows), value)
        if name in CONSTANT_ARGUMENTS:
            self.constant[name, rows] = value, share
        return share

    def _rows_of_tensor(self, name: str, rows: int, value: Any) -> Any:
        if isinstance(value, LocalRows):
            return value.tensor
        if not isinstance(value, torch.Tensor) or name in WHOLE_ARGUMENTS or value.dim() == 0:
            return value
        if name not in self.batched:
            raise ParallelError(f"{name} holds a tensor, and it is not known whether it has a row for each sample")
        dimension = int(name in LAYERED_ARGUMENTS)
        given = value.shape[dimension]
        if given not in (1, rows):
            raise ParallelError(f"{name} holds a tensor of {given} rows for a batch of {rows}")
        start, stop = rows_of(rows, self.mesh.branch, self.mesh.branch_size)
        return value if given < rows else value.narrow(dimension, start, stop - start)

    def _gather(self, mine: torch.Tensor, rows: int) -> torch.Tensor:
        ranks = self.mesh.branch_size
        most = -(-rows // ranks)
        if len(mine) < most:  # all_gather takes equal shares
            mine = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        everyone = mine.new_empty(ranks * most, *mine.shape[1:])
        all_gather(everyone, mine.contiguous(), self.mesh.group)
        if rows == ranks * most:
            return everyone
        starts = [rows_of(rows, rank, ranks) for rank in range(ranks)]
        return torch.cat([everyone[rank * most :][: stop - start] for rank, (start, stop) in enumerate(starts)])


@dataclass
class LocalRows:
    """A tensor of this rank's rows, as long as the whole batch: what DeepCache hands from one step to the next, and a
    ControlNet to the UNet."""

    tensor: torch.Tensor
    rows: int
    gather: Callable[[torch.Tensor, int], torch.Tensor]  # of all ranks

    def __len__(self) -> int:
        return self.rows

    def chunk(self, chunks: int) -> tuple[torch.Tensor, ...]:
        """As torch.Tensor.chunk, of the rows of all ranks, which must all call this."""
        return self.gather(self.tensor, self.rows).chunk(chunks)


def rows_of(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """Where the rows of `rank` start and end."""
    share, more = divmod(rows, ranks)
    start = rank * share + min(rank, more)
    return start, start + share + (rank < more)
