#!/usr/bin/env bash
# Let a checkpoint answer a benchmark's examples on this machine. Started again, it goes on with those that are left.
#
#   CHECKPOINT=runs/sft TASK=coco DATA=captions_val2014.json IMAGES=val2014 OUTPUT=predictions.jsonl \
#       bash examples/llava_mistral_clip/generate.sh [--dry-run] [mmcore generate's options]
#
#   CHECKPOINT, TASK, DATA, OUTPUT   see below
#   IMAGES                           folder of the pictures; `images` beside DATA, or its folder, if not set
#   TP, PP                           tensor and pipeline parallel size; replicas share the examples
#   GPUS and others                  see job.sh
# shellcheck source=examples/llava_mistral_clip/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
: "${CHECKPOINT:?a run or one of its checkpoints, such as runs/sft}"
: "${TASK:?a task of mmcore evaluate, such as coco}"
: "${DATA:?the task\'s own file, such as captions_val2014.json}"
: "${OUTPUT:?file for the answers, such as predictions.jsonl}"
generate_command "$OUTPUT"
on_this_machine
