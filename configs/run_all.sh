#!/bin/sh
# Train the networks of weights/, or resume from their checkpoints, and write their weights and logs there again.
#
#     sh configs/run_all.sh                           all of MSDS, two at a time, one thread each
#     JOBS=1 sh configs/run_all.sh faces_laplace      this one, of weights/*.args or configs/*.args, one at a time
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
    file=weights/$1.args
    [ -e "$file" ] || file=configs/$1.args
    $PYTHON main.py "@$file" $FLAGS --no_stdout
    $PYTHON main.py "@$file" $FLAGS --export "weights/$1.state"
    log=$($PYTHON -c "import args; print(args.run_path(args.get_args(), \".jsonl\"))" "@$file" $FLAGS)
    cp "$log" "weights/$1.jsonl"
' run_all
cd weights
$PYTHON -c "
import hashlib, pathlib
for path in sorted(pathlib.Path().glob('*.state')):
    print(hashlib.sha256(path.read_bytes()).hexdigest(), '', path)
" > SHA256SUMS
