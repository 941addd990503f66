"""One vocabulary: over every knob of every trainer, one name each, and no name set in silence."""

import dataclasses
import importlib
import re
import sys

import pytest
from support import ROOT
from tiny_runs import run_tiny, tiny_flags

from plumbing import family
from plumbing.knobs import UserError, describe, kind_of, read_knobs, spellings

TRAINERS = ("train_gpt", "train_gpu", "train_scaled", "train_arith")
MODULES = {trainer: importlib.import_module(trainer) for trainer in TRAINERS}
KNOWN = {trainer: spellings(MODULES[trainer].Knobs) for trainer in TRAINERS}
EVERY_NAME = sorted({name for known in KNOWN.values() for name in known})
SCREEN = 40  # lines


def read(trainer: str, env: dict[str, str], argv: tuple[str, ...] = ()) -> object:
    module = MODULES[trainer]
    return read_knobs(module.Knobs, module.PRESETS, list(argv), env)


def a_value(field: dataclasses.Field) -> str:
    """A value that this knob takes: its default, as one would type it."""
    return describe(field, field.default)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_name_that_some_trainer_knows_is_taken_or_refused_and_never_ignored(trainer, capsys):
    for name in EVERY_NAME:
        owner = next(known for known in KNOWN.values() if name in known)
        env = {name: a_value(KNOWN[trainer].get(name, owner[name]))}
        if name in KNOWN[trainer]:
            read(trainer, env)
            continue
        if name in family.ORDINARY:
            read(trainer, env)
            told = capsys.readouterr().err
            assert re.search(f"{name} is (a knob of|another spelling of)", told)
            continue
        with pytest.raises(UserError, match=name):
            read(trainer, env)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_alias_sets_the_same_knob_by_flag_and_by_environment(trainer):
    for name, others in family.ALIASES.items():
        field = KNOWN[trainer].get(name.upper())
        if field is None or field.name != name:
            continue
        for alias in others:
            if KNOWN[trainer].get(alias.upper(), field).name != name:
                continue  # a field of its own in this trainer
            value = {"use_wandb": "wandb", "mixed_precision": "fp32"}.get(alias, a_value(field))
            text = {"use_wandb": "1"}.get(alias, value)
            expected = getattr(read(trainer, {name.upper(): value}), name)
            assert getattr(read(trainer, {alias.upper(): text}), name) == expected
            assert getattr(read(trainer, {}, (f"--{alias}={text}",)), name) == expected


def test_a_knob_of_one_name_is_of_one_kind_in_all_trainers():
    kinds: dict[str, set[type]] = {}
    for known in KNOWN.values():
        for field in known.values():
            kinds.setdefault(field.name, set()).add(kind_of(field))
    mixed = {name: kinds for name, kinds in kinds.items() if len(kinds) > 1}
    assert not mixed


@pytest.mark.parametrize("trainer", TRAINERS)
def test_device_gpu_suggests_cuda(trainer):
    with pytest.raises(UserError, match=r"DEVICE='gpu': .* did you mean cuda\?"):
        read(trainer, {"DEVICE": "gpu"})


def help_groups(trainer: str, capsys) -> dict[str, list[str]]:
    """The lines of --help by heading."""
    module = MODULES[trainer]
    with pytest.raises(SystemExit):
        read_knobs(module.Knobs, module.PRESETS, ["--help"], {}, module.__doc__)
    groups: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if re.fullmatch(r"[a-z][a-z. ]*:", line):
            heading = groups.setdefault(line[:-1], [])
        elif groups and line.startswith("  "):
            heading.append(line)
    return groups


@pytest.mark.parametrize("trainer", TRAINERS)
def test_help_groups_every_knob_by_subject_a_screen_at_the_most(trainer, capsys):
    groups = help_groups(trainer, capsys)
    names = {
        name: re.findall(r"^  --(\w+)", "\n".join(lines), re.M) for name, lines in groups.items()
    }
    shown = [knob for knobs in names.values() for knob in knobs]
    assert sorted(shown) == sorted({field.name for field in KNOWN[trainer].values()})
    assert max(map(len, groups.values())) <= SCREEN
    assert set(names.get("knobs", [])) <= {"preset"}, "a knob without a subject"
    assert {"evaluation and saving", "run"} <= names.keys()
    assert names["run"][0] == "device" and "val_every" in names["evaluation and saving"]
    assert all(len(line) <= 100 for lines in groups.values() for line in lines)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_help_says_what_a_value_is_and_not_the_name_again(trainer, capsys):
    for lines in help_groups(trainer, capsys).values():
        for name, metavar in re.findall(r"^  --(\w+) (\S+)", "\n".join(lines), re.M):
            assert metavar.strip("[]").lower() != name
            assert re.fullmatch(r"\[0\|1\]|\{.*\}|[A-Z][A-Z|,:0-9]*", metavar), (name, metavar)


# What a run refuses before it trains, in every trainer, and so its dry run too.
PROBLEMS = {
    "a run id that cannot name files": dict(run_id="a/b"),
    "no batch": dict(batch_size=0),
    "an unknown preset": dict(preset="huge"),
    "a results file that is a folder": dict(results_file=str(ROOT)),
}
MISSING = {
    "train_gpt": dict(input_bin="/nowhere/*.bin", input_val_bin="/nowhere/v*.bin"),
    "train_gpu": dict(data="/nowhere"),
    "train_scaled": dict(data="/nowhere"),
    "train_arith": dict(train_path="/nowhere.jsonl"),
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("problem", [*PROBLEMS, "no data", "a complete run", "other columns"])
def test_a_dry_run_refuses_what_the_run_refuses_with_exit_code_2(
    trainer, problem, tmp_path, monkeypatch
):
    knobs = {**PROBLEMS, "no data": MISSING[trainer]}.get(problem, {})
    if problem == "a complete run":
        (tmp_path / "logs/tiny").mkdir(parents=True)
        (tmp_path / "logs/tiny/status.json").write_text('{"status": "finished"}')
    if problem == "other columns":
        (tmp_path / "results.csv").write_text("not,ours\n1,2\n")

    def outcome(**more) -> tuple[int, str]:
        try:
            return run_tiny(monkeypatch, trainer, tmp_path, **knobs, **more)
        except UserError as error:  # launch() makes this line and exit code 2 of it
            return 2, str(error)

    planned, words = outcome(dry_run=1)
    assert planned == 2, words
    ran, told = outcome()
    assert ran == 2
    assert told.strip() in words, "the same words"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_dry_run_of_a_good_run_says_so_and_leaves_nothing(trainer, tmp_path, monkeypatch):
    code, said = run_tiny(monkeypatch, trainer, tmp_path, dry_run=1)
    assert code == 0 and "problem:" not in said
    assert not (tmp_path / "logs").exists() and not (tmp_path / "results.csv").exists()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_first_lines_of_a_log_say_no_nan_and_name_what_a_step_is_made_of(
    trainer, tmp_path, monkeypatch
):
    code, said = run_tiny(monkeypatch, trainer, tmp_path)
    assert code == 0 and "nan" not in said.replace("finance", "")
    assert re.search(r"step:\d+/4", said)


def test_a_tiny_run_is_described_by_knobs_of_its_trainer():
    for trainer in TRAINERS:
        argv = tiny_flags(trainer, ROOT)
        assert read(trainer, {}, tuple(argv)).run_id == "tiny"
    assert "pytest" in sys.modules
