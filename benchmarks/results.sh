#!/usr/bin/env bash
# The tables of RESULTS.md, from the published data sets and SmolLM2-135M-Instruct. Resumable: run it again to go on.
#
#     benchmarks/results.sh DATA OUT        DATA holds stsb/ and sick/ with their published files
#
# On two cores: 13 minutes of extraction per data set, then about two minutes per trained head. Run it alone.
set -euo pipefail
data=$1 out=$2
model=$(python -c 'from relish.evaluate.assets import smollm2; print(smollm2())')
mkdir -p "$out"

relish extract "$out/stsb" --model "$model" --task stsb --layers 0.5,20,last \
    --data "train=$data/stsb/train.csv" --data "dev=$data/stsb/dev.csv" --data "test=$data/stsb/test.csv"
relish extract "$out/sick" --model "$model" --task sick --layers 0.5,20,last \
    --data "train=$data/sick/train.tsv" --data "dev=$data/sick/trial.tsv" --data "test=$data/sick/test.tsv"

for name in stsb sick; do
    for layer in 20 30; do
        runs="$out/$name-layer$layer-runs"
        relish train "$out/$name" --out "$runs" --layer "$layer" --threads 1 --head ridge,ridge-mean,linear,mlp --seeds 0-2
        relish train "$out/$name" --out "$runs" --layer "$layer" --threads 1 --head relish --depths 1-3 --seeds 0-2
        relish evaluate "$runs" --out "$out/$name-layer$layer-report" --format markdown | tee "$out/$name-layer$layer.md"
    done
done
