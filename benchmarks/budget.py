"""The same budget for every head: twelve pairs of learning rate and weight decay around its own, by validation rows.

    python benchmarks/budget.py WORK CACHE:LAYER... --jobs 2    resumable; caches of relish extract, a layer of each
    python benchmarks/budget.py WORK CACHE:LAYER... --best 3    a second round: the three best pairs of each head alone
    python benchmarks/budget.py WORK CACHE:LAYER... --heads mlp,linear --around mlp=3e-4:1,linear=1e-3:3
    python benchmarks/budget.py WORK --out budget.json          what was found so far
    python benchmarks/budget.py budget.json                     the same from the file

The search is around the defaults of `relish train` for 1,000 rows, which earlier ones had found (recipe-log.md), or
around other pairs. For each pair the table has the validation NRMSE over that of the pair in the middle, as the
geometric mean over the caches: below 1 is better. Heads that are solved search their penalty by validation themselves,
on every cache. Only validation rows are looked at.
"""

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from measure import save, table

from relish.train.grid import train_heads
from relish.train.settings import LEARNING_RATES, WEIGHT_DECAYS, TrainSettings, parse_layer, parse_range

Pair = tuple[float, float]
"""Learning rate and weight decay."""
MIDDLE: dict[str, Pair] = {head: (rate, WEIGHT_DECAYS[head]) for head, rate in LEARNING_RATES.items()}
"""Learning rate and weight decay around which is searched."""
FACTORS = tuple(product((1 / 3, 1, 3), (1 / 3, 1, 3, 9)))
"""Of both."""


def pairs(middle: Pair) -> list[Pair]:
    """Learning rates and weight decays that a head has to choose from, the pair in the middle among them."""
    rate, decay = middle
    # To the digits of the name: a training of another round, a last bit away, would be refused as another one.
    return [(float(f"{rate * factor:.3g}"), float(f"{decay * other:.3g}")) for factor, other in FACTORS]


def named(rate: float, decay: float) -> str:
    """A pair, in figures and files."""
    return f"{rate:.3g}-{decay:.3g}"


def search(work: Path, seeds: tuple[int, ...], tried: dict[str, list[Pair]], source: str) -> None:
    """Pairs of each head on one cache."""
    cache, _, layer = source.rpartition(":")
    for head, rate, decay in [(name, *pair) for name, own in tried.items() for pair in own]:
        settings = TrainSettings(
            heads=(head,),
            seeds=seeds,
            lr=rate,
            weight_decay=decay,
            layer=parse_layer(layer),
            device="cpu",
            workers=1,
            threads=1,
        )
        folder = work / f"{'-'.join(Path(cache).parts[-3:])}-{layer}" / head / named(rate, decay)
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


def parse_around(text: str) -> dict[str, Pair]:
    """`mlp=3e-4:1,linear=1e-3:3`, for those heads in place of MIDDLE."""
    found = dict(MIDDLE)
    for part in text.split(",") if text else []:
        head, _, pair = part.partition("=")
        rate, _, decay = pair.partition(":")
        if head not in found:
            raise ValueError(f"the heads are {', '.join(found)}; got {head!r}")
        found[head] = (float(rate), float(decay))
    return found


def first_round(found: dict[str, dict[str, dict[str, float | None]]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """What was found on the caches on which all pairs were tried."""
    return {
        head: {cache: known for cache, known in by_cache.items() if len(known) == len(FACTORS)}
        for head, by_cache in found.items()
    }


def best_pairs(middle: Pair, by_cache: dict[str, dict[str, float | None]], count: int) -> list[Pair]:
    """The pairs of a head that are best so far, and the middle one."""
    values = {pair: relative(by_cache, named(*pair), named(*middle)) for pair in pairs(middle)}
    known = {pair: value for pair, value in values.items() if value is not None}
    return list({middle: 0, **dict.fromkeys(sorted(known, key=known.__getitem__)[:count])})


def relative(by_cache: dict[str, dict[str, float | None]], pair: str, middle: str) -> float | None:
    """NRMSE at a pair over that at the middle one, the geometric mean over the caches."""
    found = [(known.get(pair), known.get(middle)) for known in by_cache.values()]
    ratios = [mine / base for mine, base in found if mine is not None and base is not None]
    return statistics.geometric_mean(ratios) if ratios and len(ratios) == len(found) else None


def shown(found: dict[str, dict[str, dict[str, float | None]]], middle: dict[str, Pair]) -> str:
    """Markdown: a line for each pair of factors, a column for each head, its best in bold."""
    columns = []
    for head, by_cache in found.items():
        values = [relative(by_cache, named(*pair), named(*middle[head])) for pair in pairs(middle[head])]
        best = min((value for value in values if value is not None), default=None)
        columns.append(["–" if v is None else f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values])
    titles = [f"{head} ({middle[head][0]:g}, {middle[head][1]:g})" for head in found]
    factors = [[f"{rate:.2g}", f"{decay:.2g}"] for rate, decay in FACTORS]
    lines = [[*factor, *values] for factor, *values in zip(factors, *columns, strict=True)]
    lines = [line for line in lines if set(line[2:]) != {"–"}]
    return table(["× rate", "× decay", *titles], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder, or what --out has written")
    parser.add_argument("sources", nargs="*", metavar="CACHE:LAYER")
    parser.add_argument("--heads", default=",".join(MIDDLE))
    parser.add_argument("--around", type=parse_around, default="", metavar="HEAD=RATE:DECAY,...")
    parser.add_argument("--seeds", default="0-1")
    parser.add_argument("--best", type=int, help="only as many of each head's pairs, by the caches that had them all")
    parser.add_argument("--jobs", type=int, default=1, help="caches at once")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    heads = tuple(given.heads.split(","))
    if given.sources:
        tried = {head: pairs(given.around[head]) for head in heads}
        if given.best is not None:
            so_far = first_round(collect(given.work, heads))
            if given.best < 1 or not all(so_far.values()):
                parser.error("--best takes a number from 1 on, and a WORK where all pairs of these heads were tried")
            tried = {head: best_pairs(given.around[head], so_far[head], given.best) for head in heads}
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            one = partial(search, given.work, parse_range(given.seeds, "--seeds"), tried)
            list(pool.map(one, given.sources))
    saved = json.loads(given.work.read_text(encoding="utf-8")) if given.work.is_file() else None
    found = saved["nrmse"] if saved is not None else collect(given.work, heads)
    middle = {
        head: (rate, decay) for head, (rate, decay) in (saved["middle"] if saved is not None else given.around).items()
    }
    whole = first_round(found)
    print(shown(whole, middle))
    if whole != found:
        print(shown(found, middle))
    save(given.out, {"middle": middle, "nrmse": found})


if __name__ == "__main__":
    main()
