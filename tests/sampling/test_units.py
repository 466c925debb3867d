from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.sampling.units import Unit, leading_units, missing_units

COUNTS = st.lists(st.integers(1, 100), min_size=1, max_size=5)


@settings(deadline=None)
@given(COUNTS, st.integers(1, 8), st.randoms())
def test_any_order_of_sizes_and_kills_ends_with_each_sample_once(counts, batch_size, random):
    committed: dict[int, int] = {}
    for num_samples in counts:
        missing = missing_units(num_samples, batch_size, committed)
        done = random.sample(missing, random.randint(0, len(missing)))  # then the run is killed
        committed |= {unit.first: unit.num_samples for unit in done}
    committed |= {unit.first: unit.num_samples for unit in missing_units(max(counts), batch_size, committed)}
    held = [index for first in sorted(committed) for index in range(first, first + committed[first])]
    assert held == list(range(max(counts)))
    assert leading_units(committed) == sorted(committed)
    assert not missing_units(max(counts), batch_size, committed)
    for first, count in committed.items():
        batches = Unit(first, count).batches(batch_size)
        assert set(range(first, first + count)) <= {index for batch in batches for index in batch}
        assert all(len(batch) == batch_size and batch.start % batch_size == 0 for batch in batches)


def test_raising_the_number_adds_what_the_last_batch_dropped():
    assert missing_units(5, 3, {}) == [Unit(0, 3), Unit(3, 2)]
    assert missing_units(8, 3, {0: 3, 3: 2}) == [Unit(5, 1), Unit(6, 2)]
    assert leading_units({0: 3, 6: 2}) == [0]  # sample 3 is not there yet


def test_units_of_a_large_set_hold_several_batches():
    assert missing_units(64, 16, {}) == [Unit(first, 16) for first in range(0, 64, 16)]
    assert missing_units(1001, 16, {0: 64, 128: 64})[:3] == [Unit(64, 64), Unit(192, 64), Unit(256, 64)]
    assert Unit(64, 40).batches(16) == [range(64, 80), range(80, 96), range(96, 112)]
