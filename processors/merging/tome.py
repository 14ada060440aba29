"""Token merging for fast diffusion (Bolya and Hoffman, arXiv 2303.17604), without randomness.

The top left token of each cell of sy x sx is a destination, all others are sources. Each source is matched with the
destination it resembles most, and the sources that resemble theirs most are merged into them. What follows runs on
`kept + destinations` rows instead of `tokens`: first the sources that were kept, then the destinations.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from processors.kernels.constants import constant_per_shape


class Partition(NamedTuple):
    """The tokens of a grid in raster order, as indices of dtype int64. It depends on the grid alone."""

    sources: torch.Tensor  # [sources]
    destinations: torch.Tensor  # [destinations]
    inverse: torch.Tensor  # [tokens], where each token stands in cat([sources, destinations])


class Matching(NamedTuple):
    """Which tokens become one, as indices of dtype int64."""

    cells: Partition
    order: torch.Tensor  # [batch, sources], positions among the sources, those that merge first
    nearest: torch.Tensor  # [batch, sources], the destination of each source, counted among the destinations
    kept: torch.Tensor  # [batch, kept], sources that remain, as tokens
    merged: torch.Tensor  # [batch, merged], sources that merge, as tokens
    partners: torch.Tensor  # [batch, merged], what they merge into, counted among the destinations
    rows: torch.Tensor  # [batch, tokens], the merged row that stands for each token


def count_merged(h: int, w: int, sy: int, sx: int, ratio: float) -> int:
    """How many tokens merging removes from a grid of h x w: `ratio` of them, or as many as there are sources."""
    destinations = (h // sy) * (w // sx)
    return min(int(h * w * ratio), h * w - destinations) if destinations else 0


def partition(h: int, w: int, sy: int, sx: int, device: torch.device) -> Partition:
    """Split a grid of h x w tokens. Rows and columns beyond the last full cell hold sources only."""
    return Partition(*_index_maps(h, w, sy, sx, device))


def match(metric: torch.Tensor, cells: Partition, merged: int) -> Matching:
    """Match tokens by the cosine similarity of `metric` `[batch, tokens, channels]`; the `merged` best pairs merge."""
    # Norms in float32: that of a half-precision token may overflow. Which tokens match has no derivative.
    precise = metric.detach().float()
    unit = (precise / precise.norm(dim=-1, keepdim=True).clamp_min(1e-12)).to(metric.dtype)
    scores = unit.index_select(1, cells.sources) @ unit.index_select(1, cells.destinations).transpose(-1, -2)
    similarity, nearest = scores.max(dim=-1)
    order = similarity.sort(dim=-1, descending=True).indices
    sources = cells.sources.expand_as(order).gather(1, order)

    kept = order.shape[-1] - merged
    # The inverse permutation. AI Cores sort floating point alone (ops-math math/sort/op_api/sort.cpp), and scatter no
    # int64 (ops-nn index/scatter_elements_v2): either would go to the AI CPU. float32 holds 2**24 positions exactly.
    rank = order.float().argsort(dim=-1)
    source_rows = torch.where(rank < merged, kept + nearest, rank - merged)
    destination_rows = torch.arange(kept, metric.shape[1] - merged, device=order.device).expand(len(order), -1)
    return Matching(
        cells=cells,
        order=order,
        nearest=nearest,
        kept=sources[:, merged:],
        merged=sources[:, :merged],
        partners=nearest.gather(1, order[:, :merged]),
        rows=torch.cat([source_rows, destination_rows], dim=1).index_select(1, cells.inverse),
    )


def merge(tokens: torch.Tensor, matching: Matching) -> torch.Tensor:
    """`[batch, tokens, channels]` to `[batch, kept + destinations, channels]`, the mean of the tokens of each row.

    Equal runs give equal bits on every device, which a scatter does not. A CPU is short of arithmetic and sums each
    row's tokens; the matrix units of a GPU or NPU make a product with the weights of the mean the cheaper way.
    """
    return _mean_by_lookup(tokens, matching) if tokens.device.type == "cpu" else mean_by_product(tokens, matching)


def unmerge(merged: torch.Tensor, matching: Matching) -> torch.Tensor:
    """`[batch, kept + destinations, channels]` to `[batch, tokens, channels]`, each token a copy of its row."""
    return _take_rows(merged, matching.rows)


@constant_per_shape
def _index_maps(h: int, w: int, sy: int, sx: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    # Index arithmetic alone: a trace with fake tensors (torch.export) knows no sizes that depend on values.
    rows, columns = torch.arange(h, device="cpu"), torch.arange(w, device="cpu")
    in_first_row = (rows % sy == 0) & (rows < h // sy * sy)
    in_first_column = (columns % sx == 0) & (columns < w // sx * sx)
    is_source = ~(in_first_row[:, None] & in_first_column).flatten()
    count = h * w - (h // sy) * (w // sx)
    # A stable order that puts sources first, and within them raster order.
    order = (torch.arange(h * w, device="cpu") + h * w * ~is_source).argsort()
    return order[:count].to(device), order[count:].to(device), order.argsort().to(device)


def _mean_by_lookup(tokens: torch.Tensor, matching: Matching) -> torch.Tensor:
    batch, rows = len(tokens), matching.kept.shape[1] + len(matching.cells.destinations)
    row_of_token, order = _flat(matching.rows, rows).sort(stable=True)
    starts = torch.searchsorted(row_of_token, torch.arange(batch * rows, device=tokens.device))
    means = F.embedding_bag(order, tokens.flatten(0, 1).float(), starts, mode="mean")  # float16 sums could overflow
    return means.to(tokens.dtype).unflatten(0, (batch, rows))


def mean_by_product(tokens: torch.Tensor, matching: Matching) -> torch.Tensor:
    """As `merge`, as a product with the weights of the mean."""
    destinations = tokens.index_select(1, matching.cells.destinations)
    partners = torch.arange(destinations.shape[1], device=tokens.device)[:, None] == matching.partners[:, None, :]
    # The share of each token in its mean, and not a division of the sum: that may be out of range in float16.
    share = (1 / (1 + partners.sum(-1, keepdim=True, dtype=torch.float32))).to(tokens.dtype)
    means = torch.baddbmm(destinations * share, partners.to(tokens.dtype) * share, _take_rows(tokens, matching.merged))
    return torch.cat([_take_rows(tokens, matching.kept), means], dim=1)


def _take_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows `[batch, count]` of `[batch, rows, channels]`, as one lookup of rows: many times faster than a gather."""
    return tensor.flatten(0, 1).index_select(0, _flat(rows, tensor.shape[1])).view(*rows.shape, tensor.shape[-1])


def _flat(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows of each sample, `[batch, n]`, as rows `[batch * n]` of the whole batch, where a sample has `count` rows."""
    return (rows + torch.arange(len(rows), device=rows.device)[:, None] * count).flatten()
