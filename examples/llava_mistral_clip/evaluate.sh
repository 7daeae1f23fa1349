#!/usr/bin/env bash
# Score predictions against references; no GPU.
#
#   TASK=coco PREDICTIONS=predictions.jsonl REFERENCES=captions_val2014.json SCORES=scores.json \
#       bash examples/llava_mistral_clip/evaluate.sh [--dry-run] [mmcore evaluate's options]
# shellcheck source=examples/llava_mistral_clip/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
: "${TASK:?a task of mmcore evaluate, such as coco}"
: "${PREDICTIONS:?what generate.sh wrote, or the benchmark\'s own format}"
: "${REFERENCES:?the benchmark\'s own file, such as captions_val2014.json}"
: "${SCORES:?file for the scores, such as scores.json; a page and samples appear beside it}"
find_python
run "$PYTHON" -m mmcore evaluate "$TASK" --predictions "$PREDICTIONS" --references "$REFERENCES" --output "$SCORES" \
    "${options[@]}"
