"""What a picture becomes in every mode and tiling: the sequence that its header promises, and the squares for it."""

import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mmcore import foreign
from mmcore.data.batch import EncodedSample, collate
from mmcore.data.conversation import encode_conversation, encode_document
from mmcore.data.image import decode_image, preprocess
from mmcore.data.pictures import Pictures
from mmcore.data.task_encoder import Layout, encode_sample, lay_out
from mmcore.data.templates import Turn
from mmcore.data.tiling import anyres_layout
from mmcore.data.tokenizer import Tokenizer, load_tokenizer
from tests.data import fabricated
from tests.data.fabricated import loader, picture, pictures, write_shards

IMAGE = 1 << 20
ANYRES: dict[str, Any] = {"tiling": "anyres", "mode": "squash", "grid_pinpoints": ((16, 32), (32, 16), (32, 32))}
DYNAMIC: dict[str, Any] = {"tiling": "dynamic", "mode": "squash", "max_num_tiles": 6}
RAW: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
TALL, WIDE, SMALL = picture(1, (17, 80)), picture(2, (60, 21)), picture(3, (9, 9))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return load_tokenizer(folder)


@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
def test_one_square_in_every_mode(tokenizer: Tokenizer, mode: Any) -> None:
    whole = pictures(IMAGE, mode=mode)
    assert list(whole.ids(TALL, tokenizer)) == [IMAGE] * 4 and whole.longest(tokenizer) == 4
    encoded = whole.encode([TALL, SMALL])
    expected = [preprocess(decode_image(data), 16, mode, (1, 2, 3)) for data in (TALL, SMALL)]
    assert torch.equal(encoded.images, torch.stack(expected))
    assert encoded.sources is None and encoded.num_features == 8


def test_padding_has_the_mean_colour_of_the_tower() -> None:
    """Not always CLIP's: transformers pads with what it normalises by."""
    square = {"height": 16, "width": 16}
    processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 16}, crop_size=square, image_mean=[0.5, 0.25, 0.75], **RAW
    )
    expected = torch.tensor(processor(decode_image(TALL))["pixel_values"][0])
    encoded = pictures(IMAGE, mode="pad", background=(127, 63, 191)).encode([TALL])
    assert torch.equal(encoded.images[0], expected)


def test_a_sequence_is_known_before_anything_is_decoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, anyres = pictures(IMAGE), pictures(IMAGE, **ANYRES)
    assert list(whole.ids(b"no picture", tokenizer)) == [IMAGE] * 4
    with pytest.raises(ValueError, match="not a picture"):
        anyres.ids(b"no picture", tokenizer)
    expected = anyres.ids(TALL, tokenizer)
    monkeypatch.setattr(Image.Image, "load", None)
    assert anyres.ids(TALL, tokenizer) == expected
    monkeypatch.setattr(foreign, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="at most 100 are decoded"):
        anyres.ids(TALL, tokenizer)


def turned(data: bytes) -> bytes:
    """The same picture as a camera held upright writes it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    decode_image(data).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("tiling", [ANYRES, DYNAMIC, {**DYNAMIC, "tile_tags": True}])
def test_squares_fit_the_sequence(tokenizer: Tokenizer, tiling: dict[str, Any]) -> None:
    cut = pictures(IMAGE, **tiling)
    files = [TALL, turned(TALL), WIDE, SMALL, turned(WIDE)]
    counts = [cut.ids(data, tokenizer).count(IMAGE) for data in files]
    assert len(set(counts)) > 2
    encoded = cut.encode(files)
    places = 4 * len(encoded.images) if encoded.sources is None else len(encoded.sources)
    assert places == sum(counts) and encoded.num_features == 4 * len(encoded.images)
    assert counts[1] == cut.ids(picture(0, (80, 17)), tokenizer).count(IMAGE)
    assert (encoded.sources is None) == (tiling is not ANYRES)


def test_anyres_squares_are_the_references(tokenizer: Tokenizer) -> None:
    cut = pictures(IMAGE, **ANYRES)
    encoded = cut.encode([TALL, WIDE])
    square = {"height": 16, "width": 16}
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size=square,
        image_grid_pinpoints=[list(p) for p in ANYRES["grid_pinpoints"]],
        **RAW,
    )
    expected = [torch.tensor(processor(decode_image(data))["pixel_values"][0]) for data in (TALL, WIDE)]
    assert torch.equal(encoded.images, torch.cat(expected))
    first, second = (anyres_layout(size, 16, 2, ANYRES["grid_pinpoints"]) for size in ((17, 80), (60, 21)))
    before = 4 * first.num_squares
    shifted = [source if source < 0 else source + before for source in second.sources]
    assert encoded.sources is not None and encoded.sources.tolist() == [*first.sources, *shifted]


def test_dynamic_squares_are_the_references(tokenizer: Tokenizer) -> None:
    encoded = pictures(IMAGE, **DYNAMIC).encode([WIDE, SMALL])
    processor = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=6, **RAW
    )
    expected = [torch.tensor(processor(decode_image(data))["pixel_values"]) for data in (WIDE, SMALL)]
    assert torch.equal(encoded.images, torch.cat(expected))


def test_tags_of_tiles_are_text(tokenizer: Tokenizer) -> None:
    tagged = pictures(IMAGE, tile_tags=True, **DYNAMIC)
    square = [IMAGE] * 4
    tags = ["<tile_1>", "<tile_2>", "<tile_3>", "<tile_global_thumbnail>"]
    assert tagged.ids(WIDE, tokenizer) == [id for tag in tags for id in (*tokenizer.encode(tag), *square)]
    assert tagged.ids(SMALL, tokenizer) == [*tokenizer.encode(tags[-1]), *square]


@pytest.mark.parametrize("tiling", [{}, ANYRES, DYNAMIC, {**DYNAMIC, "tile_tags": True}])
def test_the_longest_sequence(tokenizer: Tokenizer, tiling: dict[str, Any]) -> None:
    cut = pictures(IMAGE, **tiling)
    lengths = {
        len(cut.ids(picture(0, (width, height)), tokenizer)) for width in range(1, 99, 7) for height in (8, 16, 99)
    }
    assert max(lengths) <= cut.longest(tokenizer)
    widest = picture(0, (6 * 16, 16)) if "max_num_tiles" in tiling else picture(0, (32, 32))
    assert len(cut.ids(widest, tokenizer)) == cut.longest(tokenizer)


def turns(question: str) -> list[Turn]:
    return [Turn("user", question), Turn("assistant", "A")]


def test_pictures_of_several_lengths_stand_at_their_tags(tokenizer: Tokenizer) -> None:
    sequences = [[IMAGE] * 3, [7, IMAGE, 8, IMAGE], [IMAGE]]
    encoded = encode_conversation(
        turns("<image>a<image><image>"), tokenizer, "vicuna_v1", pictures=sequences, image_token_id=IMAGE
    )
    one = encode_conversation(
        turns("<image>a<image><image>"), tokenizer, "vicuna_v1", pictures=[[IMAGE]] * 3, image_token_id=IMAGE
    )
    expected: list[int] = []
    given = iter(sequences)
    for id in one.tokens:
        expected += next(given) if id == IMAGE else [id]
    assert encoded.tokens == expected and encoded.num_images == 3
    assert encoded.loss_mask.count(1.0) == one.loss_mask.count(1.0)


def test_tags_of_tiles_are_not_trained(tokenizer: Tokenizer) -> None:
    document = encode_document("a<image>b", tokenizer, pictures=[[7, IMAGE, 8, IMAGE]], image_token_id=IMAGE)
    trained = [label for label, weight in zip(document.labels, document.loss_mask, strict=True) if weight]
    assert trained == [*tokenizer.encode("a"), *tokenizer.encode("b"), tokenizer.eos_id]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_other_tags_than_pictures_are_refused(tokenizer: Tokenizer, count: int) -> None:
    with pytest.raises(ValueError, match=f"2 <image> for {count} pictures"):
        encode_document("<image><image>", tokenizer, pictures=[[IMAGE]] * count, image_token_id=IMAGE)


def test_a_cut_between_tags_of_one_picture_is_refused(tokenizer: Tokenizer) -> None:
    sequence = [7, IMAGE, 8, IMAGE]
    whole = encode_document("a<image>b<image>c", tokenizer, pictures=[sequence] * 2, image_token_id=IMAGE)
    starts = [place for place in range(len(whole.tokens)) if whole.tokens[place : place + 4] == sequence]
    assert len(starts) == 2
    for length in range(2, len(whole.tokens) + 1):
        options: dict[str, Any] = {"pictures": [sequence] * 2, "image_token_id": IMAGE, "seq_length": length}
        if any(start < length < start + 4 for start in starts):
            with pytest.raises(ValueError, match="cuts through a picture"):
                encode_document("a<image>b<image>c", tokenizer, **options)
            continue
        cut = encode_document("a<image>b<image>c", tokenizer, **options)
        assert cut.tokens == whole.tokens[:length] and cut.num_images == sum(start + 4 <= length for start in starts)


def layout(tokenizer: Tokenizer, seen: Pictures, seq_length: int = 512) -> Layout:
    return Layout(tokenizer=tokenizer, conversation="plain", pictures=seen, seq_length=seq_length)


def sample(tokenizer: Tokenizer, tiling: dict[str, Any], *files: bytes, seq_length: int = 512) -> EncodedSample:
    parts = {f"{number}.png": data for number, data in enumerate(files)}
    parts["json"] = b'{"text": "%s"}' % b"a".join([b"", *[b"<image>"] * len(files), b""])
    chosen = layout(tokenizer, pictures(IMAGE, **tiling), seq_length)
    return encode_sample("key", parts, lay_out(parts, chosen), chosen)


def test_samples_are_joined_with_their_sources(tokenizer: Tokenizer) -> None:
    """Features by number: what a place takes in the batch is what it takes in its sample."""
    samples = [sample(tokenizer, ANYRES, *files) for files in ((TALL, WIDE), (), (SMALL,))]
    batch = collate(samples)
    features = torch.arange(4 * len(batch.images))
    assert batch.image_sources is not None and len(batch.image_sources) == int((batch.tokens == IMAGE).sum())
    expected, start = [], 0
    for one in samples:
        own = torch.cat([features[start : start + one.num_features], torch.tensor([-1])])
        assert one.image_sources is not None
        expected.append(own[one.image_sources])
        start += one.num_features
    all_features = torch.cat([features, torch.tensor([-1])])
    assert torch.equal(all_features[batch.image_sources], torch.cat(expected))
    assert collate([sample(tokenizer, DYNAMIC, TALL), sample(tokenizer, DYNAMIC)]).image_sources is None


def test_pictures_beyond_the_cut_are_not_decoded(tokenizer: Tokenizer) -> None:
    whole = sample(tokenizer, {}, TALL, WIDE)
    second = whole.tokens.tolist().index(IMAGE, 6)
    cut = sample(tokenizer, {}, TALL, WIDE[:300], seq_length=second)
    assert torch.equal(cut.images, whole.images[:1]) and len(cut.tokens) == second


@pytest.mark.parametrize("tiling", [ANYRES, {**DYNAMIC, "tile_tags": True}])
def test_packed_batches_of_tiles(tmp_path: Path, tiling: dict[str, Any]) -> None:
    """From shards to batches: as many embeddings as places, and no source beyond the features."""
    own = fabricated.tokenizer(tmp_path / "tokenizer")
    path = write_shards(tmp_path / "shards", 12)
    data = {"seq_length": 256, "packing_buffer_size": 6}
    seen = pictures(own.vocab_size, **tiling)
    stream = loader(path, own, data=data, pictures=seen, micro_batch_size=2)
    for batch in itertools.islice(stream, 3):
        assert len(batch.keys) > 2
        num_features, num_places = 4 * len(batch.images), int((batch.tokens == own.vocab_size).sum())
        if batch.image_sources is None:
            assert tiling is not ANYRES and num_places == num_features
        else:
            assert len(batch.image_sources) == num_places and int(batch.image_sources.max()) < num_features
            assert len(batch.image_sources[batch.image_sources >= 0].unique()) > num_features / 2
