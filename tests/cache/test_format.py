import h5py
import numpy as np
import pytest
import torch

# Plain h5py alone reads these files: the table of the format, and nothing of the package's own reader.

TYPES = {"bfloat16": (2, 8, 7, 127), "float16": (2, 5, 10, 15), "float32": (4, 8, 23, 127)}


@pytest.fixture(scope="module", params=[(dtype, layers) for dtype in TYPES for layers in ((3,), (0, 2, 3))], ids=str)
def written(request, make, tmp_path_factory):
    dtype, layers = request.param
    rows = make.rows()
    folder = make.write(tmp_path_factory.mktemp("format") / "c", {"train": rows}, dtype=dtype, layers=layers)
    return folder, rows, make.states(rows, make.identity(dtype=dtype, layers=layers)), dtype, layers


def shards(folder):
    return sorted(folder.glob("train-*.h5"))


def test_names_shapes_and_types_are_those_of_the_table(written, make):
    folder, _, _, dtype, layers = written
    seen = 0
    for path in shards(folder):
        with h5py.File(path, "r") as file:
            N, T = file["mask"].shape
            expected = {
                "mask": ((N, T), np.dtype("u1")),
                "input_ids": ((N, T), np.dtype("<i4")),
                "target": ((N,), np.dtype("<f8")),
                "row": ((N,), np.dtype("<i8")),
                "checksum": ((N,), np.dtype("<u4")),
            }
            assert {name: (file[name].shape, file[name].dtype) for name in expected} == expected
            assert set(file) == {*expected, "hidden", "id"}
            assert file["hidden"].shape == ((N, T, make.WIDTH) if layers == (3,) else (N, 3, T, make.WIDTH))
            kind = file["hidden"].id.get_type()
            assert isinstance(kind, h5py.h5t.TypeFloatID)
            assert kind.get_order() == h5py.h5t.ORDER_LE
            _, _, exponent, _, mantissa = kind.get_fields()
            assert (kind.get_size(), exponent, mantissa, kind.get_ebias()) == TYPES[dtype]
            assert file["id"].shape == (N,)
            assert h5py.check_string_dtype(file["id"].dtype).encoding == "utf-8"
            assert file["hidden"].chunks is None
            seen += N
    assert seen == 10


def test_h5py_reads_the_numbers_that_were_written(written):
    folder, rows, states, _, layers = written
    for path in shards(folder):
        with h5py.File(path, "r") as file:
            hidden = file["hidden"].astype("f4")[()].reshape(len(file["row"]), len(layers), *file["hidden"].shape[-2:])
            for position, row in enumerate(file["row"][()]):
                length = len(rows.tokens[row])
                assert np.array_equal(hidden[position, :, :length], states[row].float().numpy())
                assert not hidden[position, :, length:].any()
                assert list(file["mask"][position]) == [1] * length + [0] * (hidden.shape[2] - length)
                assert list(file["input_ids"][position, :length]) == list(rows.tokens[row])
                assert not file["input_ids"][position, length:].any()
                assert np.array_equal(file["target"][position], rows.target[row], equal_nan=True)
                assert file["id"].asstr()[position] == rows.ids[row]


@pytest.mark.parametrize("value", [1.0, -2.5, 0.0078125, 77595.0, 3.0e38, 1.0e-38, 0.0])
def test_bfloat16_is_a_float_with_the_right_numbers(make, tmp_path, value):
    rows = make.rows((1,))
    split = make.open_writer(tmp_path / "c").split("train", rows, shard_rows=1)
    states = torch.full((1, 1, make.WIDTH), value).bfloat16()
    with split.shard(0) as shard:
        shard.write(0, states)
    with h5py.File(tmp_path / "c" / "train-00000.h5", "r") as file:
        assert file["hidden"].dtype.kind == "f"
        assert np.array_equal(file["hidden"].astype("f4")[()], states.float().numpy())


def test_a_row_is_never_wider_than_the_longest_of_its_shard(written):
    folder, rows, _, _, _ = written
    for path in shards(folder):
        with h5py.File(path, "r") as file:
            assert file["mask"].shape[1] == max(len(rows.tokens[row]) for row in file["row"][()])


def test_ids_of_any_script_and_width_come_back(make, tmp_path):
    ids = ["", "a", "句子-1", "é" * 300, "👩‍🚀", "a b\tc\nd", " x "]
    rows = make.rows((2,) * len(ids), ids=ids)
    make.write(tmp_path / "c", {"train": rows}, shard_rows=len(ids))
    with h5py.File(tmp_path / "c" / "train-00000.h5", "r") as file:
        assert list(file["id"].asstr()[()]) == ids


def test_two_writes_are_the_same_byte_for_byte(make, tmp_path):
    first, second = make.write(tmp_path / "a"), make.write(tmp_path / "b")
    assert make.contents(first) == make.contents(second)


def test_the_manifest_holds_no_path(make, tmp_path):
    folder = make.write(tmp_path / "c")
    assert str(tmp_path) not in (folder / "manifest.json").read_text()
