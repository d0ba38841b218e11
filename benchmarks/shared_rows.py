"""Validation and test rows whose texts are training rows too, in the data sets as they were published.

python benchmarks/shared_rows.py DATA    DATA as comparison.py has it
"""

import argparse
from pathlib import Path

from comparison import FILES
from measure import table

from relish.extract.settings import ExtractSettings
from relish.extract.sources import load_texts


def shared(data: Path, task: str) -> dict[str, str]:
    """Split to "3 of 500", the rows whose filled prompt is that of a training row."""
    files = {split: data / path for split, path in FILES[task].items()}
    splits = load_texts(ExtractSettings(model="", task=task, data=files), None).splits
    train = set(splits["train"].texts)
    return {
        name: f"{sum(text in train for text in split.texts):,} of {len(split.texts):,}"
        for name, split in splits.items()
        if name != "train"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    print(table(["data set", "val", "test"], [[task, *shared(given.data, task).values()] for task in FILES]))


if __name__ == "__main__":
    main()
