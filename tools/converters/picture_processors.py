"""What becomes of a picture before the vision tower sees it, as Hugging Face's and LLaVA's folders say it."""

from pathlib import Path
from typing import Any, Literal

from encoder import PROCESSORS
from weight_files import read_json

from mmcore.models.architecture import PictureArch, VisionArch
from mmcore.models.presets import default_pictures

CROP, PAD = "square", "pad"
ANYRES = "anyres"


def read_pictures(folder: Path, vision: VisionArch) -> PictureArch:
    """What the image processor of a Hugging Face folder does, one square a picture; the tower's own if it has none."""
    for path in (folder / name for name in PROCESSORS):
        content = read_json(path) if path.is_file() else {}
        content = content.get("image_processor", content)
        if isinstance(content, dict) and (mode := _mode(content)):
            return PictureArch(mode=mode)
    return default_pictures(vision)


def _mode(content: dict[str, Any]) -> Literal["", "crop", "pad", "squash"]:
    """Empty where it is not said."""
    if content.get("do_pad"):
        return "pad"
    if not (size := content.get("size")):
        return ""
    return "squash" if isinstance(size, dict) and {"height", "width"} <= size.keys() else "crop"


def original_pictures(content: dict[str, Any], path: Path, vision: VisionArch) -> PictureArch:
    """What LLaVA's own programs do, by the model's config.json.

    Raises:
        ValueError: they do what is not supported.
    Source: haotian-liu/LLaVA llava/mm_utils.py, process_images; llava/model/llava_arch.py.
    """
    shape, merge = content.get("image_aspect_ratio") or CROP, content.get("mm_patch_merge_type", "flat")
    if shape in (CROP, PAD) and merge == "flat":
        return PictureArch(mode="pad") if shape == PAD else default_pictures(vision)
    pinpoints = content.get("image_grid_pinpoints")
    if shape != ANYRES or merge != "spatial_unpad" or not isinstance(pinpoints, list):
        raise ValueError(
            f"{path} asks for what is not supported: image_aspect_ratio {shape!r} with mm_patch_merge_type {merge!r} "
            f"and image_grid_pinpoints {pinpoints!r}; known are {CROP!r} and {PAD!r} with 'flat', and {ANYRES!r} with "
            "'spatial_unpad' and a list"
        )
    # There (width, height).
    return anyres(tuple((int(height), int(width)) for width, height in pinpoints))


def anyres(grid_pinpoints: tuple[tuple[int, int], ...]) -> PictureArch:
    """LLaVA-NeXT's tiles.

    Args:
        grid_pinpoints: (height, width).
    """
    return PictureArch(mode="squash", tiling="anyres", grid_pinpoints=grid_pinpoints)


def check_pictures(pictures: PictureArch) -> None:
    """Raise a ValueError if Hugging Face's LLaVA and LLaVA-NeXT cannot see pictures so."""
    if pictures.tiling == "dynamic":
        raise ValueError(
            "pictures are cut into dynamic tiles, and none of Hugging Face's LLaVA models does that: export the towers "
            "by --part language and --part vision"
        )


def image_processor(arch: VisionArch, pictures: PictureArch) -> dict[str, Any]:
    """preprocessor_config.json: what mmcore.data.image and mmcore.data.tiling do to a picture, whatever the tower.

    Two differences are beyond it. transformers 5 resizes by torchvision, which rounds in other places;
    with backend="pil" it does as training. And it rounds the corner of the crop down, training to even:
    where a picture's longer side, resized, exceeds image_size by 3, 7, 11, ... pixels, engines see it one
    pixel beside.
    """
    square = {"height": arch.image_size, "width": arch.image_size}
    shortest = {"size": {"shortest_edge": arch.image_size}, "do_center_crop": True, "crop_size": square}
    pinpoints = [list(pinpoint) for pinpoint in pictures.grid_pinpoints]
    kinds: dict[str, dict[str, Any]] = {
        "crop": {"image_processor_type": "CLIPImageProcessor", **shortest},
        "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **shortest},
        "squash": {"image_processor_type": "SiglipImageProcessor", "size": square},
        "anyres": {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints, **shortest},
    }
    return {
        **kinds[pictures.mode if pictures.tiling == "none" else pictures.tiling],
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(arch.image_mean),
        "image_std": list(arch.image_std),
    }


def places(pictures: PictureArch) -> str:
    """What one square's embeddings are for, in a report."""
    if pictures.tiling == "none":
        return f"each image, not square ones by {pictures.mode}"
    return f"each square of an image, which {pictures.tiling} tiling cuts"
