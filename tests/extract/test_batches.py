import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relish.cache.errors import BackboneError
from relish.extract.batches import Budget, run_in_batches


def slots(lengths, batch):
    return lengths[batch[0]] * len(batch)


def memory(lengths, room, error=None):
    """A forward pass that has `room` token slots; keeps what it was asked for."""
    tried = []

    def forward(batch):
        tried.append(slots(lengths, batch))
        if tried[-1] > room:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return list(batch)

    return forward, tried


LENGTHS = st.lists(st.integers(1, 50), max_size=60).map(lambda lengths: sorted(lengths, reverse=True))


@given(LENGTHS, st.integers(1, 500))
def test_every_row_once_in_order_within_the_budget(lengths, budget):
    batches = [batch for batch, _ in run_in_batches(lengths, Budget(budget), list)]
    assert [row for batch in batches for row in batch] == list(range(len(lengths)))
    assert all(len(batch) == 1 or slots(lengths, batch) <= budget for batch in batches)
    # No batch but the last stops short of the budget.
    assert all(lengths[batch[0]] * (len(batch) + 1) > budget for batch in batches[:-1])


def test_what_the_forward_pass_gave_comes_with_its_rows():
    found = list(run_in_batches([4, 3, 2, 1], Budget(8), lambda batch: f"rows {batch[0]} to {batch[-1]}"))
    assert found == [(range(0, 2), "rows 0 to 1"), (range(2, 4), "rows 2 to 3")]


@given(LENGTHS.filter(bool), st.integers(1, 500), st.integers(0, 300))
def test_out_of_memory_halves_the_batch_until_it_fits(lengths, budget, more):
    room = lengths[0] + more
    forward, tried = memory(lengths, room)
    batches = list(run_in_batches(lengths, Budget(budget), forward))
    assert [row for _, rows in batches for row in rows] == list(range(len(lengths)))
    assert all(slots(lengths, batch) <= room for batch, _ in batches)
    assert sum(size > room for size in tried) <= 10


def test_later_batches_stay_at_the_size_that_fitted():
    lengths = [10] * 64
    forward, tried = memory(lengths, 90)
    budget = Budget(640)
    list(run_in_batches(lengths, budget, forward))
    assert tried == [640, 320, 160, *[80] * 8]
    list(run_in_batches(lengths, budget, forward))  # the next shard
    assert tried[11:] == [80] * 8


def test_rows_are_halved_down_to_one():
    lengths = [10] * 8
    forward, tried = memory(lengths, 10)
    list(run_in_batches(lengths, Budget(80), forward))
    assert tried == [80, 40, 20, *[10] * 8]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("Invalid buffer size: 20.00 GB"),
    ],
)
def test_a_single_row_that_does_not_fit_is_named_by_its_length(error):
    forward, tried = memory([4096, 10], 100, error)
    with pytest.raises(BackboneError) as caught:
        list(run_in_batches([4096, 10], Budget(8192), forward))
    assert str(caught.value) == (
        "out of memory on a single row of 4,096 tokens; use --max-length with --truncate, a smaller --compute-dtype, "
        "or a device with more memory"
    )
    assert tried == [8192, 4096]


def test_nobody_is_told_to_cut_rows_that_must_stay_whole():
    forward, _ = memory([4096], 100)
    with pytest.raises(BackboneError) as caught:
        list(run_in_batches([4096], Budget(8192), forward, shorten=""))
    assert str(caught.value) == (
        "out of memory on a single row of 4,096 tokens; use a smaller --compute-dtype, or a device with more memory"
    )


def test_any_other_error_is_passed_on_at_once():
    forward, tried = memory([5] * 8, 10, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(run_in_batches([5] * 8, Budget(40), forward))
    assert len(tried) == 1


def test_what_earlier_batches_hold_is_released_before_a_range_is_tried_again():
    """A row that does not fit beside them may fit alone."""
    lengths, held, events = [10] * 4, [], []

    def forward(batch):
        events.append(slots(lengths, batch))
        if len(held) > 1 or events[-1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        held.append(batch)

    def release():
        events.append("released")
        held.clear()

    assert [batch for batch, _ in run_in_batches(lengths, Budget(10), forward, release)] == [
        range(n, n + 1) for n in range(4)
    ]
    assert events == [10, 10, 10, "released", 10, 10]


def test_the_generator_holds_no_result_during_the_next_pass():
    class Result:
        pass

    seen = []

    def forward(_batch):
        assert all(one() is None for one in seen)
        result = Result()
        seen.append(weakref.ref(result))
        return result

    for batch, result in run_in_batches([1, 1, 1], Budget(1), forward):
        del batch, result
    assert len(seen) == 3
