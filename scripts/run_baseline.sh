#!/usr/bin/env bash
# run_baseline.sh -- the ungated baseline, COUNT runs that differ in their seed.
#
#     scripts/run_baseline.sh                                  3 seeds on all GPUs
#     NPROC=2 COUNT=5 BASE_SEED=2000 scripts/run_baseline.sh
#     DEVICE=cpu PRESET=demo scripts/run_baseline.sh           no GPU, a minute a run
#
# NPROC      ranks: all GPUs there are, or 1 with DEVICE=cpu
# COUNT      runs (3)
# BASE_SEED  seed of the first (1337); each further run has the next one
# SCRIPT     trainer (train_gpt.py), relative to the repository
# RUN_PREFIX runs are called RUN_PREFIX-SEED (baseline)
# PYTHON     interpreter: .venv/bin/python if it is there, else python3
#
# Every other variable and flag goes to the trainer as it is, but for ATTNGATE, SEED, RUN_ID and DRY_RUN, which are
# set here. Stops at the first run that does not finish. The same command goes on from there: finished runs are
# skipped, an unfinished one resumes. Exit code 2: a setting is wrong; else that of the run that did not finish.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "run_baseline.sh: error: $1" >&2
    exit 2
}

# number NAME VALUE LEAST
number() {
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
        fail "$1='$2': expected a whole number >= $3"
    fi
}

# value NAME FILE: of a line '  "NAME": value,' of JSON
value() {
    sed -nE "/^ +\"$1\": /{s/^[^:]*: \"?([^\"]*)\"?,?\$/\1/;s/,\$//;p;q;}" "$2"
}

# state ID: what a run's status.json says, or nothing
state() {
    [[ ! -f $logs/$1/status.json ]] || value status "$logs/$1/status.json"
}

# knobs FILE FROM: of the JSON object that follows FROM, the lines that make a finished run the one asked for
knobs() {
    sed -n "$2,/^}\$/{p;/^}\$/q;}" "$1" | grep '^  "' | grep -vE "$free" || true
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

python=${PYTHON:-$repo/.venv/bin/python}
command -v "$python" > /dev/null || python=python3
script=${SCRIPT:-train_gpt.py}
[[ $script == /* ]] || script=$repo/$script
[[ -f $script ]] || fail "SCRIPT=$script: no such file"
count=${COUNT:-3} base_seed=${BASE_SEED:-1337} prefix=${RUN_PREFIX:-baseline}
number COUNT "$count" 1
number BASE_SEED "$base_seed" 0
[[ -z ${NPROC+set} ]] || number NPROC "$NPROC" 1

# The trainer itself says what the knobs come to, and refuses wrong ones. It is asked without a run
# id, because a dry run refuses the id of a run that is complete.
plan=$(mktemp)
trap 'rm -f "$plan"' EXIT
own=(--attngate none --seed "$base_seed" --run_id "")
"$python" "$script" "$@" "${own[@]}" --dry_run 1 > "$plan" || exit 2

if [[ $(value device "$plan") == cpu ]]; then
    nproc=${NPROC:-1}
    echo "run_baseline.sh: DEVICE=cpu, $nproc process(es)"
else
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    ((gpus > 0)) || fail "PyTorch sees no CUDA GPU; DEVICE=cpu trains without (PRESET=demo is a size that makes it sensible)"
    nproc=${NPROC:-$gpus}
    ((nproc <= gpus)) || fail "NPROC=$nproc, but this machine has $gpus GPU(s); ask for at most that many"
    echo "run_baseline.sh: $nproc of $gpus GPU(s)"
fi

if [[ -z ${INPUT_BIN:-} ]]; then
    for name in input_bin input_val_bin; do
        pattern=$(value "$name" "$plan")
        [[ $pattern == embedded ]] || compgen -G "$pattern" > /dev/null ||
            fail "no token shards match $pattern; python cached_fineweb10B.py 27 downloads them, or set INPUT_BIN"
    done
fi

launch=("$python")
((nproc == 1)) || launch+=(-m torch.distributed.run --standalone --nproc_per_node="$nproc")
logs=$(value logs_folder "$plan")
# What may differ between a finished run and the one asked for: nothing that moves the loss curve.
free='"(seed|run_id|stage|dry_run|logs_folder|results_file|runpod_instance_type|keep|save_every|val_every|device_batch_size|compile)":'

for ((i = 0; i < count; i++)); do
    seed=$((base_seed + i))
    id=$prefix-$seed
    status=$(state "$id")
    if [[ $status == finished || $status == early_stop ]]; then
        # A skipped run must be the one that was asked for.
        was=$(knobs "$logs/$id.txt" '/^hyperparameters:$/')
        now=$(knobs "$plan" 1)
        if [[ $was != "$now" ]]; then
            (diff <(echo "$was") <(echo "$now") || true) | sed -nE 's/^<(.*[^,]),?$/  it had\1/p; s/^>(.*[^,]),?$/  now   \1/p' >&2
            fail "run $id is complete, with other knobs; set RUN_PREFIX to train with these"
        fi
        echo "run_baseline.sh: $id is complete ($status, val_loss $(value val_loss "$logs/$id/status.json")), skipped"
        continue
    fi
    echo "run_baseline.sh: $id, run $((i + 1)) of $count"
    code=0
    own=(--attngate none --seed "$seed" --run_id "$id" --dry_run 0)
    "${launch[@]}" "$script" "$@" "${own[@]}" || code=$?
    if ((code)); then
        status=$(state "$id")
        echo "run_baseline.sh: $id ended with exit code $code (status ${status:-none}); when its cause is mended, the same" \
            "command goes on from here" >&2
        exit "$code"
    fi
done
echo "run_baseline.sh: all $count run(s) are complete"
