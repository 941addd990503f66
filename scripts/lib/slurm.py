"""Batch files for the missing runs of a study."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from lib.deciding import ENDED, is_due
from lib.launcher import run_env
from lib.program import ROOT, count, write_whole
from lib.progress import Progress
from lib.study import Study

SBATCH = """\
#!/bin/bash
# {run_id}: written by scripts/run_study.py, {study}. sbatch's own options override these.
#SBATCH --job-name={run_id}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1{gpus}
#SBATCH --output={out}
#SBATCH --open-mode=append
#SBATCH --signal=USR1@90
#SBATCH --requeue
# USR1 comes 90 s before the time is up: the trainer saves and leaves, and the job queues itself
# again. A job that
# is preempted or loses a node is queued again by Slurm. RUN_ID is fixed, so it resumes each time.
set -u
cd {repo} || exit 1
unset {unset}
{exports}
cores=$(( ${{SLURM_CPUS_ON_NODE:-{nproc}}} / {nproc} ))
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$(( cores > 0 ? cores : 1 ))}}"
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(( 20000 + SLURM_JOB_ID % 20000 ))
srun --kill-on-bad-exit=1 {python} -m torch.distributed.run \\
    --nnodes={nodes} --nproc_per_node={nproc} \\
    --rdzv_backend=c10d --rdzv_endpoint="$head_node:$port" \\
    --rdzv_id="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}" \\
    --signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \\
    {trainer}
code=$?
if grep -q '"status": "preempted"' {status}; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def write_slurm(study: Study, runs: Sequence[Progress], a: argparse.Namespace) -> None:
    """One batch file per missing run, and a script that submits them all."""
    nproc, repo = a.nproc or study.nproc, shlex.quote(str(ROOT))
    todo = [p for p in runs if p.state not in ENDED and is_due(study, runs, p)]
    for p in todo:
        env = run_env(p, a.logs_folder, a.results_file)
        gpus = (
            f"\n#SBATCH --gpus-per-node={nproc}"
            if getattr(p.run.knobs, "device", "cuda") == "cuda"
            else ""
        )
        text = SBATCH.format(
            run_id=p.run_id,
            study=study.path.name,
            nodes=a.nodes or 1,
            nproc=nproc,
            gpus=gpus,
            out=a.logs_folder / f"{p.run_id}.out",
            repo=repo,
            unset=" ".join(sorted(study.trainer.known)),
            exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
            python=shlex.quote(sys.executable),
            trainer=shlex.quote(str(study.trainer.path)),
            status=shlex.quote(str(a.logs_folder / p.run_id / "status.json")),
        )
        write_whole(a.slurm / f"{p.run_id}.sbatch", text)
    names = " \\\n    ".join(shlex.quote(f"{p.run_id}.sbatch") for p in todo)
    text = (
        f"#!/bin/bash\n# Submits the missing runs of {study.path.name}; arguments go to sbatch: "
        f"submit_all.sh --partition=gpu --time=04:00:00\n"
        f'set -eu\ncd "$(dirname "$0")"\nmkdir -p {shlex.quote(str(a.logs_folder))}\n'
    )
    text += (
        f'for job in {names}; do\n    sbatch "$@" "$job"\ndone\n'
        if todo
        else "echo nothing is missing\n"
    )
    write_whole(a.slurm / "submit_all.sh", text)
    (a.slurm / "submit_all.sh").chmod(0o755)
    print(f"wrote {count(len(todo), 'job')} and {a.slurm / 'submit_all.sh'}; nothing was submitted")
