#!/bin/sh
# Measure the MSDS networks of weights/ and write results/ and docs/results.md, in half an hour on one core of an AMD EPYC.
#
#     sh configs/measure_all.sh
#
# PYTHON: the interpreter (default: python). FLAGS: more flags for the scripts that take weights, such as FLAGS="--cuda 0".
# To repeat a measurement, delete its file in results/.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

measure() { # NAME SCRIPT FLAGS…
    json="results/$1.json"
    shift
    [ -e "$json" ] || ${PYTHON:-python} "$@" --json "$json"
}

for state in weights/msds*.state; do
    name=$(basename "$state" .state)
    measure "$name" evaluate.py --weights "$state" --draws 3 ${FLAGS:-}
    measure "${name}_factors" plot_factors.py --weights "$state" ${FLAGS:-}
    measure "${name}_effects" effects.py --weights "$state" ${FLAGS:-}
    measure "${name}_fields" plot_receptive_fields.py --weights "$state" --histogram ${FLAGS:-}
done
for data in msds1 msds2; do
    measure ${data}_inpainting inpaint.py --weights weights/${data}_laplace.state \
        --realnvp weights/${data}_realnvp.state ${FLAGS:-}
done
measure pinwheel pinwheel.py
${PYTHON:-python} tables.py results weights --out docs/results.md
