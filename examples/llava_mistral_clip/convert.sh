#!/usr/bin/env bash
# Published weights -> one checkpoint that loads at any layout: WEIGHTS/llava. What is there already is left as it is.
#
#   CLIP=ViT-L-14-336px.pt MISTRAL=Mistral-7B-Instruct-v0.3 WEIGHTS=weights \
#       bash examples/llava_mistral_clip/convert.sh [--dry-run]
#
#   CLIP, MISTRAL, WEIGHTS   see below
#   PROJECTOR                megatron_mlp, which is the recipe's; one of mlp2x_gelu can leave as a llava-hf folder
#   CLIP_OPTIONS, MISTRAL_OPTIONS, COMBINE_OPTIONS   more options of the three converters, such as --verify
# shellcheck source=examples/llava_mistral_clip/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
: "${CLIP:?OpenAI\'s ViT-L-14-336px.pt, or what else tools/converters/clip.py takes}"
: "${MISTRAL:?folder of Mistral-7B-Instruct-v0.3, Hugging Face\'s or Mistral\'s own}"
: "${WEIGHTS:?folder to write: WEIGHTS/clip, WEIGHTS/mistral, and joined WEIGHTS/llava}"
: "${PROJECTOR:=megatron_mlp}"
no_options
find_python
read -ra clip_options <<<"${CLIP_OPTIONS:-}"
read -ra mistral_options <<<"${MISTRAL_OPTIONS:-}"
read -ra combine_options <<<"${COMBINE_OPTIONS:-}"

convert() { # OUTPUT CONVERTER OPTIONS...: a converter publishes whole checkpoints alone
    if [ -e "$1/model.json" ]; then
        say "$1 is there already"
    else
        run "$PYTHON" "$root/tools/converters/$2" --output "$1" "${@:3}"
    fi
}

convert "$WEIGHTS/clip" clip.py --input "$CLIP" "${clip_options[@]}"
convert "$WEIGHTS/mistral" mistral.py --input "$MISTRAL" "${mistral_options[@]}"
convert "$WEIGHTS/llava" combine.py --vision "$WEIGHTS/clip" --language "$WEIGHTS/mistral" \
    --projector "$PROJECTOR" "${combine_options[@]}"
