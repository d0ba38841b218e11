"""The part of the recipe that depends on the head and on the number of rows."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .settings import (
    AVERAGING_POWER,
    CLOSED_FORM,
    DECAY_ROWS,
    EPOCHS,
    LEARNING_RATES,
    LEAST_SEEN,
    STEP_SCALE,
    WEIGHT_DECAYS,
    TrainSettings,
)


@dataclass(frozen=True)
class Recipe:
    """What settings leave to the head and to the number of rows. A head that is solved has none of it."""

    lr: float
    """Highest learning rate; the weights of a mix of layers have one of their own."""
    weight_decay: float
    """AdamW's."""
    epochs: int
    """Passes over the training rows, at most."""
    patience: int
    """Epochs in which the figure of `best_by` has not improved, before a cell stops."""
    best_by: str
    """Validation figure that chooses the epoch; here because a head that is solved has no epochs."""
    averaging_power: float
    """Of the average of the weights (train/average.py): runs from before it have none."""
    step_scale: float | None
    """Of relish, see STEP_SCALE: runs from before it did not begin the same way."""
    principal_axes: bool | None
    """Of relish, whether it begins at these (train/principal.py); not on hidden states as they are."""


LEARNT = tuple(field.name for field in fields(Recipe))
"""What settings say in vain of a head that is solved."""


def own_recipe(settings: TrainSettings, head: str, rows: int) -> Recipe | None:
    """What a head is trained with on so many rows; None if it is solved instead."""
    if head in CLOSED_FORM:
        return None
    epochs = settings.epochs or max(EPOCHS, math.ceil(LEAST_SEEN / rows))
    decay = WEIGHT_DECAYS[head] * min(1.0, DECAY_ROWS / rows)
    return Recipe(
        lr=settings.lr or LEARNING_RATES[head],
        weight_decay=settings.weight_decay if settings.weight_decay is not None else decay,
        epochs=epochs,
        patience=settings.patience or math.ceil(3 / 5 * epochs),
        best_by=settings.best_by,
        averaging_power=AVERAGING_POWER,
        step_scale=STEP_SCALE if head == "relish" else None,
        principal_axes=settings.standardise if head == "relish" else None,
    )


def own_settings(config: dict[str, Any], settings: TrainSettings, head: str) -> dict[str, Any]:
    """What a run's config.json says of the settings of one head."""
    recipe = own_recipe(settings, head, config["train_rows"])
    own = asdict(recipe) if recipe is not None else dict.fromkeys(LEARNT)
    return {**config["settings"], **own}
