"""The page of scored runs: numbers that are right, nothing asked for, hostile answers that stay text, filters."""

import io
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mmcore.evaluation.confidence import interval, mean, paired_p_value
from mmcore.evaluation.scored_compare import MAX_PAIRS, compare
from mmcore.evaluation.scored_gallery import choose, sort_samples
from mmcore.evaluation.scored_page import scored_page
from mmcore.evaluation.scored_parts import axis_end
from mmcore.evaluation.scored_run import ScoredRun
from mmcore.evaluation.scores import Sample
from mmcore.evaluation.thumbnail import data_uri

ATTACK = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> \"'& \ud800"


def run(name: str, scores: list[float], *, task: str = "exact-match", metric: str = "exact_match", **changes):
    """A run with one sample for each score, of two groups in turn."""
    samples = [
        Sample(id=str(row), score=score, answer=f"{name} says {row}", group=("even", "odd")[row % 2], references=("r",))
        for row, score in enumerate(scores)
    ]
    samples = changes.pop("samples", samples)
    value = 100 * sum(scores) / len(scores)
    content = {
        "task": task,
        "score": value,
        "num_samples": len(scores),
        "metric": metric,
        "metrics": {metric: value},
        "scales": {metric: "percent"},
        **changes,
    }
    return ScoredRun(name=name, content=content, samples={sample.id: sample for sample in samples})


def page(runs: list[ScoredRun], limit: int = 100, title: str = "t") -> str:
    tasks: dict[str, list[ScoredRun]] = {}
    for found in runs:
        tasks.setdefault(found.task, []).append(found)
    return scored_page(title, {task: compare(found) for task, found in tasks.items()}, limit).decode()


class Parsed(HTMLParser):
    """Every tag with its attributes, and the texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def hostile() -> list[ScoredRun]:
    """Every text of two runs of one task and one of another is an attack."""
    content = {
        "metrics": {ATTACK: 50.0, "b": 1.0},
        "scales": {ATTACK: ATTACK, "b": "percent"},
        "intervals": {ATTACK: [40.0, 60.0]},
        "groups": {ATTACK: {ATTACK: {"score": 1.0, "num_samples": 1}}},
        "counts": {ATTACK: 1},
        "skipped": {ATTACK: ATTACK},
        "notes": [ATTACK],
        "scorer": {ATTACK: ATTACK},
        "inputs": {ATTACK: {"file": ATTACK, "sha256": ATTACK}},
    }
    texts = {"answer": ATTACK, "parsed": f"{ATTACK}!", "references": (ATTACK,)}
    samples = [
        Sample(id=f"{score}{ATTACK}", score=score, group=group, prompt=prompt, **texts)
        for score, group, prompt in ((0.0, ATTACK, ATTACK), (1.0, "g", ""))
    ]
    samples.append(Sample(id="2", score=1.0, answer="b"))
    names = ((f"1{ATTACK}", ATTACK), (f"2{ATTACK}", ATTACK), (ATTACK, f"another {ATTACK}"))
    return [run(name, [0.0, 1.0], task=task, metric=ATTACK, samples=samples, **content) for name, task in names]


@pytest.mark.parametrize(("count", "num_places"), [(1, 24), (3, 70)])
def test_every_text_is_escaped_and_nothing_is_loaded(count, num_places):
    html = page(hostile()[:count], title=ATTACK)
    parsed = Parsed(html)
    assert Counter(tag for tag, _ in parsed.tags)["script"] == 1
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in parsed.tags}
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert sum(ATTACK.replace("\ud800", "?") in text for text in parsed.texts) == num_places
    assert not re.search(r"https?://|//[a-z]|url\(|@import", html)
    assert "default-src 'none'; img-src data:" in html


def test_numbers_of_one_run():
    html = page([run("a", [1.0, 0.0, 0.0, 0.0], intervals={"exact_match": [0.0, 75.0]}, num_correct=1)])
    texts = Parsed(html).texts
    assert "exact_match, percent \u00b7 95 % 0.00 to 75.00 \u00b7 1 of 4 right" in texts
    assert '<i class="" style="width: 25.00%"></i><b style="left: 0.00%; width: 75.00%"></b>' in html
    assert "Intervals of fewer than 30 samples are rough, and mostly too narrow." in texts
    assert "Differences" not in texts and "Runs" not in texts


def test_differences_of_two_runs_on_the_samples_of_both():
    """Against the test and the interval themselves, of the 40 samples that both have."""
    first, second = [1.0, 0.0] * 20, [1.0, 1.0, 1.0, 0.0] * 10
    runs = [run("a", first), run("b", [*second, 1.0])]
    (found,) = compare(runs).differences
    assert (found.first, found.second, found.value) == ("a", "b", pytest.approx(25))
    assert (found.num_better, found.num_worse, found.num_same) == (10, 0, 30)
    assert found.p_value == paired_p_value(first, second) == 2 / 2**10
    assert found.interval == interval(mean([after - before for before, after in zip(first, second, strict=True)]))
    assert not found.is_of_metric  # of b it is over one sample more
    texts = Parsed(page(runs)).texts
    assert "+25.00" in texts and "0.002" in texts
    assert "1 samples are not in every run: they are left out here." in texts
    assert any("mean of the samples' scores is not exact_match itself" in text for text in texts)
    assert compare([run("a", first), run("b", second)]).differences[0].is_of_metric


def test_of_many_runs_each_is_compared_with_the_first():
    few, many = [run(str(n), [1.0, 0.0]) for n in range(5)], [run(str(n), [1.0, 0.0]) for n in range(6)]
    assert len(compare(few).differences) == MAX_PAIRS
    assert [(row.first, row.second) for row in compare(many).differences] == [("0", str(n)) for n in range(1, 6)]


def test_what_makes_runs_hard_to_compare_is_said():
    inputs = {"references": {"file": "r.json", "sha256": "1" * 64}}
    first = run("a", [1.0], inputs=inputs, scorer={"tokenizer": "ptb"})
    other = {"references": {"file": "r.json", "sha256": "2" * 64}}
    second = run("b", [1.0, 0.0], inputs=other, scorer={"tokenizer": "python"}, samples=[])
    assert compare([first, first]).contrasts == []
    found = compare([first, second])
    assert found.differences == []
    assert found.contrasts == [
        "The runs were scored against different files of references.",
        "The scorer differs in tokenizer: a ptb, b python.",
        "The runs are over different numbers of samples.",
        "Of b no samples were kept: there is no test, and nothing of it in the gallery.",
    ]
    assert set(found.contrasts) <= set(Parsed(page([first, second])).texts)


def test_a_run_keeps_its_colour_and_strangers_are_named():
    bare = run("bare", [1.0], samples=[])
    stranger = run("stranger", [1.0], samples=[Sample(id="x", score=1.0, answer="")])
    html = page([bare, run("a", [1.0]), stranger, run("b", [0.0])])
    assert 'c2"></i>a<span class="mark right">' in html and 'c4"></i>b<span class="mark wrong">' in html
    assert "bare, stranger: none of these samples." in html and html.count("<article") == 1
    one, two, three = (
        run(name, [1.0], samples=[Sample(id=key, score=1, answer="") for key in name]) for name in ("xy", "x", "y")
    )
    assert "There is no sample that all runs have." in page([one, two, three])


def test_other_tasks_stand_apart():
    html = page([run("a", [1.0]), run("b", [1.0], task="pope"), run("c", [1.0], task="pope")])
    parsed = Parsed(html)
    assert [attrs.get("class") for tag, attrs in parsed.tags if tag == "h1"] == [None, "another", "another"]
    assert parsed.texts.count("Differences") == 1
    assert "2 tasks, whose scores say nothing about each other." in parsed.texts


def test_bars_by_category_stand_side_by_side():
    groups = [{"subject": {"art_theory": {"score": score, "num_samples": 30}}} for score in (20.0, 40.0)]
    html = page([run(name, [1.0], groups=row) for name, row in zip("ab", groups, strict=True)])
    assert "<h2>By subject</h2>" in html and 'art_<wbr>theory <span class="quiet">30</span>' in html
    assert re.findall(r'<i class="(c\d)" style="width: ([\d.]+)%"></i></div>', html)[-2:] == [
        ("c1", "20.00"),
        ("c2", "40.00"),
    ]
    many = {"subject": {str(n): {"score": 1.0, "num_samples": 1} for n in range(61)}}
    assert "<summary>61 of them</summary>" in page([run("a", [1.0], groups=many)])


@pytest.mark.parametrize(
    ("scale", "values", "end"),
    [
        ("percent", [1.0], 100),
        ("0 to 1", [0.01], 1),
        ("0 to 10", [0.9, 1.2], 1.5),
        ("0 to 10", [6.0], 10),
        ("0 to 2800", [1234.0], 1500),
        ("0 to 2800", [0.0, float("nan")], 1),
        ("perplexity", [13.0], 15),
        ("perplexity", [100.0], 100),
    ],
)
def test_bars_end_at_the_best_or_at_a_round_number(scale, values, end):
    assert axis_end(scale, values) == end


@pytest.mark.parametrize(
    ("rows", "labels", "kinds"),
    [
        ([[0, 0.3, 1, 1]], ["Wrong", "Partly right", "Right"], ["wrong", "partly", "right", "right"]),
        ([[0.2, 3.1, 0.4]], ["Below 0.40", "0.40 or more"], ["low", "high", "high"]),
        ([[0.2, 0.3, 0.4]], ["Below 0.30", "0.30 or more"], ["low", "high", "high"]),
        (
            [[0, 1, 0, 1], [1, 0, 0, 1]],
            ["0 better", "1 better", "All wrong", "All partly right", "All right"],
            ["second", "first", "wrong", "right"],
        ),
        ([[0.2, 2.0], [0.3, 2.0]], ["0 better", "1 better", "Same"], ["second", "same"]),
        (
            [[0, 1, 0], [0, 1, 0], [1, 1, 0]],
            ["Runs differ", "All wrong", "All partly right", "All right"],
            ["differ", "right", "wrong"],
        ),
    ],
)
def test_samples_are_sorted_by_what_became_of_them(rows, labels, kinds):
    runs = [run(str(name), [*map(float, row)]) for name, row in enumerate(rows)]
    found = sort_samples(runs, [*runs[0].samples])
    assert ([*found.labels.values()], [*found.kinds.values()]) == (labels, kinds)


def test_the_choice_is_balanced_by_chance_and_keeps_the_order():
    runs = [run("a", [1.0] * 90 + [0.0] * 10)]
    sorting = sort_samples(runs, [*runs[0].samples])
    chosen = choose(sorting, 20)
    assert Counter(sorting.kinds[name] for name in chosen) == {"right": 10, "wrong": 10}
    assert chosen == sorted(chosen, key=int) == choose(sorting, 20) != [*map(str, [*range(10), *range(90, 100)])]
    assert Counter(sorting.kinds[name] for name in choose(sorting, 40)) == {"right": 30, "wrong": 10}
    assert choose(sorting, 1000) == [*runs[0].samples]
    two = [*runs, run("b", [1.0] * 80 + [0.0] * 20)]
    sorting = sort_samples(two, [*two[0].samples])
    assert set(choose(sorting, 12)[:10]) == {str(row) for row in range(80, 90)}  # where they differ comes first
    assert "<article" not in page(runs, limit=0)


def picture(size: tuple[int, int] = (64, 64), kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, (255, 0, 0, 0)[: len(mode)]).save(buffer, kind, **options)
    return buffer.getvalue()


def opened(uri: str) -> Image.Image:
    from base64 import b64decode

    head, _, content = uri.partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(b64decode(content)))


def test_thumbnails(tmp_path):
    small = picture()
    uri, side = data_uri(small, 320)
    assert side == 64 and opened(uri).format == "PNG"
    (tmp_path / "large.bmp").write_bytes(picture((2000, 1000), "BMP"))
    uri, side = data_uri(tmp_path / "large.bmp", 320)
    assert side == 2000 and opened(uri).size == (320, 160)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert opened(data_uri(picture((640, 320), "JPEG", exif=exif), 320)[0]).size == (160, 320)
    assert opened(data_uri(picture(mode="RGBA"), 320)[0]).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("damage", [b"no picture", b"", picture()[:60], picture((900, 900), "JPEG")[:700]])
def test_a_damaged_picture_is_counted_and_stops_nothing(damage, tmp_path):
    with pytest.raises(ValueError, match=r"\w"):
        data_uri(damage, 320)
    (tmp_path / "x.png").write_bytes(damage)
    images = (tmp_path / "x.png", picture(), tmp_path / "absent.png")
    samples = [Sample(id="1", score=1.0, answer="a", images=images)]
    parsed = Parsed(page([run("a", [1.0], samples=samples)]))
    assert [tag for tag, _ in parsed.tags].count("img") == 1
    assert any(re.match(r"2 pictures cannot be shown, the first: .*x\.png: ", text) for text in parsed.texts)


def test_long_texts_are_cut_and_a_common_prompt_is_said_once():
    samples = [Sample(id=name, score=1.0, answer="x" * 2100, prompt="Why?", references=("y", "y")) for name in "ab"]
    html = page([run("a", [1.0, 1.0], samples=samples)])
    assert "x" * 2001 not in html and "100 characters more in samples.jsonl" in html
    assert html.count("Why?") == 1
    assert "<dd>y <small>\u00d72</small></dd>" in html
    many = [Sample(id="1", score=1.0, answer="", images=(picture(),) * 6)]
    html = page([run("a", [1.0], samples=many)])
    assert html.count("<img") == 4 and "and 2 more pictures" in html and "&mdash;" in html


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed")


def browse(page: Path) -> tuple[Parsed, str]:
    """The page as a browser leaves it, and what its console says."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr --dump-dom"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    said = [line.split("CONSOLE", 1)[1] for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Parsed(done.stdout), "\n".join(said)


@needs_chromium
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_runs_no_answer_and_the_page_fits(width, tmp_path):
    """Hostile texts in every place: the title stays, the console is silent, nothing is wider than the window.

    The window is a frame: Chromium's own is 500 pixels wide at least.
    """
    (tmp_path / "page.html").write_text(page(hostile(), title="Quiet"))
    frame = tmp_path / "frame.html"
    frame.write_text(f"""<iframe id="f" src="page.html" width="{width}" height="900" style="border: 0"></iframe><script>
    console.log("driven");
    f.onload = () => {{
      const {{ title, documentElement, images }} = f.contentDocument;
      const cards = f.contentDocument.querySelectorAll("article").length;
      const over = documentElement.scrollWidth - documentElement.clientWidth;
      document.title = [title, images.length, cards, f.contentWindow.innerWidth, over].join(" ");
    }};</script>""")
    parsed, said = browse(frame)
    assert "driven" in said and "\n" not in said
    assert f"Quiet 0 6 {width} 0" in parsed.texts


@needs_chromium
def test_a_browser_searches_and_filters_each_gallery(tmp_path):
    runs = [run("a", [1.0, 0.0] * 50), run("b", [0.0, 0.0] * 50), run("c", [1.0] * 4, task="pope")]
    steps = """
    const [first, second] = document.querySelectorAll(".browser");
    const tell = (part) => document.title += " | " + part.querySelector(".found").textContent;
    const fill = (part, text) => { const field = part.querySelector("input"); field.value = text; field.oninput(); };
    tell(first);
    first.querySelector("button[value=first]").click(); tell(first);
    fill(first, "SAYS 1"); tell(first);
    const group = first.querySelector("select"); group.value = "1"; group.onchange(); tell(first);
    group.value = "0"; group.onchange(); tell(first);
    tell(second); fill(second, "c says 3"); tell(second);
    """
    driven = page(runs).replace("</body>", f"<script>console.log('driven'); {steps}</script></body>")
    (tmp_path / "page.html").write_text(driven)
    parsed, said = browse(tmp_path / "page.html")
    assert "driven" in said and "\n" not in said
    # 50 of which a alone is right; of those 1, 10 to 18: even ids are of the first group.
    told = ["100 of 100", "50 of 100", "5 of 100", "0 of 100", "5 of 100", "4 of 4", "1 of 4"]
    assert " | ".join(["t", *told]) in parsed.texts
    shown = [attrs for tag, attrs in parsed.tags if tag == "article" and "hidden" not in attrs]
    assert [attrs["data-kind"] for attrs in shown] == ["first"] * 5 + ["right"]
    pressed = [attrs["value"] for _, attrs in parsed.tags if attrs.get("aria-pressed") == "true"]
    assert pressed == ["first", ""]
