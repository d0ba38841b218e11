"""The five tasks of the paper as presets: the prompt, the columns, the label range, and where the hub keeps the data.

Column names are candidates in order of preference: first those of the published files, then those at the hub.
"""

from dataclasses import dataclass

from ..cache.errors import DataError
from .tables import CONVERTED

# Every prompt asks first and shows the texts after: the states of a causal LM then know the question from the first
# token.


@dataclass(frozen=True)
class Task:
    """What `--task NAME` stands for."""

    name: str
    """The name on the command line."""

    prompt: str
    """The template over the fields' names, with the text in place of each `{field}`."""

    fields: dict[str, tuple[str, ...]]
    """For each field of the prompt, the columns that may hold its text."""

    target: tuple[str, ...]
    """The columns that may hold the gold score."""

    id: tuple[str, ...]
    """The columns that may hold the row's id; without any of them the row's position is its id."""

    label_range: tuple[float, float]
    """The least and the greatest gold score there can be, in the target's own unit."""

    hub: str
    """The data set's id at the Hugging Face hub."""

    hub_config: str | None
    """The config of the data set at the hub, if it has more than one."""

    hub_revision: str | None = None
    """The branch of its repository that can be read, if not the main one."""


def get_task(name: str) -> Task:
    """Look up a preset by its name.

    Raises:
        DataError: if there is none of that name.
    """
    if name not in TASKS:
        raise DataError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def _translation_quality(source: str, translation: str, languages: tuple[str, str]) -> Task:
    pair = f"{source}-{translation}"
    return Task(
        name=f"wmt-{pair}",
        prompt="How good is this translation, on a scale from 0 to 100?\n"
        f"{languages[0]} source: {{source}}\n{languages[1]} translation: {{translation}}\nScore:",
        fields={
            "source": ("original", "source", f"translation.{source}"),
            "translation": ("translation", f"translation.{translation}"),
        },
        target=("mean",),
        id=("segid", "index"),
        label_range=(0.0, 100.0),
        hub="wmt/wmt20_mlqe_task1",
        hub_config=pair,
    )


_STSB = Task(
    name="stsb",
    prompt="How similar in meaning are these two sentences, on a scale from 0 to 5?\n"
    "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nScore:",
    fields={"sentence1": ("sentence1",), "sentence2": ("sentence2",)},
    target=("score", "similarity_score", "label"),
    id=("id", "idx", "index"),
    label_range=(0.0, 5.0),
    hub="mteb/stsbenchmark-sts",
    hub_config=None,
)

_SICK = Task(
    name="sick",
    prompt="How related in meaning are these two sentences, on a scale from 1 to 5?\n"
    "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nScore:",
    fields={"sentence1": ("sentence_A", "sentence1"), "sentence2": ("sentence_B", "sentence2")},
    # Never "label": at the hub that column is the entailment class.
    target=("relatedness_score", "score"),
    id=("pair_ID", "id"),
    label_range=(1.0, 5.0),
    hub="RobZamp/sick",
    hub_config=None,
    hub_revision=CONVERTED,
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _STSB,
        _SICK,
        _translation_quality("en", "zh", ("English", "Chinese")),
        _translation_quality("ru", "en", ("Russian", "English")),
        _translation_quality("si", "en", ("Sinhala", "English")),
    )
}
