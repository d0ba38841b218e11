import pytest

from relish.cache.errors import SettingsError
from relish.train.recipe import own_recipe
from relish.train.settings import CLOSED_FORM, HEADS, TrainSettings, parse_layer, parse_range


@pytest.mark.parametrize(
    ("text", "values"), [("3", (3,)), ("1-5", (1, 2, 3, 4, 5)), ("0,2,7", (0, 2, 7)), ("0-1,4", (0, 1, 4))]
)
def test_ranges(text, values):
    assert parse_range(text, "--seeds") == values


@pytest.mark.parametrize("text", ["", "x", "1-", "-2", "1-2-3", "1.5"])
def test_other_ranges_are_refused(text):
    with pytest.raises(SettingsError, match="--seeds takes numbers and ranges such as 0,2,7 or 1-5"):
        parse_range(text, "--seeds")


def test_a_backward_range_is_an_empty_grid():
    with pytest.raises(SettingsError, match="the grid is empty: --seeds '5-1' holds no number"):
        parse_range("0,5-1", "--seeds")
    with pytest.raises(SettingsError, match="the grid is empty: --depths '5-1' holds no number"):
        parse_range("5-1", "--depths")


def test_a_range_without_end_is_refused_before_memory_is_full():
    with pytest.raises(SettingsError, match="--seeds '0-99999999999' holds more than 10,000 numbers; shorten it"):
        parse_range("0-99999999999", "--seeds")
    assert len(parse_range("1-10000", "--seeds")) == 10_000


def test_a_layer_is_an_index_or_mix():
    assert [parse_layer(text) for text in ("15", "mix", None)] == [15, "mix", None]
    with pytest.raises(SettingsError, match="--layer takes an index such as 15, or mix; not 'last'"):
        parse_layer("last")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heads": ()}, "the grid is empty: heads has no value"),
        ({"heads": "relish"}, r"^heads takes several values; got 'relish': give \('relish',\) for one$"),
        ({"seeds": 0}, r"^seeds takes several values; got 0: give \(0,\) for one$"),
        ({"seeds": (2**63,)}, r"a seed is below 2\*\*63, not 9223372036854775808"),
        ({"heads": ("cnn",)}, f"there is no head 'cnn'; there are {', '.join(HEADS)}"),
        ({"seeds": (1, 1)}, "seeds names a value twice: 1, 1"),
        ({"depths": (0,)}, "a depth is at least 1, not 0"),
        ({"loss": "mae"}, "loss must be one of huber, mse, not 'mae'"),
        ({"best_by": "loss"}, "best_by must be one of nrmse, pearson, not 'loss'"),
        ({"lr": 0.0}, "lr must be a number above 0, not 0.0"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
        (
            {"val_split": "train"},
            "heads cannot be chosen by the rows that they learn from: leave out val_split 'train'; some of the",
        ),
        ({"val_fraction": 0.0}, "early stopping needs validation rows"),
        ({"layer": "middle"}, "layer must be an index or 'mix', not 'middle'"),
        (
            {"heads": ("linear", "ridge", "ridge-mean"), "layer": "mix"},
            "^ridge and ridge-mean cannot learn a mix of layers, being solved in closed form; name one layer, or take "
            "heads that can: relish, linear, linear-last, mlp, mlp-last, attention$",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(given, message):
    with pytest.raises(SettingsError, match=message):
        TrainSettings(**given)


@pytest.mark.parametrize(
    ("rows", "epochs", "patience"),
    [(20_000, 5, 3), (2000, 5, 3), (1999, 6, 4), (500, 20, 12), (300, 34, 21), (1, 10_000, 6000)],
)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_heads_learn_in_five_epochs_and_on_few_rows_until_they_have_seen_10000(rows, epochs, patience, batch_size):
    recipe = own_recipe(TrainSettings(batch_size=batch_size), "relish", rows)
    assert (recipe.epochs, recipe.patience) == (epochs, patience)


def test_more_rows_than_1000_lessen_the_weight_decay_in_proportion():
    decays = [own_recipe(TrainSettings(), "relish", rows).weight_decay for rows in (1, 1000, 2000, 9000)]
    assert decays == pytest.approx([9, 9, 4.5, 1])


@pytest.mark.parametrize("rows", [10, 10_000])
def test_what_is_given_is_taken(rows):
    recipe = own_recipe(TrainSettings(epochs=2, patience=1, lr=0.5, weight_decay=0.0), "relish", rows)
    assert (recipe.epochs, recipe.patience, recipe.lr, recipe.weight_decay) == (2, 1, 0.5, 0.0)


def test_each_head_that_is_not_solved_has_a_recipe():
    for head in HEADS:
        assert (own_recipe(TrainSettings(), head, 5000) is None) == (head in CLOSED_FORM)
