"""Every accepted form of a history gives the same rows; everything else is refused with both values."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsfl_fast.datasets.dataset import check_matrix
from cfsfl_fast.interactions import Interactions, as_interactions, from_pairs

DENSE = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=np.float32)
ITEMS, OFFSETS = [1, 3, 0, 1, 2, 3, 4, 4], [0, 2, 2, 7, 8]

FORMS = {
    "csr": sp.csr_matrix(DENSE),
    "csr_array": sp.csr_array(DENSE),
    "csc": sp.csc_matrix(DENSE),
    "coo": sp.coo_matrix(DENSE),
    "ratings": sp.csr_matrix(DENSE * 4.5),
    "bool": sp.csr_matrix(DENSE.astype(bool)),
    "int64 indices": sp.csr_matrix((np.ones(8), np.array(ITEMS, np.int64), np.array(OFFSETS, np.int64)), shape=(4, 5)),
    "explicit zeros": sp.csr_matrix((np.r_[0.0, np.ones(8)], np.r_[0, ITEMS], np.r_[0, 3, 3, 8, 9]), shape=(4, 5)),
    "duplicates": sp.csr_matrix((np.ones(10), np.r_[3, 1, 3, ITEMS[2:], 4], np.r_[0, 3, 3, 8, 10]), shape=(4, 5)),
    "torch dense": torch.from_numpy(DENSE),
    "torch bool": torch.from_numpy(DENSE).bool(),
    "torch csr": torch.from_numpy(DENSE).to_sparse_csr(),
    "torch coo": torch.from_numpy(DENSE).to_sparse_coo(),
    "numpy": DENSE,
    "numpy fortran": np.asfortranarray(DENSE),
    "offsets": (torch.tensor(ITEMS), torch.tensor(OFFSETS)),
    "int32 lists": (np.array(ITEMS, np.int32), OFFSETS),
    "unsorted offsets": (torch.tensor([3, 1, 4, 3, 2, 1, 0, 4]), torch.tensor(OFFSETS)),
    "torch csc": torch.from_numpy(DENSE).to_sparse_csc(),
    "unsigned": DENSE.astype(np.uint16),
    "unsigned csr": sp.csr_matrix(DENSE.astype(np.uint64)),
    "long double": sp.csr_matrix(DENSE.astype(np.longdouble)),
    "masked": np.ma.masked_array(np.ones_like(DENSE), DENSE == 0),
    "itself": Interactions(torch.tensor(ITEMS), torch.tensor(OFFSETS), 5),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form: str) -> None:
    x = as_interactions(FORMS[form], 5)
    assert (x.items.tolist(), x.offsets.tolist(), x.n_items) == (ITEMS, OFFSETS, 5)
    assert x.items.dtype == x.offsets.dtype == torch.int64


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (sp.csr_matrix((5, 4)), ValueError, r"\[B, 5\]; got shape \(5, 4\); is it items x users"),
        (sp.csr_matrix((2, 7)), ValueError, r"\[B, 5\]; got shape \(2, 7\)"),
        (torch.zeros(5), ValueError, r"users x items, \[B, 5\]; got shape \(5,\)"),
        (np.array([[0, 1, np.nan, 0, 0]]), ValueError, "NaN"),
        (np.array([[0, 1, np.inf, 0, 0]]), ValueError, "infinite"),
        (sp.csr_matrix(np.array([[0, 1, -2.0, 0, 0]])), ValueError, r"least is -2\.0"),
        ((torch.tensor([5]), torch.tensor([0, 1])), ValueError, "0 to 4; got 5"),
        ((torch.tensor([-1]), torch.tensor([0, 1])), ValueError, "0 to 4; got -1"),
        ((torch.tensor([0.5]), torch.tensor([0, 1])), ValueError, "integers; got torch.float32"),
        ((torch.tensor([1, 2]), torch.tensor([0, 1])), ValueError, r"from 0 to the number of items, 2"),
        ((torch.tensor([1, 2]), torch.tensor([0, 2, 1, 2])), ValueError, "must ascend"),
        ((torch.tensor([1]), torch.tensor([], dtype=torch.int64)), ValueError, "must ascend"),
        ("histories", TypeError, "got str"),
        ([[0, 1]], TypeError, "got list"),
        (np.zeros((1, 5), complex), TypeError, "real numbers; got complex128"),
        (torch.zeros(1, 5, dtype=torch.complex64), TypeError, "real numbers; got torch.complex64"),
        (np.array([["a"] * 5]), TypeError, "real numbers; got <U1"),
    ],
)
def test_what_is_refused(x: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        as_interactions(x, 5)


WRAPPING = [0, 3, -(2**63), -1, 8]
"""Row starts whose differences wrap around to numbers above 0."""


def test_row_starts_whose_differences_wrap_are_refused() -> None:
    x = sp.csr_matrix(DENSE)
    x.indices, x.indptr = x.indices.astype(np.int64), np.array(WRAPPING, np.int64)
    assert (np.diff(x.indptr) >= 0).all()
    with pytest.raises(ValueError, match="damaged csr matrix: row starts do not ascend"):
        as_interactions(x, 5)
    with pytest.raises(ValueError, match="offsets must ascend"):
        as_interactions((np.array(ITEMS), np.array(WRAPPING)), 5)
    with pytest.raises(ValueError, match="expected row starts ascending from 0 to 8"):
        check_matrix(x, 5, "x")


def test_read_only_arrays_are_read_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    dense, csr = DENSE.copy(), sp.csr_matrix(DENSE)
    for array in (dense, csr.data, csr.indices, csr.indptr):
        array.flags.writeable = False
    torch.set_warn_always(True)
    try:
        for x in (dense, csr):
            assert as_interactions(x, 5).items.tolist() == ITEMS
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list


def test_no_users_and_no_entries() -> None:
    assert len(as_interactions(sp.csr_matrix((0, 5)), 5)) == 0
    assert as_interactions(([], [0, 0, 0]), 5).counts.tolist() == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9))), st.randoms())
def test_rows_are_sets_in_order(pairs: list[tuple[int, int]], random: object) -> None:
    rows, items = (torch.tensor([p[i] for p in pairs], dtype=torch.int64) for i in (0, 1))
    x = from_pairs(rows, items, 7, 10)
    for user in range(7):
        own = x.items[x.offsets[user] : x.offsets[user + 1]].tolist()
        assert own == sorted({item for u, item in pairs if u == user})


def test_rows_can_be_taken_masked_padded_and_joined() -> None:
    x = as_interactions(DENSE, 5)
    taken = x.take(torch.tensor([2, 0, 2, 1]))
    assert taken.offsets.tolist() == [0, 5, 7, 12, 12]
    assert taken.items.tolist() == [0, 1, 2, 3, 4, 1, 3, 0, 1, 2, 3, 4]
    kept = x.where(x.items != 3)
    assert (kept.items.tolist(), kept.offsets.tolist()) == ([1, 0, 1, 2, 4, 4], [0, 1, 1, 5, 6])
    assert x.padded(6).counts.tolist() == [2, 0, 5, 1, 0, 0]
    joined = x.union(as_interactions(1 - DENSE, 5))
    assert joined.items.tolist() == list(range(5)) * 4
    assert x.rows.tolist() == [0, 0, 2, 2, 2, 2, 2, 3]


def test_entries_of_normalised_histories() -> None:
    x = as_interactions(DENSE, 5)
    assert torch.allclose(x.unit_weights(), torch.tensor([2**-0.5] * 2 + [5**-0.5] * 5 + [1.0]))
    assert torch.allclose(x.mean_weights(), torch.tensor([0.5] * 2 + [0.2] * 5 + [1.0]))
