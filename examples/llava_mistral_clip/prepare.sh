#!/usr/bin/env bash
# Raw files -> energon datasets DATA/pretrain and DATA/sft. What is there already is left as it is; a job that was
# killed goes on. With WEIGHTS every sample is then looked at as training will see it, and a finding ends this with 1.
#
#   PRETRAIN_ANNOTATIONS=blip_laion_cc_sbu_558k.json PRETRAIN_IMAGES=images.zip \
#   SFT_ANNOTATIONS=llava_v1_5_mix665k.json SFT_IMAGES="coco=train2017.zip gqa=gqa.zip" DATA=data WEIGHTS=weights \
#       bash examples/llava_mistral_clip/prepare.sh [--dry-run]
#
#   all of these                      see below
#   WEIGHTS                           folder that convert.sh wrote; no look if it is not set
#   PRETRAIN_LENGTH, SFT_LENGTH       longest sequences for that look: 1024 and 2048, as the recipes'
#   PREPARE_OPTIONS, INSPECT_OPTIONS  more of mmcore prepare's and inspect's
# shellcheck source=examples/llava_mistral_clip/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
: "${PRETRAIN_ANNOTATIONS:?LLaVA\'s alignment pairs, blip_laion_cc_sbu_558k.json; or files, set apart by spaces}"
: "${PRETRAIN_IMAGES:?their pictures: folders, zip or tar files, set apart by spaces}"
: "${SFT_ANNOTATIONS:?LLaVA\'s instructions, llava_v1_5_mix665k.json; or files, set apart by spaces}"
: "${SFT_IMAGES:?their pictures, likewise; PREFIX=PATH puts a place below a folder, as in coco=train2017.zip}"
: "${DATA:?folder to write: DATA/pretrain and DATA/sft}"
: "${PRETRAIN_LENGTH:=1024}" "${SFT_LENGTH:=2048}"
no_options
whole_numbers PRETRAIN_LENGTH SFT_LENGTH
find_python
read -ra prepare_options <<<"${PREPARE_OPTIONS:-}"
read -ra inspect_options <<<"${INSPECT_OPTIONS:-}"

prepare() { # OUTPUT SOURCE ANNOTATIONS IMAGES
    local annotations images
    read -ra annotations <<<"$3"
    read -ra images <<<"$4"
    if [ -e "$1" ]; then
        say "$1 is there already"
    else
        run "$PYTHON" -m mmcore prepare "$2" --annotations "${annotations[@]}" --images "${images[@]}" --output "$1" \
            "${prepare_options[@]}"
    fi
}

inspect() { # DATASET CONVERSATION LENGTH
    run "$PYTHON" -m mmcore inspect "$DATA/$1" --checkpoint "$WEIGHTS/llava" --conversation "$2" --seq-length "$3" \
        --output "$DATA/inspection/$1" "${inspect_options[@]}"
}

prepare "$DATA/pretrain" llava-pretrain "$PRETRAIN_ANNOTATIONS" "$PRETRAIN_IMAGES"
prepare "$DATA/sft" llava-instruct "$SFT_ANNOTATIONS" "$SFT_IMAGES"
if [ -n "${WEIGHTS:-}" ]; then
    inspect pretrain plain "$PRETRAIN_LENGTH"
    inspect sft mistral_instruct "$SFT_LENGTH"
fi
