"""The page around the sections: a head that lets nothing be loaded, and one stylesheet for screen, phone, dark and print.

Colours are those of Okabe and Ito, which people with any common colour blindness tell apart; lines that share a chart differ in
weight or dash as well, for a printer without colours.
"""
from __future__ import annotations

from collections.abc import Iterable

from minilora.report.markup import Child, Markup, tag

# Nothing is fetched and no script runs, whatever a label says: the escaping is not the only lock.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_DARK = """
  --paper: #15181c; --ink: #e6e8ea; --quiet: #9aa3ad; --rule: #30363d; --soft: #1d2126; --grid: #2a3037;
  --blue: #5db6ee; --orange: #f2a33c; --raw: #6d8ba3; --alarm: #f48fb8;
"""
STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --quiet: #5b6570; --rule: #d5dae0; --soft: #f5f6f8; --grid: #e6e9ed;
  --blue: #0068a8; --orange: #d55e00; --raw: #9dbfd8; --alarm: #a3195b; }
@media (prefers-color-scheme: dark) { :root {""" + _DARK + """} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 40px 28px 64px; max-width: 1080px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 21px; line-height: 1.3; margin: 56px 0 10px; padding-top: 14px; border-top: 1px solid var(--rule);
  font-weight: 650; }
h3 { font-size: 16px; margin: 28px 0 6px; font-weight: 650; }
p { margin: 0 0 12px; max-width: 72ch; overflow-wrap: anywhere; }
td, th, dd, text, blockquote { unicode-bidi: isolate; }
.lead { font-size: 17px; margin-top: 8px; color: var(--quiet); overflow-wrap: anywhere; }
.quiet, figcaption, .legend { color: var(--quiet); font-size: 14px; }
.quiet { margin-bottom: 6px; } .block { display: block; font-size: 13px; }
.notice { background: var(--soft); border-left: 3px solid var(--orange); padding: 10px 14px; margin: 16px 0;
  max-width: none; }
.hint { background: var(--soft); padding: 10px 14px; margin: 16px 0; max-width: none; }
.hint p { margin: 0; } .hint pre { padding: 0; }
pre { background: var(--soft); padding: 12px 14px; margin: 8px 0; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas,
  "Liberation Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.headline { display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: center; margin: 26px 0 8px; }
.headline p { margin: 0 0 2px; } .headline > div { flex: 1 1 300px; }
.headline .score { font-size: 60px; line-height: 1; font-weight: 650; letter-spacing: -0.03em;
  font-variant-numeric: tabular-nums; }
.headline .bar { width: 100%; max-width: 420px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 18px 24px; margin: 24px 0 0; }
.tiles div { display: flex; flex-direction: column-reverse; border-top: 2px solid var(--rule); padding-top: 8px; }
.tiles dt { color: var(--quiet); font-size: 13px; }
.tiles dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 8px 44px; }
.single { max-width: 520px; }
figure { margin: 8px 0 0; min-width: 0; } figure h3 { margin: 14px 0 2px; }
figcaption { margin-top: 4px; max-width: 64ch; }
.legend { margin: 0 0 4px; min-height: 21px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; margin-right: 16px; }
.swatch { width: 20px; height: 10px; flex: none; }
svg { display: block; width: 100%; height: auto; overflow: visible; } .bar { width: 220px; }
td .bar { max-width: 28vw; margin-top: 4px; } td .bar.small { width: 90px; margin-top: 6px; }
text { fill: var(--ink); font-family: inherit; }
.axis, .tick { font-size: 11.5px; fill: var(--quiet); } .faint { fill: var(--quiet); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--grid); stroke-width: 1; } .base { stroke: var(--quiet); stroke-width: 1; }
.line { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.line.main { stroke: var(--blue); stroke-width: 2.2; } .line.raw { stroke: var(--raw); stroke-width: 0.9; }
.line.second { stroke: var(--orange); stroke-width: 1.8; stroke-dasharray: 6 3; }
.line.bound { stroke: var(--quiet); stroke-width: 1.2; stroke-dasharray: 2 4; }
.line.gap { stroke: var(--orange); stroke-width: 2; } .line.guess { stroke: var(--quiet); stroke-width: 2; }
.line.oom { stroke: var(--alarm); stroke-width: 2; stroke-dasharray: 2 2; }
.interval { stroke: var(--blue); stroke-width: 4; stroke-linecap: round; opacity: 0.45; }
.dot { stroke: var(--paper); stroke-width: 1; } .dot.main { fill: var(--blue); } .dot.second { fill: var(--orange); }
.track { fill: var(--grid); } .fill { fill: var(--blue); } .fill.wrong { fill: var(--orange); }
.hit { fill: var(--blue); } .miss { fill: var(--orange); } .count.strong { fill: var(--paper); }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; width: 100%; margin: 8px 0 4px; font-size: 15px; }
th { text-align: left; font-weight: 500; color: var(--quiet); font-size: 13px; vertical-align: bottom; }
td, th { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--rule); } td { vertical-align: top; }
td:last-child, th:last-child { padding-right: 0; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } .num:first-child { width: 1%; }
.dense { font-size: 14px; } .dense td { padding-top: 3px; padding-bottom: 3px; }
.facts thead { display: none; } .facts td { overflow-wrap: anywhere; }
.facts td:first-child { color: var(--quiet); white-space: nowrap; }
.settings { columns: 3 250px; column-gap: 36px; margin: 8px 0; font-size: 14px; }
.settings div { display: flex; justify-content: space-between; gap: 12px; padding: 3px 0; border-bottom: 1px solid var(--grid);
  break-inside: avoid; color: var(--quiet); }
.settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.settings .changed { color: var(--ink); font-weight: 600; }
.notes { padding-left: 26px; } .notes li { margin: 12px 0; } .notes p { margin: 0 0 4px; }
blockquote { margin: 0; padding: 8px 12px; background: var(--soft); font-size: 14px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
footer { margin-top: 56px; border-top: 1px solid var(--rule); padding-top: 12px; }
@media (max-width: 600px) { body { padding: 24px 16px 48px; } h1 { font-size: 24px; } h2 { margin-top: 40px; }
  .headline .score { font-size: 48px; } td, th { padding-right: 12px; } .tiles { grid-template-columns: 1fr 1fr; }
  table { font-size: 14px; } .axis, .tick { font-size: 13px; }
  .others :is(td, th):is(:nth-child(4), :nth-child(8)),
  .scores .block, .scores :is(td, th):nth-child(4), .labels :is(td, th):is(:nth-child(3), :nth-child(n + 7)) {
    display: none; } }
@media print { :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --quiet: #444b52; --rule: #bbc1c8;
    --soft: #f3f4f6; --grid: #dfe3e7; --blue: #0068a8; --orange: #d55e00; --raw: #9dbfd8; --alarm: #a3195b; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } h2 { margin-top: 24pt; }
  h2, h3, thead { break-after: avoid; } table, .dense, pre { font-size: 9pt; }
  figure, tr, pre, .headline, .tiles, li { break-inside: avoid; } .charts { grid-template-columns: 1fr 1fr; gap: 6px 24px; }
  .scores td:first-child { min-width: 44mm; } .scores .bar { width: 100px; }
  .scroll { overflow: visible; } .wide > div { width: 100% !important; } }
@page { margin: 14mm; }
"""


def page(title: str, sections: Iterable[Child]) -> str:
    """The whole document."""
    head = tag("head", tag("meta", charset="utf-8"),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
               tag("meta", name="referrer", content="no-referrer"), tag("title", title), tag("style", Markup(STYLE)))
    foot = tag("footer", tag("p", "Not a medical device. A label is a suggestion that a qualified person checks; scores hold "
                                  "for notes like those that were scored.", class_="quiet"))
    body = "\n".join(str(section) for section in sections if section is not None)
    return f"<!DOCTYPE html>\n{tag('html', head, Markup(chr(10)), tag('body', tag('main', Markup(body)), foot), lang='en')}\n"
