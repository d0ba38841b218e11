"""Where rows come from; at the hub the real datasets library is asked for the right thing, without a network."""

import pytest

from relish.cache.errors import DataError
from relish.extract.settings import TextSettings
from relish.extract.sources import load_texts


@pytest.fixture
def asked(monkeypatch):
    """What the library was asked for; it has three splits of one row."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def split_names(path, config_name=None, *, revision=None):
        calls.append((path, config_name, revision))
        return ["train", "validation", "test"]

    def load(path, name=None, *, split, revision=None):
        calls.append((path, name, split, revision))
        columns = ("sentence_A", "sentence_B", "relatedness_score", "translation.en", "translation.zh", "mean")
        return datasets.Dataset.from_list([dict.fromkeys(columns, "4")])

    monkeypatch.setattr(datasets, "get_dataset_split_names", split_names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


SCRIPTLESS = "refs/convert/parquet"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"task": "sick"}, ("RobZamp/sick", None, SCRIPTLESS)),
        ({"task": "wmt-en-zh"}, ("wmt/wmt20_mlqe_task1", "en-zh", None)),
        ({"task": "sick", "hub_config": "c", "hub_revision": "main"}, ("RobZamp/sick", "c", "main")),
        ({"task": "sick", "hub": "me/sick"}, ("me/sick", None, None)),
        ({"task": "sick", "hub": "me/sick", "hub_config": "c", "hub_revision": "v2"}, ("me/sick", "c", "v2")),
    ],
)
def test_the_data_set_the_config_and_the_revision(asked, settings, expected):
    texts = load_texts(TextSettings(model="m", **settings), None)
    assert list(texts.splits) == ["train", "validation", "test"]
    name, config, revision = expected
    splits = [(name, config, split, revision) for split in texts.splits]
    assert asked == [expected, *splits]


def test_some_of_the_splits(asked):
    assert list(load_texts(TextSettings(model="m", task="sick", hub_splits=("test",)), None).splits) == ["test"]
    assert len(asked) == 2


@pytest.mark.parametrize("split", ["train", "dev"])
def test_blank_labels_that_no_head_can_learn_from_are_refused_before_the_llm_reads(split):
    labelled = [{"text": "a film", "score": score} for score in (1, 2, 5)]
    data = {"train": labelled, split: [*labelled, {"text": "dull", "score": " "}]}
    with pytest.raises(DataError) as caught:
        load_texts(TextSettings(model="m", data=data), None)
    assert str(caught.value) == (
        f"1 of 4 rows of the split '{split}' have no label, first row 3 (id '3'), and heads learn from labelled rows "
        "alone; fill them in, or leave those rows out"
    )


def test_blank_labels_may_be_elsewhere_and_everywhere():
    rows = [{"text": "a film", "score": 1}, {"text": "dull", "score": None}]
    bare = [{"text": "a film", "score": ""}]
    splits = load_texts(TextSettings(model="m", data={"test": rows, "train": bare}, label_range=(0, 5)), None).splits
    assert [int((splits[name].targets != splits[name].targets).sum()) for name in ("test", "train")] == [1, 1]
