import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from relish.cache.dtypes import storage_dtype
from relish.cache.errors import DataError
from relish.cache.shard import HiddenLayout
from relish.extract.sink import ShardSink, SinkShard, _all_finite

TASKS = Path("/proc/self/task")
LENGTHS = [4, 3, 3, 1]
NAMES = [f"row {number} of train (id 'r{number}')" for number in range(4)]


class Shard:
    """Stands for a ShardWriter: keeps what is written and how it ended, and may be slow or fail."""

    def __init__(self, dtype="bfloat16", layers=2, delay=0.0, error=None, commit_delay=0.0, commit_error=None):
        self.layout = HiddenLayout(layers, 4, 5, storage_dtype(dtype))
        self.written = {}
        self.delay, self.error = delay, error
        self.commit_delay, self.commit_error = commit_delay, commit_error
        self.thread = None
        self.state = "waiting"

    @contextmanager
    def open(self):
        self.state = "open"
        try:
            yield self
            time.sleep(self.commit_delay)
            if self.commit_error is not None:
                raise self.commit_error
        except BaseException:
            self.state = "dropped"
            raise
        self.state = "committed"

    def write(self, position, values):
        self.thread = threading.current_thread()
        time.sleep(self.delay)
        if self.error is not None:
            raise self.error
        self.written[position] = values.clone()


def put(sink, shard, rows, states):
    """Makes the storage type as the forward pass does."""
    sink.put(shard, rows, states, states.to(shard.open.__self__.layout.dtype.torch))


class OneShard(ShardSink):
    """A sink for the batches of one shard."""

    def __init__(self, shard):
        super().__init__()
        self.shard = sink_shard(shard)

    def put(self, rows, states):
        put(super(), self.shard, rows, states)


def sink_shard(shard):
    return SinkShard(shard.open, LENGTHS, NAMES)


def open_sink(shard):
    return OneShard(shard)


def states(rows=4, layers=2):
    return torch.arange(rows * layers * 4 * 5).reshape(rows, layers, 4, 5).float() / 7


def put_many(shard, times, after=lambda: None):
    """Hand over the first row again and again: the shard never gets its last one."""
    with open_sink(shard) as sink:
        for _ in range(times):
            sink.put(range(1), states(1))
            after()


def alive():
    return [thread for thread in threading.enumerate() if thread.name == "relish-shard-writer"]


def test_real_tokens_are_written_in_the_storage_type_by_another_thread():
    shard, values = Shard(), states()
    with open_sink(shard) as sink:
        sink.put(range(0, 2), values[:2])
        sink.put(range(2, 4), values[2:])
    assert sorted(shard.written) == [0, 1, 2, 3]
    for row, written in shard.written.items():
        assert torch.equal(written, values[row, :, : LENGTHS[row]].bfloat16())
    assert shard.thread is not threading.current_thread()
    assert alive() == []


def test_what_stands_in_the_padding_does_not_matter():
    values = states()
    for row, length in enumerate(LENGTHS):
        values[row, :, length:] = float("nan")
    shard = Shard()
    with open_sink(shard) as sink:
        sink.put(range(4), values)
    assert len(shard.written) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_value_that_is_not_finite_is_named_by_row(bad, dtype):
    shard, values = Shard(dtype), states()
    values[2, 1, 2, 4] = bad
    with pytest.raises(DataError) as caught, open_sink(shard) as sink:
        sink.put(range(4), values)
    assert str(caught.value) == (
        "row 2 of train (id 'r2') has NaN or infinity in its hidden states; nothing of its shard was kept. "
        "Try another copy of the weights, or --on-nonfinite skip to leave such rows out"
    )


def test_in_a_narrower_type_a_wider_one_is_to_be_tried():
    shard, values = Shard("float32"), states().bfloat16()
    values[0, 1, 2, 4] = torch.nan
    with (
        pytest.raises(DataError, match="Try --compute-dtype float32, or --on-nonfinite skip"),
        open_sink(shard) as sink,
    ):
        sink.put(range(4), values)


def test_two_infinities_that_cancel_are_found():
    values = states()
    values[1, 0, 0, 0], values[1, 0, 0, 1] = float("inf"), float("-inf")
    with pytest.raises(DataError, match="row 1 of train"), open_sink(Shard()) as sink:
        sink.put(range(4), values)


def test_a_value_beyond_float16_is_named_with_the_largest():
    values = states()
    values[1, 0, 1, 2], values[1, 1, 0, 0] = 66000.0, -77595.0
    with pytest.raises(DataError) as caught, open_sink(Shard("float16")) as sink:
        sink.put(range(4), values)
    assert str(caught.value) == (
        "row 1 of train (id 'r1') has a hidden state of 77,595, and float16 ends at 65,504; nothing of its shard was "
        "kept. Try --dtype bfloat16, or --on-nonfinite skip to leave such rows out"
    )


def test_large_values_that_are_finite_are_kept():
    values = torch.full((4, 2, 4, 5), 3e38)
    shard = Shard("float32")
    with open_sink(shard) as sink:
        sink.put(range(4), values)
    assert torch.equal(shard.written[0], values[0])


def test_an_error_of_the_writer_comes_out_and_nothing_hangs():
    with pytest.raises(OSError, match="No space left"):
        put_many(Shard(error=OSError(28, "No space left")), 50)
    assert alive() == []


def test_the_error_shows_at_a_later_put_already():
    reached = []
    with pytest.raises(OSError, match="full"):
        put_many(Shard(error=OSError("full")), 1000, lambda: reached.append(time.sleep(0.01)))
    assert len(reached) < 1000


def test_an_error_of_the_block_is_the_one_that_comes_out():
    interrupt_after((sink_shard(Shard(error=OSError("full"))), range(1)))


def test_few_batches_wait():
    shard = Shard(delay=0.02)
    with open_sink(shard) as sink:
        for row in (*[0] * 12, 3):
            sink.put(range(row, row + 1), states(1))
            assert sink._queue.qsize() <= 2


# Several shards


def test_a_shard_is_begun_with_its_first_batch_and_committed_with_its_last():
    first, second = Shard(), Shard()
    with ShardSink() as sink:
        one, two = sink_shard(first), sink_shard(second)
        put(sink, one, range(0, 2), states(2))
        wait_for(lambda: len(first.written) == 2)
        assert (first.state, second.state) == ("open", "waiting")
        put(sink, one, range(2, 4), states(2))
        wait_for(lambda: first.state == "committed")  # without a batch of the next
        put(sink, two, range(0, 4), states())
    assert second.state == "committed"
    assert first.thread is second.thread


def test_a_commit_keeps_nobody_waiting():
    shards = [Shard(commit_delay=0.3) for _ in range(2)]
    started = time.perf_counter()
    with ShardSink() as sink:
        for shard in shards:
            put(sink, sink_shard(shard), range(4), states())
        assert time.perf_counter() - started < 0.2
    assert [shard.state for shard in shards] == ["committed"] * 2


def test_a_commit_that_fails_drops_what_comes_after():
    first, second = Shard(commit_error=OSError("full")), Shard()

    def run():
        with ShardSink() as sink:
            for shard in (first, second):
                put(sink, sink_shard(shard), range(4), states())

    with pytest.raises(OSError, match="full"):
        run()
    assert (first.state, second.state) == ("dropped", "waiting")
    assert alive() == []


def interrupt_after(*handed_over):
    def run():
        with ShardSink() as sink:
            for shard, rows in handed_over:
                put(sink, shard, rows, states(len(rows)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert alive() == []


def test_an_interruption_keeps_the_shard_that_was_complete_and_drops_the_one_at_work():
    first, second = Shard(commit_delay=0.1), Shard()
    interrupt_after((sink_shard(first), range(4)), (sink_shard(second), range(2)))
    assert (first.state, second.state) == ("committed", "dropped")


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_hidden_states_made_in_inference_mode_are_taken():
    shard = Shard()
    with open_sink(shard) as sink, torch.inference_mode():
        sink.put(range(4), states() * 2)
    assert np.isclose(shard.written[0][0, 0, 1].item(), 2 / 7, rtol=0.01)


def test_a_value_beyond_bfloat16_is_named_with_the_largest():
    values = states()
    values[1, 0, 1, 2] = 3.4e38  # a float32 that no bfloat16 is near
    with pytest.raises(DataError) as caught, open_sink(Shard("bfloat16")) as sink:
        sink.put(range(4), values)
    assert str(caught.value) == (
        "row 1 of train (id 'r1') has a hidden state of 3.4e+38, and bfloat16 ends at 3.38953e+38; nothing of its "
        "shard was kept. Try --dtype float32, or --on-nonfinite skip to leave such rows out"
    )
    shard = Shard("float32")
    with open_sink(shard) as sink:
        sink.put(range(4), values)
    assert len(shard.written) == 4


def test_draining_waits_until_no_batch_is_held():
    shard = Shard(delay=0.02)
    with open_sink(shard) as sink:
        batches = [states(1) for _ in range(3)]
        held = [weakref.ref(values) for values in batches]
        while batches:
            sink.put(range(1), batches.pop())
        sink.drain()
        assert all(one() is None for one in held)
        assert len(shard.written) == 1
        sink.drain()  # with nothing to wait for
        sink.put(range(3, 4), states(1))


def test_draining_after_an_error_tells_it():
    def put_and_drain():
        with open_sink(Shard(error=OSError("full"))) as sink:
            sink.put(range(1), states(1))
            sink.drain()
            pytest.fail("the forward pass would be tried again")

    with pytest.raises(OSError, match="full"):
        put_and_drain()
    assert alive() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_known_as_finite_or_not(dtype):
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = everything.isfinite()
    assert _all_finite(everything[finite][None])
    assert not any(_all_finite(value) for value in everything[~finite].split(1))


def test_a_float_is_known_as_finite_or_not():
    assert _all_finite(torch.tensor([[0.0, -3.4e38, 1e-45]]))
    for value in (float("nan"), float("inf"), float("-inf")):
        assert not _all_finite(torch.tensor([[0.0, value]]))


@pytest.mark.skipif(not TASKS.is_dir(), reason="threads are counted as Linux shows them")
def test_the_check_takes_no_threads_from_the_forward_pass():
    """torch would start some for a row of this size, and they would wait for more in the backbone's way."""
    row = torch.zeros(2, 400, 512, dtype=torch.bfloat16)
    found = []

    def check():
        before = sum(1 for _ in TASKS.iterdir())
        for _ in range(20):
            assert _all_finite(row)
        found.append(sum(1 for _ in TASKS.iterdir()) - before)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert found[0] <= 0  # one of an earlier test may have ended meanwhile
