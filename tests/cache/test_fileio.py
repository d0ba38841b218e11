import errno
import json
import math
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relish.cache import fileio
from relish.cache.errors import CacheError


@pytest.fixture(params=["positioned", "seek"], autouse=True)
def platform(request, monkeypatch):
    """Run each test as on Linux, and as where preadv, pwrite and posix_fallocate are missing."""
    if request.param == "seek":
        monkeypatch.setattr(fileio, "_POSITIONED", False)
        for name in ("preadv", "pwrite", "posix_fallocate"):
            monkeypatch.delattr(os, name, raising=False)


@pytest.fixture
def descriptor(tmp_path):
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def read(descriptor, count, offset):
    buffer = bytearray(count)
    done = fileio.read_into(descriptor, memoryview(buffer), offset)
    return done, bytes(buffer)


def test_what_is_written_at_a_place_is_read_from_it(descriptor):
    fileio.write_at(descriptor, memoryview(b"world"), 6)
    fileio.write_at(descriptor, memoryview(b"hello "), 0)
    assert read(descriptor, 11, 0) == (11, b"hello world")
    assert read(descriptor, 3, 7) == (3, b"orl")


def test_reading_past_the_end_says_how_much_there_was(descriptor):
    fileio.write_at(descriptor, memoryview(b"abc"), 0)
    assert read(descriptor, 5, 1) == (2, b"bc\0\0\0")
    assert read(descriptor, 5, 9) == (0, bytes(5))


def test_asking_for_bytes_ahead_of_time_harms_nothing(descriptor):
    fileio.write_at(descriptor, memoryview(b"abc"), 0)
    fileio.read_soon(descriptor, 0, 10)
    fileio.read_soon(-1, 0, 10)
    fileio.read_soon(descriptor, 0, 1 << 63)
    assert read(descriptor, 3, 0) == (3, b"abc")


def test_short_reads_and_writes_are_taken_up_where_they_stopped(descriptor, monkeypatch):
    data = bytes(range(256))
    for name in ("preadv", "pwrite", "read", "write"):
        if not hasattr(os, name):
            continue
        whole = getattr(os, name)
        short = {
            "preadv": lambda fd, buffers, offset, whole=whole: whole(fd, [buffers[0][:7]], offset),
            "pwrite": lambda fd, data, offset, whole=whole: whole(fd, data[:7], offset),
            "read": lambda fd, count, whole=whole: whole(fd, min(count, 7)),
            "write": lambda fd, data, whole=whole: whole(fd, data[:7]),
        }[name]
        monkeypatch.setattr(os, name, short)
    fileio.write_at(descriptor, memoryview(data), 3)
    assert read(descriptor, 256, 3) == (256, data)


def test_allocating_gives_the_file_its_size_and_keeps_what_it_holds(descriptor):
    fileio.write_at(descriptor, memoryview(b"abc"), 0)
    fileio.allocate(descriptor, 1000)
    assert os.fstat(descriptor).st_size == 1000
    assert read(descriptor, 3, 0) == (3, b"abc")


def test_threads_on_one_descriptor_do_not_disturb_each_other(descriptor):
    fileio.write_at(descriptor, memoryview(b"".join(bytes([n]) * 64 for n in range(8))), 0)
    wrong = []

    def work(number):
        for _ in range(100):
            got = read(descriptor, 64, number * 64)
            wrong.extend({got} - {(64, bytes([number]) * 64)})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_shard_written_one_way_is_the_same_as_one_written_the_other(make, tmp_path, monkeypatch):
    here = make.write(tmp_path / "here")
    monkeypatch.undo()
    there = make.write(tmp_path / "there")
    assert make.contents(here) == make.contents(there)


def test_json_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "manifest.json"
    fileio.write_json_durably(path, {"a": 1})
    fileio.write_json_durably(path, {"prompt": "Текст: {text}"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "Текст: {text}"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_old_json_stands_if_writing_the_new_one_stops(tmp_path, monkeypatch, step):
    path = tmp_path / "manifest.json"
    fileio.write_json_durably(path, {"a": 1})
    whole = path.read_bytes()

    def stop(*_arguments):
        raise OSError("no room")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (type(path), "replace")), stop)
    with pytest.raises(OSError, match="no room"):
        fileio.write_json_durably(path, {"a": 2})
    assert path.read_bytes() == whole


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        fileio.write_json_durably(tmp_path / "manifest.json", {"a": math.nan})
    assert list(tmp_path.iterdir()) == []


@given(pieces=st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=50)), max_size=8))
def test_reads_see_the_last_write_at_every_place(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("pieces") / "file"
    expected = bytearray(400)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fileio.allocate(descriptor, 400)
        for offset, data in pieces:
            fileio.write_at(descriptor, memoryview(data), offset)
            expected[offset : offset + len(data)] = data
        assert read(descriptor, 400, 0) == (400, bytes(expected))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("number", "way"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EACCES, "make the folder writable"),
        (errno.EROFS, "make the folder writable"),
        (errno.ENOENT, "put its folder back"),
        (errno.EISDIR, "take away the folder of that name"),
        (errno.EIO, "see to that"),
    ],
)
def test_what_to_do_about_a_file_that_cannot_be_written_follows_from_the_error(tmp_path, number, way):
    with pytest.raises(CacheError) as caught, fileio.writing_cache(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == (
        f"{tmp_path / 'x'} cannot be written ({os.strerror(number)}); finished shards are kept: {way}, and run the "
        "same command again"
    )
