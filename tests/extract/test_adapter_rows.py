"""Which rows an adapter was tuned on: those of other splits are counted, and a split of such rows alone is refused."""

import pytest

from relish.cache.errors import AdapterError
from relish.extract.pipeline import extract_cache
from relish.extract.tune import tune_adapter

from ..heard import Heard
from .test_adapter import extraction


def test_rows_that_it_was_tuned_on_are_refused_where_figures_would_be_made_of_them(
    tuned, tiny_model, tiny_rows, tmp_path
):
    own = tiny_rows(24)
    for rows in (own, own[:10], own[::-1], [{**row, "score": 1.0} for row in own]):
        data = {"train": tiny_rows(4), "test": rows}
        with pytest.raises(AdapterError) as caught:
            extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, tuned(), data=data))
        assert str(caught.value) == (
            "the split 'test' holds rows that the adapter lora-llama was tuned on, and no others, so that figures on "
            "it would be no measurement; give rows that it has not seen, or call the split train"
        )
        assert not (tmp_path / "c").exists()


def test_some_rows_that_it_was_tuned_on_are_noted(tuned, tiny_model, tiny_rows, tmp_path):
    heard = Heard()
    data = {"test": [*tiny_rows(4, 2), *tiny_rows(24)[:3]]}
    extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, tuned(), data=data), progress=heard)
    assert [text for text in heard.notes if text.startswith("note: ")] == [
        "note: 3 of 7 rows of test have texts that the adapter lora-llama was tuned on, and figures on them will "
        "flatter"
    ]


def test_rows_that_chose_the_epoch_count_as_learned_where_they_are_of_the_training_file(
    tune_settings, tiny_model, tiny_rows, tmp_path
):
    own = tiny_rows(24)
    tune_adapter(tmp_path / "a", tune_settings("lora", data={"train": own}))
    with pytest.raises(AdapterError, match="holds rows that the adapter a was tuned on, and no others"):
        extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, tmp_path / "a", data={"test": own}))


def test_only_the_rows_that_were_drawn_were_learned(tune_settings, tiny_model, tiny_rows, tmp_path):
    own = tiny_rows(24)
    tune_adapter(tmp_path / "a", tune_settings("lora", rows=6))
    heard = Heard()
    settings = extraction(tiny_model, tiny_rows, tmp_path / "a", data={"test": own})
    extract_cache(tmp_path / "c", settings, progress=heard)
    assert [text for text in heard.notes if text.startswith("note: ")] == [
        "note: 6 of 24 rows of test have texts that the adapter a was tuned on, and figures on them will flatter"
    ]


def test_other_rows_than_it_was_tuned_on_and_validation_by_them_are_noted(tuned, tiny_model, tiny_rows, tmp_path):
    def notes(folder, **data):
        heard = Heard()
        settings = extraction(tiny_model, tiny_rows, tuned(), data=data)
        extract_cache(tmp_path / folder, settings, progress=heard)
        return [text for text in heard.notes if text.startswith("note: ")]

    own, dev = tiny_rows(24), tiny_rows(8, 1)
    assert notes("a", train=own, dev=dev) == []
    assert notes("test", test=tiny_rows(4, 2)) == []
    other = "note: the adapter lora-llama was tuned on other rows or labels than those of train here"
    assert notes("b", train=own[:20], dev=dev) == notes("d", train=own[:20]) == [other]
    assert notes("c", train=own) == [
        "note: without a validation split relish train holds out rows of train, which the adapter lora-llama has "
        "learned, and its validation figures will flatter; give the split dev too"
    ]
    assert notes("test", train=own)  # nor was one added to the cache before
    assert notes("dev", dev=dev) == notes("dev", train=own) == []
