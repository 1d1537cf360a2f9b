"""CFSFL, the drop-in module: a recommender in a feedback loop with a virtual user."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfsfl_fast import backends, checkpoint, item_rows, judging, ops, resharding
from cfsfl_fast.config import MOST_STEPS, CFSFLConfig, whole
from cfsfl_fast.distributed import Mesh
from cfsfl_fast.graphs import Graphs, capacity
from cfsfl_fast.interactions import Interactions, as_interactions, item_vector, left_out_rows
from cfsfl_fast.loop import Loop, unroll
from cfsfl_fast.memory import N_EVIDENCE, ItemMemory
from cfsfl_fast.numerics import PRECISIONS, numerics
from cfsfl_fast.recommenders import RECOMMENDERS
from cfsfl_fast.scarcity import Batches
from cfsfl_fast.sharded import Shard
from cfsfl_fast.virtual_user import (
    LookupTable,
    VirtualUser,
    feedback_generator,
    item_reward,
    reward_estimator,
    weights,
)

ITEM_TABLES = ("recommender.input.weight", "recommender.output.weight", "recommender.output.bias", "lookup.weight")
"""The parameters that have a row per item."""

_OF_PARTS: dict[str, tuple[Any, ...]] = {
    "recommender": ("vae", "dae"),
    "feedback": ("embedding",),
    "table_dtype": ("fp32",),
    "backend": ("auto", "triton", "cpp", "torch"),
    "precision": ("fp32",),
    "deterministic": (False,),
}
"""What a model in parts can be: the multinomial likelihood, and products in float32."""

ROWS = 32
"""Batches are padded with empty users to a multiple of this: a row then has the same bits in any batch."""

BATCH = 512
"""Users that `recommend` answers at once by default; more come in as many batches as it takes."""

MARGIN = 32
"""Items beyond those asked for that `recommend(rescore=True)` scores again."""


class Trace(NamedTuple):
    """The loop made visible: what happened at every step."""

    ids: Tensor  # a^t, t = 0 .. T - 1. [T, B, K] int64, -1 where a list ends
    rewards: Tensor  # R(s^t, a^t); with feedback="scores" the mean reward of the listed items. [T, B]
    feedback: Tensor  # v^(t + 1). [T, B, V]; with feedback="scores" g of the listed items. [T, B, K]


class CFSFL(nn.Module):
    """Collaborative filtering with a synthetic feedback loop (Algorithm 1's model; equations (1) to (4) and (16)).

    Args:
        n_items: M.
        recommender: name of the base recommender.
        steps: T, feedback steps; 0 is the plain recommender.
        top_k: K, items of the list that the virtual user sees; the whole catalogue where M < K.
        action: how the list enters h(x, a): "straight_through", "topk_softmax", "softmax" or "hard".
        hidden_dim, latent_dim, lookup_dim, feedback_dim: H, Z, D, V.
        dropout: share of the history hidden in training.
        reading: "heldout" (lists leave out what the user has) or "full" (they may repeat it).
        backend: "auto", "triton", "cpp", "torch" or "reference".
        precision: of the decoder's product, "fp32", "tf32" (a CUDA device's) or "bf16" (`numerics.PRECISIONS`); weights
            stay float32.
        deterministic: the same bits on every run and, in inference on a CUDA device, for every split into batches;
            slower. A CPU's answers are so anyhow.
        graphs: "auto" replays inference and training updates as CUDA graphs on a CUDA device; False launches kernel by
            kernel; True also gives a CPU the padded shapes of graphs, for tests.
        **training: the other fields of `CFSFLConfig`, for its trainer.

    Raises:
        ValueError: a size is below 1 or a choice unknown.
    """

    def __init__(
        self,
        n_items: int,
        *,
        recommender: str = "vae",
        steps: int = 8,
        top_k: int = 50,
        action: str = "straight_through",
        hidden_dim: int = 600,
        latent_dim: int = 200,
        lookup_dim: int = 64,
        feedback_dim: int = 128,
        dropout: float = 0.5,
        reading: str = "heldout",
        backend: str = "auto",
        precision: str = "fp32",
        deterministic: bool = False,
        graphs: str | bool = "auto",
        **training: Any,
    ) -> None:
        super().__init__()
        n_items = whole("n_items", n_items, 1)
        if backend not in backends.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)}; got {backend!r}")
        self.n_items = n_items
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        if precision == "bf16" and backend == "reference":
            raise ValueError('precision="bf16" is not what backend="reference" states; choose another of the two')
        self.backend, self.precision, self.deterministic = backend, precision, deterministic
        self.graphs = Graphs(graphs)
        self.config = CFSFLConfig.from_dict(
            {
                "recommender": recommender,
                "steps": steps,
                "top_k": top_k,
                "action": action,
                "hidden_dim": hidden_dim,
                "latent_dim": latent_dim,
                "lookup_dim": lookup_dim,
                "feedback_dim": feedback_dim,
                "dropout": dropout,
                "reading": reading,
                **training,
            }
        )
        if self.config.table_dtype == "bf16" and backend == "reference":
            raise ValueError('table_dtype="bf16" is not what backend="reference" states; choose another of the two')
        self.shard: Shard | None = None
        self.item_ids: np.ndarray | None = None
        self._batches = Batches(ROWS)
        with item_rows.stored_as(torch.bfloat16 if self.config.table_dtype == "bf16" else torch.float32):
            self.recommender = RECOMMENDERS[recommender](n_items, hidden_dim, latent_dim, feedback_dim)
        self.lookup = LookupTable(n_items, lookup_dim)
        judges = self.config.judges_items
        self.memory = ItemMemory(n_items) if judges else None
        self.reward = item_reward(N_EVIDENCE) if judges else reward_estimator(lookup_dim)
        self.feedback = feedback_generator(lookup_dim, feedback_dim)

    @classmethod
    def from_config(cls, n_items: int, config: CFSFLConfig, **run_time: Any) -> CFSFL:
        """A new model with every choice of a config; run_time: backend, precision, deterministic and graphs."""
        return cls(n_items, **run_time, **dataclasses.asdict(config))

    @classmethod
    def part(cls, n_items: int, config: CFSFLConfig, shard: Shard, **run_time: Any) -> CFSFL:
        """A new model whose item tables have the rows of one shard alone; its weights are those of a whole model.

        All processes of the shard's group make one, and call it with the same histories. It recommends and trains; what
        takes every item's scores at once is not for it.

        Args:
            n_items: M, of the whole catalogue.
            config: every choice.
            shard: which rows.
            **run_time: of `from_config`.

        Raises:
            ValueError: a choice that needs the whole catalogue in one place, or more shards than items.
        """
        for name, needed in _OF_PARTS.items():
            found = getattr(config, name, run_time.get(name, needed[0]))
            if found not in needed:
                raise ValueError(f"item tables in parts need {name} = {' or '.join(map(repr, needed))}; got {found!r}")
        if shard.group.size > n_items:
            raise ValueError(f"{n_items} items cannot be shared by {shard.group.size} processes")
        with item_rows.kept(shard.span):
            model = cls.from_config(n_items, config, **{**run_time, "graphs": False})
        model.shard = shard
        return model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.lookup.weight.device

    @property
    def user(self) -> VirtualUser:
        """The virtual user's parts."""
        return VirtualUser(self.lookup, self.reward, self.feedback)

    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer; several times as fast as asking for these, which graphs do at every call."""
        found: list[Tensor] = []
        modules: list[nn.Module | None] = [self]
        while modules:
            module = modules.pop()
            if module is not None:
                held = (*module._parameters.values(), *module._buffers.values())
                found += [t for t in held if t is not None]
                modules += module._modules.values()
        return found

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        """Of `to` and its like: weights get other addresses, and graphs of the old ones only hold memory."""
        self.graphs.clear()
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

    def output_table(self) -> ops.Table:
        """The recommender's output layer, for the operations of one pass; rounded where products are narrow."""
        output = self.recommender.output
        if self.precision == "bf16" or output.weight.dtype == torch.bfloat16:
            # In every pass: a copy that is kept would be stale where nobody tells that weights changed.
            return ops.Table(output.weight.bfloat16(), output.bias.bfloat16())
        return ops.Table(output.weight, output.bias)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model's backend, shard, precision and determinism, for what runs inside."""
        with (
            backends.use_backend(self.backend),
            backends.use_shard(self.shard),
            numerics(self.precision, self.deterministic, self.device),
        ):
            yield

    def forward(self, x: Any, *, steps: int | None = None) -> Tensor:
        """Scores s^T of every item. In training mode with dropout and sampled z, from torch's generator.

        With feedback="scores": -inf for the items of x, judged items before all others.

        Args:
            x: histories of B users, in any form that `as_interactions` takes.
            steps: T; None is the model's own.

        Returns:
            [B, M].
        """
        self._need_whole("scores of every item")
        with self.running():
            history, n_users = self._padded(x)
            if self.memory is not None:
                return self._answer(history, steps, judging.closed(history)).scores[:n_users]
            if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
                loop = self._loop(history, steps)
                u, output = loop.code.u, loop.output
            else:
                (u,) = self._replayed("code", steps, lambda x: (self._loop(x, steps).code.u,), history)
                output = self.output_table()
            return F.linear(u.to(output.weight.dtype), output.weight, output.bias)[:n_users].to(u.dtype)

    def unroll(self, x: Any, *, steps: int | None = None) -> Trace:
        """Every step's list, reward and feedback.

        Args:
            x: histories of B users.
            steps: T; None is the model's own.
        """
        with self.running():
            history, n_users = self._padded(x)
            if self.memory is not None:
                return self._pages(history, n_users, steps)
            turns = self._loop(history, steps).turns
        k = min(self.config.top_k, self.n_items)
        if not turns:
            empty = self.lookup.weight.new_empty
            shape = (0, n_users)
            return Trace(empty((*shape, k), dtype=torch.int64), empty(shape), empty((*shape, self.config.feedback_dim)))
        return Trace(
            torch.stack([t.ids for t in turns])[:, :n_users],
            torch.stack([t.logit for t in turns]).sigmoid()[:, :n_users],
            torch.stack([t.feedback for t in turns])[:, :n_users],
        )

    @torch.no_grad()
    def recommend(
        self,
        x: Any,
        n: int = 10,
        *,
        exclude_seen: bool = True,
        exclude: Any = None,
        candidates: Any = None,
        steps: int | None = None,
        batch_size: int = BATCH,
        rescore: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The n best items of every user after T steps, as an evaluated model (no dropout, z = mu).

        Args:
            x: histories of B users.
            n: items per user, at least 0.
            exclude_seen: leave out the items of x.
            exclude: items to leave out besides: ids [.] for all users, or rows in any form that x may have.
            candidates: ids [.] that may be recommended; None for all.
            steps: T; None is the model's own.
            batch_size: users at once, fewer where the device has no memory for so many; it changes no answer.
            rescore: where products are narrower than float32, MARGIN more items are listed, their scores computed again
                from the float32 weights, and the n best of these given.

        Returns:
            ids [B, n] int64, score descending, ties to the smaller id; scores [B, n] float32. Padded with -1 and -inf
            where fewer items exist. The same bits in any batch and order where layers are multiples of 4 wide (as the
            defaults are; a CPU's library products of other widths round by position).

        Raises:
            ValueError: n is negative, an id is out of range, or weights or scores are NaN.
            OutOfMemoryError: the device has no memory for ROWS users.
        """
        n, batch_size = whole("n", n, 0), whole("batch_size", batch_size, 1)
        histories = as_interactions(x, self.n_items, self.device)
        left_out = None if exclude is None else left_out_rows(exclude, len(histories), self.n_items).to(self.device)
        listed = None
        if candidates is not None:
            self._need_whole("candidates")
            listed = item_vector(candidates, self.n_items, "candidates").to(self.device).unique()

        def answer(some: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            all_of_them = len(some) == len(histories)
            mine, others = (rows if rows is None or all_of_them else rows.take(some) for rows in (histories, left_out))
            assert mine is not None
            return self._recommend(mine, n, exclude_seen, others, listed, steps, rescore)

        training = self.training
        if training:
            self.eval()
        try:
            with self.running():
                # Parts of a model answer together: none of them can go on with fewer users than the others.
                batches = self._batches if self.shard is None else Batches(batch_size)
                found = list(batches(torch.arange(len(histories)), batch_size, answer))
        finally:
            if training:
                self.train()
        ids, scores, finite = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        if not bool(finite.all()):
            raise ValueError("the model's scores are NaN or infinite: its weights are damaged or its training diverged")
        return ids, scores.float()

    def _recommend(
        self,
        x: Interactions,
        n: int,
        exclude_seen: bool,
        exclude: Interactions | None,
        candidates: Tensor | None,
        steps: int | None,
        rescore: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`recommend` for one batch of checked rows; and whether its codes are finite. [B, n] twice, [1]"""
        history, n_users = self._padded(x)
        shut = history if exclude_seen else None
        if self.memory is not None:
            if exclude is not None:
                exclude = exclude.padded(len(history))
            ids, scores, finite = self._judged_list(history, n, shut, exclude, candidates, steps)
            return ids[:n_users], scores[:n_users], finite
        same = exclude is None and candidates is None and exclude_seen == (self.config.reading == "heldout")
        if exclude is not None:
            exclude = exclude.padded(len(history))
            shut = exclude if shut is None else shut.union(exclude)
        if candidates is not None and shut is not None:
            shut = shut.among(candidates)
        n_listed = self.n_items if candidates is None else len(candidates)
        k, rescore = min(n, n_listed), rescore and self.precision != "fp32"

        def listed(x: Interactions, shut: Interactions | None) -> tuple[Tensor, ...]:
            loop = self._loop(x, steps)
            output = loop.output if candidates is None else loop.output.rows(candidates)
            excluded, state = None if shut is None else shut.csr, loop.state if same else None
            u, longer = loop.code.u, min(k + MARGIN, n_listed) if rescore else k
            ids, scores = ops.linear_topk(u, output, longer, excluded, state)
            if rescore:
                ids, scores = self._rescored(u, ids, k, candidates)
            return ids, scores, u.isfinite().all()[None]

        if candidates is not None:  # another choice of items is another function
            ids, scores, finite = listed(history, shut)
        elif shut is None or shut is history:
            key = "list", k, exclude_seen, rescore
            ids, scores, finite = self._replayed(key, steps, lambda x: listed(x, x if exclude_seen else None), history)
        else:
            ids, scores, finite = self._replayed(("list", k, "others", rescore), steps, listed, history, shut)
        if candidates is not None and len(candidates):
            ids = torch.where(ids < 0, ids, candidates[ids.clamp_min(0)])
        return *_filled_up(ids[:n_users], scores[:n_users], n, float("-inf")), finite

    def _rescored(self, u: Tensor, ids: Tensor, k: int, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k best of listed items by float32 scores, ties to the smaller id. [B, K'] -> [B, k] twice"""
        ids = ids.sort(1).values
        items = ids.clamp_min(0) if candidates is None else candidates[ids.clamp_min(0)]
        weight, bias = self.recommender.output.weight.detach(), self.recommender.output.bias.detach()
        scores = ops.pair_scores(u, weight, bias, items).masked_fill_(ids < 0, float("-inf"))
        best = scores.sort(dim=1, descending=True, stable=True)
        return ids.gather(1, best.indices)[:, :k].contiguous(), best.values[:, :k].contiguous()

    # With feedback="scores"

    def _answer(self, x: Interactions, steps: int | None, shut: Tensor | None) -> judging.Answer:
        """The virtual user's answer to the recommender's scores of every item."""
        assert self.memory is not None
        steps = self._n_steps(steps)
        s = self.plain_scores(x)
        return judging.answer(self.memory, weights(self.reward), s, x, shut, steps, self.config.top_k)

    def plain_scores(self, x: Interactions) -> Tensor:
        """s^0 of every item, which knows neither loop nor item memory. [B, M]"""
        u, output = self._loop(x, 0).code.u, self.output_table()
        return F.linear(u.to(output.weight.dtype), output.weight, output.bias).to(u.dtype)

    def _judged_list(
        self,
        x: Interactions,
        n: int,
        seen: Interactions | None,
        exclude: Interactions | None,
        candidates: Tensor | None,
        steps: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The n best items after T pages of items that may be recommended, and whether all scores are numbers."""
        others = None
        if candidates is not None:
            others = torch.full((self.n_items,), judging.NO_SCORE, device=self.device)
            others[candidates] = 0

        def listed(x: Interactions, *rows: Interactions) -> tuple[Tensor, ...]:
            shut = others
            for closed in (judging.closed(some) for some in rows):
                shut = closed if shut is None else shut + closed
            scores = self._answer(x, steps, shut).scores
            return *ops.topk(scores, min(n, self.n_items)), (~scores.isnan()).all()[None]

        rows = [some for some in (seen, exclude) if some is not None]
        if candidates is None:
            key = "judged", n, seen is not None
            ids, scores, finite = self._replayed(key, steps, listed, x, *rows)
        else:
            ids, scores, finite = listed(x, *rows)
        return *_filled_up(ids, scores, n, judging.NO_SCORE), finite

    def _pages(self, x: Interactions, n_users: int, steps: int | None) -> Trace:
        """`unroll`: the pages that the virtual user judges."""
        T, K = self._n_steps(steps), min(self.config.top_k, self.n_items)
        found = self._answer(x, T, judging.closed(x))
        more = (0, T * K - found.ids.shape[1])
        ids = F.pad(found.ids, more, value=-1)[:n_users].view(n_users, T, K).transpose(0, 1)
        logits = F.pad(found.logits, more)[:n_users].view(n_users, T, K).transpose(0, 1)
        listed = ids >= 0
        rewards = (logits.sigmoid() * listed).sum(2) / listed.sum(2).clamp_min(1)
        return Trace(ids, rewards, logits)

    def _need_whole(self, what: str) -> None:
        if self.shard is not None:
            raise ValueError(f"{what} need the whole model; this is part {self.shard.group.rank} of its tables")

    def _n_steps(self, steps: int | None) -> int:
        return whole("steps", self.config.steps if steps is None else steps, 0, MOST_STEPS)

    def _padded(self, x: Any) -> tuple[Interactions, int]:
        """Checked histories with empty users behind them, and how many are no padding. With graphs the users' number
        is one of few: ROWS times a power of two up to BATCH, and multiples of BATCH.
        """
        history = as_interactions(x, self.n_items, self.device)
        rows = ROWS
        if self.deterministic and self.device.type == "cuda":
            rows = BATCH  # one shape of every product
        elif self.graphs.wanted(self.device):
            rows = min(BATCH, max(ROWS, 1 << (len(history) - 1).bit_length()))
        return history.padded(-(-len(history) // rows) * rows), len(history)

    def _replayed(
        self, key: Hashable, steps: int | None, function: Callable[..., tuple[Tensor, ...]], *rows: Interactions
    ) -> tuple[Tensor, ...]:
        """function(*rows), an inference without gradients, by a graph where there are graphs.

        Args:
            key: what the function depends on beside the model, `steps` and the rows.
        """
        if not self.graphs.wanted(self.device) or len(rows[0]) == 0:
            return function(*rows)
        rows = tuple(x.padded(len(x), capacity(len(x.items))) for x in rows)
        n_items = [x.n_items for x in rows]

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            pairs = zip(tensors[::2], tensors[1::2], n_items, strict=True)
            return function(*(Interactions(*pair, fixed=True) for pair in pairs))

        with torch.no_grad():
            return self.graphs.run(
                of_tensors,
                *(t for x in rows for t in x.csr),
                key=(key, steps, self.config, self.precision, backends.resolve(self.device)),
                reads=self.tensors(),
            )

    def _loop(self, x: Interactions, steps: int | None) -> Loop:
        """T steps from histories; in training mode with torch's dropout and noise."""
        steps = self._n_steps(steps)
        entries = x.unit_weights()
        noise = None
        if self.training:
            entries = F.dropout(entries, self.config.dropout)
            eps = torch.randn(len(x), self.config.latent_dim, device=self.device)
            noise = lambda _: eps  # noqa: E731
        exclude = x.csr if self.config.reading == "heldout" else None
        return self.run_loop(x, entries, x, steps=steps, exclude=exclude, noise=noise)

    def run_loop(
        self,
        encoded: Interactions,
        weights: Tensor,
        seen: Interactions,
        *,
        steps: int,
        exclude: tuple[Tensor, Tensor] | None = None,
        noise: Callable[[int], Tensor] | None = None,
    ) -> Loop:
        """T steps of the loop; the parts of it that do not depend on v are computed once.

        Args:
            encoded: what the encoder takes in, with the entries `weights` [E] of x^.
            seen: the history of h(x, a).
            steps: T.
            exclude: CSR rows of items that never enter a list.
            noise: eps of pass t, [B, Z]; None takes z = mu.
        """
        output, lookup = self.output_table(), ops.Table(self.lookup.weight)
        hoisted = self.recommender.hoist(*encoded.csr, weights)
        hx = ops.row_bag(lookup, *seen.csr, seen.mean_weights())
        return unroll(
            self.recommender,
            self.user,
            hoisted,
            hx,
            output,
            lookup,
            steps=steps,
            k=self.config.top_k,
            action=self.config.action,
            exclude=exclude,
            noise=noise,
            through_time=self.config.gradient_through_time,
            inputs=self.config.feedback_inputs,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors, item_ids.npy and memory.safetensors to a folder, whole or not at all;
        the last two where the model has them.
        """
        self._need_whole("such folders")
        memory = None if self.memory is None or self.memory.is_empty else self.memory.tensors()
        checkpoint.save_model(Path(folder), self.n_items, self.config, self.state_dict(), self.item_ids, memory)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str | None = None, **run_time: Any) -> CFSFL:
        """The model of a folder, in eval mode.

        Args:
            folder: of `save_pretrained`, or a run's.
            device: where it goes; the CPU by default.
            run_time: backend, precision, deterministic and graphs, which a folder does not hold.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is truncated, altered or of a newer format; the message names it.
        """
        saved = checkpoint.load_model(Path(folder))
        try:
            with torch.device("meta"):
                model = cls.from_config(saved.n_items, saved.config, **run_time)
        except RuntimeError as error:  # of a size in bytes beyond 64 bits
            raise ValueError(f"{Path(folder) / checkpoint.CONFIG}: no model has these sizes ({error})") from None
        checkpoint.check_tensors(Path(folder) / checkpoint.MODEL, saved.tensors, model.state_dict())
        model.load_state_dict(saved.tensors, assign=True)
        model.item_ids = saved.item_ids
        model.restore_memory(saved.memory)
        return model.requires_grad_(True).to(device or "cpu").eval()

    @classmethod
    def part_from_pretrained(
        cls, folder: str | Path, mesh: Mesh, device: torch.device | str | None = None, **run_time: Any
    ) -> CFSFL:
        """This process's part of a folder's model, in eval mode; called by all processes of a mesh.

        Args:
            folder: of `save_pretrained`, or a run's, trained in any number of parts.
            mesh: whose `items` share the rows.
            device, run_time: as in `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: as in `from_pretrained`, and as in `part`.
            ProcessError: the first process found the file altered.
        """
        place = Path(folder)
        n_items, config = checkpoint.read_description(place)
        shard = Shard(mesh.items, n_items)
        tensors, metadata = resharding.read_tensors(place / checkpoint.MODEL, shard, mesh.everyone, ITEM_TABLES)
        item_ids = checkpoint.read_item_ids(place, n_items, metadata)
        if checkpoint.read_description(place) != (n_items, config):
            raise ValueError(f"{place} was replaced while it was read")
        with torch.device("meta"):
            model = cls.part(n_items, config, shard, **run_time)
        checkpoint.check_tensors(place / checkpoint.MODEL, tensors, model.state_dict())
        model.load_state_dict(tensors, assign=True)
        model.item_ids = item_ids
        return model.requires_grad_(True).to(device or "cpu").eval()

    def restore_memory(self, tensors: dict[str, Tensor] | None) -> None:
        """Gives the model the tensors of a memory, or an empty one.

        Raises:
            ValueError: they are not of a memory of this many items.
        """
        if self.memory is not None:
            self.memory.restore(tensors)


def _filled_up(ids: Tensor, scores: Tensor, n: int, nothing: float) -> tuple[Tensor, Tensor]:
    """Lists [B, k] as lists [B, n], with id -1 and a score of `nothing` where they have ended."""
    room = (0, n - ids.shape[1])
    return (F.pad(ids, room, value=-1), F.pad(scores, room, value=nothing)) if room[1] else (ids, scores)
