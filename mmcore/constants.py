"""Names and numbers that more than one room needs."""

# The placeholder that LLaVA's JSON files carry where a picture belongs.
IMAGE_TAG = "<image>"

# Embedding tables are padded to a multiple of this, so that every power-of-two tensor parallel
# size up to it divides them and one checkpoint fits them all (Megatron-LM's
# --make-vocab-size-divisible-by has the same default).
VOCAB_DIVISOR = 128

# The parts of the composed model, which are also the prefixes of its checkpoint keys (mcore's).
VISION_MODEL = "vision_model"
VISION_PROJECTION = "vision_projection"
LANGUAGE_MODEL = "language_model"
MODULES = (VISION_MODEL, VISION_PROJECTION, LANGUAGE_MODEL)

# Pixel statistics of OpenAI's CLIP (open_clip.constants.OPENAI_DATASET_MEAN and _STD).
CLIP_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# Of SigLIP and SigLIP 2 (transformers, SiglipImageProcessor).
SIGLIP_IMAGE_MEAN = (0.5, 0.5, 0.5)
SIGLIP_IMAGE_STD = (0.5, 0.5, 0.5)

# A checkpoint folder: the architecture, the tokenizer's files, and torch_dist's own files.
MODEL_FILE = "model.json"
TOKENIZER_DIR = "tokenizer"

# What marks a folder in Megatron-LM's own layout (megatron/training/checkpointing.py).
MEGATRON_FILE = "latest_checkpointed_iteration.txt"

# Exit codes of every command.
EXIT_DONE, EXIT_FAULT, EXIT_USAGE = 0, 1, 2

# And of `mmcore train`, for what starts it: docs/training.md, Exit codes. 75 is EX_TEMPFAIL of sysexits.h; 16 and 17
# are Megatron-LM's (megatron/core/rerun_state_machine.py at core_v0.16.1), and 93 is that of nvidia-resiliency-ext.
EXIT_PREEMPTED, EXIT_SUSPECT, EXIT_BAD_AGAIN, EXIT_SICK = 75, 16, 17, 93

# Written last by a run that has done all of its steps.
DONE_FILE = "DONE"
