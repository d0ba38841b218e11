"""Report folders, read back and joined."""

import json

import numpy as np
import pytest

from relish.cache.errors import RunError, SettingsError
from relish.evaluate.compare_load import load_places, parse_source
from relish.evaluate.compare_read import Source
from relish.evaluate.files import write_results

from .reports import grid, write_report


def edit(folder, change):
    path = folder / "results.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_report_is_read_as_it_was_written(tmp_path):
    results = write_report(tmp_path / "r", grid(ridge=1.0, relish1=0.6, relish2=0.5))
    (place,) = load_places([Source(tmp_path / "r")])
    assert (place.dataset, place.backbone, place.split, place.label_range) == ("stsb", "tiny", "test", (0, 5))
    assert (place.ids, place.row) == (results.ids, list(range(80)))
    assert place.backbone_parameters == 2_000_000
    np.testing.assert_array_equal(place.target, results.target)
    assert [entry.method.label for entry in place.entries] == ["ridge", "relish, L = 1", "relish, L = 2"]
    np.testing.assert_array_equal(np.concatenate([e.predictions for e in place.entries]), results.predictions)
    for entry, group in zip(place.entries, results.groups, strict=True):
        assert repr(entry.metrics) == repr(group.metrics)
        assert (entry.parameters, entry.extras) == (group.parameters, group.extras)
        assert entry.seeds == ((0,) if entry.method.head == "ridge" else (0, 1, 2))


def test_a_report_from_before_there_were_costs_can_be_read(tmp_path):
    write_report(tmp_path / "r", grid(ridge=1.0, relish1=0.6))

    def old(value):
        value["meta"] = {"model": "tiny"}
        for one in value["cells"] + value["groups"]:
            for name in ("val_nrmse", "val_pearson", "train_seconds", "seconds_per_1000_rows"):
                del one[name]

    edit(tmp_path / "r", old)
    with pytest.raises(RunError, match=r"does not say what its data set is called; name it: NAME=\S+r \(reports say"):
        load_places([Source(tmp_path / "r")])
    (place,) = load_places([Source(tmp_path / "r", "essays")])
    assert (place.dataset, place.backbone_parameters) == ("essays", None)
    assert set(place.entries[0].extras.values()) == {None}


def test_names_given_by_the_user(tmp_path, monkeypatch):
    assert parse_source("a/b") == Source(path=parse_source("a/b").path)
    assert parse_source("essays=a/b").dataset == "essays"
    assert parse_source("essays, Smol ,mse=a/b") == Source(parse_source("a/b").path, "essays", "Smol", "mse")
    assert parse_source(",,mse=a=b") == Source(parse_source(",=a=b").path, variant="mse")
    for wrong in ("a,b,c,d=e", "a="):
        with pytest.raises(SettingsError, match=r"a report is given as REPORT, or as DATASET,BACKBONE,VARIANT=REPORT"):
            parse_source(wrong)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    assert parse_source("lr=3") == Source(path=parse_source("x=lr=3").path)


def test_tuned_reports_join_their_data_set_and_bring_the_adapters_costs(tmp_path):
    write_report(tmp_path / "frozen", grid(ridge=1.0, relish1=0.6))
    lora = {"adapter": "a" * 64, "adapter method": "lora", "adapter parameters": "40,000", "adapter seconds": "1,500.5"}
    write_report(tmp_path / "lora", grid(ridge=0.7, relish1=0.5), meta=lora)
    write_report(tmp_path / "other", grid(ridge=0.7), meta={"adapter": "b" * 64})
    (place,) = load_places([Source(tmp_path / name) for name in ("frozen", "lora", "other")])
    entries = {entry.method.label: entry for entry in place.entries}
    assert list(entries) == [
        "ridge",
        "ridge on lora",
        "ridge on tuned",
        "relish, L = 1",
        "relish, L = 1 on lora",
    ]
    assert (entries["ridge"].parameters, entries["ridge on lora"].parameters) == (1000, 41000)
    assert entries["ridge on lora"].extras["train_seconds"] == 1510.5
    assert (entries["ridge on tuned"].parameters, entries["ridge on tuned"].extras["train_seconds"]) == (None, None)


def test_places_stand_in_the_order_in_which_they_are_named(tmp_path):
    for task, data in (("sick", 1), ("stsb", 0)):
        for model in ("b", "a"):
            write_report(tmp_path / f"{task}-{model}", grid(ridge=1.0), task=task, model=model, data=data)
    names = ("sick-b", "stsb-b", "stsb-a", "sick-a")
    places = load_places([Source(tmp_path / name) for name in names])
    assert [(p.backbone, p.dataset) for p in places] == [("b", "sick"), ("b", "stsb"), ("a", "sick"), ("a", "stsb")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": 1}, r"and score different rows: line 0 of one is row 0 \(id 'r0', gold [\d.]+\), of the other row 0"),
        ({"rows": 70}, r"and \S+/b lacks 10 of the rows, such as row 70 \(id 'r70'\); if extraction left them out"),
        (
            {"rows": 70, "data": 1},
            "and score 70 and 80 rows; evaluate both on the same rows, or, if they are two",
        ),
        ({"label_range": (0.0, 100.0)}, "with labels from 0 to 100 and from 0 to 5, by which NRMSE divides"),
        ({"split": "dev"}, "and score the splits dev and test; evaluate the same split of both"),
    ],
)
def test_other_rows_under_one_name_are_refused(tmp_path, changes, message):
    write_report(tmp_path / "a", grid(ridge=1.0))
    write_report(tmp_path / "b", grid(mlp=1.0), model="another", **changes)
    with pytest.raises(RunError, match=message) as caught:
        load_places([Source(tmp_path / "a"), Source(tmp_path / "b")])
    assert str(caught.value).startswith(f"{tmp_path / 'b'} and {tmp_path / 'a'} are both of stsb")
    assert str(caught.value).endswith(f"if they are two data sets, name one of them: NAME={tmp_path / 'b'}")
    assert len(load_places([Source(tmp_path / "a"), Source(tmp_path / "b", "other")])) == 2


def test_of_several_layers_each_method_has_its_own_best_by_validation(tmp_path):
    figures = {"15": (0.2, 0.1), "20": (0.1, 0.2), "mix": (0.2, 0.2)}
    for place, (layer, (relish, mlp)) in enumerate(figures.items()):
        # The test errors would choose otherwise; answers of the LLM are the same in each report.
        errors = grid(relish1=0.9 - 0.1 * place, mlp=0.9 - 0.1 * place, rail=0.7)
        given = {("relish", 1): relish, ("mlp", 0): mlp, ("rail", 0): None}
        extras = {name: {"val_nrmse": value} for name, value in given.items()}
        write_report(tmp_path / layer, errors, meta={"layer": layer}, extras=extras)
    (place,) = load_places([Source(tmp_path / layer) for layer in figures])
    chosen = {entry.method.label: (entry.layer, tuple(e.layer for e in entry.rejected)) for entry in place.entries}
    assert chosen == {"relish, L = 1": ("20", ("15", "mix")), "mlp": ("15", ("20", "mix")), "rail": ("15", ())}
    assert place.notes == ["layers chosen by validation NRMSE: mlp: 15 (not 20, mix); relish, L = 1: 20 (not 15, mix)"]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_equal_answers_those_with_validation_figures_stand(tmp_path, order):
    """The LLM was asked about the validation split between two reports of a cache."""
    for name, layer, value in (("a", "15", None), ("b", "20", 0.3)):
        extras = {("rail", 0): {"val_nrmse": value}}
        write_report(tmp_path / name, grid(rail=0.7), meta={"layer": layer}, extras=extras)
    (place,) = load_places([Source(tmp_path / name) for name in order])
    assert [entry.extras["val_nrmse"] for entry in place.entries] == [0.3]


def test_the_same_method_twice_is_refused_unless_it_is_a_variant(tmp_path):
    write_report(tmp_path / "a", grid(ridge=1.0, relish1=0.5))
    write_report(tmp_path / "b", grid(relish1=0.5))
    with pytest.raises(RunError, match=r"both hold relish, L = 1 on stsb with tiny; tell them apart .*: ,,NAME=\S+b$"):
        load_places([Source(tmp_path / "a"), Source(tmp_path / "b")])
    (place,) = load_places([Source(tmp_path / "a"), Source(tmp_path / "b", variant="mse")])
    assert [e.method.label for e in place.entries] == ["ridge", "relish, L = 1", "relish, L = 1 (mse)"]


@pytest.mark.parametrize("order", ["abc", "bca", "acb"])
def test_two_of_one_layer_are_refused_in_any_order(tmp_path, order):
    for name, layer, val in (("a", "15", 0.1), ("b", "22", 0.12), ("c", "22", 0.09)):
        write_report(
            tmp_path / name, grid(relish1=0.5 + val), meta={"layer": layer}, extras={("relish", 1): {"val_nrmse": val}}
        )
    with pytest.raises(RunError, match="both hold relish, L = 1 on stsb with tiny"):
        load_places([Source(tmp_path / name) for name in order])


def test_layers_are_not_chosen_by_the_validation_figures_of_different_rows(tmp_path):
    for layer, rows in (("15", "dev, 1a"), ("22", "dev, 2b")):
        meta = {"layer": layer, "validation data": rows}
        write_report(tmp_path / layer, grid(relish1=float(layer) / 20), meta=meta)
    with pytest.raises(
        RunError, match=r"both hold relish, L = 1 .*, validated on different rows \(dev, 1a and dev, 2b\)"
    ):
        load_places([Source(tmp_path / "15"), Source(tmp_path / "22")])
    write_report(tmp_path / "old", grid(relish1=0.6), meta={"layer": "30"})  # of an earlier relish, which did not say
    (place,) = load_places([Source(tmp_path / "15"), Source(tmp_path / "old")])
    assert place.entries[0].layer == "30"


def test_two_adapters_are_not_taken_for_layers_of_one(tmp_path):
    for layer, adapter, name in (("15", "aaa", "15"), ("22", "bbb", "22"), ("30", "aaa", "30")):
        meta = {"layer": layer, "adapter": adapter, "adapter method": "lora"}
        write_report(tmp_path / name, grid(relish1=float(layer) / 20), meta=meta)
    sources = [Source(tmp_path / name) for name in ("15", "22", "30")]
    told = r"22 and \S+15 are of different adapters, all called lora \(bbb… and aaa…\); .*: ,,NAME=\S+22\. Tunings are"
    with pytest.raises(RunError, match=told):
        load_places(sources[:2])
    (place,) = load_places([sources[0], sources[2], Source(tmp_path / "22", variant="seed 1")])
    assert [entry.method.label for entry in place.entries] == [
        "relish, L = 1 on lora",
        "relish, L = 1 on lora (seed 1)",
    ]


def test_methods_that_learned_from_different_rows_are_named(tmp_path):
    write_report(tmp_path / "a", grid(relish1=0.5), meta={"training rows": 5000, "training data": "1a"})
    write_report(tmp_path / "b", grid(ridge=0.7), meta={"training rows": 2000, "training data": "1a"})
    write_report(tmp_path / "c", grid(mlp=0.7))  # of an earlier relish, which did not say
    (place,) = load_places([Source(tmp_path / name) for name in "abc"])
    assert place.notes == [
        f"{tmp_path / 'a'} and {tmp_path / 'b'} learned from different rows or prompts (training rows: 5000 and 2000)"
    ]


def test_ids_of_any_length_and_with_any_line_end_are_read_back(tmp_path):
    results = write_report(tmp_path / "r", grid(relish1=0.5))
    results.ids[:4] = ["x" * 200_000, "a\rb", 'c\n"d', ","]
    write_results(results, tmp_path / "r")
    (place,) = load_places([Source(tmp_path / "r")])
    assert place.ids == results.ids


def test_a_quote_that_is_never_closed_is_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("relish.evaluate.compare_read._LONGEST", 1000)
    write_report(tmp_path / "r", grid(relish1=0.5))
    path = tmp_path / "r" / "predictions.csv"
    path.write_text(path.read_text().replace("r7,", '"r7,', 1))
    with pytest.raises(RunError, match=r"cannot be used .*predictions.csv: field larger than field limit"):
        load_places([Source(tmp_path / "r")])


def test_folders_that_are_no_report(tmp_path):
    with pytest.raises(RunError, match="there is no report to compare; make some with: relish evaluate"):
        load_places([])
    (tmp_path / "empty").mkdir()
    (tmp_path / "results.json").touch()
    with pytest.raises(RunError) as caught:
        load_places([Source(tmp_path / "results.json")])
    assert str(caught.value) == (
        f"{tmp_path / 'results.json'} is a file; name the folder of the report, as in relish compare {tmp_path}"
    )
    for name in ("nowhere", "empty"):
        with pytest.raises(RunError, match=rf"{name} is no report folder: it has no results.json; make one with"):
            load_places([Source(tmp_path / name)])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "results.json").write_text("{"), "cannot be used .*; evaluate again with --out"),
        (lambda folder: (folder / "results.json").write_text("[]"), "results.json is no object"),
        (lambda folder: edit(folder, lambda value: value.pop("groups")), "KeyError.*groups"),
        (lambda folder: edit(folder, lambda value: value["cells"][0].update(nrmse=0.5)), "of different evaluations"),
        (lambda folder: edit(folder, lambda value: value["cells"][0].update(seed=7)), "KeyError"),
        (lambda folder: (folder / "predictions.csv").unlink(), "predictions.csv cannot be read"),
        (lambda folder: (folder / "predictions.csv").write_text("a,b\n"), "has other columns"),
    ],
)
def test_damaged_reports_are_named(tmp_path, harm, message):
    write_report(tmp_path / "r", grid(ridge=1.0, relish1=0.5))
    harm(tmp_path / "r")
    with pytest.raises(RunError, match=message) as caught:
        load_places([Source(tmp_path / "r")])
    assert str(tmp_path / "r") in str(caught.value)


@pytest.mark.parametrize("cut", [1, 30])
def test_predictions_that_were_cut_off_are_refused(tmp_path, cut):
    write_report(tmp_path / "r", grid(ridge=1.0, mlp=0.9))
    path = tmp_path / "r" / "predictions.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-cut]) + "\n")
    with pytest.raises(RunError, match=r"predictions.csv is cut off"):
        load_places([Source(tmp_path / "r")])


def test_one_llm_under_two_names_is_told(tmp_path):
    for name, model, files in (("a", "org/Smol", "weights 11"), ("b", "Smol", "weights 11"), ("c", "other", "")):
        write_report(tmp_path / name, grid(relish1=0.5), model=model, meta={"backbone files": files})
    first, second, third = load_places([Source(tmp_path / name) for name in "abc"])
    assert second.notes == [
        f"this LLM has the files of org/Smol, and is compared apart from it; if they are one, name it alike: "
        f",org/Smol={tmp_path / 'b'}"
    ]
    assert first.notes == third.notes == []
    for place in load_places([Source(tmp_path / "a"), Source(tmp_path / "b", backbone="another prompt")]):
        assert place.notes == []


def test_two_llms_of_one_name_are_not_joined(tmp_path):
    write_report(tmp_path / "old", grid(mlp=0.5))
    write_report(tmp_path / "a", grid(ridge=0.5), meta={"backbone files": "weights 11"})
    write_report(tmp_path / "b", grid(relish1=0.5), meta={"backbone files": "weights 22"})
    told = r"b and \S+old are of two LLMs, both called tiny \(weights 22 and weights 11\); .* second name: ,NAME=\S+b$"
    with pytest.raises(RunError, match=told):
        load_places([Source(tmp_path / "old"), Source(tmp_path / "a"), Source(tmp_path / "b")])
    places = load_places([Source(tmp_path / "a"), Source(tmp_path / "b", backbone="other")])
    assert [place.backbone for place in places] == ["tiny", "other"]
