"""How a picture becomes places in a sequence and squares of pixels, in training and generation alike."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmcore.data.image import Mode, picture_size, preprocess
from mmcore.data.pixels import DECODERS, Resize
from mmcore.data.tiling import TileLayout, anyres_layout, dynamic_layout, tiles
from mmcore.data.tokenizer import Tokenizer

# NVLM's text before the whole picture; before the tiles of it stands <tile_1>, <tile_2>, ...
THUMBNAIL_TAG = "<tile_global_thumbnail>"


class EncodedPictures(NamedTuple):
    """Pixels of a sample's pictures."""

    images: Tensor  # uint8 [n, 3, h, w], squares in the order of their places
    sources: Tensor | None  # int64 [e]; feature of each place, -1 the newline; None: every feature in order
    num_features: int
    """Of all squares, used or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What a model makes of pictures: `Pictures(**architecture.picture_options())`.

    How long a picture's sequence is follows from its size, which the header of its file tells: nothing
    is decoded before it is known to fit.
    """

    image_token_id: int
    """What stands in the sequence once for every embedding."""
    image_size: int
    """Side of a square in pixels."""
    num_square_embeddings: int
    """Embeddings of a square."""
    mode: Mode = "crop"
    background: tuple[int, int, int]
    """Colour that the mode "pad" puts beside a picture."""
    tiling: Literal["none", "anyres", "dynamic"] = "none"
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    max_num_tiles: int = 0
    tile_tags: bool = False
    """As in `PictureArch`, all five."""
    resize: Resize = "exact"
    """Who decodes and resizes; see mmcore.data.pixels."""

    @property
    def square_ids(self) -> Sequence[int]:
        """Sequence of one square."""
        return array("q", [self.image_token_id]) * self.num_square_embeddings

    def ids(self, data: bytes, tokenizer: Tokenizer) -> Sequence[int]:
        """Sequence of one picture, text tags between its tiles included.

        Args:
            data: content of its file, of which no more than the header is read.
        Raises:
            ValueError: the length depends on its size, and it is no picture or too large.
        """
        return self.square_ids if self.tiling == "none" else self._ids(picture_size(data), tokenizer)

    def longest(self, tokenizer: Tokenizer) -> int:
        """Length of the longest sequence that one picture can become."""
        if self.tiling == "none":
            return self.num_square_embeddings
        sizes = [(width, height) for height, width in self.grid_pinpoints]
        if self.tiling == "dynamic":
            sizes = [(self.max_num_tiles * self.image_size, self.image_size)]
        return max(len(self._ids(size, tokenizer)) for size in sizes)

    def encode(self, files: Sequence[bytes]) -> EncodedPictures:
        """Decode the pictures of a sample and cut them into squares.

        Raises:
            ValueError: one is broken or too large.
        """
        squares: list[Tensor] = []
        sources: list[int] = []
        for data in files:
            image = DECODERS[self.resize](data)
            if self.tiling == "none":
                squares.append(preprocess(image, self.image_size, self.mode, self.background)[None])
                continue
            layout = self._layout(picture_size(data))
            before = sum(map(len, squares)) * self.num_square_embeddings
            sources += [source if source < 0 else before + source for source in layout.sources]
            squares.append(tiles(image, layout, self.image_size))
        if len(squares) == 1:
            images = squares[0]  # uint8 [n, 3, h, w]
        else:
            images = torch.cat([torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8), *squares])
        return EncodedPictures(
            images=images,
            sources=torch.tensor(sources, dtype=torch.int64) if self.tiling == "anyres" else None,
            num_features=len(images) * self.num_square_embeddings,
        )

    def _layout(self, size: tuple[int, int]) -> TileLayout:
        if self.tiling == "anyres":
            side = round(self.num_square_embeddings**0.5)
            return anyres_layout(size, self.image_size, side, self.grid_pinpoints)
        return dynamic_layout(size, self.image_size, self.num_square_embeddings, self.max_num_tiles)

    def _ids(self, size: tuple[int, int], tokenizer: Tokenizer) -> list[int]:
        """Source of the tags: NVLM-D's modeling_nvlm_d.py; Megatron-LM examples/multimodal."""
        layout = self._layout(size)
        if not self.tile_tags:
            return [self.image_token_id] * layout.num_embeddings
        tags = [*(f"<tile_{number}>" for number in range(1, layout.num_squares)), THUMBNAIL_TAG]
        return [id for tag in tags for id in (*tokenizer.encode(tag), *self.square_ids)]
