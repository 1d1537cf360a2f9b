"""Training on wide catalogues: gradients and moments of touched rows alone, and the softmax from drawn items."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfsfl_fast import CFSFL, CFSFLConfig, backends, ops
from cfsfl_fast.interactions import Interactions, from_pairs
from cfsfl_fast.lookups import Table, gradients_by_rows
from cfsfl_fast.row_adam import RowAdam, rounded
from cfsfl_fast.runs import Run
from cfsfl_fast.stages import fresh_model
from cfsfl_fast.training import Noise, joint_step, view
from cfsfl_fast.updates import Optimisers, run_epoch
from tests.conftest import stop_at
from tests.processes import outputs
from tests.test_distributed import assert_alike
from tests.test_sharded import BACKENDS
from tests.test_training import QUICK, SIZES, command, same, weights_of

WIDE = {"softmax": "sampled", "negatives": 25, "table_updates": "rows"}
N_ITEMS = 300


def histories(n_users: int = 30, seed: int = 0) -> Interactions:
    """Of items below 100: the others are never looked up."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(n_users).repeat_interleave(8)
    return from_pairs(rows, torch.randint(100, (len(rows),), generator=generator), n_users, N_ITEMS)


# Gradients and moments by rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", [None, 25])
def test_gradients_by_rows_are_the_dense_ones(backend: str, negatives: int | None) -> None:
    config = CFSFLConfig(**{**SIZES, "batch_size": 30, "anneal_steps": 100})
    torch.manual_seed(0)
    model = CFSFL.from_config(N_ITEMS, config, backend=backend)
    torch.nn.init.normal_(model.recommender.input.feedback)
    users = torch.arange(30)
    batch = view(histories(), users, config, 5)
    if negatives:
        batch = batch._replace(drawn=torch.randint(N_ITEMS, (negatives,)))
    found = []
    named = dict(model.named_parameters())
    for by_rows in (False, True):
        with model.running(), gradients_by_rows(by_rows):
            loss, _ = joint_step(model, batch, Noise(users, 8, False, (5,)), 1)
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found.append(dict(zip(named, gradients, strict=True)))
    dense, by_rows = found
    sparse = {name for name, g in by_rows.items() if g is not None and g.is_sparse}
    tables = {"recommender.input.weight", "lookup.weight"}
    assert sparse == tables | ({"recommender.output.weight"} if negatives else set())
    for name, g in by_rows.items():
        assert (g is None) == (dense[name] is None), name
        if g is not None:
            assert torch.equal(g.to_dense() if g.is_sparse else g, dense[name]), name
    rows = by_rows["recommender.input.weight"].coalesce().indices()[0]
    assert torch.equal(rows, batch.encoded.items.unique())


def test_a_row_moves_as_if_updates_without_it_had_not_been() -> None:
    torch.manual_seed(0)
    start = torch.randn(6, 3)
    plan = [[0, 1], [1], [1, 4], [0, 1, 4], [4]]
    gradients = [torch.randn(6, 3) for _ in plan]
    table = torch.nn.Parameter(start.clone())
    rows_alone = RowAdam([{"params": [table], "lr": 0.05, "weight_decay": 0.1}], fused=True)
    for touched, gradient in zip(plan, gradients, strict=True):
        index = torch.tensor([touched])
        table.grad = torch.sparse_coo_tensor(index, gradient[touched], table.shape, check_invariants=True)
        rows_alone.step()
    for row in range(6):
        alone = torch.nn.Parameter(start[row : row + 1].clone())
        adam = torch.optim.Adam([alone], lr=0.05, weight_decay=0.1)
        for touched, gradient in zip(plan, gradients, strict=True):
            if row in touched:
                alone.grad = gradient[row : row + 1].clone()
                adam.step()
        if any(row in touched for touched in plan):
            assert torch.allclose(table[row], alone[0], atol=1e-6), row
        else:
            assert torch.equal(table[row], start[row]), row
            assert not bool(rows_alone.state[table]["exp_avg"][row].any())
    assert rows_alone.state[table]["row_steps"].tolist() == [2, 4, 0, 0, 3, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from /proc")
def test_moments_of_rows_that_nothing_touched_take_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    table = torch.nn.Parameter(torch.zeros(1_000_000, 32))
    optimiser = RowAdam([{"params": [table], "lr": 0.1}], fused=True)
    rows = torch.arange(0, 1_000_000, 50_000)
    before = resident()
    for _ in range(2):
        table.grad = torch.sparse_coo_tensor(rows[None], torch.ones(20, 32), table.shape, check_invariants=True)
        optimiser.step()
    assert optimiser.state[table]["exp_avg"].shape == (1_000_000, 32)
    assert resident() - before < 60e6, "two moments of 128 MB"


def test_dense_parameters_are_updated_as_by_adam() -> None:
    twins = [torch.nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2)]
    for parameter, kind in zip(twins, (RowAdam, torch.optim.Adam), strict=True):
        optimiser = kind([parameter], lr=0.1, fused=True)
        for _ in range(3):
            parameter.grad = parameter.detach().cos()
            optimiser.step()
    assert torch.equal(*twins)


# The softmax from drawn items


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Table, Any, Any]:
    """Codes, an output layer, targets and excluded items; the second user has no target, the third nothing at all."""
    generator = torch.Generator().manual_seed(seed)
    u, weight = (torch.randn(n, 6, generator=generator, dtype=dtype) for n in (5, 40))
    bias = torch.randn(40, generator=generator, dtype=dtype)
    x = from_pairs(torch.tensor([0, 0, 3, 3, 3, 4]), torch.tensor([1, 7, 0, 20, 39, 5]), 5, 40)
    exclude = from_pairs(torch.tensor([0, 1, 3, 4]), torch.tensor([2, 9, 21, 0]), 5, 40)
    return u.requires_grad_(), Table(weight.requires_grad_(), bias.requires_grad_()), x, exclude


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("excluding", [True, False])
def test_every_item_drawn_once_gives_the_loss_itself(backend: str, excluding: bool) -> None:
    found = []
    for drawn in (torch.randperm(40), None):
        with backends.use_backend("torch" if drawn is not None else backend):
            u, output, x, exclude = problem()
            shut = exclude.csr if excluding else None
            if drawn is None:
                loss, _, _ = ops.linear_nll(u, output, *x.csr, shut)
            else:
                loss = ops.sampled_nll(u, output, *x.csr, shut, drawn, 40)
            weights = torch.arange(1.0, 6.0, dtype=torch.float64)
            leaves = [u, *_leaves(output)]
            found.append((loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaves)))
    for mine, expected in zip(*found, strict=True):
        assert torch.allclose(mine, expected, rtol=1e-9, atol=1e-12)


def _leaves(output: Table) -> list[Tensor]:
    """The weight and the bias that a table was made of."""
    return [leaf.variable for leaf, _ in output.weight.grad_fn.next_functions if leaf is not None]


def test_the_partition_function_is_estimated_without_bias_and_the_loss_with_the_stated_one() -> None:
    u, output, x, exclude = problem()
    truth, _, _ = ops.linear_nll(u, output, *x.csr, exclude.csr)
    counts, biases = x.counts, []
    has = counts > 0
    generator = torch.Generator().manual_seed(3)
    for n in (80, 320):
        drawn = [torch.randint(40, (n,), generator=generator) for _ in range(800)]
        found = torch.stack([ops.sampled_nll(u, output, *x.csr, exclude.csr, d, 40).detach() for d in drawn])
        assert not bool(found[:, ~has].any())
        ratio = ((found - truth.detach())[:, has] / counts[has]).exp()  # Z^ / Z
        error = 4 * ratio.std(0) / len(drawn) ** 0.5
        assert bool(((ratio.mean(0) - 1).abs() < error).all())
        bias = (ratio.log() - (ratio - 1)).mean(0)  # the second has mean 0, and takes most of the noise away
        assert bool((bias < 0).all())
        biases.append(float(bias.mean()))
        if n == 320:
            assert torch.allclose(bias, -ratio.var(0) / 2, rtol=0.1)
    assert biases[1] == pytest.approx(biases[0] / 4, rel=0.3)


# Training


def test_training_touches_what_it_looks_up_and_nothing_else() -> None:
    config = CFSFLConfig(**{**SIZES, **WIDE, "batch_size": 10}).resolved(30)
    model = fresh_model(N_ITEMS, config, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = histories()
    optimisers = Optimisers(model, "joint")
    run_epoch(model, x, optimisers, "joint", torch.arange(30), (0, 3, 1), 0, lambda *_: None)
    known = x.items.unique()
    for name, rows in (("recommender.input.weight", known), ("lookup.weight", None)):
        moved = (model.state_dict()[name] != before[name]).any(1).nonzero().squeeze(1)
        assert len(moved) > 0
        if rows is not None:
            assert set(moved.tolist()) <= set(rows.tolist()), name
        assert len(moved) < N_ITEMS
    steps = optimisers.state()["main/recommender.output.weight/row_steps"]
    moved = (model.state_dict()["recommender.output.weight"] != before["recommender.output.weight"]).any(1)
    assert torch.equal(moved, steps > 0)
    assert 0 < int(moved.sum()) < N_ITEMS


def test_sampled_training_learns_the_clusters(toy: Any, tmp_path: Path) -> None:
    choices = {**QUICK, **WIDE, "epochs": (12, 2, 2)}
    report = Run(toy, tmp_path / "run", CFSFLConfig(**choices), show_progress=False).train()
    popular, *systems = (found["Recall@20"][0] for found in report["test"].values())
    assert popular < 0.8
    assert min(systems) > 0.95


def test_a_run_by_rows_resumes_with_the_same_weights(toy: Any, tmp_path: Path) -> None:
    config = CFSFLConfig(**{**QUICK, **WIDE})
    Run(toy, tmp_path / "whole", config, show_progress=False).train()
    stop_at(Run(toy, tmp_path / "run", config, show_progress=False), 2)
    Run(toy, tmp_path / "run", config, resume=True, show_progress=False).train()
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))


@pytest.mark.parametrize("shards", [1, 2])
def test_two_processes_by_rows_are_one(shards: int, toy: Any, toy_folder: Path, tmp_path: Path) -> None:
    Run(toy, tmp_path / "one", CFSFLConfig(**{**QUICK, **WIDE}), show_progress=False).train()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in WIDE.items()]
    outputs([*command(toy_folder, tmp_path / "two")[1:], *options, f"--item-shards={shards}"], 2)
    assert_alike(tmp_path / "two", tmp_path / "one", 1e-4)


# Tables in bfloat16


def test_rows_of_a_narrow_table_are_widened() -> None:
    u, output, x, exclude = problem(dtype=torch.float32)
    drawn = torch.randint(40, (60,), generator=torch.Generator().manual_seed(1))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        weight, bias = (leaf.detach().bfloat16().to(dtype).requires_grad_() for leaf in _leaves(output))
        code = u.detach().clone().requires_grad_()
        with gradients_by_rows():
            table = Table(weight, bias)
            loss = ops.sampled_nll(code, table, *x.csr, exclude.csr, drawn, 40)
            bags = ops.row_bag(table, *x.csr, torch.linspace(0.1, 0.9, len(x.items)))
            assert loss.dtype == bags.dtype == torch.float32
            dcode, dweight = torch.autograd.grad(loss.sum() + bags.square().sum(), [code, weight])
        assert dweight.is_sparse
        assert dweight.dtype == dtype
        found.append((loss.detach(), bags.detach(), dcode, dweight.to_dense()))
    (*narrow, dnarrow), (*wide, dwide) = found
    for mine, expected in zip(narrow, wide, strict=True):
        assert torch.equal(mine, expected)
    assert torch.equal(dnarrow, dwide.bfloat16()), "summed in float32, rounded once"


def test_rounding_goes_up_as_often_as_the_value_says() -> None:
    values = torch.tensor([1.0, 1.0 + 2**-9, 1.0 + 3 * 2**-10, -0.3, 1e-3, 0.0]).expand(20_000, 6)
    keys = torch.arange(20_000)
    found = rounded(values, keys, keys // 7)
    near = torch.stack(
        [
            values[0].bfloat16(),
            *(torch.nextafter(values[0].bfloat16(), values.new_tensor(to).bfloat16()) for to in (9.0, -9.0)),
        ]
    )
    assert bool((found[:, None] == near).any(1).all()), "a neighbour"
    step = 2.0 ** (torch.frexp(values[0]).exponent - 8)
    assert bool(((found.float().mean(0) - values[0]).abs() <= 4 * 0.5 * step / 20_000**0.5).all())
    assert bool((found[:, 0] == 1).all()), "what is a bfloat16 stays"
    assert torch.equal(found, rounded(values, keys, keys // 7))


def test_moves_smaller_than_a_step_add_up() -> None:
    torch.manual_seed(0)
    start = torch.randn(50, 40).bfloat16()
    narrow, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    rows = torch.arange(0, 50, 2)
    optimisers = [RowAdam([{"params": [p], "lr": 1e-4}], fused=True) for p in (narrow, wide)]
    for _ in range(100):
        gradient = torch.randn(25, 40).bfloat16() + 0.5
        for parameter, optimiser in zip((narrow, wide), optimisers, strict=True):
            part = gradient.to(parameter.dtype)
            parameter.grad = torch.sparse_coo_tensor(rows[None], part, (50, 40), check_invariants=True)
            optimiser.step()
    moved = [p.detach().float() - start.float() for p in (narrow, wide)]
    assert not bool(moved[0][1::2].any()), "a row without a gradient"
    assert float(moved[0][::2].mean()) == pytest.approx(float(moved[1][::2].mean()), rel=0.05)
    states = [optimiser.state[p] for optimiser, p in zip(optimisers, (narrow, wide), strict=True)]
    assert states[0]["exp_avg"].dtype == torch.float32
    assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])


NARROW = {**WIDE, "table_dtype": "bf16"}


def test_narrow_tables_learn_and_resume_with_the_same_weights(toy: Any, tmp_path: Path) -> None:
    config = CFSFLConfig(**{**QUICK, **NARROW, "epochs": (12, 2, 2)})
    report = Run(toy, tmp_path / "whole", config, show_progress=False).train()
    assert min(found["Recall@20"][0] for found in list(report["test"].values())[1:]) > 0.95
    stop_at(Run(toy, tmp_path / "run", config, show_progress=False), 2)
    Run(toy, tmp_path / "run", config, resume=True, show_progress=False).train()
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))
    model = CFSFL.from_pretrained(tmp_path / "run")
    tables = {name for name, w in model.named_parameters() if w.dtype == torch.bfloat16}
    assert tables == {"recommender.input.weight", "recommender.output.weight"}
    ids, scores = model.recommend(toy.test.fold_in, 5)
    assert scores.dtype == torch.float32
    alone = model.recommend(toy.test.fold_in[3], 5)
    assert torch.equal(ids[3], alone[0][0])


def test_two_processes_with_narrow_tables_are_one(toy: Any, toy_folder: Path, tmp_path: Path) -> None:
    Run(toy, tmp_path / "one", CFSFLConfig(**{**QUICK, **NARROW}), show_progress=False).train()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in NARROW.items()]
    outputs([*command(toy_folder, tmp_path / "two")[1:], *options], 2)
    assert_alike(tmp_path / "two", tmp_path / "one", 1e-2)  # a gradient may round the other way


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"softmax": "full"}, "needs softmax = 'sampled'; got 'full'"),
        ({"table_updates": "dense"}, "needs table_updates = 'rows'; got 'dense'"),
        ({"recommender": "recvae"}, "needs recommender = 'vae' or 'dae'; got 'recvae'"),
        ({"feedback": "scores"}, "needs feedback = 'embedding'; got 'scores'"),
    ],
)
def test_narrow_tables_are_for_updates_by_rows(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f'table_dtype="bf16" {message}'):
        CFSFLConfig(**{**NARROW, **choice})


def test_the_specification_knows_no_narrow_tables() -> None:
    with pytest.raises(ValueError, match='table_dtype="bf16" is not what backend="reference" states'):
        CFSFL.from_config(N_ITEMS, CFSFLConfig(**NARROW), backend="reference")


def test_only_the_multinomial_loss_is_sampled() -> None:
    with pytest.raises(
        ValueError, match="estimates the multinomial loss of vae, dae, recvae, awae; got recommender='warp'"
    ):
        CFSFLConfig(recommender="warp", softmax="sampled")
    with pytest.raises(ValueError, match="negatives must be at least 1; got 0"):
        CFSFLConfig(negatives=0)
    assert json.loads(json.dumps(CFSFLConfig(**WIDE).to_dict()))["table_updates"] == "rows"
