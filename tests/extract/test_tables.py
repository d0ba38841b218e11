import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relish.cache.errors import DataError
from relish.extract.tables import hub_splits, read_hub, read_rows

# The folder is the test's, not the example's; every example overwrites its one file.
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)

# csv refuses NUL before Python 3.11.
text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
# What makes a table hard to read, more often than chance would give it.
hard_text = (
    text | st.text(st.sampled_from('",\t\n\r a'), max_size=8) | st.sampled_from(["NA", "null", "nan", "007", ""])
)
plain_text = st.text(st.characters(codec="utf-8", exclude_characters='\0\t\r\n"'), max_size=12)
values = hard_text | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.none() | st.booleans()


def tables(cells, names=plain_text, least=2):
    """Draw a header of distinct names and rows of as many cells, at least two columns so that no line is blank."""
    return st.lists(names.filter(str.strip), min_size=least, max_size=4, unique=True).flatmap(
        lambda header: st.lists(st.lists(cells, min_size=len(header), max_size=len(header)), max_size=5).map(
            lambda rows: [dict(zip(header, row, strict=True)) for row in rows] or [dict.fromkeys(header, "x")]
        )
    )


def write_delimited(path, rows, delimiter, quoting=csv.QUOTE_MINIMAL):
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    return path


@one_folder
@given(tables(hard_text))
def test_csv_gives_back_every_cell(tmp_path, rows):
    assert list(read_rows(write_delimited(tmp_path / "a.csv", rows, ","))) == rows


@one_folder
@given(tables(hard_text), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_quoted_tsv_gives_back_every_cell(tmp_path, rows, quoting):
    assert list(read_rows(write_delimited(tmp_path / "a.tsv", rows, "\t", quoting))) == rows


@one_folder
@given(tables(plain_text | st.text(st.sampled_from("' ,;|a"))), st.sampled_from(["\n", "\r\n"]))
def test_plain_tsv_gives_back_every_cell(tmp_path, rows, end):
    path = tmp_path / "a.tsv"
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    path.write_text(end.join(lines), encoding="utf-8", newline="")
    assert list(read_rows(path)) == rows


@one_folder
@given(tables(values, names=text, least=1))
def test_jsonl_gives_back_every_value(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert list(read_rows(path)) == rows


@one_folder
@given(st.lists(st.tuples(hard_text | st.none(), st.none() | st.floats(allow_nan=False)), min_size=1))
def test_parquet_gives_back_every_value(tmp_path, cells):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts, scores = zip(*cells, strict=True)
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()), "a.b": pyarrow.array(scores, "float64")})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == [{"text": text, "a.b": score} for text, score in cells]


@pytest.mark.parametrize(
    ("suffix", "content"), [("CSV", "a,b\n1,2\n"), ("tsv", "a\tb\n1\t2\n"), ("ndjson", '{"a": "1", "b": "2"}')]
)
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_text(content, encoding="utf-8-sig")
    assert list(read_rows(path)) == [{"a": "1", "b": "2"}]


def test_blank_lines_are_no_rows(tmp_path):
    for name, content in {
        "a.csv": "a,b\r\n1,2\r\n\r\n",
        "a.tsv": "a\tb\n\n1\t2\n\n",
        "q.tsv": 'a\tb\n\n"1"\t2\n\n',
    }.items():
        (tmp_path / name).write_text(content, newline="")
        assert list(read_rows(tmp_path / name)) == [{"a": "1", "b": "2"}]


def test_a_cell_may_be_longer_than_the_csv_modules_default_limit(tmp_path):
    cell = "long " * 40_000
    (tmp_path / "a.csv").write_text(f"text,y\n{cell},1\n")
    assert next(read_rows(tmp_path / "a.csv"))["text"] == cell


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([['"Yes, he said', "5"]], id="a quote opens a cell and does not close it"),
        pytest.param([['"Yes" he said', "5"]], id="text follows the closing quote"),
        pytest.param([['"a "b" c"', "5"]], id="a quote inside a quoted cell is not doubled"),
        pytest.param([['"whole"', "1"], ['new "track"', "2"]], id="a cell with a quote inside is not quoted"),
        pytest.param([['"a', 'b"'], ["c", "d"]], id="the quotes pair up across cells"),
        pytest.param([['"a', "1", "x"], ["b", '2"', "y"]], id="the quotes pair up across lines"),
        pytest.param([['5"', "1"], ["b", "2"]], id="no cell starts with a quote"),
    ],
)
def test_quotes_are_text_in_a_tsv_that_was_not_written_with_quoting(tmp_path, rows):
    header = [f"column {i}" for i in range(len(rows[0]))]
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(row) for row in [header, *rows]))
    assert [list(row.values()) for row in read_rows(tmp_path / "a.tsv")] == rows


def test_a_spreadsheets_tsv_loses_its_quotes(tmp_path):
    (tmp_path / "a.tsv").write_text('text\ty\n"He said ""hi""\tand\nleft"\t1\nplain\t2\n')
    assert list(read_rows(tmp_path / "a.tsv")) == [
        {"text": 'He said "hi"\tand\nleft', "y": "1"},
        {"text": "plain", "y": "2"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"a,b\n1,2\n1,2,3\n",
            "the row at line 3 has a wrong number of cells: expected 2 as in the header, got 3",
        ),
        (
            "a.csv",
            b'a,b\n"1\n1",2\n1\n',
            "the row at line 4 has a wrong number of cells: expected 2 as in the header, got 1",
        ),
        (
            "a.tsv",
            b"a\tb\n1\t2\n1\n",
            "the row at line 3 has a wrong number of cells: expected 2 as in the header, got 1",
        ),
        (
            "a.tsv",
            b'a\tb\n"1"\t2\n1\n',
            "the row at line 3 has a wrong number of cells: expected 2 as in the header, got 1",
        ),
        ("a.csv", b'a,b\n1,2\n3,"4\n5,6\n', "the row at line 3 has broken quoting: unexpected end of data"),
        ("a.csv", b'a,b\n1,2\n3,"4"5\n', "the row at line 3 has broken quoting"),
        ("a.csv", b"a,b\n1,2\n1,caf\xe9\n", "line 3 is not UTF-8; save the file as UTF-8"),
        ("a.tsv", b"a\tb\n1\tcaf\xe9\n", "line 2 is not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "line 2 is not UTF-8"),
        ("a.csv", b"\xff\xfea\x00,\x00", "line 1 is not UTF-8"),
        ("a.csv", b"\na,b\n1,2\n", "has no header: its first line must name the columns"),
        ("a.tsv", b"\t\n1\t2\n", "has no header"),
        ("a.csv", b"a,b,a\n1,2,3\n", "has more than one column named 'a'"),
        ("a.tsv", b"a\ta\n1\t2\n", "has more than one column named 'a'"),
        ("a.csv", b"", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3 is not JSON: Expecting value"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
            "line 2 is JSON that is nested too deeply to be read",
        ),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2 is not a JSON object, but a list"),
        ("a.parquet", b"PAR1 no more", "cannot be read as Parquet"),
        ("a.xlsx", b"PK", "has a suffix that is not supported; supported are .csv, .tsv, .jsonl, .ndjson, .parquet"),
        ("a.csv.gz", b"\x1f\x8b", "has a suffix that is not supported"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_rows(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name))
    assert message in str(error.value)


def test_a_path_that_is_no_file_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv does not exist$"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv is a directory, not a file of rows$"):
        read_rows(str(tmp_path / "folder.csv"))


@pytest.mark.parametrize("pair", ["en-zh", "ru-en", "si-en"])
@pytest.mark.parametrize("split", ["train", "dev", "test20"])
def test_wmt_rows_keep_their_quote_characters(shared_data, pair, split):
    path = shared_data / "wmt-mlqe-pe" / pair / f"{split}.tsv"
    rows = list(read_rows(path))
    assert sum(str(cell).count('"') for row in rows for cell in row.values()) == path.read_text("utf-8").count('"') > 0


def test_stsb_rows_lose_their_csv_quotes(shared_data):
    rows = list(read_rows(shared_data / "stsb" / "train.csv"))
    assert list(rows[0].values()) == ["A plane is taking off.", "An air plane is taking off.", "5.0"]
    assert rows[1523]["sentence1"] == 'A dog in a "superman" shirt sleeps on a blanket.'


def test_times_in_parquet_are_text(tmp_path):
    """Python has no nanoseconds and no year 10000."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    times = {
        "ns": pyarrow.array([1], pyarrow.timestamp("ns")),
        "far": pyarrow.array([2**62], pyarrow.timestamp("us")),
        "day": pyarrow.array([1], pyarrow.date32()),
        "hour": pyarrow.array([1], pyarrow.time64("ns")),
        "took": pyarrow.array([5], pyarrow.duration("ns")),
    }
    parquet.write_table(pyarrow.table({"text": ["a"], **times}), tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet")
    assert (row["text"], row["ns"], row["day"]) == ("a", "1970-01-01 00:00:00.000000001", "1970-01-02")
    assert (row["hour"], row["took"]) == ("00:00:00.000000001", 5)
    assert isinstance(row["far"], str)


def test_a_column_of_jsonl_that_the_first_row_lacks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b", "score": 1, "id": "x"}\n')
    assert list(read_rows(path)) == [
        {"text": "a", "score": None, "id": None},
        {"text": "b", "score": 1, "id": "x"},
    ]


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A data set in a folder, which datasets loads by its path as it would one at the hub by its id."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split in ("train", "test"):
        row = {"translation": {"en": split, "zh": "句子"}, "mean": 50.5}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return str(folder)


def test_the_hubs_nested_columns_are_flattened(hub_folder):
    assert hub_splits(hub_folder) == ["train", "test"]
    assert list(read_hub(hub_folder, "test")) == [{"translation.en": "test", "translation.zh": "句子", "mean": 50.5}]


@pytest.mark.parametrize(
    ("split", "config", "message"),
    [
        ("dev", None, "the hub did not give split 'dev' of the data set '.*pairs': Unknown split \"dev\""),
        ("test", "xx", r"the hub did not give split 'test' of the data set '.*pairs' \(config 'xx'\): BuilderConfig"),
    ],
)
def test_a_split_or_config_that_the_hub_lacks_is_a_data_error(hub_folder, split, config, message):
    with pytest.raises(DataError, match=message):
        read_hub(hub_folder, split, config)


def test_a_data_set_of_a_script_is_refused_with_where_its_rows_are(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.py").write_text("")
    message = (
        f"'{folder}': Dataset scripts are no longer supported, but found pairs.py; --hub-revision "
        "refs/convert/parquet takes what the hub itself made of it, where it did"
    )
    with pytest.raises(DataError) as caught:
        read_hub(str(folder), "test")
    assert str(caught.value) == f"the hub did not give split 'test' of the data set {message}"
    with pytest.raises(DataError) as caught:
        hub_splits(str(folder))
    assert str(caught.value) == f"the hub did not give the splits of the data set {message}"


def test_a_hub_out_of_reach_is_a_data_error_of_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\nTraceback and more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(DataError, match=r"^the hub did not give split 'test' of the data set 'a/b': Couldn't .* Hub$"):
        read_hub("a/b", "test")
    with pytest.raises(DataError, match=r"^the hub did not give the splits of the data set 'a/b': Couldn't .* Hub$"):
        hub_splits("a/b")
