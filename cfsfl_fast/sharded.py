"""The operations on tables whose rows several processes hold: an implementation of the border over another one.

Process r of S has the rows first_r .. last_r - 1 of every item table, and all processes have the same users. Codes,
lists and feedback are the same everywhere; what an operation looks up or sums over the catalogue is summed over all:

    row_bag         each bags its own rows; one all-reduce of [B, D]
    linear_topk     each lists its own K best; an all-gather, merged: score descending, ties to the smaller id
    linear_nll      logsumexp of the S logsumexps, from one all-gather of [B, 3]
    backward        gradients of rows stay where the rows are; the code's is one all-reduce of [B, H]

A score is computed by the process that has the item's row, from the same numbers as in one process: with backend "cpp",
whose scores are one fixed order of operations, lists and their scores are the same bits. Library products may round the
last bit by the shape of the table.

Messages  in bytes on each process, float32: a bag 4 B D, a list 12 S B K, a loss 12 S B, a code's gradient 4 B H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cfsfl_fast import library
from cfsfl_fast.distributed import Group

CSR = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shard:
    """The rows of every item table that this process has.

    Attributes:
        group: the processes that share the rows; process r has the r-th part.
        n_items: M, rows in all.
    """

    group: Group
    n_items: int

    @property
    def span(self) -> tuple[int, int]:
        """Its first row, and the one after its last."""
        return self.group.span(self.n_items)


@dataclass
class _State:
    """Of one loop: what the implementation remembers, and the excluded rows that are this process's."""

    inner: Any
    exclude: CSR | None = None
    own: CSR | None = None


@dataclass(frozen=True)
class Sharded:
    """Functions of the names that `ops` calls, on this process's rows; item ids are those of the whole catalogue.

    Attributes:
        impl: the implementation that works on the rows.
        shard: which rows these are.
    """

    impl: Any
    shard: Shard

    def own(self, items: Tensor, offsets: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """The entries of CSR rows whose items are here, by their numbers here, and their values."""
        first, last = self.shard.span
        here = (items >= first) & (items < last)  # room holds M
        kept = F.pad(here.cumsum(0), (1, 0))
        return items[here] - first, kept[offsets], *(each[here] for each in values)

    def _own_exclude(self, exclude: CSR | None, state: _State | None) -> CSR | None:
        if exclude is None:
            return None
        if state is None:
            items, offsets = self.own(*exclude)
            return items, offsets
        if state.exclude is None or state.exclude[0] is not exclude[0]:
            items, offsets = self.own(*exclude)
            state.exclude, state.own = exclude, (items, offsets)
        return state.own

    def _sum(self, part: Tensor) -> Tensor:
        return self.shard.group.sums([part])[0]

    def loop_state(self) -> _State:
        """What one pass over the loop remembers from step to step."""
        return _State(self.impl.loop_state())

    def row_bag(self, table: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """sum_{e in row b} weights_e table[items_e]. [B, D]"""
        values = () if weights is None else (weights,)
        return self._sum(self.impl.row_bag(table, *self.own(items, offsets, *values)))

    def row_bag_backward(
        self, dout: Tensor, items: Tensor, offsets: Tensor, weights: Tensor | None, n_rows: int
    ) -> Tensor:
        """The gradient of `row_bag` for the rows that are here; items by their numbers here."""
        found: Tensor = self.impl.row_bag_backward(dout, items, offsets, weights, n_rows)
        return found

    def row_dot(self, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """< x_b, table[ids_bk] >; padding ids (-1) give 0. [B, K]"""
        first, last = self.shard.span
        here = torch.where((ids >= first) & (ids < last), ids - first, -1)
        return self._sum(self.impl.row_dot(x, table, here))

    def linear_pick(self, u: Tensor, weight: Tensor, bias: Tensor, items: Tensor, rows: Tensor) -> Tensor:
        """The scores < u_b, weight_j > + bias_j of single pairs (rows_e, items_e). [E]"""
        first, last = self.shard.span
        here = ((items >= first) & (items < last)).nonzero().squeeze(1)
        found = library.linear_pick(u, weight, bias, items[here] - first, rows[here])
        return self._sum(found.new_zeros(len(items)).index_copy_(0, here, found))

    def linear_topk(
        self, u: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: CSR | None = None, state: _State | None = None
    ) -> tuple[Tensor, Tensor]:
        """Equation (2): ids and scores of the K best items, excluded ones left out. [B, K] twice"""
        inner = state and state.inner
        ids, scores = self.impl.linear_topk(u, weight, bias, k, self._own_exclude(exclude, state), inner)
        return self._merged(ids, scores, k)

    def _merged(self, ids: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """One list from every process's own: ids ascend from part to part, so a stable sort keeps ties right."""
        k = min(k, self.shard.n_items)
        ids = torch.where(ids < 0, ids, ids + self.shard.span[0])
        room = (0, k - ids.shape[1])
        ids, scores = F.pad(ids, room, value=-1), F.pad(scores, room, value=float("-inf"))
        all_ids, all_scores = (
            torch.cat(list(self.shard.group.gathered(part)), 1) for part in (ids, scores.contiguous())
        )
        best = all_scores.sort(dim=1, descending=True, stable=True)
        return all_ids.gather(1, best.indices[:, :k]), best.values[:, :k].contiguous()

    def linear_nll(
        self,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        items: Tensor,
        offsets: Tensor,
        exclude: CSR | None,
        k: int,
        state: _State | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], None]:
        """The multinomial loss of every user [B], its logsumexp [B], and the list of the K best.

        With c_r targets in part r: |x| lse - sum_{j in x} s_j = sum_r (nll_r + c_r (lse - lse_r)), all terms positive.
        """
        items, offsets = self.own(items, offsets)
        nll, lse, (ids, scores), kept = self.impl.linear_nll(
            u, weight, bias, items, offsets, self._own_exclude(exclude, state), k, state and state.inner
        )
        if kept is not None:
            library.scratch.give(kept)  # backward needs softmax by the logsumexp of all, and computes scores again
        counts = offsets.diff().to(lse.dtype)
        nlls, lses, all_counts = self.shard.group.gathered(torch.stack([nll, lse, counts])).unbind(1)
        lse = lses.logsumexp(0)
        more = torch.where(all_counts > 0, all_counts * (lse - lses), 0)
        return (nlls + more).sum(0), lse, self._merged(ids, scores, k), None

    def linear_nll_backward(
        self,
        dnll: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        items: Tensor,
        offsets: Tensor,
        exclude: CSR | None,
        lse: Tensor,
        kept: None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of u [B, H], and of the weight and bias that are here."""
        counts = offsets.diff()
        own_items, own_offsets = self.own(items, offsets)
        du, dweight, dbias = library.linear_nll_backward(
            dnll, u, weight, bias, own_items, own_offsets, self._own_exclude(exclude, None), lse, None, counts
        )
        return self._sum(du), dweight, dbias

    def fuse(self, hx: Tensor, lookup: Tensor, ids: Tensor, scores: Tensor, action: str) -> tuple[Tensor, Tensor]:
        """Equation (16): h = hx + sum_k w_k lookup[ids_k] [B, D], and the weights w [B, K]."""
        w = library.list_weights(ids, scores, action)
        return self.row_bag(lookup, ids.flatten(), library.list_offsets(ids), w.flatten()).add_(hx), w

    def feedback_step(
        self,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        hx: Tensor,
        lookup: Tensor,
        reward: Any,
        feedback: Any,
        hoisted: Tensor,
        wv: Tensor,
        k: int,
        action: str,
        exclude: CSR | None = None,
        state: _State | None = None,
    ) -> tuple[Tensor, ...]:
        """v [B, V], the reward's logit [B], ids, scores [B, K], hoisted + v^ Wv [B, P], h [B, D], weights [B, K]."""
        ids, scores = self.linear_topk(u, weight, bias, k, exclude, state)
        h, w = self.fuse(hx, lookup, ids, scores, action)
        logit, v = library.respond(h, reward, feedback)
        return v, logit, ids, scores, library.follow(v, hoisted, wv), h, w

    def fuse_softmax(
        self, u: Tensor, weight: Tensor, bias: Tensor, lookup: Tensor, exclude: CSR | None
    ) -> tuple[Tensor, Tensor]:
        """softmax(s) lookup [B, D] over the whole catalogue, and logsumexp(s) [B]."""
        mean, lse = library.fuse_softmax(u, weight, bias, lookup, self._own_exclude(exclude, None))
        whole = self.shard.group.gathered(lse).logsumexp(0)
        share = (lse - whole.masked_fill(whole == float("-inf"), 0)).exp()
        return self._sum(mean * share[:, None]), whole

    def fuse_softmax_backward(
        self,
        dmean: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        lookup: Tensor,
        exclude: CSR | None,
        mean: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of u, and of the weight, bias and lookup rows that are here."""
        exclude = self._own_exclude(exclude, None)
        du, dweight, dbias, dlookup = library.fuse_softmax_backward(dmean, u, weight, bias, lookup, exclude, mean, lse)
        return self._sum(du), dweight, dbias, dlookup
