#!/bin/sh
# Train the networks of weights/, or go on from their checkpoints, and write their weights and logs there anew.
#
#     sh configs/run_all.sh                           all, two at a time, one thread each
#     JOBS=1 sh configs/run_all.sh msds1_laplace      some of them
#     FLAGS="--cuda 0" sh configs/run_all.sh          more flags for all
#
# PYTHON: the interpreter (default: python). A run that is stopped goes on when this is started again. One that is
# finished goes on if its file of flags gets a larger --max_steps; its learning rate then rises again, so that it is not
# what it would have been from the start. Where one fails the others go on; the exit status then is not 0, and SHA256SUMS
# is not written.
set -eu
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-python}" FLAGS="${FLAGS:-}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ $# = 0 ]; then
    set -- $(basename -a -s .args weights/*.args)
fi
printf '%s\n' "$@" | xargs -n 1 -P "${JOBS:-2}" sh -euc '
    $PYTHON main.py "@weights/$1.args" $FLAGS --no_stdout
    $PYTHON main.py "@weights/$1.args" $FLAGS --export "weights/$1.state"
    log=$($PYTHON -c "import args; print(args.run_path(args.get_args(), \".jsonl\"))" "@weights/$1.args" $FLAGS)
    cp "$log" "weights/$1.jsonl"
' run_all
cd weights
$PYTHON -c "
import hashlib, pathlib
for path in sorted(pathlib.Path().glob('*.state')):
    print(hashlib.sha256(path.read_bytes()).hexdigest(), '', path)
" > SHA256SUMS
