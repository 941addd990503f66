"""The fixtures of the page's tests and of launchers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import report
from page_support import ATTACKS, options_of
from pretender import PRETENDER
from study_support import TWO_BY_TWO, make_study, result, write_log, write_results


@pytest.fixture
def study(tmp_path) -> list[str]:
    return make_study(tmp_path)


@pytest.fixture
def attacked(tmp_path) -> list[str]:
    """A study whose names, notes, knobs and states are markup."""
    nasty = dict(notes=f"X={ATTACKS[1]} {ATTACKS[0]}", gpu_name=ATTACKS[2])
    rows = [result(run, seed, loss, gate, torch=ATTACKS[seed], **nasty)
            for run, seed, loss, gate in TWO_BY_TWO]  # fmt: skip
    rows.append(result("odd" + ATTACKS[1], 1, 3.4, ATTACKS[0]))
    rows.append(result("lost" + ATTACKS[2], 1, 3.4, status=ATTACKS[1]))
    path = write_results(tmp_path / "results.csv", rows)
    for run, _, loss, _ in TWO_BY_TWO:
        write_log(tmp_path / "logs", run, loss)
        log = f"x\nhyperparameters:\n{json.dumps({ATTACKS[1]: ATTACKS[0]})}\nRunning {ATTACKS[1]}\n"
        (tmp_path / f"logs/{run}.txt").write_text(log)
    name = "<img src=x onerror=pwned=4>"
    write_log(tmp_path / "logs", name, 3.5)
    status = dict(status="running", host=ATTACKS[1], step=ATTACKS[0], updated=time.time())
    (tmp_path / "logs" / name / "status.json").write_text(json.dumps(status))
    return [
        "--results_file",
        str(path),
        "--logs_folder",
        str(tmp_path / "logs"),
        "--title",
        ATTACKS[0],
    ]


@pytest.fixture
def served(tmp_path, study) -> Iterator[tuple[int, list[str]]]:
    """The port of a watched study, and its options."""
    server = report.server(options_of(study))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], study
    server.shutdown()
    server.server_close()


@pytest.fixture
def pretend(tmp_path) -> Callable[..., Path]:
    """Write the pretending trainer and a study of it; returns the study's path."""
    trainer = tmp_path / "pretender.py"
    trainer.write_text(PRETENDER.replace("@", str(tmp_path)))

    def study(stages: str, knobs: str = "") -> Path:
        path = tmp_path / "study.toml"
        path.write_text(f'title = "T"\ntrainer = "{trainer}"\n[knobs]\n{knobs}\n{stages}')
        return path

    return study
