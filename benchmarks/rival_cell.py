"""The rival's training of one cell, as a person would write it: one process, one head, torch's own threads.

    python benchmarks/rival_cell.py CACHE --depth 3 --seed 0 --layer 20 --epochs 5 --out head.pt
    python benchmarks/rival_cell.py CACHE --depth 3 --seed 0 --layer 20 --epochs 5 --sample 100

The plain head (rival.py) with relish's recipe: the same first weights, and the same rows in the same batches and order,
read ahead in a thread by relish's reader, without what all of them begin with; hidden states standardised as they come;
AdamW with warm-up and cosine, gradients clipped, squared error; the weights' average, by relish's own function, is
validated after each epoch, and the best epoch's is kept.
It prints one JSON object. With --sample it takes so many steps and validates once, to see how long these take.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rival import PlainRelish, train_plainly
from torch import Tensor

from relish.cache.reader import open_cache
from relish.train.average import AveragedWeights
from relish.train.data import feature_moments, ordered_batches, read_ahead, shuffled_batches, training_rows
from relish.train.metrics import score
from relish.train.principal import begin_with, principal_axes
from relish.train.recipe import own_recipe
from relish.train.scale import InputScale
from relish.train.settings import EPOCHS, TrainSettings
from relish.train.shared import shared_tokens

UNCOUNTED = 5  # first steps of a sample, in which memory is still being taken


def train(given: argparse.Namespace) -> dict[str, Any]:
    settings = TrainSettings(layer=given.layer, epochs=given.epochs)
    cache = open_cache(given.cache)
    rows, val = training_rows(cache, settings)
    recipe = own_recipe(settings, "relish", len(rows))
    assert recipe is not None
    inputs = InputScale(cache.hidden_size)
    skip = shared_tokens(rows.split, val.split)
    moments = feature_moments(rows, None, skip=skip)
    inputs.set(moments.mean, moments.std)
    target_mean, target_std = float(rows.target.mean()), float(rows.target.std())
    torch.manual_seed(given.seed)
    head = PlainRelish(cache.hidden_size, given.depth)
    axes = principal_axes(rows, inputs, skip=skip, count=settings.latent_size)
    assert axes is not None
    begin_with(head.input_projection, axes)
    per_epoch = math.ceil(len(rows) / settings.batch_size)
    order = np.random.default_rng(given.seed)

    def standardised(hidden: Tensor) -> Tensor:
        return (hidden[:, skip:].float() - inputs.mean) / inputs.scale

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _ in range(recipe.epochs):
            for hidden, mask, target in read_ahead(rows, shuffled_batches(rows, settings.batch_size, order)):
                yield standardised(hidden), mask[:, skip:], (target - target_mean) / target_std

    average = AveragedWeights(head, power=recipe.averaging_power)
    steps = count(1)
    plain_step = train_plainly(
        head,
        batches(),
        recipe.lr,
        recipe.weight_decay,
        steps=recipe.epochs * per_epoch,
        warmup=settings.warmup,
    )

    def step() -> None:
        plain_step()
        average.look(next(steps))

    @torch.inference_mode()
    def validate() -> dict[str, float]:
        average.head.eval()
        predictions = np.empty(len(val))
        chunks = ordered_batches(val.lengths)
        for chunk, (hidden, mask, _) in zip(chunks, read_ahead(val, chunks), strict=True):
            predictions[chunk] = (
                target_mean + target_std * average.head(standardised(hidden), mask[:, skip:])
            ).double()
        return score(val.target, predictions, cache.label_range)

    if given.sample is not None:
        seconds = []
        for _ in range(min(given.sample, recipe.epochs * per_epoch)):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        validate()
        counted = seconds[UNCOUNTED:] or seconds
        validation = time.perf_counter() - started
        return {
            "sampled_s": sum(seconds) + validation,
            "epoch_s": per_epoch * sum(counted) / len(counted) + validation,
        }
    best, best_state, best_epoch = {"nrmse": math.inf}, head.state_dict(), 0
    for epoch in range(1, recipe.epochs + 1):
        for _ in range(per_epoch):
            step()
        average.take(epoch * per_epoch)
        figures = validate()
        if figures["nrmse"] < best["nrmse"]:
            best, best_state, best_epoch = figures, copy.deepcopy(average.head.state_dict()), epoch
        elif epoch - best_epoch >= recipe.patience:
            break
    if given.out is not None:
        torch.save(best_state, given.out)
    return {"pearson": best["pearson"], "nrmse": best["nrmse"], "best_epoch": best_epoch, "epochs": epoch}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--sample", type=int, help="only time so many steps and one validation")
    parser.add_argument("--out", type=Path, help="the best epoch's weights")
    print(json.dumps(train(parser.parse_args())))
