"""checkout.py -- a copy of this repository in which many commands are run as a user would run them.

To import torch takes seconds, and there are a hundred commands. So one process imports the
libraries (and none of our modules) and forks for each command; the fork runs the program's file.
Our programs find the root of the checkout by their own place, so that what they write stays in the
copy.

    python checkout.py    serves: requests as lines of JSON in, exit code and CPU seconds out
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

LIBRARIES = "torch torch._dynamo torch.distributed numpy matplotlib.pyplot scipy.stats yaml"
LIBRARIES += " huggingface_hub.utils"
OUTPUT = ".output"  # what the last command wrote


class Checkout:
    """The copy of `root` in `folder`, and the process that runs commands in it."""

    def __init__(self, root: Path, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.cpu_s = folder, 0.0
        self.answers: dict[str, tuple[int, str]] = {}
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for name in listed:
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)
        self.server = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self, words: list[str], env: dict[str, str] | None = None, interrupt: bool = False
    ) -> tuple[int, str]:
        """The exit code of `python WORDS` and what it wrote, stdout and stderr in one.

        `interrupt`: Ctrl-C is pressed when it has written something.
        """
        asked = json.dumps([words, env])
        if asked in self.answers:  # several documents show it
            return self.answers[asked]
        request = dict(words=words, env=env or {}, interrupt=interrupt)
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        code, cpu_s = json.loads(self.server.stdout.readline())
        self.cpu_s += cpu_s
        self.answers[asked] = code, (self.folder / OUTPUT).read_text()
        return self.answers[asked]

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=200)


def become(words: list[str], env: dict[str, str]) -> None:
    """In the forked process: run the program, and end with its exit code."""
    out = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, sys.stdout.fileno())
    os.dup2(out, sys.stderr.fileno())
    os.environ.update(env)
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def interrupt(child: int) -> None:
    """Ctrl-C, half a second after the program has begun to write."""
    output = Path(OUTPUT)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, child, ended) is None:
        if output.exists() and output.stat().st_size > 0:
            time.sleep(0.5)
            os.kill(child, signal.SIGINT)
            return
        time.sleep(0.05)


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        Path(OUTPUT).unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            become(request["words"], request["env"])
        if request["interrupt"]:
            interrupt(child)
        _, status, used = os.wait4(child, 0)
        answer = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for library in LIBRARIES.split():
        __import__(library)
    serve()
