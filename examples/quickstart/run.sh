#!/usr/bin/env bash
# From scanned digits to a scored vision-language model on two CPU cores: see README.md beside this file.
#
#   TP, PP, DP  tensor, pipeline and data parallel size; TP=2 if none is set, otherwise what is not set is 1
#   OUT         folder for everything it makes (quickstart-run); a second run goes on after the last finished stage
#   FRESH=1     begin anew
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash install.sh
export PATH=$PWD/.venv/bin:$PATH

if [ -z "${TP:-}${PP:-}${DP:-}" ]; then
    TP=2
fi
TP=${TP:-1} PP=${PP:-1} DP=${DP:-1}
OUT=${OUT:-quickstart-run}
ranks=$((TP * PP * DP))
raw=$OUT/raw

# Threads are fixed, not counted from the machine: sums then have the same order and runs the same numbers.
export OMP_NUM_THREADS=2
# Threads that spin while they wait stall each other as soon as anything else wants a core: five times slower, seen.
export OMP_WAIT_POLICY=PASSIVE

if [ "${FRESH:-0}" = 1 ]; then
    rm -rf "$OUT"
fi
mkdir -p "$OUT/done"
layout="TP=$TP PP=$PP DP=$DP"
if [ "$(cat "$OUT/layout" 2>/dev/null || true)" != "$layout" ]; then
    # What another layout trained must not be passed off as this one's. Data and towers have none.
    rm -rf "$OUT/pretrain" "$OUT/sft" "$OUT/eval" "$OUT/report.html" "$OUT"/done/{pretrain,sft,eval}*
    echo "$layout" >"$OUT/layout"
fi

stage() { # NAME TITLE COMMAND...: run a command unless it has been finished before
    local name=$1 title=$2 start=$SECONDS
    shift 2
    if [ -e "$OUT/done/$name" ]; then
        echo "== $title: finished before"
        return
    fi
    echo "== $title"
    "$@"
    touch "$OUT/done/$name"
    echo "== $title: $((SECONDS - start)) s"
}

spread() { # VERB ARGUMENTS...: an mmcore verb on all ranks
    local threads=$((ranks > 1 ? 1 : OMP_NUM_THREADS))
    OMP_NUM_THREADS=$threads torchrun --standalone --nproc-per-node "$ranks" -m mmcore "$@"
}

prepare() {
    mmcore prepare llava-pretrain --annotations "$raw/captions_train.json" --images "$raw/images" \
        --output "$OUT/data/pretrain" --overwrite
    mmcore prepare llava-instruct --annotations "$raw/instruct_train.json" --images "$raw/images" \
        --output "$OUT/data/sft" --overwrite
}

convert() {
    local converted=$OUT/converted
    python tools/converters/clip.py --input "$OUT/towers/clip.pt" --output "$converted/vision" \
        --num-attention-heads 4 --activation quick_gelu --overwrite
    python tools/converters/mistral.py --input "$OUT/towers/mistral" --output "$converted/language" --overwrite
    python tools/converters/combine.py --vision "$converted/vision" --language "$converted/language" \
        --projector mlp2x_gelu --output "$converted/llava" --overwrite
}

train() { # RECIPE START DATA RUN ROWS
    spread train "$1" --model.checkpoint "$2" --data.path "$3" --checkpoint.save "$4" \
        --parallel.tensor-model-parallel-size "$TP" --parallel.pipeline-model-parallel-size "$PP" \
        --train.micro-batch-size $(($5 / (DP * PP))) # replicas share the rows of a step, stages take turns
}

evaluate() { # PART CHECKPOINT TASK REFERENCES GENERATE-OPTIONS...: what is generated, and how much of it is exact
    local folder=$OUT/eval/$1 references=$raw/$4
    spread generate --checkpoint "$2" --task "$3" --data "$references" --images "$raw/images" \
        --output "$folder/predictions.jsonl" --max-new-tokens 32 \
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "${@:5}"
    mmcore evaluate exact-match --predictions "$folder/predictions.jsonl" --references "$references" \
        --output "$folder/scores_exact.json"
    if [ "$1" = captions ]; then
        mmcore evaluate coco --predictions "$folder/predictions.jsonl" --references "$references" \
            --output "$folder/scores_coco.json"
    fi
}

mkdir -p "$OUT/towers"
ask=(--prompt "Describe the picture.")
stage raw "Draw pictures of scanned digits" python examples/quickstart/make_data.py --output "$raw"
stage clip "Train a tiny CLIP" python examples/quickstart/train_clip.py --data "$raw" --output "$OUT/towers/clip.pt"
stage mistral "Train a tiny Mistral" python examples/quickstart/train_mistral.py --data "$raw" --output "$OUT/towers/mistral"
stage convert "Convert and join the towers" convert
stage data "Prepare the data" prepare
stage pretrain "Pretrain: the projector learns to speak between the towers ($layout)" \
    train quickstart_pretrain "$OUT/converted/llava" "$OUT/data/pretrain" "$OUT/pretrain" 4
stage eval_pretrain "Held-out captions after pretraining alone" \
    evaluate pretrain_captions "$OUT/pretrain" coco captions_val.json "${ask[@]}"
stage sft "Instruction tuning: all but the vision tower ($layout)" \
    train quickstart_sft "$OUT/pretrain" "$OUT/data/sft" "$OUT/sft" 8
stage eval_captions "Held-out captions" evaluate captions "$OUT/sft" coco captions_val.json "${ask[@]}"
stage eval_answers "Held-out answers" evaluate answers "$OUT/sft" exact-match questions_val.json
stage eval_blind "Blind control: every picture replaced by another's" \
    evaluate blind_captions "$OUT/sft" coco captions_val.json "${ask[@]}" --shuffle-images
echo "== all stages: $SECONDS s"
python examples/quickstart/report.py "$OUT"
