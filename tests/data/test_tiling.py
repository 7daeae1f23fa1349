import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, get_anyres_image_grid_shape
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from mmcore.data.image import decode_image
from mmcore.data.tiling import NEWLINE, TileLayout, anyres_layout, dynamic_layout, tiles
from tests.data.fabricated import picture

# In squares, (rows, columns): LLaVA-NeXT's own, and one-row and one-column grids as LLaVA-OneVision adds.
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
MORE_GRIDS = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]
RAW: dict[str, Any] = {"do_rescale": False, "do_normalize": False}


def pinpoints(image_size: int, grids: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(rows * image_size, columns * image_size) for rows, columns in grids]


def sizes(count: int, longest: int) -> list[tuple[int, int]]:
    """Of pictures: extreme ones, round ones with ties, two that need the rounding, random ones."""
    draw = random.Random(5)
    chosen = [(1, 1), (1, longest), (longest, 1), (2, 3), (336, 336), (672, 672), (672, 336), (1008, 336), (640, 480)]
    chosen += [(55, 176), (176, 99)]
    return chosen + [(draw.randint(1, longest), draw.randint(1, longest)) for _ in range(count)]


@pytest.mark.parametrize("grids", [GRIDS, MORE_GRIDS, MORE_GRIDS[::-1], [(2, 2)]])
@pytest.mark.parametrize("image_size, patch_size", [(336, 14), (384, 16), (32, 16)])
def test_anyres_has_the_embeddings_of_the_reference_in_its_order(
    image_size: int, patch_size: int, grids: list[tuple[int, int]]
) -> None:
    allowed = pinpoints(image_size, grids)
    side = image_size // patch_size
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=allowed),
        patch_size=patch_size,
        num_additional_image_tokens=0,
        _get_unpadded_features=lambda *numbers: LlavaNextProcessor._get_unpadded_features(None, *numbers),
    )
    vision = SimpleNamespace(image_size=image_size, patch_size=patch_size)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=allowed))
    for width, height in sizes(60, 3000):
        layout = anyres_layout((width, height), image_size, side, allowed)
        assert layout.grid == get_anyres_image_grid_shape((height, width), allowed, image_size)
        count = LlavaNextProcessor._get_number_of_features(processor, height, width, image_size, image_size)
        assert layout.num_embeddings == count
        features = torch.arange(layout.num_squares * side * side).view(layout.num_squares, side * side, 1)
        packed, _ = LlavaNextModel.pack_image_features(
            model, [features], [(height, width)], "default", image_newline=torch.tensor([NEWLINE])
        )
        assert list(layout.sources) == packed[0].flatten().tolist()


def test_the_tokens_of_an_anyres_picture_by_hand() -> None:
    """Twice as wide as high on 2 x 2 squares of 4 x 4 features: the middle 4 rows of 8 show the picture."""
    layout = anyres_layout((200, 100), 8, 4, [(16, 16)])
    assert layout == TileLayout(
        grid=(2, 2),
        resized=(16, 8),
        boxes=((0, -4, 8, 4), (8, -4, 16, 4), (0, 4, 8, 12), (8, 4, 16, 12)),
        thumbnail="first",
        sources=(
            *range(16),
            *(24, 25, 26, 27, 40, 41, 42, 43, NEWLINE),
            *(28, 29, 30, 31, 44, 45, 46, 47, NEWLINE),
            *(48, 49, 50, 51, 64, 65, 66, 67, NEWLINE),
            *(52, 53, 54, 55, 68, 69, 70, 71, NEWLINE),
        ),
    )
    assert layout.num_squares == 5
    assert layout.num_embeddings == 16 + 4 * 9
    assert layout.newlines == [24, 33, 42, 51]


@pytest.mark.parametrize("size", [(56, 56), (57, 56), (100, 37), (37, 101), (333, 500), (5, 200), (640, 427)])
def test_anyres_pixels_are_the_references(size: tuple[int, int]) -> None:
    image = decode_image(picture(sum(size), size))
    square = {"height": 56, "width": 56}
    allowed = pinpoints(56, GRIDS)
    reference = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=square, image_grid_pinpoints=[list(point) for point in allowed], **RAW
    )
    expected = torch.tensor(reference(image)["pixel_values"][0])
    shown = tiles(image, anyres_layout(size, 56, 4, allowed), 56)
    assert shown.dtype == torch.uint8 and torch.equal(shown, expected)


@pytest.mark.parametrize("max_num_tiles", [1, 2, 6, 12, 40])
@pytest.mark.parametrize("image_size", [336, 448])
def test_dynamic_grids_are_the_references(image_size: int, max_num_tiles: int) -> None:
    processor = GotOcr2ImageProcessorPil(
        size={"height": image_size, "width": image_size}, crop_to_patches=True, max_patches=max_num_tiles
    )
    for width, height in sizes(150, 3000):
        layout = dynamic_layout((width, height), image_size, 256, max_num_tiles)
        square = (image_size, image_size)
        assert layout.grid == get_optimal_tiled_canvas((height, width), square, 1, max_num_tiles)[::-1]
        assert layout.num_squares == processor.get_number_of_image_patches(height, width)
        assert layout.sources == tuple(range(256 * layout.num_squares))
        assert layout.newlines == []


def test_of_grids_in_the_same_proportions_a_large_picture_takes_more_tiles() -> None:
    """2 x 2 tiles of 100 pixels are 40000: a square picture takes them from above half of that."""
    assert [dynamic_layout((side, side), 100, 1, 4).grid for side in (141, 142)] == [(1, 1), (2, 2)]
    assert [dynamic_layout((side, side), 100, 1, 4).thumbnail for side in (141, 142)] == [None, "last"]


@pytest.mark.parametrize("size", [(56, 56), (57, 56), (100, 37), (37, 101), (333, 500), (5, 200), (640, 427)])
@pytest.mark.parametrize("max_num_tiles", [1, 6, 12])
def test_dynamic_pixels_are_the_references(size: tuple[int, int], max_num_tiles: int) -> None:
    image = decode_image(picture(sum(size), size))
    reference = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=max_num_tiles, **RAW
    )
    expected = torch.tensor(reference(image)["pixel_values"])
    shown = tiles(image, dynamic_layout(size, 56, 4, max_num_tiles), 56)
    assert shown.dtype == torch.uint8 and torch.equal(shown, expected)


def test_a_picture_of_one_pixel_is_tiled() -> None:
    image = Image.new("RGB", (1, 1), (1, 2, 3))
    for layout in (anyres_layout((1, 1), 14, 1, [(14, 28)]), dynamic_layout((1, 1), 14, 1, 4)):
        assert tiles(image, layout, 14)[0, :, 0, 0].tolist() == [1, 2, 3]


def test_a_picture_too_long_is_refused() -> None:
    image = Image.new("RGB", (1, 200_000))
    for layout in (anyres_layout(image.size, 336, 24, [(672, 672)]), dynamic_layout(image.size, 336, 576, 12)):
        with pytest.raises(ValueError, match="1 x 200000 pixels is too long to be resized"):
            tiles(image, layout, 336)


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="no grid_pinpoints"):
        anyres_layout((3, 2), 14, 1, [])
    for pinpoint in ((14, 30), (0, 14)):
        with pytest.raises(ValueError, match="not made of whole squares of 14 pixels"):
            anyres_layout((3, 2), 14, 1, [(14, 14), pinpoint])
    with pytest.raises(ValueError, match="max_num_tiles is 0"):
        dynamic_layout((3, 2), 14, 1, 0)
