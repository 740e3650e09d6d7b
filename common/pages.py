"""What the HTML pages share: one file each, light and dark, from 320 px wide, colours that colour-blind readers tell apart."""

import html

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), its lighter half on a dark ground
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#a6761d")
DARK = ("#56b4e9", "#e69f00", "#2fd1a0", "#e39cc5", "#9ad1f5", "#f0e442")
COLOURS = len(LIGHT)

STYLE = (
    ":root{color-scheme:light dark;--ground:#fff;--card:#f6f7f8;--ink:#1b1f23;--soft:#5a636c;--line:#d5dade;--warn:#8a4b00;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(LIGHT))
    + "}@media(prefers-color-scheme:dark){:root{--ground:#15181b;--card:#1e2226;--ink:#e8eaed;--soft:#a3abb3;--line:#363c42;--warn:#ffc069;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(DARK))
    + "}}*{box-sizing:border-box}body{margin:0 auto;padding:1rem;max-width:80rem;background:var(--ground);color:var(--ink);"
    "font:15px/1.5 system-ui,sans-serif}h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .6rem}"
    "a{color:var(--c0)}p{margin:.3rem 0}.soft{color:var(--soft)}.warn{color:var(--warn);border-left:3px solid var(--warn);"
    "padding-left:.6rem}code,pre{font:13px/1.45 ui-monospace,monospace}pre{white-space:pre-wrap;overflow-wrap:anywhere}"
    ".grid{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}"
    ".card{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.7rem;min-width:0;overflow-wrap:anywhere}"
    ".card h3{font-size:.95rem;margin:0 0 .2rem}"
)


def page(title: str, body: str, style: str = "", refresh: int | None = None) -> str:
    """A whole HTML document.

    Args:
        body: HTML; what comes from users or models must be escaped in it.
        style: CSS on top of STYLE.
        refresh: seconds after which a browser loads the page again.
    """
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"{again}<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )
