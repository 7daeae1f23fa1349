"""The page of `mmcore inspect`: every text escaped, nothing loaded."""

import re
from pathlib import Path

from mmcore.evaluation.inspection_page import write_page
from tests.evaluation.test_histogram import report

ATTACK = "<script>x</script><img src=x onerror=y> \"'& \ud800"


def sample(**changes: object) -> dict[str, object]:
    piece = {"text": ATTACK, "ids": [7, 8], "kind": "text", "trained": True}
    texts = dict.fromkeys(("source", "shard", "key", "error", "text"), ATTACK)
    return {**texts, "was_cut": True, "pieces": [piece], "pictures": [ATTACK], "squares": [ATTACK], **changes}


def test_every_text_is_escaped(tmp_path: Path) -> None:
    told = report(dataset=ATTACK, split=ATTACK, conversation=ATTACK, padding={ATTACK: 0.5})
    finding = {**told["findings"][0], "title": ATTACK, "meaning": ATTACK, "by_source": {ATTACK: 1, "s": 2}}
    finding["examples"] = [{"source": "s", "shard": ATTACK, "key": ATTACK, "detail": ATTACK}]
    told["findings"] = [finding, {**finding, "count": 0}]
    told["sources"] = [{**source, "name": ATTACK, "tokens": 1, "trained_tokens": 0} for source in told["sources"]]
    write_page(tmp_path / "report.html", told, [sample(), sample(pieces=[])])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img src=x" not in page and "\ud800" not in page
    assert page.count("&lt;script&gt;x&lt;/script&gt;") >= 20
    assert not re.search(r"<[^>]*\sonerror", re.sub(r'"[^"]*"', "", page))
    assert 'title="id 7 8"' in page and "default-src 'none'" in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_kinds_of_tokens_are_told_apart(tmp_path: Path) -> None:
    kinds = [("image", "", [9] * 576), ("control", "</s>", [2]), ("unknown", "", [999]), ("text", "a\n", [5])]
    pieces = [{"text": text, "ids": ids, "kind": kind, "trained": kind == "control"} for kind, text, ids in kinds]
    told = report()
    told["sources"] = told["sources"][:1]
    write_page(tmp_path / "report.html", told, [sample(pieces=pieces)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<span class="t image" title="id 9">image \u00d7 576</span>' in page
    assert '<span class="t control trained" title="id 2">&lt;/s&gt;</span>' in page
    assert '<span class="t unknown" title="id 999">id 999</span>' in page
    assert '<span class="t" title="id 5">a\u21b5\n</span>' in page
    assert "579 tokens, 1 trained, cut at the window" in page
