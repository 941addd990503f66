@echo off
rem Trains configs/scale_10m.yaml on a GPU, in half precision, from any folder. Further flags go to train_arith.py.
rem Exit code 1: no usable environment, or the size of the model is off; 3: no CUDA.
setlocal
cd /d "%~dp0.."

echo ==========================================
echo 10M Scaling Experiment
echo ==========================================

if not exist .venv\Scripts\python.exe (
    echo Creating .venv ...
    python -m venv .venv || exit /b 1
    .venv\Scripts\python.exe -m pip install --quiet -r requirements.txt || exit /b 1
)
call .venv\Scripts\activate.bat

echo Verifying configuration...
python scripts\verify_10m_config.py --no-gpu || exit /b 1

python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
if errorlevel 1 (
    echo ERROR: CUDA not available. Aborting.
    echo This experiment requires a GPU. https://pytorch.org/get-started says how
    echo a torch with CUDA is installed.
    exit /b 3
)
python scripts\verify_10m_config.py || exit /b 3

if not exist data\pilot_train.jsonl python scripts\arith\generate_pilot_dataset.py || exit /b 1

echo Starting training...
python train_arith.py --config configs/scale_10m.yaml --output-dir runs/scale_10m --seed 42 --device cuda --fp16 --gpu-only %*
exit /b %errorlevel%
