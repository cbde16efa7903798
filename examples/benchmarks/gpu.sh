#!/bin/sh
# Everything that needs a GPU, in less than eight minutes on one card, from a bare checkout with this package installed:
# the GPU tests, then rounds and plain decoding, eager and compiled, on SmolLM2 and on random weights of Qwen3's shapes.
#     sh examples/benchmarks/gpu.sh [FOLDER]
set -u
out=${1:-model_cards/smollm2-dspark/results}
python=${PYTHON:-python}
status=0
run() { timeout "$1" "$python" -m "$2" $3 || { status=1; echo "failed: $2 $3" >&2; }; }
mkdir -p "$out"
run 150 pytest "-q -m gpu tests/decoding/test_cuda.py"
run 90 examples.benchmarks.rounds "--device cuda --dtype bf16 --rows 1,8,32 --repeats 3 --json $out/gpu_smollm2.json"
run 110 examples.benchmarks.rounds "--device cuda --dtype bf16 --shape qwen3-4b --accept 4 --rows 1,8,32 --repeats 2 --json $out/gpu_qwen3_4b.json"
run 120 examples.benchmarks.rounds "--device cuda --dtype bf16 --shape qwen3-8b --accept 4 --rows 1,8,32 --repeats 2 --json $out/gpu_qwen3_8b.json"
exit $status
