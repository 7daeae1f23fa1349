"""Pictures in more detail than one square holds: cut into several, which the vision tower sees one by one.

Which squares, and where their embeddings stand, follows from a picture's size alone; only `tiles` needs
its pixels. Sizes are (width, height) as Pillow's, boxes (left, top, right, bottom).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcore.data.image import Picture, resize

# Among `sources`: the learned embedding that ends a row, instead of a feature.
NEWLINE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class TileLayout:
    """The squares of one picture, and the sequence that their features become."""

    grid: tuple[int, int]
    """Rows and columns of tiles."""

    resized: tuple[int, int]
    """Width and height to which the picture is resized before it is cut."""

    boxes: tuple[tuple[int, int, int, int], ...]
    """What each tile shows of the resized picture, in reading order; beyond the picture's edges is black."""

    thumbnail: Literal["first", "last"] | None
    """Where among the squares the whole picture stands once more, squashed into one."""

    sources: tuple[int, ...]
    """For each embedding, which feature it is, of all squares' features one after the other; or NEWLINE."""

    @property
    def num_squares(self) -> int:
        return len(self.boxes) + (self.thumbnail is not None)

    @property
    def num_embeddings(self) -> int:
        return len(self.sources)

    @property
    def newlines(self) -> list[int]:
        """Places of the embeddings that end a row."""
        return [place for place, source in enumerate(self.sources) if source == NEWLINE]


def anyres_layout(
    size: tuple[int, int], image_size: int, features_per_side: int, grid_pinpoints: Sequence[tuple[int, int]]
) -> TileLayout:
    """LLaVA-NeXT: the whole picture first, then tiles whose features are read row by row over all of them.

    The picture keeps its proportions and is centred on the grid. Features of the black beside it are left
    out, and each row ends with the newline embedding.

    Args:
        size: of the picture.
        image_size: side of a square in pixels.
        features_per_side: of a square, after the vision tower: image_size / patch_size.
        grid_pinpoints: (height, width) in pixels that the grid may have; earlier ones win ties.
    Raises:
        ValueError: no pinpoints, or one that is not made of whole squares.
    Source: transformers 5.23, LlavaNextImageProcessor and LlavaNextModel.pack_image_features: the same
        squares and the same order. LLaVA's own code keeps pinpoints as (width, height), which matters
        only in ties.
    """
    height, width = _best_pinpoint(size, image_size, grid_pinpoints)
    rows, columns = height // image_size, width // image_size
    scales = width / size[0], height / size[1]
    resized = (
        (width, min(math.ceil(size[1] * scales[0]), height))
        if scales[0] < scales[1]
        else (min(math.ceil(size[0] * scales[1]), width), height)
    )
    left, top = (width - resized[0]) // 2, (height - resized[1]) // 2
    return TileLayout(
        grid=(rows, columns),
        resized=resized,
        boxes=_boxes(rows, columns, image_size, left, top),
        thumbnail="first",
        sources=_unpadded_sources(size, rows, columns, features_per_side),
    )


def dynamic_layout(size: tuple[int, int], image_size: int, num_features: int, max_num_tiles: int) -> TileLayout:
    """InternVL and NVLM: tiles in the picture's nearest proportions, then the whole picture if they are several.

    The picture is stretched to fill the grid, so every feature is an embedding; tags that number the tiles
    belong to the text.

    Args:
        size: of the picture.
        image_size: side of a square in pixels.
        num_features: of a square, after the projection.
        max_num_tiles: without the thumbnail.
    Raises:
        ValueError: max_num_tiles is not positive.
    Source: InternVL 1.5, dynamic_preprocess; transformers 5.23, GotOcr2ImageProcessor(crop_to_patches=True),
        which is InternVL's: the same squares.
    """
    if max_num_tiles < 1:
        raise ValueError(f"max_num_tiles is {max_num_tiles}, and a picture is at least 1 tile")
    rows, columns = _nearest_grid(size, image_size, max_num_tiles)
    num_squares = rows * columns + (rows * columns > 1)
    return TileLayout(
        grid=(rows, columns),
        resized=(columns * image_size, rows * image_size),
        boxes=_boxes(rows, columns, image_size),
        thumbnail="last" if num_squares > 1 else None,
        sources=tuple(range(num_squares * num_features)),
    )


def tiles(image: Picture, layout: TileLayout, image_size: int) -> Tensor:
    """The squares of a picture that has the size for which the layout was made.

    Args:
        image: mode RGB, or its pixels.
        image_size: side of a square, as the layout was told.
    Returns:
        uint8 [num_squares, 3, image_size, image_size], not normalised.
    Raises:
        ValueError: so long and narrow that on the way it would have more than MAX_PIXELS.
    """
    rows, columns = layout.grid
    left, top, *_ = layout.boxes[0]
    canvas = torch.zeros(3, rows * image_size, columns * image_size, dtype=torch.uint8)
    canvas[:, -top : layout.resized[1] - top, -left : layout.resized[0] - left] = resize(image, layout.resized)
    cut = canvas.view(3, rows, image_size, columns, image_size).permute(1, 3, 0, 2, 4)  # [rows, columns, 3, h, w]
    squares = [cut.flatten(0, 1)]
    if layout.thumbnail:
        whole = resize(image, (image_size, image_size))[None]
        squares.insert(0 if layout.thumbnail == "first" else 1, whole)
    return torch.cat(squares)  # [n, 3, h, w]


def _best_pinpoint(
    size: tuple[int, int], image_size: int, grid_pinpoints: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Height and width that keep most of the picture's pixels, and of those that keep as many the smallest."""
    if not grid_pinpoints:
        raise ValueError("no grid_pinpoints; give at least one (height, width)")
    for pinpoint in grid_pinpoints:
        if any(side < image_size or side % image_size for side in pinpoint):
            raise ValueError(f"the grid pinpoint {tuple(pinpoint)} is not made of whole squares of {image_size} pixels")

    def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        height, width = pinpoint
        scale = min(width / size[0], height / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, -height * width

    return max(grid_pinpoints, key=merit)


def _nearest_grid(size: tuple[int, int], image_size: int, max_num_tiles: int) -> tuple[int, int]:
    """Rows and columns in the nearest proportions; of grids as near, more tiles if the picture fills half of them."""
    sides = range(1, max_num_tiles + 1)
    grids = [(rows, columns) for columns in sides for rows in sides if rows * columns <= max_num_tiles]
    grids.sort(key=math.prod)
    distances = [abs(size[0] / size[1] - columns / rows) for rows, columns in grids]
    least = min(distances)
    best, *others = (grid for grid, distance in zip(grids, distances, strict=True) if distance == least)
    for grid in others:
        if size[0] * size[1] > 0.5 * image_size * image_size * math.prod(grid):
            best = grid
    return best


def _boxes(
    rows: int, columns: int, image_size: int, left: int = 0, top: int = 0
) -> tuple[tuple[int, int, int, int], ...]:
    """Of a grid on which the picture's corner lies at (left, top)."""
    corners = [(column * image_size - left, row * image_size - top) for row in range(rows) for column in range(columns)]
    return tuple((x, y, x + image_size, y + image_size) for x, y in corners)


def _unpadded_sources(size: tuple[int, int], rows: int, columns: int, side: int) -> tuple[int, ...]:
    """Features of the whole picture, then those of the grid that show the picture, by rows of the grid."""
    width, height = columns * side, rows * side
    left = top = 0
    # Rounded to 7 digits as the reference does: 1.9999999 features are 2.
    if size[0] / size[1] > width / height:
        top = (height - int(round(size[1] * (width / size[0]), 7))) // 2
    else:
        left = (width - int(round(size[0] * (height / size[1]), 7))) // 2
    sources = list(range(side * side))
    for y in range(top, height - top):
        for column in range(columns):
            square = 1 + y // side * columns + column
            start = (square * side + y % side) * side  # of this square's row
            first, end = max(left - column * side, 0), min(width - left - column * side, side)
            sources.extend(range(start + first, start + end))
        sources.append(NEWLINE)
    return tuple(sources)
