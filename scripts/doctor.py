"""doctor.py -- what this machine can do for a run, and what stands in the way of one.

    python scripts/doctor.py                    in the environment in which the run would start
    python scripts/doctor.py --device cuda      a missing GPU is a problem, not a note

A line for each thing that is looked at: ok, note (a run works without it) or BAD (a run fails, or
is much slower than it should be), and below a note or BAD what can be done about it.
Exit     0 when nothing is BAD, else 1
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from lib.program import ROOT, UserError, launch

OK, NOTE, BAD = "ok", "note", "BAD"
GIB = 2**30
PACKAGES = "numpy huggingface_hub tiktoken safetensors filelock tqdm yaml".split()
OPTIONAL = {  # package: what it is for
    "scipy": "confidence intervals in tables",
    "matplotlib": "figures",
    "pyarrow": "WikiText and Wikipedia from the hub",
}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Finding:
    subject: str
    level: str
    found: str
    way_out: str = ""


def looked(
    subject: str, is_good: bool, found: str, way_out: str = "", else_level: str = BAD
) -> Finding:
    if is_good:
        return Finding(subject, OK, found)
    return Finding(subject, else_level, found, way_out)


# ----------------------------------------------------------------------------
# Programs and packages


def python(args: argparse.Namespace) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    where = f"{version} in {sys.prefix}"
    yield looked("python", sys.version_info >= (3, 10), where, "install Python 3.11 or later")
    is_enough = sys.version_info >= (3, 11)
    yield looked("study files", is_enough, "TOML is read", "run_study.py needs Python 3.11", NOTE)


def packages(args: argparse.Namespace) -> Iterator[Finding]:
    missing = [name for name in PACKAGES if util.find_spec(name) is None]
    found = f"missing: {', '.join(missing)}" if missing else "all that a trainer imports"
    yield looked("packages", not missing, found, "pip install -r requirements.txt")
    missing = [
        f"{name} ({what})" for name, what in OPTIONAL.items() if util.find_spec(name) is None
    ]
    found = f"missing: {', '.join(missing)}" if missing else "for tables, figures and the hub"
    yield looked("more packages", not missing, found, "pip install -r requirements-dev.txt", NOTE)


def torch_itself(args: argparse.Namespace) -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        way_out = "source .venv/bin/activate, or pip install -r requirements.txt"
        yield Finding("torch", BAD, f"cannot be imported ({error})", way_out)
        return
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    found = f"{torch.__version__}, built for {built}"
    yield looked("torch", version >= (2, 9), found, "install torch 2.9 or later")
    pinned = dict(line.split("==") for line in read_lines(ROOT / "requirements.lock"))
    other = []
    for name, wanted in pinned.items():
        installed = version_of(name)
        if installed and installed.split("+")[0] != wanted:
            other.append(f"{name} {installed} (tested: {wanted})")
    found = ", ".join(other[:4]) or "as tested"
    way_out = "pip install -r requirements.lock, should anything behave oddly"
    yield looked("versions", not other, found, way_out, NOTE)


def version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def read_lines(path: Path) -> list[str]:
    """The lines of a file that say something; none where there is no file."""
    if not path.is_file():
        return []
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line]


# ----------------------------------------------------------------------------
# GPUs


def driver(args: argparse.Namespace) -> Iterator[Finding]:
    level = BAD if args.device == "cuda" else NOTE
    said = output_of("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    if not said:
        way_out = "train with DEVICE=cpu, or install the vendor's driver"
        yield Finding("driver", level, "nvidia-smi finds no GPU", way_out)
        return
    yield Finding("driver", OK, said.splitlines()[0])


def gpus(args: argparse.Namespace) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        level = BAD if args.device == "cuda" else NOTE
        way_out = "DEVICE=cpu PRESET=demo trains here; a GPU needs a torch that is built for CUDA"
        yield Finding("GPU", level, "torch sees none", way_out)
        return
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        free, total = torch.cuda.mem_get_info(i)
        found = f"{torch.cuda.get_device_name(i)}, capability {major}.{minor}, "
        found += f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"
        way_out = "another process holds its memory; nvidia-smi shows which"
        yield looked(f"GPU {i}", free > 0.5 * total, found, way_out, NOTE)
        # torch.cuda.is_bf16_supported() calls emulation support, and says yes on a T4.
        found = "in hardware" if major >= 8 else "would be emulated, which is slow"
        yield looked(f"bf16 {i}", major >= 8, found, "PRECISION=fp16, or auto", NOTE)
    from torch import distributed

    found = "none in this torch"
    if distributed.is_available() and distributed.is_nccl_available():
        found = ".".join(map(str, torch.cuda.nccl.version()))
    is_needed = torch.cuda.device_count() > 1
    way_out = "several GPUs need a torch with NCCL"
    yield looked("NCCL", found[0] != "n" or not is_needed, found, way_out)


def kernels(args: argparse.Namespace) -> Iterator[Finding]:
    version = version_of("fla-core")
    way_out = "pip install fla-core, for KERNEL=fla of train_gpu.py on a GPU"
    yield looked("fla", bool(version), version or "not installed", way_out, NOTE)


def compiler(args: argparse.Namespace) -> Iterator[Finding]:
    from plumbing.device import check_compiler

    for kind in ("cpu", "cuda"):
        import torch

        if kind == "cuda" and not torch.cuda.is_available():
            continue
        try:
            check_compiler(True, kind)
            yield Finding(f"compiler {kind}", OK, "torch.compile has what it needs")
        except ValueError as error:
            yield Finding(f"compiler {kind}", NOTE, "torch.compile cannot be used", str(error))


# ----------------------------------------------------------------------------
# The machine


def processor(args: argparse.Namespace) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = f"{cores} cores, load {load:.1f}"
    way_out = "others compute here as well: times of a CPU run mean little now"
    yield looked("processor", load < cores, found, way_out, NOTE)


def memory(args: argparse.Namespace) -> Iterator[Finding]:
    lines = read_lines(Path("/proc/meminfo"))
    free = next((int(line.split()[1]) for line in lines if "MemAvailable" in line), 0) / 2**20
    if free:
        way_out = "close other programs, or train a smaller preset"
        yield looked("memory", free > 4, f"{free:.0f} GiB free", way_out, NOTE)


def disk(args: argparse.Namespace) -> Iterator[Finding]:
    folders = {"LOGS_FOLDER": ROOT / "logs", "RESULTS_FILE": ROOT / "experiments/results.csv"}
    for name, default in folders.items():
        folder = Path(os.environ.get(name) or default)
        folder = folder if name == "LOGS_FOLDER" else folder.parent
        there = next(path for path in (folder, *folder.parents) if path.exists())
        way_out = f"set {name} to a place that you may write to"
        yield looked(f"write {name}", os.access(there, os.W_OK), str(folder), way_out)
        if name == "LOGS_FOLDER":
            free = shutil.disk_usage(there).free / GIB
            # Two checkpoints of the 124M models with their optimizers take 3 GiB.
            way_out = "free space, lower KEEP, or set LOGS_FOLDER to another disk"
            yield looked("disk", free > 10, f"{free:.0f} GiB free for {folder}", way_out, NOTE)


def shards(args: argparse.Namespace) -> Iterator[Finding]:
    from plumbing.data import TokenShards

    for name, part in (("INPUT_BIN", "train"), ("INPUT_VAL_BIN", "val")):
        default = f"{ROOT / 'data/fineweb10B/fineweb'}_{part}_*.bin"
        pattern = os.environ.get(name) or default
        if pattern == "embedded":
            continue
        try:
            found = TokenShards(pattern)
            words = f"{len(found.paths)} with {found.total:,} tokens"
            yield Finding(f"shards {part}", OK, words)
        except UserError as error:
            is_missing = "no token shards match" in str(error)
            found = f"none match {pattern}" if is_missing else str(error)
            way_out = "python cached_fineweb10B.py 27 downloads an epoch; PRESET=demo needs none"
            if not is_missing:
                way_out = "delete the file that is named, and download or make it again"
            yield Finding(f"shards {part}", NOTE if is_missing else BAD, found, way_out)


def launcher(args: argparse.Namespace) -> Iterator[Finding]:
    present = [name for name in LAUNCHER if name in os.environ]
    missing = [name for name in LAUNCHER if name not in os.environ]
    is_whole = not present or not missing
    found = "none is set; torchrun sets them" if not present else f"set: {', '.join(present)}"
    way_out = f"{' '.join(missing)} missing: start with torchrun, or unset {' '.join(present)}"
    yield looked("launcher variables", is_whole, found, way_out)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    found = f"OMP_NUM_THREADS={threads}" if threads else "chosen by the run, on a CPU"
    yield looked("threads", threads == "" or threads.isdigit(), found, "give it a whole number")


def knobs(args: argparse.Namespace) -> Iterator[Finding]:
    from plumbing.family import ALIASES, COMMON, FAMILY

    words = {*COMMON.split(), *(name for names in FAMILY.values() for name in names.split())}
    words |= {alias for names in ALIASES.values() for alias in names}
    present = sorted(name for name in os.environ if name.lower() in words and name.isupper())
    found = ", ".join(f"{name}={os.environ[name]}" for name in present) or "none is set"
    way_out = "these set every run that starts from here; env -u NAME unsets one"
    yield looked("knobs in the environment", not present, found, way_out, NOTE)


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


CHECKS: tuple[Callable[[argparse.Namespace], Iterator[Finding]], ...] = (
    python, packages, torch_itself, driver, gpus, kernels, compiler, processor, memory, disk,
    shards, launcher, knobs,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=("any", "cuda"), default="any", help="what you need")
    args = parser.parse_args(argv)
    num_bad = 0
    for check in CHECKS:
        findings = []
        try:
            findings += check(args)
        except Exception as error:  # a doctor goes on to the next patient
            what = f"could not be looked at ({type(error).__name__}: {error})"
            findings.append(Finding(check.__name__, BAD, what, "see the lines above"))
        for finding in findings:
            num_bad += finding.level == BAD
            print(f"{finding.level:4}  {finding.subject + ':':26} {finding.found}")
            if finding.way_out and finding.level != OK:
                print(f"{'':6}{'':26} -> {finding.way_out}")
    print("nothing stands in the way" if num_bad == 0 else f"{num_bad} BAD; see the arrows above")
    return 1 if num_bad else 0


if __name__ == "__main__":
    launch(main)
