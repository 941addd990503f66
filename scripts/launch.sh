#!/usr/bin/env bash
# launch.sh -- start a command that outlives this terminal, with a log, and say how to follow, check and stop it.
#
#     scripts/launch.sh .venv/bin/python scripts/run_study.py experiments/studies/gating.toml
#     NUM_ITERATIONS=800 scripts/launch.sh torchrun --standalone --nproc_per_node=8 train_gpt.py
#
# Says "started" when the log shows that a run is past its checks and trains, or of another command when it is still
# alive after LAUNCH_WAIT_S seconds (20); a command that has ended by then is reported with its last lines and its exit
# code. Writes launch-<time>.log and .pid into logs/ (or LOGS_FOLDER). Stopping sends SIGTERM, at which trainers and
# run_study.py save and leave; the same command goes on from there.
set -eu

if [ $# -eq 0 ]; then
    echo "launch.sh: error: no command; use: scripts/launch.sh CMD [ARGUMENT...]" >&2
    exit 2
fi
if ! command -v -- "$1" >/dev/null; then
    echo "launch.sh: error: $1: no such command" >&2
    exit 2
fi

logs=${LOGS_FOLDER:-$(cd "$(dirname "$0")/.." && pwd)/logs}
mkdir -p -- "$logs"
name=$logs/launch-$(date +%Y%m%d-%H%M%S)
while ! (set -o noclobber && : >"$name.log") 2>/dev/null; do # two in one second: the later one takes the next
    if ! [ -e "$name.log" ]; then
        echo "launch.sh: error: $name.log cannot be written" >&2
        exit 2
    fi
    sleep 1
    name=$logs/launch-$(date +%Y%m%d-%H%M%S)
done

# A session of its own (setsid) and no SIGHUP (nohup): closing the terminal reaches it in neither way. Python's output
# is not held back in a buffer.
printf '# %s\n' "$(date '+%Y-%m-%d %H:%M:%S') $PWD: $*" >>"$name.log"
PYTHONUNBUFFERED=1 setsid nohup "$@" >>"$name.log" 2>&1 </dev/null &
pid=$!
echo "$pid" >"$name.pid"

# What a trainer, or run_study.py, says when all its checks are made.
trains='^(log: |resumed step:|step:|start: |resume: )'
words='alive, but has not said yet that it trains'
end=$((SECONDS + ${LAUNCH_WAIT_S:-20}))
while :; do
    if ! kill -0 "$pid" 2>/dev/null; then
        code=0
        wait "$pid" || code=$?
        echo "it has ended already, with exit code $code; $name.log:"
        tail -n 5 -- "$name.log"
        exit "$code"
    fi
    if grep -qE "$trains" -- "$name.log"; then
        words='past its checks'
        break
    fi
    ((SECONDS < end)) || break
    sleep 0.5
done
printf 'started, pid %s, %s\n' "$pid" "$words"
printf 'follow  tail -f %q\n' "$name.log"
printf 'check   ps -o pid,etime,args -p %s\n' "$pid"
printf 'stop    kill -TERM -%s\n' "$pid"
