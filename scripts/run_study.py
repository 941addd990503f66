"""run_study.py -- run what is missing of a study, and only that.

    python scripts/run_study.py experiments/studies/mini.toml   again after any interruption
    python scripts/run_study.py experiments/studies/gating.toml --stage stage1,stage2 --nproc 8
    python scripts/run_study.py FILE --dry_run                  the runs, their state, their tokens
    python scripts/run_study.py FILE --slurm jobs --nodes 2     job files instead of runs
    python scripts/run_study.py FILE --set device=cuda          knobs of every run

A study file (TOML, Python 3.11) says what is compared with what:

    title = "Which gate"
    trainer = "train_gpt.py"            # relative to the repository
    nproc = 8                           # processes of a run (default 1); --nproc overrides
    budget_s = 3600                     # seconds of training for all of it; may be left out

    [knobs]                             # of every run; names as in `python TRAINER --help`
    val_every = 125

    [stage.stage1]                      # stages run in this order; the name is in the results row
    about = "at the record's rate"      # may be left out, as all below but seeds and baseline
    seeds = [1337, 1338]                # every cell runs once per seed
    baseline = { attngate = "none" }    # what the others are compared with
    target_loss = 3.6                   # nats; tables give steps and seconds to it
    knobs = { num_iterations = 1500 }   # of every run of the stage; go before [knobs]
    grid = { attngate = ["none", "headwise"], lr = [0.003, 0.004] }    # all combinations are cells
    cells = [{ attngate = "const" }]    # further cells, one by one; with neither, one cell
    fork = { from = "lr=0.003", step = 750 }  # cells start from that cell's checkpoint of there
    stop = "decided"                    # seeds are added until all is decided (docs/studies.md)
    delta = 0.002                       # with it: the smallest difference that matters, in nats
    max_seeds = 12                      # with it: of each cell

A run is a stage, a cell's knobs and a seed; its RUN_ID is made of them and of the code (trainer
and plumbing), so that a finished run is known by its content, a half-done one resumes, and a
change makes it missing again. Whatever knobs the environment sets are dropped, and named: results
are a function of the study file. (LOGS_FOLDER, RESULTS_FILE, DEVICE_BATCH_SIZE and
RUNPOD_INSTANCE_TYPE move no loss, and are used.) Two launchers on one study share the work.
Ctrl-C, SIGTERM and SIGUSR1 are passed on to the run, which saves; a second Ctrl-C kills it.

Exit     0 all finished, 1 some failed (listed with their last lines), 2 bad input,
         128 + n after signal n
Raises   UserError, before anything runs, with all that is wrong in the file
"""

import argparse
import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lib.deciding import is_next, spare
from lib.fork_stage import fork_problems
from lib.launcher import Runner
from lib.planning import Pace, forecast_lines
from lib.program import UserError, count, launch
from lib.progress import Progress, Records
from lib.slurm import write_slurm
from lib.study import Study, read_study
from lib.study_stage import Run
from lib.trainers import Plan, near, plan_of


def check_data(study: Study, runs: Sequence[Progress]) -> None:
    """Raise UserError when the data of runs that are to do are missing or too few: better now
    than in every one."""
    problems: dict[str, list[str]] = {}
    todo = {(p.run.stage, p.run.label): p for p in runs if p.state != "done"}
    for (stage, label), p in todo.items():
        if problem := plan_of(p.run.knobs, study.trainer).problem:
            problems.setdefault(problem, []).append(f"[stage.{stage}] {label}")
    words = fork_problems([p.run for p in runs], study.trainer)
    for problem, labels in problems.items():
        more = f" (and {len(labels) - 1} more)" if len(labels) > 1 else ""
        words.append(f"{labels[0]}{more}: {problem}")
    if len(words) == 1:
        raise UserError(words[0])
    if words:
        raise UserError("\n  ".join([f"{len(words)} problems:", *words]))


def runs_of(study: Study, stages: Collection[str]) -> tuple[Run, ...]:
    """The runs of these stages, and the trunks that they are forked from."""
    wanted = [run for run in study.runs if run.stage in stages and not run.stop_after]
    trunks = {run.trunk for run in wanted}
    return tuple(run for run in study.runs if run in wanted or run.content in trunks)


def show_stage(
    title: str, group: Sequence[Progress], plans: Mapping[str, Plan], due: set[str]
) -> None:
    """The runs of a stage with their states and sizes, as a table. `due`: not to be decided on."""
    print(f"\n{title}".rstrip())
    rows = []
    for p in group:
        plan = plans[p.run.label]
        rows.append({
            "cell": p.run.label + "*" * p.run.is_baseline,
            "seed": str(p.run.seed),
            "state": f"{p.state if p.run_id in due else 'if needed'} {p.note}".rstrip(),
            "steps": str(p.run.steps),
            "params": plan.parameters,
            "tokens": f"{plan.tokens:,}" if plan.tokens else "",
            "run id": p.run_id,
        })  # fmt: skip
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in [{name: name for name in widths}, *rows]:
        words = []
        for name, width in widths.items():
            left = name in ("cell", "state", "run id")
            words.append(row[name].ljust(width) if left else row[name].rjust(width))
        print("  " + "  ".join(words).rstrip())


def show_study(study: Study, runs: Sequence[Progress], ignored: str) -> None:
    """--dry_run: every run, its state, its size."""
    code = f"{study.trainer.path.name}, code {study.trainer.code[:6]}"
    print(f"{study.title}: {study.path}, {code}{ignored}")
    todo = [p for p in runs if p.state != "done"]
    missing = total = 0
    problems: Counter[str] = Counter()
    due = {p.run_id for p in runs if p.run.stop_after or is_next(study, runs, p)}
    for stage, group in itertools.groupby(runs, key=lambda p: p.run.stage):
        group = list(group)
        plans = {}  # the same for all seeds
        for p in group:
            if p.run.label not in plans:
                plans[p.run.label] = plan_of(p.run.knobs, study.trainer)
            plan = plans[p.run.label]
            planned = max(1, getattr(p.run.knobs, "num_iterations", None) or 1)
            tokens = plan.tokens * (p.run.steps - p.run.first_step) // planned
            total += tokens
            if p in todo:
                missing += tokens
                problems[plan.problem] += 1
        show_stage(f"{stage}  {study.stages[stage]}", group, plans, due)
    summary = f"{count(len(runs), 'run')}, {len(runs) - len(todo)} done, {len(todo)} to do"
    if total:
        summary += f"; {missing:,} of {total:,} training tokens to do"
    print(f"\n* baseline\n{summary}")
    for problem, n in problems.items():
        if problem:
            print(f"data of {count(n, 'run')}: {problem}")


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "file", type=Path, metavar="FILE", help="the study, such as experiments/studies/mini.toml"
    )
    p.add_argument("--stage", metavar="S,S", help="these stages only")
    p.add_argument(
        "--nproc", type=int, metavar="N", help="processes of a run, per node; default: the study's"
    )
    p.add_argument(
        "--retries", type=int, default=1, metavar="N", help="further attempts at a run that fails"
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KNOB=VALUE",
        help="of every run, before the file's",
    )
    p.add_argument(
        "--ignore-code",
        "--ignore_code",
        action="store_true",
        help="runs of other code count as finished",
    )
    p.add_argument("--dry_run", "--dry-run", action="store_true", help="list the runs and stop")
    p.add_argument(
        "--slurm", type=Path, metavar="DIR", help="write batch files there instead of running"
    )
    p.add_argument("--nodes", type=int, metavar="N", help="nodes of a run; with --slurm")
    p.add_argument(
        "--logs_folder", "--logs-folder", type=Path, metavar="DIR", help="default: the trainer's"
    )
    p.add_argument(
        "--results_file", "--results-file", type=Path, metavar="CSV", help="default: the trainer's"
    )
    return p.parse_args(argv)


def check_arguments(a: argparse.Namespace) -> None:
    """Raise UserError for flags that say nothing, or do not go together."""
    for name, low in (("nproc", 1), ("nodes", 1), ("retries", 0)):
        if (value := getattr(a, name)) is not None and value < low:
            raise UserError(f"--{name} {value}: expected a whole number >= {low}")
    if wrong := [text for text in a.set if "=" not in text]:
        raise UserError(f"--set {wrong[0]}: expected KNOB=VALUE, such as --set num_iterations=100")
    if a.nodes and not a.slurm:
        raise UserError(
            "--nodes goes with --slurm DIR, which writes job files; this machine alone runs "
            "without it (on several machines by hand, see torchrun --nnodes)"
        )


def main(argv: Sequence[str] | None = None) -> int:
    a = read_arguments(argv)
    check_arguments(a)
    study = read_study(a.file, changes=dict(text.split("=", 1) for text in a.set))
    if a.stage:
        names = [s.strip() for s in a.stage.split(",") if s.strip()]
        if unknown := [s for s in names if s not in study.stages]:
            hint = near(unknown[0], study.stages)
            raise UserError(f"--stage {unknown[0]}: {a.file} has {', '.join(study.stages)}{hint}")
        study = dataclasses.replace(study, runs=runs_of(study, names))
    defaults = {f.name: f.default for f in dataclasses.fields(study.trainer.module.Knobs)}
    for name in (
        "logs_folder",
        "results_file",
    ):  # a flag beats the environment, as it does for knobs
        path = getattr(a, name) or Path(os.environ.get(name.upper()) or defaults[name])
        setattr(a, name, path.resolve())
    records = Records(a.logs_folder, a.results_file)
    runs = [Progress(run, run.default_id) for run in study.runs]
    by_content = {p.run.content: p for p in runs}
    for p in runs:
        p.trunk = by_content.get(p.run.trunk)
        records.look(p, a.ignore_code)
    spare(study, runs)
    if study.said:
        print(study.said, flush=True)
    if a.dry_run:
        show_study(study, runs, ", other code counts (--ignore-code)" if a.ignore_code else "")
        print("\n".join(forecast_lines(study, runs, Pace(a.logs_folder))))
        return 0
    if a.slurm:
        write_slurm(study, runs, a)
        return 0
    check_data(study, runs)
    (a.logs_folder / ".locks").mkdir(parents=True, exist_ok=True)
    return Runner(study, runs, records, a).run()


if __name__ == "__main__":
    launch(main)
