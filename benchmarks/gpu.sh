#!/usr/bin/env bash
# Everything that needs a CUDA device, for a machine that has torch, transformers, pytest and hypothesis: the gpu tests,
# tests of the CPU's suite on the device, then the figures. Logs and results go to the folder $1; $2: more for gpu.py.
#     bash benchmarks/gpu.sh out --quick
set -u
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu-run}
mkdir -p "$out"
python3 -c "import pp_fx.passes" 2> /dev/null || python3 -m pip install -q --no-deps --no-build-isolation -e .
export TORCHINDUCTOR_COMPILE_THREADS=2  # many processes compile at once
python3 -m pytest -q -m gpu -n 8 tests/test_gpu.py tests/test_kernels.py --tb=short 2>&1 | tee "$out/gpu-tests.log" | tail -n 40
PP_FX_TEST_DEVICE=cuda timeout "${SUITE_SECONDS:-100}" python3 -m pytest -q -n 10 --tb=line tests/test_cuda_graphs.py \
  tests/test_cache.py tests/test_decode.py tests/test_compile.py tests/test_generate.py 2>&1 | tee "$out/suite.log" | tail -n 40
unset TORCHINDUCTOR_COMPILE_THREADS
python3 benchmarks/gpu.py --out "$out/gpu" "${@:2}"
