"""Look and manners of a report: style and script, embedded in every page because a report is one file."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --quiet: #5d6675; --line: #e2e5ea; --soft: #eef0f4;
  --accent: #3157d5; --right: #13743f; --right-soft: #e2f4e9; --wrong: #b3261e; --wrong-soft: #fce8e6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1a1e26; --ink: #e7eaf0; --quiet: #98a2b3; --line: #2b313c; --soft: #232833;
    --accent: #8aa6ff; --right: #6fd39a; --right-soft: #17352680; --wrong: #ff9a92; --wrong-soft: #43201e80;
  }
}
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
.curves { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; padding: 14px 16px 10px; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; margin-bottom: 6px; }
figcaption b { font-weight: 600; }
svg { display: block; width: 100%; height: auto; font: 13px system-ui, sans-serif; }
svg text { fill: var(--quiet); }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--quiet); }
svg path { fill: none; stroke: var(--accent); stroke-linejoin: round; }
svg .raw { stroke-width: 1; opacity: 0.35; }
svg .mean { stroke-width: 2; }
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
}
"""

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
