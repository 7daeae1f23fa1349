"""One self-contained HTML file about a run: scores, loss curves, pictures with what was said about them."""

import base64
import difflib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mmcore.evaluation.curves import Curve, smoothing_window, svg
from mmcore.evaluation.page import SCRIPT, document
from mmcore.evaluation.scores import write_whole
from mmcore.foreign import PICTURE_FORMATS

THUMBNAIL = 512  # pixels; larger pictures are scaled down, so that the file stays small
SMALL = 128  # pixels; smaller pictures are enlarged without blur


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """A number, and whether it is as it should be."""

    name: str
    value: str
    note: str = ""
    """What it means, or which bar it is held against."""
    passed: bool | None = None
    """None where there is no bar."""
    is_part: bool = False
    """Whether it is a part of the row above it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryItem:
    """A picture, what the model said, and what is right."""

    image: bytes | Path | None
    generated: str
    true: str
    correct: bool
    label: str = ""
    """Small print: where it belongs, its id."""
    prompt: str = ""


def write_report(
    path: Path,
    *,
    title: str,
    summary: Sequence[SummaryRow],
    curves: Sequence[Curve] = (),
    gallery: Sequence[GalleryItem] = (),
    notes: Sequence[str] = (),
    subtitle: str = "",
) -> None:
    """Write the report, whole or not at all.

    Raises:
        ValueError: a picture cannot be read, or the file cannot be written.
    """
    sections = [_summary(summary), _curves(curves) if curves else "", _gallery(gallery) if gallery else ""]
    body = f"""<p class="quiet">{escape(subtitle)}</p>
{"".join(sections)}
<footer class="quiet">{"".join(f"<p>{escape(note)}</p>" for note in notes)}</footer>"""
    write_whole(path, document(title, body, script=SCRIPT if gallery else ""))


def _summary(rows: Sequence[SummaryRow]) -> str:
    marks = {True: '<span class="mark right">met</span>', False: '<span class="mark wrong">missed</span>', None: ""}
    body = "".join(
        f'<tr class="{"part" if row.is_part else ""}">'
        f'<th scope="row">{escape(row.name)}</th><td class="value">{escape(row.value)}</td>'
        f'<td class="note">{escape(row.note)}</td><td>{marks[row.passed]}</td></tr>'
        for row in rows
    )
    head = '<th>score</th><th class="value">value</th><th>what it means</th><th>bar</th>'
    return f'<div class="card summary"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _curves(curves: Sequence[Curve]) -> str:
    figures = []
    for curve in curves:
        window = smoothing_window(curve)
        last = [loss for loss in curve.losses if math.isfinite(loss)][-window:]
        told = f"at the end {sum(last) / len(last):.3g}" if last else "no finite loss"
        told += f", mean of {len(last)} steps" if len(last) > 1 else ""
        figures.append(
            f'<figure class="card"><figcaption><b>{escape(curve.name)}</b><span class="quiet">{told}</span>'
            f"</figcaption>{svg(curve)}</figure>"
        )
    return f'<h2>Loss</h2><div class="curves">{"".join(figures)}</div>'


def _gallery(items: Sequence[GalleryItem]) -> str:
    num_right = sum(item.correct for item in items)
    choices = [("all", "All", len(items)), ("wrong", "Wrong", len(items) - num_right), ("right", "Right", num_right)]
    buttons = "".join(
        f'<button value="{kind}" aria-pressed="{str(kind == "all").lower()}">{name} {count}</button>'
        for kind, name, count in choices
    )
    return (
        f'<h2>Gallery</h2><div class="tools"><div class="choice">{buttons}</div>'
        '<input type="search" placeholder="Search texts" aria-label="Search texts">'
        '<span class="quiet found" aria-live="polite"></span></div>'
        f'<div class="gallery">{"".join(map(_item, items))}</div>'
        '<button class="more" hidden>Show more</button>'
    )


def _item(item: GalleryItem) -> str:
    kind = "right" if item.correct else "wrong"
    words = escape(" ".join((item.label, item.prompt, item.generated, item.true)).lower())
    prompt = f'<p class="prompt">{escape(item.prompt)}</p>' if item.prompt else ""
    return (
        f'<article class="card item {kind}" data-text="{words}">{_picture(item.image)}'
        f'<div class="head"><span class="quiet">{escape(item.label)}</span><span class="mark">{kind}</span></div>'
        f"{prompt}<dl>{_texts(item)}</dl></article>"
    )


def _texts(item: GalleryItem) -> str:
    """What was said and what is true; words of the first that are not in the second are marked."""
    generated, true = item.generated.split(), item.true.split()
    if generated == true:
        return f"<dt>generated, and true</dt><dd>{escape(item.generated)}</dd>"
    words = []
    for kind, start, end, *_ in difflib.SequenceMatcher(None, generated, true, autojunk=False).get_opcodes():
        if text := escape(" ".join(generated[start:end])):
            words.append(text if kind == "equal" or item.correct else f"<mark>{text}</mark>")
    return f"<dt>generated</dt><dd>{' '.join(words) or '&mdash;'}</dd><dt>true</dt><dd>{escape(item.true)}</dd>"


def _picture(image: bytes | Path | None) -> str:
    """An <img> whose source is the picture itself."""
    if image is None:
        return ""
    from PIL import Image

    try:
        content = image.read_bytes() if isinstance(image, Path) else image
        with Image.open(io.BytesIO(content), formats=tuple(PICTURE_FORMATS)) as picture:
            kind, edge = Image.MIME.get(picture.format or "", ""), max(picture.size)
            if edge > THUMBNAIL or kind not in ("image/png", "image/jpeg", "image/webp", "image/gif"):
                picture.thumbnail((THUMBNAIL, THUMBNAIL))
                buffer = io.BytesIO()
                picture.convert("RGB").save(buffer, "JPEG", quality=85)
                kind, content = "image/jpeg", buffer.getvalue()
    except OSError as error:
        name = image if isinstance(image, Path) else "picture"
        raise ValueError(f"{name} cannot be shown in the report: {error}") from None
    small = ' class="small"' if edge <= SMALL else ""
    return f'<img{small} alt="" src="data:{kind};base64,{base64.b64encode(content).decode()}">'
