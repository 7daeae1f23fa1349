"""What `benchmarks.train_gpu` measures beside the command itself, each in a process of its own.

`python -m benchmarks.train_gpu_peers CONTENDER SHAPES STAGE PRECISION STEPS` prints a JSON object for each batch:

- mmcore-compute: this project's model on one packed row that lies on the device, forward and backward;
- megatron-core: its LLaVAModel as it comes, forward and backward on batches of several samples;
- transformers: its LlavaForConditionalGeneration, likewise.

Weights are random, and so are pixels and tokens. All samples of a stage are of one length, so nothing is padded: of
all batches the ones that suit the others best. Frozen is what the recipe freezes. There is no optimizer and no loader.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from mmcore import host

host.use_host()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.train_gpu_models import THEIR_IMAGE_TOKEN, megatron_core_model, transformers_model  # noqa: E402
from benchmarks.train_gpu_shapes import FP8_RECIPE, SHAPES, Shape, is_trained, number_format  # noqa: E402
from mmcore import distributed  # noqa: E402
from mmcore.config import ModelConfig, ParallelConfig  # noqa: E402
from mmcore.data.batch import EncodedSample, collate, with_image_positions  # noqa: E402
from mmcore.models.kernels import accumulate_in_place, check_kernels  # noqa: E402
from mmcore.models.llava import LlavaModel, base_config  # noqa: E402
from mmcore.recipes import RECIPES  # noqa: E402
from mmcore.training import freezing  # noqa: E402
from mmcore.training.loop import DTYPES  # noqa: E402
from mmcore.training.optimizer import wrap  # noqa: E402
from mmcore.training.step import forward_backward  # noqa: E402

WARMUP = 3  # steps that do not count
# transformers' names of the parts that a recipe can freeze.
THEIR_PARTS = {
    "vision_model": ("model.vision_tower",),
    "vision_projection": ("model.multi_modal_projector",),
    "language_model": ("model.language_model", "lm_head"),
}

Contender = tuple[nn.Module, Callable[[int], None], Sequence[int]]
"""A model, a step of it on so many samples, and the numbers of samples that it is measured with."""


def fp8_recipe(precision: str) -> str:
    """What --model.fp8 is.

    Raises:
        ValueError: this machine computes nothing in FP8.
    """
    config = ModelConfig(fp8=FP8_RECIPE if precision == "fp8" else "none")
    check_kernels(config)
    return config.fp8


def compute(shape: Shape, stage: str, precision: str) -> Contender:
    """This project's model, with the gradient buffers that the trainer gives it."""
    dtype, fp8 = DTYPES[number_format(precision)], fp8_recipe(precision)
    model = LlavaModel(shape.architecture(), "auto", **base_config(ParallelConfig(), dtype, fp8=fp8))
    accumulate_in_place(model)
    model.to(host.device(), dtype)
    freezing.freeze(model, RECIPES[shape.recipe(stage)]().model.freeze)
    ddp = wrap(model, states=shape.states(stage, precision))
    size = shape.samples_per_row(stage)
    arch = shape.architecture()
    assert arch.image_token_id is not None
    row = with_image_positions(collate([_sample(shape, stage, seed) for seed in range(size)]), arch.image_token_id)
    batch = distributed.broadcast_in_replica(row)  # which brings it to the device

    def step(_: int) -> None:
        ddp.zero_grad_buffer()
        forward_backward(ddp, [batch])

    return model, step, (size,)


def _sample(shape: Shape, stage: str, seed: int) -> EncodedSample:
    arch, length = shape.architecture(), shape.lengths[stage]
    assert arch.vision is not None and arch.language is not None and arch.image_token_id is not None
    numbers, side = torch.Generator().manual_seed(seed), arch.vision.image_size
    tokens = torch.randint(0, arch.language.vocab_size, (length,), generator=numbers)
    labels = tokens.roll(-1)
    tokens[1 : 1 + arch.vision.num_image_embeddings] = arch.image_token_id
    mask = torch.zeros(length)
    mask[-shape.labels[stage] :] = 1
    return EncodedSample(
        key=str(seed),
        tokens=tokens,
        labels=torch.where(mask > 0, labels, 0),
        loss_mask=mask,
        images=torch.randint(0, 256, (1, 3, side, side), generator=numbers, dtype=torch.uint8),
    )


def megatron_core(shape: Shape, stage: str, precision: str) -> Contender:
    """megatron-core's model."""
    arch, dtype = shape.architecture(), DTYPES[number_format(precision)]
    model = megatron_core_model(arch, dtype, is_fp8=fp8_recipe(precision) != "none").to(host.device(), dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(shape, stage, name))
    assert arch.vision is not None and arch.language is not None
    length = shape.lengths[stage] - arch.vision.num_image_embeddings + 1  # one token stands for the picture
    side, vocabulary = arch.vision.image_size, arch.language.vocab_size

    def step(size: int) -> None:
        pixels = torch.randn(size, 3, side, side, device=host.device(), dtype=dtype)
        tokens = torch.randint(0, vocabulary, (size, length), device=host.device())
        tokens[:, 1] = model.image_token_index
        mask = torch.zeros(size, length, device=host.device())
        mask[:, -shape.labels[stage] :] = 1
        places = torch.arange(length, device=host.device()).expand(size, -1)
        losses, weights = model(pixels, tokens, places, None, labels=tokens.roll(-1, 1), loss_mask=mask)
        ((losses.float() * weights).sum() / weights.sum()).backward()
        model.zero_grad(set_to_none=True)

    return model, step, shape.batches


def transformers(shape: Shape, stage: str, precision: str) -> Contender:
    """transformers' model; FP8 it has none."""
    arch = shape.architecture()
    assert arch.vision is not None and arch.language is not None
    model = transformers_model(arch, DTYPES[number_format(precision)])
    for part in RECIPES[shape.recipe(stage)]().model.freeze:
        for name, parameter in model.named_parameters():
            if name.startswith(THEIR_PARTS[part]):
                parameter.requires_grad_(False)
    length, side, vocabulary = shape.lengths[stage], arch.vision.image_size, arch.language.vocab_size
    picture = slice(1, 1 + arch.vision.num_image_embeddings)

    def step(size: int) -> None:
        pixels = torch.randn(size, 3, side, side, device=host.device(), dtype=DTYPES[number_format(precision)])
        tokens = torch.randint(THEIR_IMAGE_TOKEN + 1, vocabulary, (size, length), device=host.device())
        labels = tokens.clone()
        labels[:, : -shape.labels[stage]] = -100
        tokens[:, picture] = THEIR_IMAGE_TOKEN
        model(input_ids=tokens, pixel_values=pixels, labels=labels, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return model, step, shape.batches


CONTENDERS = {"mmcore-compute": compute, "megatron-core": megatron_core, "transformers": transformers}


def timed(step: Callable[[], None], steps: int) -> list[float]:
    """Milliseconds of each of so many steps, after some that do not count.

    The host hands out one after the other without waiting, as it does in training: on a GPU its own clock counts.
    """
    ticks = [host.tick()]
    for _ in range(WARMUP + steps):
        step()
        ticks.append(host.tick())
    taken = [host.seconds_between(*pair) * 1e3 for pair in pairwise(ticks)]
    return taken[WARMUP:]


def rows(contender: str, shape: Shape, stage: str, precision: str, steps: int) -> Iterator[dict[str, Any]]:
    """Measure every batch; one that the device has no room for is a row that says so."""
    model, step, sizes = CONTENDERS[contender](shape, stage, precision)
    numbers = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    for size in sizes:
        row: dict[str, Any] = {"contender": contender, "batch": size, **numbers, **device()}
        torch.cuda.reset_peak_memory_stats()
        try:
            times = timed(partial(step, size), steps)
            yield {**row, "step_ms": times, "samples": size, "peak_memory_gib": host.peak_memory() / 2**30}
        except torch.OutOfMemoryError:
            yield {**row, "error": "out of memory"}
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


def device() -> dict[str, Any]:
    """What computes here."""
    name = torch.cuda.get_device_name() if host.has_cuda() else "CPU"
    return {"device": name, "cuda": torch.version.cuda, "peak_tflops": host.peak_tflops()}


def main(arguments: Sequence[str]) -> None:
    contender, shapes, stage, precision, steps = arguments
    distributed.initialize(ParallelConfig(), seed=1)
    for row in rows(contender, SHAPES[shapes], stage, precision, int(steps)):
        print(json.dumps(row), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
