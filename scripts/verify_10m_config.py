"""verify_10m_config.py -- is configs/scale_10m.yaml a model of about 10M parameters, and can this machine train it?

python scripts/verify_10m_config.py                exit code 0: yes; 1: the size is off; 3: no CUDA; 2: a bad file
python scripts/verify_10m_config.py --no-gpu       the size alone
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from plumbing import HERE, launch
from train_arith import count_parameters, flat_items, memory_mib, read_all, read_yaml

TARGET, TOLERANCE = 10_000_000, 0.10
RULE = "=" * 60


def show(title: str, items: dict[str, object]) -> None:
    print(f"{RULE}\n{title}\n{RULE}")
    for name, value in items.items():
        print(f"  {name}: {value}")


def gpu_ready(needed_mib: int) -> bool:
    """Whether there is a GPU with enough memory, said aloud."""
    print(
        f"{RULE}\nGPU Requirements:\n{RULE}\nRequired: a CUDA GPU with about {needed_mib:,} MiB beside CUDA's own"
    )
    if not torch.cuda.is_available():
        print("[ERROR] CUDA not available\nTraining will FAIL with --gpu-only flag")
        return False
    memory = torch.cuda.get_device_properties(0).total_memory
    print(f"CUDA detected: {torch.cuda.get_device_name(0)}\nVRAM available: {memory / 1e9:.2f} GB")
    if memory < 2**20 * (needed_mib + 1024):
        print("[ERROR] not enough GPU memory")
        return False
    print("[OK] Ready for GPU training")
    return True


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--config",
        default=str(HERE / "configs/scale_10m.yaml"),
        help="default configs/scale_10m.yaml",
    )
    p.add_argument("--no-gpu", action="store_true", help="do not look for a GPU")
    a = p.parse_args()
    k = read_all([], {}, a.config, [])
    items = dict(flat_items(read_yaml(a.config)))
    print(f"{RULE}\n10M Scaling Config Verification\n{RULE}\n{a.config}")
    show(
        "Model Configuration:",
        {key: value for key, value in items.items() if key.startswith("model.")},
    )
    n = count_parameters(k)
    off = abs(n - TARGET) / TARGET
    print(
        f"\nTotal parameters: {n:,}\n                  {n / 1e6:.2f}M\nTarget: 10M\nDifference: {100 * off:.1f}%"
    )
    good = off < TOLERANCE
    verdict = (
        "[OK] Configuration verified: ~10M parameters"
        if good
        else "[ERROR] Parameter count is far from 10M"
    )
    print(f"\n{verdict}\n")
    show(
        "Training Configuration:",
        {key: value for key, value in items.items() if key.startswith("training.")},
    )
    ready = a.no_gpu or gpu_ready(memory_mib(n, k.batch_size, k))
    return 0 if good and ready else 3 if good else 1


if __name__ == "__main__":
    launch(main)
