"""The same budget for every head: twelve pairs of learning rate and weight decay around its own, by validation rows.

    python benchmarks/budget.py WORK CACHE:LAYER... --jobs 2    resumable; caches of relish extract, a layer of each
    python benchmarks/budget.py WORK --out budget.json          what was found so far

A head's own pair is what `relish train` takes by default. For each pair the table has the validation NRMSE over that of
the own pair, as the geometric mean over the caches: below 1 is better. Heads that are solved search their penalty by
validation themselves, on every cache. Only validation rows are looked at.
"""

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from measure import table

from relish.train.grid import train_heads
from relish.train.settings import LEARNING_RATES, WEIGHT_DECAYS, TrainSettings, parse_layer, parse_range

RATES, DECAYS = (1 / 3, 1.0, 3.0), (1 / 3, 1.0, 3.0, 9.0)
"""Factors of a head's own."""
OWN = (1.0, 1.0)


def search(work: Path, seeds: tuple[int, ...], heads: tuple[str, ...], source: str) -> None:
    """All pairs of all heads on one cache."""
    cache, _, layer = source.rpartition(":")
    for head, (rate, decay) in product(heads, product(RATES, DECAYS)):
        settings = TrainSettings(
            heads=(head,),
            seeds=seeds,
            lr=LEARNING_RATES[head] * rate,
            weight_decay=WEIGHT_DECAYS[head] * decay,
            layer=parse_layer(layer),
            device="cpu",
            workers=1,
            threads=1,
        )
        folder = work / f"{'-'.join(Path(cache).parts[-3:])}-{layer}" / head / f"{rate:.3g}-{decay:.3g}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        nrmse = [cell["val"]["nrmse"] for cell in train_heads(cache, folder, settings).cells.values() if cell]
        # A rate at which a seed diverges is no rate to take.
        found = statistics.mean(nrmse) if len(nrmse) == len(seeds) else None
        (folder.parent / f"{folder.name}.json").write_text(json.dumps(found), encoding="utf-8")
        print(folder, found, flush=True)


def collect(work: Path, heads: tuple[str, ...]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Head to cache to pair to validation NRMSE, None where a seed diverged."""
    return {
        head: {
            folder.name: {path.stem: json.loads(path.read_text()) for path in sorted((folder / head).glob("*.json"))}
            for folder in sorted(work.iterdir())
            if (folder / head).is_dir()
        }
        for head in heads
    }


def relative(by_cache: dict[str, dict[str, float | None]], pair: str) -> float | None:
    """NRMSE at a pair over that at the own one, the geometric mean over the caches."""
    own = f"{OWN[0]:.3g}-{OWN[1]:.3g}"
    found = [(pairs.get(pair), pairs.get(own)) for pairs in by_cache.values()]
    ratios = [mine / base for mine, base in found if mine is not None and base is not None]
    return statistics.geometric_mean(ratios) if ratios and len(ratios) == len(found) else None


def shown(found: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """Markdown: a line for each head, a column for each pair, the best in bold."""
    pairs = [f"{rate:.3g}-{decay:.3g}" for rate, decay in product(RATES, DECAYS)]
    lines = []
    for head, by_cache in found.items():
        values = [relative(by_cache, pair) for pair in pairs]
        best = min((value for value in values if value is not None), default=None)
        texts = ["–" if v is None else f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values]
        lines.append([f"{head} ({LEARNING_RATES[head]:g}, {WEIGHT_DECAYS[head]:g})", *texts])
    return table(["head (own rate, decay)", *(pair.replace("-", " × rate, ") + " × decay" for pair in pairs)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("sources", nargs="*", metavar="CACHE:LAYER")
    parser.add_argument("--heads", default=",".join(LEARNING_RATES))
    parser.add_argument("--seeds", default="0-1")
    parser.add_argument("--jobs", type=int, default=1, help="caches at once")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    heads = tuple(given.heads.split(","))
    if given.sources:
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            one = partial(search, given.work, parse_range(given.seeds, "--seeds"), heads)
            list(pool.map(one, given.sources))
    found = collect(given.work, heads)
    print(shown(found))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
