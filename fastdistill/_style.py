"""How this project's pages look: paper and ink, by day and by night."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #faf7f1; --panel: #f3eee4; --line: #ddd5c6; --ink: #1d1b17; --soft: #6d665a; --accent: #b5371f;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", "DejaVu Serif", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #15140f; --panel: #1e1c16; --line: #37332a; --ink: #efe9dc; --soft: #a0978a; --accent: #ff8263; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: 64px 32px 48px; }
h1, h2, .figure { font-family: var(--serif); font-weight: 500; letter-spacing: -0.015em; }
h1 { font-size: clamp(38px, 6vw, 68px); line-height: 1.05; margin: 10px 0 20px; text-wrap: balance; }
h2 { font-size: 28px; line-height: 1.2; margin: 72px 0 8px; }
p { margin: 0 0 12px; }
.lead { font-size: 20px; line-height: 1.5; max-width: 44em; }
.eyebrow, th, .unit, figcaption, .note, footer { color: var(--soft); }
.eyebrow { font-size: 13px; letter-spacing: 0.08em; text-transform: uppercase; margin: 0; }

.figures { display: grid; grid-template-columns: repeat(4, 1fr); margin: 40px 0 0; padding: 0;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
.figures div { padding: 18px 20px 20px; border-left: 1px solid var(--line); }
.figures div:first-child { border-left: 0; padding-left: 0; }
.figures dt { font-size: 14px; line-height: 1.4; color: var(--soft); }
.figures dd { margin: 0 0 4px; font: 500 44px/1.1 var(--serif); letter-spacing: -0.02em; }
.figures div:first-child dd { color: var(--accent); }
.figures small { font-size: 22px; }

.figure { font-size: 30px; font-variant-numeric: lining-nums tabular-nums; }
.note { font-size: 13.5px; line-height: 1.4; margin: 2px 0 0; }
.unit { font-size: 13px; white-space: nowrap; }
.warning { margin: 16px 0 0; color: var(--accent); font-size: 15px; }
figure { margin: 0; }
figcaption { font-size: 14px; margin-bottom: 10px; }
figcaption b { color: var(--ink); font-weight: 650; }

.scroll { overflow-x: auto; margin-top: 16px; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: lining-nums tabular-nums; }
th { font-size: 13px; font-weight: 500; text-align: right; padding: 8px 0 8px 24px; vertical-align: bottom;
  border-bottom: 1px solid var(--ink); line-height: 1.35; white-space: nowrap; }
td { text-align: right; padding: 11px 0 11px 24px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.best td { color: var(--accent); font-weight: 600; }
td .unit { margin-left: 6px; font-weight: 400; }
.definitions { display: grid; grid-template-columns: 1fr 1fr; gap: 10px 40px; margin: 20px 0 0;
  font-size: 14px; line-height: 1.5; color: var(--soft); }
.definitions b { color: var(--ink); font-weight: 600; }

pre { background: var(--panel); padding: 16px 20px; margin: 16px 0 20px; overflow-x: auto; font: 14.5px/1.5 var(--mono);
  border-radius: 4px; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 28px; margin: 0; font-size: 15px; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--line); font-size: 13.5px; }

@media (max-width: 820px) {
  main { padding: 40px 20px 32px; }
  .figures { grid-template-columns: 1fr 1fr; }
  .figures div:nth-child(odd) { border-left: 0; padding-left: 0; }
  .figures div:nth-child(n+3) { border-top: 1px solid var(--line); }
  .definitions { grid-template-columns: 1fr; }
}
"""
