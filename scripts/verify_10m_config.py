"""verify_10m_config.py -- is configs/scale_10m.yaml a model of about 10M parameters, and does it
fit?

python scripts/verify_10m_config.py           exit code 0: yes; 1: the size is off; 3: no CUDA;
                                              2: a bad file
python scripts/verify_10m_config.py --no-gpu  the size alone
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from plumbing import ROOT, launch
from plumbing.config import read_yaml
from plumbing.problem_config import FIXED, read_problem_knobs, yaml_keys
from train_arith import PRESETS, CompactTransformer, Knobs

TARGET, TOLERANCE = 10_000_000, 0.10
RULE = "=" * 60


def count_parameters(cfg: Knobs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in CompactTransformer(cfg).parameters())


def memory_mib(cfg: Knobs) -> int:
    """Rough peak: weights, gradients and moments, and activations with their dropout masks."""
    per_layer = 20 * cfg.n_embd + 4 * cfg.d_ff + 4 * cfg.n_head * cfg.sequence_length
    tokens = cfg.batch_size * cfg.sequence_length
    return (16 * count_parameters(cfg) + 4 * tokens * cfg.n_layer * per_layer) // 2**20


def show(title: str, items: dict[str, object]) -> None:
    print(f"{RULE}\n{title}\n{RULE}")
    for name, value in items.items():
        print(f"  {name}: {value}")


def gpu_ready(needed_mib: int) -> bool:
    """Whether there is a GPU with enough memory, said aloud."""
    print(f"{RULE}\nGPU Requirements:\n{RULE}")
    print(f"Required: a CUDA GPU with about {needed_mib:,} MiB beside CUDA's own")
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
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    config = str(ROOT / "configs/scale_10m.yaml")
    p.add_argument("--config", default=config, help="default configs/scale_10m.yaml")
    p.add_argument("--no-gpu", action="store_true", help="do not look for a GPU")
    a = p.parse_args()
    cfg = read_problem_knobs(Knobs, PRESETS, "", [f"--config={a.config}"], {})
    names = yaml_keys(Knobs)
    texts = read_yaml(a.config, names, FIXED)
    print(f"{RULE}\n10M Scaling Config Verification\n{RULE}\n{a.config}")
    for title, section in (("Model", "model."), ("Training", "training.")):
        keys = {key: texts[name] for key, name in names.items() if name in texts}
        items = {key: text for key, text in keys.items() if key.startswith(section)}
        show(f"{title} Configuration:", items)
    n = count_parameters(cfg)
    off = abs(n - TARGET) / TARGET
    print(f"\nTotal parameters: {n:,}\n                  {n / 1e6:.2f}M")
    print(f"Target: 10M\nDifference: {100 * off:.1f}%\n")
    if off >= TOLERANCE:
        print("[ERROR] Parameter count is far from 10M\n")
        return 1
    print("[OK] Configuration verified: ~10M parameters\n")
    if a.no_gpu or gpu_ready(memory_mib(cfg)):
        return 0
    return 3


if __name__ == "__main__":
    launch(main)
