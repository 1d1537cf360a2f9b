"""What the virtual user knows of items: which of them occur together, and what a history says for each listed item.

    G = sum_u w_u x_u x_u^T,    w_u = |x_u|^(-1/2) / mean |x|^(-1/2)
    P = (G + diag(c sqrt(g mean(g))))^(-1),    g = diag G
    b_ij = -P_ij / P_jj  (i != j, b_jj = 0),    e_j(x) = sum_{i in x} b_ij

These are EASE's weights (Steck 2019) with two changes: long histories count less, and the ridge grows with an item's
count. A user who is in G and asks for an item of their own finds themselves in the answer: a reward that learns from
such answers learns to trust them too much. So training looks at P without the user, exactly (Sherman and Morrison):

    P' = P + f q q^T,    q = P x_u,    f = w_u / (1 - w_u x_u^T q)                 (the ridge stays)

Shapes    G, P [M, M]; kept histories x~ as CSR rows [B, M] with E entries; ids [B, K]; evidence [B, K, 19].
Traffic   A history's scores read |x| rows of P: 4 M |x| bytes; evidence gathers |x| K entries of P.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from cfsfl_fast import ops
from cfsfl_fast.interactions import Interactions
from cfsfl_fast.item_item import ridge_inverse

MAX_ITEMS = 60_000
"""Of a memory: its matrix takes 4 M^2 bytes, 14.4 GB here."""

N_EVIDENCE = 19
_LEAST = 1e-4  # what a logarithm sees of less


class ItemMemory(nn.Module):
    """P [M, M] and the items' users, as buffers that no state_dict holds: a memory is not trained, and can be large.

    What a state_dict does hold is how `judging` mixes and scales: `weight` (beta, 0 while the recommender learns),
    `recommender_weight` (alpha), and the mean and standard deviation of each column of the evidence.

    Args:
        n_items: M.

    Raises:
        ValueError: there are more than MAX_ITEMS items.
    """

    precision: Tensor
    counts: Tensor
    user_scale: Tensor
    weight: Tensor
    recommender_weight: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, n_items: int) -> None:
        super().__init__()
        if n_items > MAX_ITEMS:
            raise ValueError(
                f"an item memory holds {n_items} x {n_items} numbers; the most is {MAX_ITEMS} items. Leave out rare "
                'items, or use feedback="embedding", which needs no memory'
            )
        self.n_items = n_items
        self.register_buffer("weight", torch.tensor(0.0))
        self.register_buffer("recommender_weight", torch.tensor(0.3))
        self.register_buffer("centre", torch.zeros(N_EVIDENCE))
        self.register_buffer("spread", torch.ones(N_EVIDENCE))
        self.register_buffer("precision", torch.empty(0, 0), persistent=False)
        self.register_buffer("counts", torch.empty(0), persistent=False)
        self.register_buffer("user_scale", torch.ones(()), persistent=False)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was remembered yet."""
        return len(self.precision) == 0

    def tensors(self) -> dict[str, Tensor]:
        """What a file of the memory holds."""
        return {"precision": self.precision, "counts": self.counts, "user_scale": self.user_scale}

    def restore(self, tensors: dict[str, Tensor] | None) -> None:
        """Takes `tensors` back, or forgets.

        Raises:
            ValueError: they are not a memory of this many items.
        """
        device, M = self.centre.device, self.n_items
        if tensors is None:
            tensors = {"precision": torch.empty(0, 0), "counts": torch.empty(0), "user_scale": torch.ones(())}
            M = 0
        shapes = {"precision": (M, M), "counts": (M,), "user_scale": ()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes or not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError(f"a memory of {M} items has the finite tensors {shapes}; got {found}")
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(device))

    def fit(self, histories: Interactions, ridge: float) -> None:
        """Remembers which items occur together.

        Args:
            histories: of the training users.
            ridge: c > 0, the ridge of an item of average count in units of that count.

        Raises:
            ValueError: the ridge is too small for an inverse.
        """
        M, device = self.n_items, histories.items.device
        items, offsets = (t.cpu().numpy() for t in histories.exact().csr)
        x = sp.csr_matrix((np.ones(len(items), np.float32), items, offsets), (len(histories), M))
        sizes = np.maximum(np.diff(offsets), 1).astype(np.float64)
        scale = 1 / np.mean(sizes**-0.5) if len(sizes) else 1.0
        weights = scale * sizes**-0.5
        g = np.maximum(weights @ x, 1)
        try:
            P = ridge_inverse(x, ridge * np.sqrt(g * g.mean()), weights, label="item memory")
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise ValueError(f"the items' matrix [{M}, {M}] is not positive definite: raise memory_ridge") from None
        self.precision = P.to(device)
        self.counts = torch.from_numpy(np.bincount(items, minlength=M).astype(np.float32)).to(device)
        self.user_scale = torch.tensor(scale, dtype=torch.float32, device=device)

    def scores(self, kept: Interactions, whole: Interactions | None = None) -> tuple[Tensor, Absence | None]:
        """e_j(x~) of every item, and what leaving the users out takes.

        Args:
            kept: the histories x~ that are looked at.
            whole: the same users' histories in G, where they are training users: they are left out. None for others.

        Returns:
            [B, M].
        """
        table = ops.Table(self.precision)
        y = ops.row_bag(table, *kept.csr)
        diagonal = self.precision.diagonal()
        absence = None
        if whole is not None:
            q = ops.row_bag(table, *whole.csr)
            weight = self.user_scale * whole.counts.clamp_min(1).rsqrt()
            factor = weight / (1 - weight * _sums_of(q, whole))
            y = y + (factor * _sums_of(q, kept))[:, None] * q
            diagonal = diagonal + factor[:, None] * q.square()
            absence = Absence(q, factor, whole)
        return _add_at(-y / diagonal, kept, 1.0), absence

    def evidence(
        self, kept: Interactions, ids: Tensor, scores: Tensor, first: int, absence: Absence | None = None
    ) -> Tensor:
        """What is known for each listed item: pooled b_ij, sizes, the recommender's score, the place. [B, K, 19]

        With r_i = 1 / log(3 + n_i), n_i the users of an item, b+ = max(b, 0) and sums over i in x~, the columns are:
        sum b; sum min(b, 0); max b+; sum sqrt(b+); sum b+^2; sum r b; the log of sum b, max b+, sum r b, max r b+,
        sum sqrt(b+) and sum b+^2; sum b and sum r b in standard deviations from their mean over the list's `first`
        items; log(1 + n_j); log(1 + |x~|); s; s in such standard deviations; log(1 + place in the list from 0).

        Args:
            kept: the histories x~.
            ids: the lists, -1 where they end. [B, K] int64
            scores: s, the recommender's of the listed items. [B, K]
            first: items of the first page.
            absence: of `scores`, where the users are left out.
        """
        users, entries = kept.rows, kept.items.clamp_max(self.n_items - 1)
        listed = ids.clamp_min(0)
        P, column = self.precision, ids.new_zeros(1)
        diagonal = P.diagonal()[listed]
        counts = self.counts
        mine = counts[listed]
        rare = counts[entries]
        b = P[entries[:, None], torch.cat([listed, column.expand(1, listed.shape[1])])[users]]  # [E, K]
        if absence is not None:
            at = users.clamp_max(len(ids) - 1)
            ql = absence.q.gather(1, listed)
            b = b + (absence.factor[at] * absence.q[at, entries])[:, None] * ql[at]
            diagonal = diagonal + absence.factor[:, None] * ql.square()
            mine = mine - absence.holds(listed)
            rare = rare - 1
        b = b.div_(-_below(diagonal, users)).masked_fill_(entries[:, None] == _below(listed, users), 0)
        r = (1 / (3 + rare).log())[:, None]

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(len(ids) + 1, values.shape[1]).index_add_(0, users, values)[:-1]

        def most(values: Tensor) -> Tensor:
            found = values.new_zeros(len(ids) + 1, values.shape[1])
            return found.scatter_reduce_(0, users[:, None].expand_as(values), values, "amax")[:-1]

        positive = b.clamp_min(0)
        e, negative, rare_e = total(b), total(b.clamp_max(0)), total(r * b)
        best, rare_best = most(positive), most(r * positive)
        roots, squares = total(positive.sqrt()), total(positive.square())
        logs = [v.clamp_min(_LEAST).log() for v in (e, best, rare_e, rare_best, roots, squares)]
        page = (ids >= 0) & (torch.arange(ids.shape[1], device=ids.device) < first)
        columns = [e, negative, best, roots, squares, rare_e, *logs, _standard(e, page), _standard(rare_e, page)]
        size = kept.counts.float().log1p()[:, None].expand_as(e)
        place = torch.arange(ids.shape[1], dtype=e.dtype, device=e.device).log1p().expand_as(e)
        columns += [mine.log1p(), size, scores, _standard(scores, page), place]
        return torch.stack(columns, 2).masked_fill_((ids < 0)[:, :, None], 0)


class Absence:
    """Training users taken out of P: q = P x [B, M] and f [B].

    Args:
        q, factor: as above.
        whole: their histories.
    """

    def __init__(self, q: Tensor, factor: Tensor, whole: Interactions) -> None:
        self.q, self.factor, self.whole = q, factor, whole

    def holds(self, ids: Tensor) -> Tensor:
        """1 where an item is the user's own, else 0. ids [B, K] -> [B, K]"""
        return _add_at(torch.zeros_like(self.q), self.whole, 1.0).gather(1, ids)


def _sums_of(values: Tensor, x: Interactions) -> Tensor:
    """sum_{j in x_b} values[b, j]. [B]"""
    users, items = x.rows, x.items.clamp_max(values.shape[1] - 1)
    found = values[users.clamp_max(len(values) - 1), items]
    return values.new_zeros(len(values) + 1).index_add_(0, users, found)[:-1]


def _add_at(values: Tensor, x: Interactions, amount: float) -> Tensor:
    """values [B, M] with an amount more at the entries of x."""
    users, items = x.rows.clamp_max(len(values) - 1), x.items.clamp_max(values.shape[1] - 1)
    more = torch.where(x.items < values.shape[1], amount, 0.0).to(values.dtype)
    return values.index_put((users, items), more, accumulate=True)


def _below(values: Tensor, users: Tensor) -> Tensor:
    """Every entry's user's row of values [B, K]; the room behind gets the last. [E, K]"""
    return values[users.clamp_max(len(values) - 1)]


def _standard(values: Tensor, page: Tensor) -> Tensor:
    """Values [B, K] in standard deviations from their mean over the first page."""
    n = page.sum(1, keepdim=True).clamp_min(1)
    centred = values - (values * page).sum(1, keepdim=True) / n
    return centred / ((centred.square() * page).sum(1, keepdim=True) / n).sqrt().clamp_min(1e-6)
