"""`relish tune --method lora` beside transformers' own regression: do both learn the same from the same rows?

    python benchmarks/lora_check.py DATA/stsb --rows 500,125,250 --lr 1e-3 --out lora_check.json
    python benchmarks/lora_check.py --small

So many rows of train, dev and test are drawn as `comparison.py --rows` draws them: its LoRA row learns from the same.

The other side is AutoModelForSequenceClassification(num_labels=1) with peft's LoRA in a plain loop: the same r, α,
dropout, rows, batches, epochs, learning rates and standardised targets, squared error, the best epoch by validation
NRMSE. What differs: its head begins with random weights and has no bias, and each side draws its own dropout. So
figures differ as they do between seeds, and --seeds takes several. With --same-start there is no dropout, and its head
has a bias and begins with zeros: then both must learn the same but for rounding.
"""

import copy
import math
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from backbones import WORDS, smollm2_folder, tiny_model
from comparison import draw_rows
from measure import arguments, save, table
from torch import Tensor, nn

from relish.extract.adapter import open_adapter
from relish.extract.backbone import Backbone
from relish.extract.files import find_backbone
from relish.extract.regression import load_regression_head
from relish.extract.sources import load_texts
from relish.extract.tables import read_rows
from relish.extract.tune import tune_adapter
from relish.extract.tune_loop import Examples, epoch_batches, figures, warmup_cosine
from relish.extract.tune_rows import choose_rows
from relish.extract.tune_settings import TuneSettings

BATCH = 16
Splits = dict[str, Examples]


def made_up(count: int, seed: int) -> list[dict[str, object]]:
    """Rows whose score is the share of the kind words in the second sentence."""
    draw = Random(seed)
    rows = []
    for number in range(count):
        kind = number % 6
        words = [draw.choice(WORDS[:5]) for _ in range(kind)] + [draw.choice(WORDS[5:10]) for _ in range(5 - kind)]
        draw.shuffle(words)
        rows.append({"sentence1": "film", "sentence2": " ".join(words), "score": float(kind)})
    return rows


def read_splits(settings: TuneSettings, test: Any, model: Path) -> Splits:
    """The rows as `relish tune` takes them, and the test split's, as token ids."""
    train, val = choose_rows(load_texts(settings, None), settings.rows)
    data = load_texts(TuneSettings(model=model, task=settings.task, data={"test": test}, method="lora"), None)
    split = data.splits["test"]
    backbone = bare(model)
    parts = {"train": (train.texts, train.target), "val": (val.texts, val.target), "test": (split.texts, split.targets)}
    return {
        name: Examples(backbone.tokenize(texts, chat_template=False, max_length=10**6, truncate=False)[0], target)
        for name, (texts, target) in parts.items()
    }


def bare(model: Path, adapter: Path | None = None) -> Backbone:
    files = find_backbone(model, gguf_file=None, revision=None)
    return Backbone(
        files,
        layers=(),
        compute_dtype="float32",
        device="cpu",
        trust_remote_code=False,
        adapter=open_adapter(adapter, files) if adapter is not None else None,
    )


def in_batches(rows: Examples, predict: Any) -> np.ndarray:
    """Predictions (N,) of batches of like length."""
    predictions = np.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda row: -len(rows.tokens[row]))
    for begin in range(0, len(order), 32):
        chosen = order[begin : begin + 32]
        with torch.no_grad():
            predictions[chosen] = predict(rows.of(chosen)).double().numpy()
    return predictions


def ours(model: Path, settings: TuneSettings, splits: Splits, folder: Path) -> dict[str, Any]:
    summary = tune_adapter(folder, settings)
    backbone = bare(model, folder)
    assert backbone.adapter is not None
    head, _ = load_regression_head(backbone.adapter)

    def predict(rows: list[np.ndarray]) -> Tensor:
        mask = torch.arange(max(map(len, rows))) < torch.tensor([len(row) for row in rows])[:, None]
        return head(backbone.hidden_states(rows)[:, 0], mask)

    predictions = in_batches(splits["test"], predict)
    return described(predictions, splits["test"], summary.trainable_parameters, summary.seconds, summary.best_epoch)


def theirs(model: Path, settings: TuneSettings, splits: Splits, *, same_start: bool) -> dict[str, Any]:
    import peft
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(settings.seed)
    regressor = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    pad = regressor.config.pad_token_id
    if pad is None:
        pad = regressor.config.pad_token_id = bare(model).pad_token(regressor)
    if same_start:
        regressor.score = nn.Linear(regressor.config.hidden_size, 1)
        nn.init.zeros_(regressor.score.weight)
        nn.init.zeros_(regressor.score.bias)
    torch.manual_seed(settings.seed)
    adapted = peft.get_peft_model(
        regressor,
        peft.LoraConfig(
            task_type="SEQ_CLS",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules="all-linear",
        ),
    )
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    train, val = splits["train"], splits["val"]
    mean, std = float(train.target.mean()), float(train.target.std())

    def forward(rows: list[np.ndarray]) -> Tensor:
        longest = max(map(len, rows))
        ids = torch.tensor([[*row.tolist(), *[pad] * (longest - len(row))] for row in rows])
        mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        return adapted(input_ids=ids, attention_mask=mask.long()).logits[:, 0]

    def predict(rows: list[np.ndarray]) -> Tensor:
        return mean + std * forward(rows)

    per_epoch = math.ceil(len(train) / settings.batch_size)
    best, kept, best_epoch, step = math.inf, {}, 0, 0
    started = time.perf_counter()
    for epoch in range(settings.epochs):
        adapted.train()
        for batch in epoch_batches(len(train), settings.batch_size, settings.seed, epoch):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * warmup_cosine(step, settings.epochs * per_epoch)
            target = torch.from_numpy((train.target[batch] - mean) / std).float()
            loss = nn.functional.mse_loss(forward(train.of(batch)), target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
        adapted.eval()
        nrmse, _ = figures(val.target, in_batches(val, predict), (0.0, 5.0))
        if nrmse < best:
            best, best_epoch, kept = nrmse, epoch + 1, copy.deepcopy(adapted.state_dict())
    seconds = time.perf_counter() - started
    adapted.load_state_dict(kept)
    parameters = sum(parameter.numel() for parameter in trained)
    return described(in_batches(splits["test"], predict), splits["test"], parameters, seconds, best_epoch)


def described(
    predictions: np.ndarray, test: Examples, parameters: int, seconds: float, best_epoch: int
) -> dict[str, Any]:
    nrmse, pearson = figures(test.target, predictions, (0.0, 5.0))
    return {
        "pearson": pearson,
        "nrmse": nrmse,
        "trainable_parameters": parameters,
        "best_epoch": best_epoch,
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="folder of STS-B's train.csv, dev.csv and test.csv")
    parser.add_argument("--rows", default="1000,500,1000", help="rows of train, dev and test")
    parser.add_argument("--epochs", type=int, default=TuneSettings.epochs)
    parser.add_argument("--lr", type=float, default=TuneSettings.lr)
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--same-start", action="store_true", help="the same first weights, no dropout")
    given = parser.parse_args()
    if given.data is None and not given.small:
        parser.error("give the folder of STS-B, or --small")
    warnings.simplefilter("ignore", FutureWarning)  # of what peft calls in transformers
    with tempfile.TemporaryDirectory() as home:
        if given.small:
            model = tiny_model(Path(home) / "tiny")
            tables: dict[str, Any] = {"train": made_up(96, 0), "dev": made_up(24, 1), "test": made_up(48, 2)}
            given.lr, given.epochs = 1e-2, 8
        else:
            model = smollm2_folder()
            counts = zip(("train", "dev", "test"), map(int, given.rows.split(",")), strict=True)
            tables = {
                name: list(read_rows(draw_rows(given.data / f"{name}.csv", Path(home) / f"{name}.csv", count)))
                for name, count in counts
            }
        test = tables.pop("test")
        sides: dict[str, list[dict[str, Any]]] = {"relish tune": [], "transformers and peft": []}
        for seed in range(given.seeds):
            settings = TuneSettings(
                model=model,
                task="stsb",
                data=tables,
                method="lora",
                loss="mse",
                epochs=given.epochs,
                lr=given.lr,
                batch_size=BATCH,
                seed=seed,
                dropout=0.0 if given.same_start else TuneSettings.dropout,
                device="cpu",
            )
            splits = read_splits(settings, test, model)
            sides["relish tune"].append(ours(model, settings, splits, Path(home) / f"adapter-{seed}"))
            sides["transformers and peft"].append(theirs(model, settings, splits, same_start=given.same_start))
    rows = {name: len(split) for name, split in splits.items()}
    found = {
        "rows": rows,
        "model": model.name,
        "lr": given.lr,
        "epochs": given.epochs,
        "seeds": given.seeds,
        "same_start": given.same_start,
        "sides": sides,
    }
    save(given.out, found)
    lines = [
        (
            name,
            *(f"{statistics.mean(run[figure] for run in runs):.4f}" for figure in ("pearson", "nrmse")),
            f"{runs[0]['trainable_parameters']:,}",
            f"{statistics.mean(run['seconds'] for run in runs):.1f} s",
        )
        for name, runs in sides.items()
    ]
    print(table(("LoRA, squared error", "test Pearson", "test NRMSE", "trainable parameters", "training"), lines))


if __name__ == "__main__":
    main()
