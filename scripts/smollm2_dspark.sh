#!/usr/bin/env bash
# The recipe of the embedded drafter: SmolLM2-135M-Instruct writes responses, a drafter under 25 MB learns from them. Both steps resume
# where they stood when this is run again.
#
#   scripts/smollm2_dspark.sh PROMPTS RUNS
#
# PROMPTS: a folder with train/*.jsonl (prompts to answer) and eval/*.jsonl (prompts never to learn from), one {"turns": [..]} a line;
# responses/*.jsonl.gz in it, where there are any, are rows that the target wrote before, and are learnt from too.
# RUNS: where data and run go. MINUTES of training and ROWS of self-written prompts (two processes of one thread each) can be set.
set -euo pipefail
cd "$(dirname "$0")/.."
prompts=${1:?PROMPTS} runs=${2:?RUNS}
minutes=${MINUTES:-52} rows=${ROWS:-700}
command=${HF_DSPARK:-.venv/bin/hf-dspark}

for seed in 1 2; do
    OMP_NUM_THREADS=1 $command data --target smollm2 --dtype bf16 --self-prompt "$rows" --begin scripts/smollm2_beginnings.jsonl \
        --self-tokens 160 --temperature 0 --temperature 1 --max-new-tokens 256 --batch-size 64 --seed $seed \
        $(printf -- '--exclude %s ' "$prompts"/eval/*.jsonl) --output "$runs/data-$seed" &
done
wait

$command train --target smollm2 --dtype bf16 --output "$runs/drafter" --minutes "$minutes" \
    --data "$runs/data-1" --data "$runs/data-2" $(printf -- '--data %s ' $(ls "$prompts"/responses/*.jsonl.gz)) \
    --layers 2 --rank 48 --taps 1 --taps 8 --taps 14 --taps 21 --taps 27 --mask-token '<gh_stars>' --draft-vocab 12288 \
    --batch-size 4 --anchors 192 --chunk 512 --lr 1.5e-3 --evaluation-minutes 13 \
    --target-name HuggingFaceTB/SmolLM2-135M-Instruct --seed 0
