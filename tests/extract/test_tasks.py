import pytest

from relish.cache.errors import DataError
from relish.extract.prompt import prompt_fields
from relish.extract.rows import load_split, resolve_columns
from relish.extract.tables import read_rows
from relish.extract.tasks import TASKS, get_task


def test_the_presets_are_the_five_of_the_paper():
    assert {name: task.label_range for name, task in TASKS.items()} == {
        "stsb": (0, 5),
        "sick": (1, 5),
        "wmt-en-zh": (0, 100),
        "wmt-ru-en": (0, 100),
        "wmt-si-en": (0, 100),
    }
    assert all(get_task(name).name == name for name in TASKS)


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(DataError, match="there is no task 'sts-b'; the tasks are stsb, sick, wmt-en-zh, wmt-ru-en"):
        get_task("sts-b")


def test_the_prompts_name_the_range_the_languages_and_every_field():
    for task in TASKS.values():
        low, high = task.label_range
        assert f"from {low:g} to {high:g}" in task.prompt
        assert set(prompt_fields(task.prompt)) == set(task.fields)
    assert "Sinhala source: {source}\nEnglish translation: {translation}\n" in TASKS["wmt-si-en"].prompt
    assert "English source: {source}\nChinese translation: {translation}\n" in TASKS["wmt-en-zh"].prompt


@pytest.mark.parametrize(
    ("name", "columns", "texts", "target", "row_id"),
    [
        ("stsb", "split genre sid score sentence1 sentence2", ["sentence1", "sentence2"], "score", None),
        (
            "sick",
            "id sentence_A sentence_B label relatedness_score entailment_AB",
            ["sentence_A", "sentence_B"],
            "relatedness_score",
            "id",
        ),
        (
            "wmt-en-zh",
            "segid translation.en translation.zh scores mean z_scores z_mean model_score doc_id nmt_output",
            ["translation.en", "translation.zh"],
            "mean",
            "segid",
        ),
        ("wmt-ru-en", "translation.en translation.ru mean", ["translation.ru", "translation.en"], "mean", None),
    ],
)
def test_the_columns_at_the_hub_are_found(name, columns, texts, target, row_id):
    task = TASKS[name]
    found = resolve_columns(columns.split(), prompt=task.prompt, task=task)
    assert [found.texts[field] for field in prompt_fields(task.prompt)] == texts
    assert (found.target, found.id) == (target, row_id)


@pytest.mark.parametrize(
    ("name", "file", "rows", "target", "row_id"),
    [
        ("stsb", "stsb/train.csv", 5749, "score", None),
        ("stsb", "stsb/dev.csv", 1500, "score", None),
        ("stsb", "stsb/test.csv", 1379, "score", None),
        ("sick", "sick/train.tsv", 4500, "relatedness_score", "pair_ID"),
        ("sick", "sick/trial.tsv", 500, "relatedness_score", "pair_ID"),
        ("sick", "sick/test.tsv", 4927, "relatedness_score", "pair_ID"),
        *(
            (f"wmt-{pair}", f"wmt-mlqe-pe/{pair}/{split}.tsv", rows, "mean", row_id)
            for pair, row_id in (("en-zh", "index"), ("ru-en", "segid"), ("si-en", "index"))
            for split, rows in (("train", 7000), ("dev", 1000), ("test20", 1000))
        ),
    ],
)
def test_the_published_files_load_whole(shared_data, name, file, rows, target, row_id):
    task = TASKS[name]
    table = list(read_rows(shared_data / file))
    columns = resolve_columns(list(table[0]), prompt=task.prompt, task=task)
    assert (columns.target, columns.id) == (target, row_id)
    split = load_split(table, columns, task.prompt, source=file, label_range=task.label_range)
    assert len(split.ids) == len(split.texts) == len(split.targets) == rows
    assert split.targets.min() >= task.label_range[0]
    assert split.targets.max() <= task.label_range[1]
