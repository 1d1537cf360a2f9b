"""Random numbers that depend on their keys alone."""

import pytest
import scipy.stats
import torch

from cfsfl_fast import noise

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """SplitMix64's finaliser, in Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_bits_are_splitmix64_over_the_keys() -> None:
    golden = 0x9E3779B97F4A7C15
    for keys in ((0,), (1, 2), (7, 2**40, 3), (123456789, 0, 5)):
        state = 0
        for key in keys:
            state = mix(((state + golden) & MASK) ^ mix((key + golden) & MASK))
        assert int(noise.bits(*keys)) & MASK == state
        for n_numbers in range(len(keys)):  # numbers and tensors are one key
            mixed = [*keys[:n_numbers], *(torch.tensor(key) for key in keys[n_numbers:])]
            assert int(noise.bits(*mixed)) & MASK == state
            assert int(noise.bits(*reversed(mixed))) == int(noise.bits(*reversed(keys)))


def test_a_number_does_not_depend_on_its_neighbours() -> None:
    users, items = torch.arange(50), torch.arange(30)
    whole = noise.uniform(1, 2, users[:, None], items)
    assert torch.equal(whole[13:20, 5:9], noise.uniform(1, 2, users[13:20, None], items[5:9]))
    assert float(whole[3, 4]) == float(noise.uniform(1, 2, 3, 4))
    assert not torch.equal(whole, noise.uniform(1, 3, users[:, None], items))


def test_uniform_is_uniform_and_normal_is_normal() -> None:
    keys = torch.arange(200_000)
    u, z = noise.uniform(4, keys), noise.normal(4, keys)
    assert 0 < float(u.min()) < float(u.max()) <= 1
    assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 0.01
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 0.01
    assert abs(float((z[1:] * z[:-1]).mean())) < 0.01
    assert bool(z.isfinite().all())


def test_numbers_may_be_mixed_beforehand() -> None:
    begun, items = noise.Begun((3, 5)), torch.arange(30)
    held = begun.states.data_ptr()
    for numbers in ((0,), (7, 2**40), (1, 2, 3)):
        begun.set(*numbers)
        for stream in (3, 5):
            assert torch.equal(noise.bits(stream, begun, items), noise.bits(stream, *numbers, items))
            assert torch.equal(noise.normal(stream, begun, 4, items), noise.normal(stream, *numbers, 4, items))
    assert begun.states.data_ptr() == held
    with pytest.raises(KeyError):
        noise.bits(4, begun)
