#!/usr/bin/env bash
# The recipe of the embedded drafter: SmolLM2-135M-Instruct writes responses, a drafter under 25 MB learns from them. Both steps resume
# where they stood when this is run again.
#
#   examples/smollm2_dspark/train.sh PROMPTS RUNS
#
# PROMPTS: a folder with train/*.jsonl (prompts to answer) and eval/*.jsonl (prompts never to learn from), one {"turns": [..]} a line;
# responses/*.jsonl.gz in it, where there are any, are rows that the target wrote before, and are trained on too.
# RUNS: where data and runs go. ROWS of self-written prompts for the first MINUTES of training, MORE_ROWS and MORE_MINUTES for going on from
# there (two processes of one thread each write them), THIRD_MINUTES and LAST_MINUTES for a third and fourth run on the same rows can be
# set; so can LIMIT, the given prompts of each file that confidences are calibrated on, and with it those that the target writes itself.
set -euo pipefail
cd "$(dirname "$0")/../.."
prompts=${1:?PROMPTS} runs=${2:?RUNS}
minutes=${MINUTES:-52} rows=${ROWS:-700} more_minutes=${MORE_MINUTES:-60} third_minutes=${THIRD_MINUTES:-56}
last_minutes=${LAST_MINUTES:-90} more_rows=${MORE_ROWS:-2400} limit=${LIMIT:-200}
command=${HF_DSPARK:-.venv/bin/hf-dspark}

write() { # SEED ROWS
    OMP_NUM_THREADS=1 $command data --target smollm2 --dtype bf16 --self-prompt "$2" --begin examples/smollm2_dspark/beginnings.jsonl \
        --self-tokens 160 --temperature 0 --temperature 1 --max-new-tokens 256 --batch-size 64 --seed "$1" \
        $(printf -- '--exclude %s ' "$prompts"/eval/*.jsonl) --output "$runs/data-$1"
}
write 1 "$rows" & write 2 "$rows" & wait

$command train --target smollm2 --dtype bf16 --output "$runs/drafter" --minutes "$minutes" \
    --data "$runs/data-1" --data "$runs/data-2" $(printf -- '--data %s ' $(ls "$prompts"/responses/*.jsonl.gz)) \
    --layers 2 --rank 48 --taps 1 --taps 8 --taps 14 --taps 21 --taps 27 --mask-token '<gh_stars>' --draft-vocab 12288 \
    --batch-size 4 --anchors 192 --chunk 512 --lr 1.5e-3 --evaluation-minutes 13 \
    --target-name HuggingFaceTB/SmolLM2-135M-Instruct --seed 0

# On from there, with more rows and a rate that rises and falls once more.
write 3 "$more_rows" & write 4 "$more_rows" & wait
$command train --target smollm2 --dtype bf16 --output "$runs/drafter2" --minutes "$more_minutes" --drafter "$runs/drafter/best" \
    $(printf -- '--data %s ' "$runs"/data-[1-4]) $(printf -- '--data %s ' $(ls "$prompts"/responses/*.jsonl.gz)) \
    --batch-size 4 --anchors 192 --chunk 512 --lr 1.5e-3 --evaluation-minutes 22 --seed 1

# Twice more over the same rows, with Muon for the backbone's matrices.
again() { # RUN MINUTES BASE SEED
    $command train --target smollm2 --dtype bf16 --output "$runs/$1" --minutes "$2" --drafter "$runs/$3/best" \
        $(printf -- '--data %s ' "$runs"/data-[1-4]) $(printf -- '--data %s ' $(ls "$prompts"/responses/*.jsonl.gz)) \
        --batch-size 4 --anchors 192 --chunk 512 --optimizer muon --lr 1e-3 --evaluation-minutes 90 --seed "$4"
}
again drafter3 "$third_minutes" drafter2 3
again drafter4 "$last_minutes" drafter3 4

# N-gram copies and confidences: on prompts that no training row answers, about as many rounds each of grade-school math, of everyday
# instructions, and of code described in words and by a stub, prompts that the target writes itself.
for name in gsm8k_train self_instruct_seed self_instruct_user; do
    "${PYTHON:-.venv/bin/python}" examples/smollm2_dspark/fresh_prompts.py "$prompts/train/$name.jsonl" --limit "$limit" --output "$runs/$name.jsonl" \
        $(printf -- '--answered %s ' "$prompts"/responses/*.jsonl.gz)
done
mv "$runs/gsm8k_train.jsonl" "$runs/gsm8k_fresh.jsonl"
cat "$runs"/self_instruct_{seed,user}.jsonl > "$runs/self_instruct_fresh.jsonl"
"${PYTHON:-.venv/bin/python}" examples/smollm2_dspark/self_prompts.py "$runs"/data-[1-4] --output "$runs/self_written.jsonl"
self_prompts() { # KIND PROMPTS
    grep "\"$1\"" examples/smollm2_dspark/beginnings.jsonl > "$runs/$1.begin.jsonl"
    $command data --target smollm2 --dtype fp32 --self-prompt "$2" --begin "$runs/$1.begin.jsonl" --self-tokens 160 --temperature 0 \
        --max-new-tokens 1 --batch-size 64 --seed 11 --exclude "$runs/self_written.jsonl" \
        $(printf -- '--exclude %s ' "$prompts"/eval/*.jsonl "$prompts"/responses/*.jsonl.gz) --output "$runs/data-$1"
    "${PYTHON:-.venv/bin/python}" examples/smollm2_dspark/self_prompts.py "$runs/data-$1" --output "$runs/$1.jsonl"
}
self_prompts self-code $((limit * 7 / 10))
self_prompts self-stub $((limit * 8 / 5)) # many are cut off
$command calibrate --target smollm2 --drafter "$runs/drafter4/best" $(printf -- "--prompts $runs/%s.jsonl " \
    gsm8k_fresh self_instruct_fresh self-code self-stub) --max-new-tokens 128 --concurrency 32 --copying 64 --replace \
    $(for name in mt-bench mbpp humaneval; do printf -- '--others %s ' "$prompts/eval/$name.jsonl"; done)
