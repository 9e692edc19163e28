#!/bin/sh
# Measure the networks of weights/ and write results/ and docs/results.md: half an hour on one CPU core.
#
#     sh configs/measure_all.sh
#
# PYTHON: the interpreter (default: python). FLAGS: for the scripts that take weights, as in FLAGS="--cuda 0"
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-python}" flags="${FLAGS:-}"

for state in weights/*.state; do
    $python evaluate.py --weights "$state" --draws 3 --json "results/$(basename -s .state "$state").json" $flags
done
for data in msds1 msds2; do
    flows="weights/${data}_laplace.state weights/${data}_gaussian.state weights/${data}_realnvp.state"
    $python plot_factors.py --weights $flows --json results/${data}_factors.json $flags
    $python effects.py --weights $flows --json results/${data}_effects.json $flags
    $python inpaint.py --weights weights/${data}_laplace.state --realnvp weights/${data}_realnvp.state \
        --json results/${data}_inpainting.json $flags
done
$python pinwheel.py --json results/pinwheel.json
$python tables.py results weights --out docs/results.md
