"""check_gpu_enforcement.py -- launches train_arith.py in every way that must end, and checks texts
and exit codes.

    python scripts/arith/check_gpu_enforcement.py   a table; exit code 0 when all are as promised

GPUs are hidden from the launches (CUDA_VISIBLE_DEVICES=''), so the table is the same on any
machine. The configuration named does not exist: whatever is refused must be refused before it is
opened. A program, not a test for pytest.
"""

import os
import subprocess
import sys
from pathlib import Path

TRAINER = Path(__file__).resolve().parents[2] / "train_arith.py"
MISSING = "no-such-folder/no-such-config.yaml"
ONLY = (
    "RuntimeError: GPU-only mode requires --device cuda. "
    "Aborting to prevent accidental CPU training."
)
NONE = (
    "RuntimeError: CUDA requested but not available. "
    "GPU-only mode cannot fall back to CPU. Aborting."
)
FP16 = "RuntimeError: FP16 mixed precision requires CUDA device"
FALLS, OPENED = "CUDA not available, using CPU", f"--config {MISSING}: cannot be read"
CASES = [  # flags, exit code, what must be said, what must not
    ("--gpu-only", 1, [ONLY], [OPENED]),
    ("--gpu-only --device cpu", 1, [ONLY], [OPENED]),
    ("--gpu-only --device cpu --fp16", 1, [ONLY], [FP16, OPENED]),
    ("--gpu-only --device cuda", 1, [NONE], [FALLS, OPENED]),
    ("--gpu-only --device cuda --fp16", 1, [NONE], [FALLS, FP16, OPENED]),
    ("--device cpu --fp16", 1, [FP16], [OPENED]),
    ("--device cuda --fp16", 1, [FALLS, FP16], [OPENED]),
    ("--device cuda", 2, [FALLS, OPENED], ["RuntimeError"]),
    ("--device cpu", 2, [OPENED], ["RuntimeError", FALLS]),
    ("--device tpu", 2, ["expected one of cpu, cuda"], ["RuntimeError"]),
]


def launch(flags: str) -> tuple[int, str]:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DEVICE", "FP16", "GPU_ONLY", "CONFIG")
    }
    env |= dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [
        sys.executable,
        str(TRAINER),
        "--config",
        MISSING,
        "--output-dir",
        "no-such-folder/run",
        *flags.split(),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    failed = 0
    print(f"{'flags':36} {'exit':>4} {'said':>5}  verdict")
    for flags, code, said, unsaid in CASES:
        got, text = launch(flags)
        right = [words in text for words in said], [words not in text for words in unsaid]
        good = got == code and all(right[0]) and all(right[1])
        failed += not good
        last = "" if good else f"expected exit {code} and {said}; it said: {text.strip()[-200:]}"
        print(
            f"{flags:36} {got:4} {sum(right[0]):2}/{len(said)}  {'[OK]' if good else '[FAILED]'} "
            f"{last}"
        )
    print(f"{len(CASES) - failed} of {len(CASES)} as promised")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
