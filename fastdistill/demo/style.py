"""What the demo page adds to the house style: rows of digits, walls of them, bars."""

from fastdistill import _style

CSS = (
    _style.CSS
    + """
.row { display: grid; grid-template-columns: 184px 1fr 132px; gap: 22px; align-items: center;
  padding: 18px 0; border-top: 1px solid var(--line); }
.row:first-of-type { border-top: 0; }
.row h3 { margin: 0; font-size: 17px; line-height: 1.3; font-weight: 650; }
.digits { display: grid; grid-template-columns: repeat(10, 1fr); gap: 10px; }
.drawn { display: block; width: 100%; height: auto; }
/* The model draws ink as white on black: shown as ink on this paper by day, as chalk by night. */
.drawn { filter: invert(1); mix-blend-mode: multiply; }
@media (prefers-color-scheme: dark) { .drawn { filter: none; mix-blend-mode: screen; } }
.time { text-align: right; line-height: 1.2; }
.best h3, .best .figure { color: var(--accent); }

.walls { display: grid; grid-template-columns: repeat(3, 1fr); gap: 44px; margin-top: 22px; }

.bar { width: 26%; }
.bar i { display: block; height: 10px; min-width: 2px; background: var(--soft); border-radius: 1px; }
.best .bar i { background: var(--accent); }

@media (max-width: 820px) {
  .row { grid-template-columns: 1fr auto; gap: 12px; }
  .digits { grid-column: 1 / -1; grid-row: 2; grid-template-columns: repeat(5, 1fr); }
  .walls { grid-template-columns: 1fr; }
  .bar { display: none; }
}
@media print { .drawn { mix-blend-mode: normal; } h2, .row, .walls { break-inside: avoid; } }
"""
)
