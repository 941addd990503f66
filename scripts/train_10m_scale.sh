#!/usr/bin/env bash
# Trains configs/scale_10m.yaml on a GPU, in half precision, from any folder. Further flags go to train_arith.py:
#   scripts/train_10m_scale.sh --seed 42
# Exit code 1: no usable environment, or the size of the model is off; 3: no CUDA. VENV and PYTHON may be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

echo "=========================================="
echo "10M Scaling Experiment"
echo "=========================================="

venv="${VENV:-.venv}"
if [ ! -x "$venv/bin/python" ]; then
    echo "Creating $venv ..."
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet -r requirements.txt
fi
# shellcheck disable=SC1091
. "$venv/bin/activate"

echo "Verifying configuration..."
python scripts/verify_10m_config.py --no-gpu

if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "ERROR: CUDA not available. Aborting."
    echo "This experiment requires a GPU. https://pytorch.org/get-started says how a torch"
    echo "with CUDA is installed."
    exit 3
fi
python scripts/verify_10m_config.py > /dev/null
python -c "
import torch
print('GPU:', torch.cuda.get_device_name(0))
print(f'VRAM: {torch.cuda.get_device_properties(0).total_memory / 1e9:.2f} GB')"

[ -f data/pilot_train.jsonl ] || python scripts/arith/generate_pilot_dataset.py

echo "Starting training..."
exec python train_arith.py --config configs/scale_10m.yaml --output-dir runs/scale_10m --seed 42 \
    --device cuda --fp16 --gpu-only "$@"
