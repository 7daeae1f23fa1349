#!/usr/bin/env bash
# Alignment, where CLIP and Mistral stay frozen and the projector learns, on this machine. Started again, it goes on.
# What follows a fault is README's "How a job ends".
#
#   CHECKPOINT=weights/llava DATA=data/pretrain RUN=runs/pretrain \
#       bash examples/llava_mistral_clip/pretrain.sh [--dry-run] [mmcore train's options]
#
#   CHECKPOINT, DATA, RUN   see below
#   RECIPE, CONFIG          another recipe than mistral_clip_pretrain; a YAML over it
#   TP, PP, CP              tensor, pipeline and context parallel size, if not the recipe's
#   GPUS and others         see job.sh
# shellcheck source=examples/llava_mistral_clip/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
: "${CHECKPOINT:?the model to start from, which convert.sh wrote: such as weights/llava}"
: "${DATA:?the dataset, which prepare.sh wrote: such as data/pretrain}"
: "${RUN:?folder of the run, such as runs/pretrain: checkpoints and logs; where it has a checkpoint, it goes on}"
train_command mistral_clip_pretrain
on_this_machine
