#!/usr/bin/env bash
# Everything that needs a CUDA device, for a machine that has torch, transformers, pytest and hypothesis: the gpu tests,
# tests of the CPU's suite on the device, then the figures. Logs and results go to the folder $1; $2: more for gpu.py.
#     bash benchmarks/gpu.sh out --quick
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu-run}
mkdir -p "$out"
failed=0
python3 -c "import pp_fx.passes" 2> /dev/null || python3 -m pip install -q --no-deps --no-build-isolation -e .
export TORCHINDUCTOR_COMPILE_THREADS=2  # many processes compile at once
python3 -m pytest -q -m gpu -n 8 tests/system/test_gpu.py tests/behaviour/test_kernels.py tests/unit/kernels/test_strongest.py --tb=short 2>&1 | tee "$out/gpu-tests.log" | tail -n 40 || failed=1
PP_FX_TEST_DEVICE=cuda timeout "${SUITE_SECONDS:-100}" python3 -m pytest -q -n 10 --tb=line tests/behaviour/test_cuda_graphs.py \
  tests/behaviour/test_cache.py tests/behaviour/test_decode.py tests/behaviour/test_compile.py tests/behaviour/test_generate.py \
  tests/behaviour/test_step.py --deselect tests/behaviour/test_step.py::test_a_copy_of_the_gate_ranks_and_the_gate_computes 2>&1 | tee "$out/suite.log" | tail -n 40 || failed=1
unset TORCHINDUCTOR_COMPILE_THREADS
python3 benchmarks/gpu.py --out "$out/gpu" "${@:2}" || failed=1
exit "$failed"
