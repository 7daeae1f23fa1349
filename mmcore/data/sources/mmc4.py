"""MMC4: web pages as sentences, and pictures that were matched to them.

One JSON object a line (docs_no_face_shard_0_v2.jsonl, also in the zip that it comes in):

    text_list          sentences
    image_info         pictures: image_name, raw_url, matched_text_index (from 0)
    similarity_matrix  a row for each picture, a column for each sentence; decides where there is no
                       matched_text_index

A picture stands before its sentence; pictures of one sentence stand as they are listed. It is
looked for by image_name and then by raw_url. A page goes without pictures that cannot be used, and
is rejected when none is left.

Source: Zhu et al., Multimodal C4, 2023; allenai/mmc4, README.
"""

from pathlib import Path
from typing import Any

from mmcore.constants import IMAGE_TAG
from mmcore.data.sources.lines import read_json_lines
from mmcore.data.sources.row import Row


def read_rows(path: Path) -> list[Row]:
    """A row for every page, in order; of a page with a fault, the fault.

    Raises:
        ValueError: the file cannot be read.
    """
    rows = []
    for number, page in read_json_lines(path):
        try:
            rows.append(_read_page(page, number, path))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            fault = f"not a page of MMC4 ({type(error).__name__}: {error})"
            rows.append(Row(file=path, number=number, id=str(number), fault=fault))
    return rows


def _read_page(page: Any, number: int, path: Path) -> Row:
    if isinstance(page, ValueError):
        raise page
    sentences: list[str] = page["text_list"]
    if any(IMAGE_TAG in sentence for sentence in sentences):
        raise ValueError(f"a sentence holds {IMAGE_TAG}")
    matched = [_matched_sentence(page, index) for index in range(len(page["image_info"]))]
    order = sorted(range(len(matched)), key=matched.__getitem__)  # stable
    pictures = [page["image_info"][index] for index in order]
    names = [(picture.get("image_name") or picture["raw_url"], picture.get("raw_url") or "") for picture in pictures]
    if not all(isinstance(name, str) for pair in names for name in pair):
        raise TypeError("image_name and raw_url are texts")
    return Row(
        file=path,
        number=number,
        id=str(page.get("url", number)),
        images=tuple(name for name, _ in names),
        urls=tuple(url for _, url in names),
        text=_interleave(sentences, matched),
    )


def _matched_sentence(page: dict[str, Any], index: int) -> int:
    sentence = page["image_info"][index].get("matched_text_index")
    if sentence is None:
        similarities: list[float] = page["similarity_matrix"][index]
        sentence = similarities.index(max(similarities))
    if sentence not in range(len(page["text_list"])):
        raise IndexError(f"picture {index} belongs to sentence {sentence} of {len(page['text_list'])}")
    return int(sentence)


def _interleave(sentences: list[str], matched: list[int]) -> str:
    """Sentences with a space between them, or the pictures that stand there."""
    text = ""
    for index, sentence in enumerate(sentences):
        tags = IMAGE_TAG * matched.count(index)
        text += (tags or " " if text else tags) + sentence
    return text
