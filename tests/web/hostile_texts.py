"""Texts that try to act, or to load something, or to break the page: row 27 of the reliability
board. {outside} is an address that nothing of the page may ever ask.

A script that ran would set `window.hacked`.
"""

from __future__ import annotations

_HACK = "window.hacked=1"
_BIDI = "\u202e\u2066\u2067\u202d"

HOSTILE: tuple[str, ...] = (
    # Scripts.
    f"<script>{_HACK}</script>",
    "<SCRIPT SRC={outside}/x.js></SCRIPT>",
    f"<scr<script>ipt>{_HACK}</scr</script>ipt>",
    f"```html\n<script>{_HACK}</script>\n```",
    f"`<script>{_HACK}</script>`",
    f"</code></pre></div><script>{_HACK}</script>",
    f"<img src=x onerror={_HACK}>",
    f'<img src=x onerror="{_HACK}"//',
    f"<svg onload={_HACK}>",
    f"<svg><script>{_HACK}</script></svg>",
    f"<svg><animate onbegin={_HACK} attributeName=x dur=1s>",
    f"<svg><use href=\"data:image/svg+xml,<svg id='x' xmlns='http://www.w3.org/2000/svg'><script>{_HACK}</script></svg>#x\"></svg>",
    "<math><mtext><table><mglyph><style><!--</style>"
    f'<img title="--&gt;&lt;img src=x onerror={_HACK}&gt;">',
    f"<math><maction actiontype=statusline xlink:href=javascript:{_HACK}>x</maction></math>",
    f'<noscript><p title="</noscript><img src=x onerror={_HACK}>">',
    f"<template><script>{_HACK}</script></template>",
    f"<details open ontoggle={_HACK}>x</details>",
    f"<body onload={_HACK}>",
    f"<input autofocus onfocus={_HACK}>",
    f"<video><source onerror={_HACK}></video>",
    '<iframe srcdoc="<script>parent.hacked=1</script>"></iframe>',
    '<iframe src="javascript:parent.hacked=1"></iframe>',
    f'<object data="data:text/html,<script>{_HACK}</script>"></object>',
    f'<embed src="javascript:{_HACK}">',
    f"<a id=x onclick={_HACK}>click</a>",
    '<div data-testid=x style="animation-name:x" onanimationstart="window.hacked=1">',
    "${window.hacked=1}",
    "{{constructor.constructor('window.hacked=1')()}}",
    "<!--><script>window.hacked=1</script>-->",
    "<![CDATA[<script>window.hacked=1</script>]]>",
    # Links that act.
    f"[click](javascript:{_HACK})",
    f"[click](JaVaScRiPt:{_HACK})",
    f"[click](java\tscript:{_HACK})",
    f"[click](&#106;avascript:{_HACK})",
    f"[click](<javascript:{_HACK}>)",
    f"[click](vbscript:{_HACK})",
    "[click](data:text/html;base64,PHNjcmlwdD5wYXJlbnQuaGFja2VkPTE8L3NjcmlwdD4=)",
    f"<javascript:{_HACK}>",
    f"[click][x]\n\n[x]: javascript:{_HACK}",
    f'<a href="javascript:{_HACK}">click</a>',
    f'<form action="javascript:{_HACK}"><button>click</button></form>',
    # Things from outside.
    "![picture]({outside}/a.png)",
    "![p][r]\n\n[r]: {outside}/b.png",
    "<img src={outside}/c.png>",
    '<img srcset="{outside}/d.png 1x">',
    "<video poster={outside}/e.png src={outside}/e.mp4 autoplay></video>",
    "<link rel=stylesheet href={outside}/f.css><link rel=prefetch href={outside}/f2>",
    "<style>@import '{outside}/g.css';body{display:none;background:url({outside}/g.png)}</style>",
    '<div style="position:fixed;inset:0;background:url({outside}/h.png)">cover</div>',
    '<meta http-equiv=refresh content="0;url={outside}/i">',
    "<base href={outside}/>",
    "<script>fetch('{outside}/j')</script><svg><image href={outside}/j.png></svg>",
    "```mermaid\ngraph TD\nA[<img src={outside}/k.png>] --> B\n"
    'click A href "javascript:window.hacked=1"\n```',
    # Formulas.
    "$\\href{javascript:window.hacked=1}{x}$ $\\url{{outside}/l}$"
    " $\\includegraphics{{outside}/l.png}$",
    "$\\htmlData{x=1}{y}$ $\\undefined<img src=x onerror=window.hacked=1>$ $$\\frac{$$",
    "$$"
    + "{" * 2000
    + "$$ $"
    + "\\sqrt" * 500
    + "$ $\\def\\a{\\a\\a}\\a$ $\\rule{99999em}{99999em}$",
    "\ue000%%%LATEX_BLOCK_0%%%\uefe0\\frac{a}{b}\uefe1 <b>\uefe2x\uefe3",
    # Texts that turn the page around or stretch it.
    f"{_BIDI}txet desrever{_BIDI} <script>{_HACK}</script>",
    "Z" + "\u0300\u0301\u0302\u0303" * 2000,
    "A" * 5_000_000 + f"<script>{_HACK}</script>",
)


def hostile(outside: str) -> list[str]:
    """The texts with `outside`, the address of a server that counts what it is asked."""
    return [text.replace("{outside}", outside) for text in HOSTILE]
