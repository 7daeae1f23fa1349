#!/usr/bin/env bash
# Instruction tuning, where only CLIP stays frozen, on this machine. Started again, it goes on.
# What follows a fault is README's "How a job ends".
#
#   CHECKPOINT=runs/pretrain DATA=data/sft RUN=runs/sft \
#       bash examples/llava_mistral_clip/sft.sh [--dry-run] [mmcore train's options]
#
#   CHECKPOINT, DATA, RUN   see below
#   RECIPE, CONFIG          another recipe than mistral_clip_sft; a YAML over it
#   TP, PP, CP              tensor, pipeline and context parallel size, if not the recipe's
#   GPUS and others         see job.sh
# shellcheck source=examples/llava_mistral_clip/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
: "${CHECKPOINT:?the model to start from: a run or one of its checkpoints, such as runs/pretrain}"
: "${DATA:?the dataset, which prepare.sh wrote: such as data/sft}"
: "${RUN:?folder of the run, such as runs/sft: checkpoints and logs; where it has a checkpoint, it goes on}"
train_command mistral_clip_sft
on_this_machine
