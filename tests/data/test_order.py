"""The order of the data: bijections, frozen vectors, coverage of epochs, mixture quotas."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data.windows.order import (
    BLOCK_WINDOWS,
    WindowOrder,
    block_quotas,
    derive_keys,
    permute,
)

PRIMES = (1009, 4099, 65537, 99991)
MIXTURE = WindowOrder((500, 3000, 90), 32, 1, (3.0, 6.0, 1.0))


def lists(arrays):
    return [array.tolist() for array in arrays]


def plain_keys(*parts):
    text = "|".join(["pretrain_lib.order", "1", *map(str, parts)])
    digest = hashlib.blake2b(text.encode(), digest_size=48).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8)]


def plain_permute(index, size, keys):
    """The permutation in Python integers: cycle-walked Feistel rounds over SplitMix64's hash."""
    half = 1
    while 4**half < size:
        half += 1
    while True:
        left, right = divmod(index, 2**half)
        for key in keys:
            x = (right + key) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ ((x ^ x >> 31) % 2**half)
        index = left * 2**half + right
        if index < size:
            return index


def test_permute_is_a_bijection_of_every_small_size():
    keys = derive_keys("bijection")
    for size in range(1, 1001):
        assert sorted(permute(np.arange(size), size=size, keys=keys)) == list(range(size)), size


@pytest.mark.parametrize("size", PRIMES)
def test_permute_is_a_bijection_of_larger_primes(size):
    image = permute(np.arange(size), size=size, keys=derive_keys("prime", size))
    np.testing.assert_array_equal(np.sort(image), np.arange(size))


@settings(deadline=None)
@given(st.integers(1, 10**13), st.integers(0, 2**64), st.data())
def test_permute_equals_python_integers(size, key, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), max_size=5))
    image = permute(np.array(indices, dtype=np.int64), size=size, keys=derive_keys(key))
    assert image.tolist() == [plain_permute(i, size, plain_keys(key)) for i in indices]


def test_keys_are_frozen():
    assert derive_keys("a").tolist() == [
        2902677379495332350,
        11145333443225608104,
        16761051748199763649,
        5419319099430246816,
        2159096399432682254,
        2637520674473379678,
    ]


@pytest.mark.parametrize(
    ("size", "key", "image"),
    [
        (1, "a", [0]),
        (10, "a", [8, 3, 7, 6, 5, 4, 0, 1, 9, 2]),
        (10, "b", [2, 9, 6, 7, 4, 0, 5, 1, 8, 3]),
        (17, "c", [3, 9, 12, 1, 4, 0, 14, 2, 15, 5, 6, 16, 8, 13, 7, 10, 11]),
    ],
)
def test_permute_is_frozen(size, key, image):
    assert permute(np.arange(size), size=size, keys=derive_keys(key)).tolist() == image


def test_permute_of_a_huge_range_is_frozen():
    image = permute(
        np.array([0, 1, 2, 10**12 - 1]), size=10**12, keys=derive_keys("large", 3)
    ).tolist()
    assert image == [151251853893, 2905996805, 946486217470, 905222094244]


def test_order_of_one_source_is_frozen():
    order = WindowOrder((1000,), 64, 7)
    source, epoch, start = lists(order.locate(np.arange(18)))
    assert source == [0] * 18
    assert epoch == [0] * 14 + [1] * 4
    assert start == [
        *(273, 145, 785, 849, 17, 209, 337, 465, 529, 721, 401, 657, 593, 81),
        *(557, 493, 685, 877),
    ]
    assert lists(order.locate(np.arange(40, 46)))[1:] == [
        [2, 2, 3, 3, 3, 3],
        [476, 284, 282, 346, 410, 218],
    ]


def test_order_of_a_mixture_is_frozen():
    source, epoch, start = lists(MIXTURE.locate(np.arange(16)))
    assert source == [1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1]
    assert epoch == [0] * 16
    assert start == [
        *(360, 392, 904, 1512, 269, 1416, 2024, 109),
        *(173, 45, 840, 429, 205, 520, 456, 2600),
    ]
    assert lists(MIXTURE.locate(np.arange(4090, 4102))) == [
        [0, 0, 1, 2, 1, 0, 0, 1, 1, 0, 1, 1],
        [87, 87, 26, 409, 26, 87, 87, 26, 26, 87, 26, 26],
        [137, 265, 1378, 29, 2882, 41, 9, 866, 1794, 361, 66, 1890],
    ]
    assert lists(MIXTURE.locate(np.array([10**6, 10**9]))) == [
        [0, 0],
        [21431, 21432058],
        [249, 338],
    ]


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(2, 3000), st.integers(1, 200), st.integers(0, 2**63))
def test_each_epoch_draws_every_window_once_and_stays_inside(tokens, length, seed):
    tokens = max(tokens, length + 1)
    order = WindowOrder((tokens,), length, seed)
    windows = order.windows_per_epoch(0)
    for epoch in range(4):
        _, epochs, starts = order.locate(np.arange(epoch * windows, (epoch + 1) * windows))
        assert set(epochs.tolist()) == {epoch}
        # Neighbours start T apart and hold T + 1 tokens: they overlap by exactly one.
        offset = order.offset(0, epoch)
        assert sorted(starts.tolist()) == [offset + i * length for i in range(windows)]
        assert 0 <= offset < length
        assert starts.max() + length + 1 <= tokens
        assert offset + windows * length + 1 + 2 * length > tokens  # less than two windows unread


@pytest.mark.parametrize("tokens", range(9, 17))
def test_a_source_of_one_window_stays_inside_in_every_epoch(tokens):
    _, epoch, start = WindowOrder((tokens,), 8, 0).locate(np.arange(50))
    assert epoch.tolist() == list(range(50))
    assert start.min() >= 0 and start.max() + 8 + 1 <= tokens


def test_boundaries_move_from_epoch_to_epoch():
    order = WindowOrder((100_000,), 1024, 0)
    assert len({order.offset(0, epoch) for epoch in range(20)}) > 15


def test_each_epoch_of_each_source_of_a_mixture_draws_every_window_once():
    source, epoch, start = MIXTURE.locate(np.arange(3 * BLOCK_WINDOWS))
    for s in range(3):
        windows = MIXTURE.windows_per_epoch(s)
        for e in range(epoch[source == s].max()):  # the last may be cut off
            starts = start[(source == s) & (epoch == e)]
            offset = MIXTURE.offset(s, e)
            assert sorted(starts.tolist()) == [offset + i * 32 for i in range(windows)], (s, e)


def test_mixture_quotas_are_exact_in_every_block():
    quotas = dict(enumerate(block_quotas((3.0, 6.0, 1.0))))
    for block in (0, 1, 2, 77, 10**6):
        first = block * BLOCK_WINDOWS
        source, _, _ = MIXTURE.locate(np.arange(first, first + BLOCK_WINDOWS))
        assert Counter(source.tolist()) == quotas
    blocks = [MIXTURE.locate(np.arange(4096) + 4096 * b)[0].tolist() for b in (0, 1)]
    assert blocks[0] != blocks[1]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_quotas_are_proportional_to_weights(weights):
    quotas = block_quotas(tuple(weights))
    assert sum(quotas) == BLOCK_WINDOWS
    for weight, quota in zip(weights, quotas, strict=True):
        assert abs(quota / BLOCK_WINDOWS - weight / sum(weights)) < 1 / BLOCK_WINDOWS


def test_weight_zero_gives_no_window_and_default_weights_are_token_counts():
    assert block_quotas((0.0, 2.0)) == (0, 4096)
    tokens = (3000, 1000)
    by_default = WindowOrder(tokens, 10, 0).locate(np.arange(500))
    explicit = WindowOrder(tokens, 10, 0, (3.0, 1.0)).locate(np.arange(500))
    assert lists(by_default) == lists(explicit)


@pytest.mark.parametrize(
    "weights", [(1.0, 1e-6), (), (0.0, 0.0), (1.0, -0.5), (float("nan"), 1.0), (float("inf"), 1.0)]
)
def test_weights_that_make_no_mixture_are_refused(weights):
    with pytest.raises(ValueError, match="data.weights"):
        block_quotas(weights)


def test_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match="one weight for each of the 2"):
        WindowOrder((100, 100), 10, 0, (1.0,))


def test_source_shorter_than_a_window_is_refused():
    assert WindowOrder((11,), 10, 0).windows_per_epoch(0) == 1
    with pytest.raises(ValueError, match="^a source of 10 tokens is too short.*at most 9"):
        WindowOrder((11, 10), 10, 0)
    with pytest.raises(ValueError, match="^data.path=b: a source of 1 tokens is too .*mixture$"):
        WindowOrder((11, 1), 10, 0, names=("a", "b"))
    assert WindowOrder((1,), 10, 0, planned_windows=(1,)).locate(np.array([0]))[2] == [0]


def test_a_source_of_too_few_tokens_for_its_share_is_named():
    with pytest.raises(ValueError, match="^data.path=b: its 100 of 1,000,100 tokens are .* leave"):
        WindowOrder((10**6, 100), 10, 0, names=("a", "b"))
    WindowOrder((10**6, 100), 10, 0, (0.9, 0.1), names=("a", "b"))


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**63),
    st.lists(st.integers(20, 10**6), min_size=1, max_size=3),
    st.integers(1, 19),
    st.lists(st.integers(0, 10**10), min_size=1, max_size=12),
)
def test_locating_many_equals_locating_one_by_one(seed, tokens, length, positions):
    order = WindowOrder(tuple(tokens), length, seed, (1.0,) * len(tokens))
    together = list(zip(*lists(order.locate(np.array(positions))), strict=True))
    assert together == [
        tuple(int(array[0]) for array in order.locate(np.array([p]))) for p in positions
    ]


def test_locate_works_for_ten_trillion_tokens():
    tokens = 10**13
    order = WindowOrder((tokens,), 1024, 0)
    positions = np.array([0, 1, 10**9, order.windows_per_epoch(0) - 1])
    _, epoch, start = order.locate(positions)
    assert epoch.tolist() == [0] * 4
    image = [
        plain_permute(p, order.windows_per_epoch(0), plain_keys("window", 0, 0, 0))
        for p in positions.tolist()
    ]
    assert start.tolist() == [order.offset(0, 0) + 1024 * i for i in image]


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [WindowOrder((10_000,), 10, seed) for seed in range(4)]
    windows = orders[0].windows_per_epoch(0)
    seen = set()
    for order in orders:
        for epoch in range(4):
            start = order.locate(np.arange(windows) + epoch * windows)[2] - order.offset(0, epoch)
            seen.add(tuple((start // 10).tolist()))
    assert len(seen) == 16


def test_a_weight_that_is_too_small_has_one_remedy_that_works():
    with pytest.raises(ValueError, match="raise it above .*, or leave its path out") as error:
        block_quotas((1.0, 1e-5))
    above = float(re.search(r"above (\S+),", str(error.value))[1])
    assert block_quotas((1.0, above * 1.01)) == (BLOCK_WINDOWS - 1, 1)
    assert "set it to 0" not in str(error.value)  # which the setting does not allow
