"""Look and manners of a report: frame, style and script, embedded in every page because a report is one file."""

from collections.abc import Iterable
from html import escape

# A report must not ask any machine for anything, even if a text got past the escaping.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

COLOURS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --quiet: #5d6675; --line: #e2e5ea; --soft: #eef0f4;
  --accent: #3157d5; --right: #13743f; --right-soft: #e2f4e9; --wrong: #b3261e; --wrong-soft: #fce8e6;
  --notice: #8a5a00; --notice-soft: #fdf1d8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1a1e26; --ink: #e7eaf0; --quiet: #98a2b3; --line: #2b313c; --soft: #232833;
    --accent: #8aa6ff; --right: #6fd39a; --right-soft: #17352680; --wrong: #ff9a92; --wrong-soft: #43201e80;
    --notice: #f0c060; --notice-soft: #3d2e0e80;
  }
}
"""

# Of `mmcore.evaluation.curves` and `histogram`; the numbered colours are those of lines in one chart.
CHARTS = """
:root {
  --c1: #c4590a; --c2: #0f7d74; --c3: #a62f8f; --c4: #7a6300; --c5: #5b4bc4; --c6: #a8324a; --c7: #4f6b1f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --c1: #ffa35c; --c2: #4fd1c4; --c3: #f08ad9; --c4: #d9c04a; --c5: #b7abff; --c6: #ff8fa3; --c7: #a9cf6a;
  }
}
svg { display: block; width: 100%; height: auto; overflow: visible; font: 13px system-ui, sans-serif; }
svg text { fill: var(--quiet); }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--quiet); }
svg .stage { stroke: var(--quiet); stroke-dasharray: 4 4; }
svg path { fill: none; stroke: var(--colour, var(--accent)); stroke-linejoin: round; stroke-linecap: round; }
svg .name { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
svg .raw { stroke-width: 1; opacity: 0.35; }
svg .mean { stroke-width: 2; }
svg .dot { stroke-width: 5; }
svg .bad { stroke: var(--wrong); stroke-width: 2; }
.c1 { --colour: var(--c1); }
.c2 { --colour: var(--c2); }
.c3 { --colour: var(--c3); }
.c4 { --colour: var(--c4); }
.c5 { --colour: var(--c5); }
.c6 { --colour: var(--c6); }
.c7 { --colour: var(--c7); }
"""

PAGE = """
* { box-sizing: border-box; }
body {
  margin: 0; padding: 0 16px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; }
h1 { margin: 40px 0 4px; font-size: 28px; line-height: 1.2; letter-spacing: -0.02em; text-wrap: balance; }
h2 { margin: 40px 0 12px; font-size: 18px; letter-spacing: -0.01em; }
.quiet { color: var(--quiet); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.summary { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 9px 16px; text-align: left; vertical-align: baseline; border-top: 1px solid var(--line); }
thead th { border-top: 0; }
thead th, thead .value { color: var(--quiet); font-size: 13px; font-weight: 500; }
tbody th { font-weight: 500; }
.part th, .part td { border-top: 0; padding-top: 0; }
.part th { padding-left: 32px; color: var(--quiet); font-weight: 400; }
.part .value { color: var(--quiet); font-weight: 500; }
.value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; font-weight: 600; }
.note { color: var(--quiet); font-size: 14px; }
.mark {
  display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 13px; font-weight: 500; white-space: nowrap;
}
.right .mark, .mark.right { color: var(--right); background: var(--right-soft); }
.wrong .mark, .mark.wrong { color: var(--wrong); background: var(--wrong-soft); }
.mark.notice { color: var(--notice); background: var(--notice-soft); }
.mark.verdict { font-size: 15px; padding: 3px 12px; }
code { font: 13px ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.curves { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; padding: 14px 16px 10px; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; margin-bottom: 6px; }
figcaption b { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 8px; font-size: 13px; color: var(--quiet); }
.legend i {
  display: inline-block; width: 16px; height: 3px; margin-right: 6px; border-radius: 2px; vertical-align: middle;
  background: var(--colour, var(--accent));
}
.legend .raw { opacity: 0.35; }
.facts tbody { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 0 32px; }
.facts tr { display: flex; justify-content: space-between; gap: 16px; padding: 0 16px; border: 0; }
.facts th, .facts td { padding: 8px 0; border: 0; }
.facts th { flex: none; max-width: 60%; }
.facts td { text-align: right; overflow-wrap: anywhere; }
.tools { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin-bottom: 14px; }
.choice { display: flex; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; background: var(--card); }
button { border: 0; padding: 7px 14px; background: none; color: inherit; font: inherit; cursor: pointer; }
button[aria-pressed="true"] { background: var(--accent); color: var(--card); }
button:focus-visible, input:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
input {
  flex: 1 1 220px; min-width: 0; padding: 7px 12px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); color: inherit; font: inherit;
}
.gallery { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); }
.item { display: flex; flex-direction: column; overflow: hidden; }
.item[hidden] { display: none; }
.item img { width: 100%; height: 200px; object-fit: contain; padding: 12px; background: var(--soft); }
.item img.small { image-rendering: pixelated; }
.item .head { display: flex; justify-content: space-between; gap: 8px; padding: 12px 14px 0; font-size: 13px; }
.item .prompt { margin: 8px 14px 0; color: var(--quiet); font-size: 14px; }
dl { margin: 8px 14px 14px; overflow-wrap: anywhere; }
dt { color: var(--quiet); font-size: 12px; }
dd { margin: 0 0 6px; }
dd mark { padding: 0 3px; border-radius: 4px; color: var(--wrong); background: var(--wrong-soft); }
.more {
  display: block; margin: 20px auto 0; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
}
.more[hidden] { display: none; }
footer { margin-top: 40px; font-size: 14px; }
footer p { margin: 4px 0; }
@media (max-width: 600px) {
  h1 { margin-top: 24px; font-size: 24px; }
  thead { display: none; }
  tr { display: grid; grid-template-columns: 1fr auto; padding: 9px 14px; border-top: 1px solid var(--line); }
  tbody tr:first-child, .part { border-top: 0; }
  tr.part { padding-top: 0; }
  th, td, .part th, .part td { padding: 0; border: 0; }
  .part th { padding-left: 14px; }
  .part .note { padding-left: 14px; }
  td:last-child { text-align: right; }
  svg { font-size: 16px; }
  .sources { display: block; overflow-x: auto; }
  .sources thead { display: table-header-group; }
  .sources tr { display: table-row; }
  .sources th, .sources td { padding: 8px 12px; border-top: 1px solid var(--line); white-space: nowrap; }
}
"""

STYLE = COLOURS + CHARTS + PAGE

# Shows a page of the gallery's items at a time; those that the buttons and the search leave.
SCRIPT = """
const items = [...document.querySelectorAll(".item")], buttons = [...document.querySelectorAll(".choice button")];
const search = document.querySelector("input"), more = document.querySelector(".more");
const found = document.querySelector(".found"), page = 48;
let kind = "all", limit = page;
function show() {
  const words = search.value.toLowerCase().split(/\\s+/);
  let count = 0;
  for (const item of items) {
    const fits = words.every(word => item.dataset.text.includes(word));
    item.hidden = !fits || !(kind === "all" || item.classList.contains(kind)) || ++count > limit;
  }
  more.hidden = count <= limit;
  found.textContent = `${count} of ${items.length}`;
}
for (const button of buttons) button.onclick = () => {
  kind = button.value; limit = page;
  for (const other of buttons) other.setAttribute("aria-pressed", other === button);
  show();
};
search.oninput = () => { limit = page; show(); };
more.onclick = () => { limit += page; show(); };
show();
"""


def document(title: str, body: str, *, style: str = "", script: str = "") -> bytes:
    """A whole page.

    Args:
        title: plain text; `body` is HTML.
        style: rules beside `STYLE`.
    """
    policy = f"{POLICY}; script-src 'unsafe-inline'" if script else POLICY
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""
    # Lone surrogates, which JSON can carry, cannot be written in UTF-8.
    return page.encode("utf-8", "replace")


def facts_table(heading: str, rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, in as many columns as there is room for."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="note">{escape(value)}</td></tr>' for name, value in rows
    )
    return f'<h2>{escape(heading)}</h2><div class="card facts"><table><tbody>{body}</tbody></table></div>'
