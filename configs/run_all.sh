#!/bin/sh
# Train the MSDS networks of weights/, or resume from their checkpoints, and write their weights and logs there again.
#
#     sh configs/run_all.sh                           all of MSDS, two at a time, one thread each
#     JOBS=1 sh configs/run_all.sh msds1_laplace      some of them
#     FLAGS="--cuda 0" sh configs/run_all.sh          more flags for all
#
# PYTHON: the interpreter (default: python). Repeat the command to resume stopped runs. A finished run resumes if its file
# of flags gets a larger --max_steps. Its learning rate then rises again, so the result differs from that of one long run.
# If a run fails, the others continue; the exit status is then not 0 and SHA256SUMS is not written.
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
