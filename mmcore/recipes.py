"""Named runs. A variant derives from another with `dataclasses.replace`.

Give paths on the command line: `mmcore train mistral_clip_pretrain --model.checkpoint DIR --data.path DIR
--checkpoint.save DIR`.
"""

from collections.abc import Callable
from dataclasses import replace

from mmcore.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)


def mistral_clip_pretrain() -> RunConfig:
    """CLIP ViT-L/14@336 and Mistral-7B, frozen; the projector learns to speak between them.

    Source: Megatron-LM examples/multimodal/pretrain_mistral_clip.sh at core_v0.16.1, without its
    wrong RoPE base (a checkpoint's own is used) and without its dropout on frozen modules.

    Also otherwise: the projector begins as combine.py draws it (--init-method-std 0.014 there); the job ends by its
    scheduler or its last step (--exit-duration-in-mins 230); neither the parameters' norm nor the number of zero
    gradients is logged (--log-params-norm, --log-num-zeros-in-grad); the 10 batches of validation every 1000 steps are
    --train.val-interval 1000, which needs a val split; the last two checkpoints stay, not all; and pictures are
    cropped, see docs/training.md.
    """
    return RunConfig(
        model=ModelConfig(
            vision="clip_vit_l_14_336",
            language="mistral_7b_v03",
            projector="megatron_mlp",
            freeze=("vision_model", "language_model"),
        ),
        parallel=ParallelConfig(tensor_model_parallel_size=4, distributed_timeout_minutes=60),
        # The reference's batches count samples, of which it packs none.
        data=DataConfig(conversation="plain", seq_length=1024, packing_buffer_size=0),
        train=TrainConfig(steps=20000, global_batch_size=256, micro_batch_size=1),
        optimizer=OptimizerConfig(lr=1.5e-4, min_lr=1e-5, lr_warmup_steps=200, weight_decay=0.01, clip_grad=1.0),
        checkpoint=CheckpointConfig(save_interval=1000),
    )


def mistral_clip_sft() -> RunConfig:
    """The same model after alignment, on conversations: only the vision tower stays frozen.

    Source: Megatron-LM examples/multimodal/sft_mistral_clip.sh at core_v0.16.1, in bf16 (the script
    forgets the flag and trains in fp32). What else differs is as in mistral_clip_pretrain; its validation comes every
    500 steps.
    """
    base = mistral_clip_pretrain()
    return replace(
        base,
        model=replace(base.model, freeze=("vision_model",)),
        data=replace(base.data, conversation="mistral_instruct", seq_length=2048),
        train=replace(base.train, global_batch_size=128),
        optimizer=replace(base.optimizer, lr=1e-6, min_lr=1e-7, weight_decay=0.1, clip_grad=0.5),
        checkpoint=replace(base.checkpoint, save_interval=500),
    )


def llava15_vicuna_pretrain() -> RunConfig:
    """LLaVA-1.5: CLIP ViT-L/14@336 and Vicuna-7B, frozen; one epoch of the 558k pairs for the projector.

    Source: haotian-liu/LLaVA scripts/v1_5/pretrain.sh at ecb5984, and the defaults of transformers' trainer under
    it: AdamW with betas .9 and .999, gradients clipped at 1. Its learning rate is 1e-3; the 2e-3 that is told of
    LLaVA too is that of the older scripts/pretrain.sh, for a linear projector. Its micro batches are of 32 samples,
    here of 4, which as many as 64 ranks can share; its only checkpoint is the last step's, here the last two stay.
    """
    return RunConfig(
        model=ModelConfig(
            vision="clip_vit_l_14_336",
            language="vicuna_7b_v15",
            projector="mlp2x_gelu",
            freeze=("vision_model", "language_model"),
        ),
        data=DataConfig(conversation="plain", seq_length=2048, packing_buffer_size=0),
        train=TrainConfig(steps=2181, global_batch_size=256, micro_batch_size=4),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_steps=66, adam_beta2=0.999),
    )


def llava15_vicuna_sft() -> RunConfig:
    """LLaVA-1.5 after alignment: one epoch of the 665k conversations; only the vision tower stays frozen.

    Source: haotian-liu/LLaVA scripts/v1_5/finetune.sh at ecb5984, which pads pictures to a square and has one
    learning rate for all that is trained (that of LoRA has its own for the projector, see --optimizer.module-lr).
    Its batches are of samples alike in length; here they are mixed.
    """
    base = llava15_vicuna_pretrain()
    return replace(
        base,
        model=replace(base.model, freeze=("vision_model",)),
        parallel=ParallelConfig(tensor_model_parallel_size=4),
        data=replace(base.data, conversation="vicuna_v1", image_mode="pad"),
        train=replace(base.train, steps=5198, global_batch_size=128, micro_batch_size=4),
        optimizer=replace(base.optimizer, lr=2e-5, lr_warmup_steps=156),
    )


def llava_moss2_pretrain() -> RunConfig:
    """LLaVA-MOSS2: CLIP ViT-L/14@336 and MOSS2-2.5B, frozen; the projector alone, on LLaVA's 558k pairs.

    Source: Callione/LLaVA-MOSS2 scripts/pretrain.sh at 7fe0297, the mlp2x_gelu of its README, and the defaults
    of transformers' trainer. How many GPUs share its steps it does not say: the batch is that of eight (32 each),
    as LLaVA-1.5's, in the same micro batches.
    """
    base = llava15_vicuna_pretrain()
    return replace(
        base,
        model=replace(base.model, language="moss2_2_5b"),
        train=replace(base.train, steps=5000),
        optimizer=replace(base.optimizer, lr=2e-3, lr_warmup_steps=150),
        checkpoint=CheckpointConfig(save_interval=1000, keep_last=5),
    )


def llava_moss2_sft() -> RunConfig:
    """LLaVA-MOSS2 after alignment, on LLaVA's 665k conversations: only the vision tower stays frozen.

    Source: Callione/LLaVA-MOSS2 scripts/finetune.sh at 7fe0297, on eight GPUs again (8 samples each, here one by one).
    Before the first question it has a system text, conv_llava_llama_2's, which is left out here; data can bring it as
    a conversation's first turn.
    """
    base = llava_moss2_pretrain()
    return replace(
        base,
        model=replace(base.model, freeze=("vision_model",)),
        data=replace(base.data, conversation="llama2_chat"),
        train=replace(base.train, steps=10000, global_batch_size=64, micro_batch_size=1),
        optimizer=replace(base.optimizer, lr=2e-5, lr_warmup_steps=300),
        checkpoint=replace(base.checkpoint, save_interval=2000),
    )


def quickstart_pretrain() -> RunConfig:
    """The alignment stage in miniature; runs on a laptop's CPU (examples/quickstart)."""
    return RunConfig(
        model=ModelConfig(freeze=("vision_model", "language_model")),
        data=DataConfig(conversation="plain", seq_length=256, num_workers=0),
        train=TrainConfig(steps=300, global_batch_size=4, micro_batch_size=4, precision="fp32"),  # rows of 8 samples
        optimizer=OptimizerConfig(lr=2e-3, lr_warmup_steps=20),
        checkpoint=CheckpointConfig(save_interval=1000),
    )


def quickstart_sft() -> RunConfig:
    """The instruction-tuning stage in miniature."""
    base = quickstart_pretrain()
    return replace(
        base,
        model=replace(base.model, freeze=("vision_model",)),
        data=replace(base.data, conversation="mistral_instruct"),
        train=replace(base.train, steps=800, global_batch_size=8, micro_batch_size=8),  # rows of 5 samples
        optimizer=replace(base.optimizer, lr=1e-3),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        mistral_clip_pretrain,
        mistral_clip_sft,
        llava15_vicuna_pretrain,
        llava15_vicuna_sft,
        llava_moss2_pretrain,
        llava_moss2_sft,
        quickstart_pretrain,
        quickstart_sft,
    )
}
