"""How the inspection page looks and its one script."""

from __future__ import annotations

# Each scheme: background, raised background, text, quiet text, lines, bars, links, warning text and its background.
# Text of every kind has a contrast of 4.5 : 1 or more on both backgrounds (WCAG 2.2 AA; held by a test).
PALETTES = {
    "light": {
        "page": "#ffffff",
        "raised": "#f4f6f8",
        "text": "#1b1f24",
        "quiet": "#56606b",
        "line": "#c9d0d7",
        "bar": "#8fc1e8",
        "link": "#0b5cad",
        "warn": "#7a3e00",
        "warn-page": "#fff4e2",
    },
    "dark": {
        "page": "#14171a",
        "raised": "#1e2328",
        "text": "#e8eaed",
        "quiet": "#a4adb7",
        "line": "#414a53",
        "bar": "#2f6a9c",
        "link": "#82bdf5",
        "warn": "#ffc680",
        "warn-page": "#33240f",
    },
}


def stylesheet() -> str:
    light, dark = (";".join(f"--{k}:{v}" for k, v in PALETTES[scheme].items()) for scheme in ("light", "dark"))
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"
        # last, so that it wins over the dark scheme: paper is white
        f"@media print{{:root{{color-scheme:light;{light}}}{_PRINT}}}"
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem 1.25rem 4rem;max-width:78rem;background:var(--page);color:var(--text);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0 1rem}
h2{font-size:1.2rem;margin:2.25rem 0 .5rem}
a{color:var(--link)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
#texts:focus{outline:none}
.skip{position:absolute;left:-200vw;background:var(--page);padding:.5rem}
.skip:focus{left:1rem;top:.5rem;z-index:2}
dl{margin:0}
.facts{display:flex;flex-wrap:wrap;gap:.25rem 2rem}
dl div{display:flex;gap:.6rem;min-width:0}
dt{color:var(--quiet);flex:none}
dd{margin:0;overflow-wrap:anywhere}
.reading{margin-top:1rem}
.reading dl{padding:.5rem 0 0 1rem}
.reading dt{min-width:9.5rem}
summary{cursor:pointer;color:var(--link)}
form{display:flex;flex-wrap:wrap;gap:.5rem 1.5rem;align-items:center;margin:1.5rem 0 0}
form[hidden]{display:none}
input[type=search]{font:inherit;color:inherit;background:var(--page);border:1px solid var(--quiet);border-radius:4px;
padding:.2rem .5rem;width:16rem;max-width:60vw}
output{color:var(--quiet)}
.text{white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 .75rem;padding:.6rem .8rem;background:var(--raised);
border-inline-start:4px solid var(--line);max-height:20rem;overflow:auto}
.warnings{list-style:none;margin:0 0 .75rem;padding:0}
.warnings li{color:var(--warn);background:var(--warn-page);border-inline-start:4px solid var(--warn);
padding:.5rem .8rem;margin:0 0 .4rem}
.warnings em{font-weight:600;font-style:normal}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
caption{text-align:start;color:var(--quiet);padding:0 0 .25rem}
.steps caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:end;vertical-align:top;white-space:nowrap;
font-variant-numeric:tabular-nums}
thead th{border-bottom:2px solid var(--quiet);font-weight:600;vertical-align:bottom;white-space:normal}
thead abbr{text-decoration-line:none;border-bottom:1px dotted var(--quiet);cursor:help}
.summary{min-width:44rem}
.summary th:first-child,.words{text-align:start}
.summary tbody th{font-weight:400;white-space:normal;overflow-wrap:anywhere;min-width:14rem}
.summary td.words{white-space:normal}
.steps{min-width:52rem}
.steps .words{white-space:normal;width:60%}
.bar{min-width:5.5rem;background:linear-gradient(var(--bar),var(--bar)) left top 1.45em/var(--share) 3px no-repeat
content-box border-box;padding-bottom:.5rem}
ol{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.25rem .4rem}
ol li{display:inline-flex;gap:.45rem;align-items:baseline;border:1px solid var(--line);border-radius:4px;
padding:0 .4rem .15rem;max-width:100%;
background:linear-gradient(var(--bar),var(--bar)) left bottom/var(--share) 3px no-repeat var(--raised)}
code{font:.95em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre;
overflow:hidden;text-overflow:ellipsis}
.p{color:var(--quiet);font-size:.85em}
.blank{color:var(--quiet)}
.mark{color:var(--quiet);border:1px dotted var(--quiet);border-radius:3px;padding:0 .15em;font-size:.85em}
[data-hidden]{display:none}
@media screen and (max-width:46rem){
.summary{min-width:0}
.summary .extra{display:none}
.summary th,.summary td{padding:.3rem}
.summary tbody th{min-width:7rem}
.steps{display:block;min-width:0}
.steps thead,.steps tbody{display:block}
.steps tr{display:grid;grid-template-columns:1.6rem repeat(5,1fr);border-bottom:1px solid var(--line)}
.steps th,.steps td{border:0;padding:.3rem .15rem;font-size:.85rem}
.steps .bar{min-width:0}
.steps .words{grid-column:1/-1;width:auto}
}
"""

_PRINT = """
@page{margin:14mm}
body{max-width:none;padding:0;font-size:9pt}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.skip,form,form[hidden]{display:none}
.scroll,.text{overflow:visible;max-height:none}
.steps,.summary{min-width:0}
thead{display:table-header-group}
tr,.warnings li{break-inside:avoid}
h2,.text,.warnings{break-after:avoid}
th,td{padding:.2rem .35rem}
.bar{min-width:3.6rem}
.reading::details-content{content-visibility:visible;block-size:auto;display:block}
.steps .words{width:56%}
"""

SCRIPT = """
"use strict";
(() => {
  const root = document.documentElement;
  addEventListener("error", (event) => { root.dataset.error = event.message; });
  const articles = [...document.querySelectorAll("article")];
  const lines = new Map([...document.querySelectorAll("tr[data-text]")].map((row) => [row.dataset.text, row]));
  const words = articles.map((article) => article.textContent.toLowerCase());
  const find = document.getElementById("find");
  const warned = document.getElementById("warned");
  const apply = () => {
    const wanted = find.value.trim().toLowerCase();
    let shown = 0;
    articles.forEach((article, i) => {
      const show = words[i].includes(wanted) && (!warned.checked || article.dataset.warnings !== "0");
      article.toggleAttribute("data-hidden", !show);
      lines.get(article.dataset.text).toggleAttribute("data-hidden", !show);
      shown += show;
    });
    document.getElementById("count").textContent = shown + " of " + articles.length + " texts";
  };
  const form = document.getElementById("filter");
  form.addEventListener("submit", (event) => event.preventDefault());
  find.addEventListener("input", apply);
  warned.addEventListener("change", apply);
  form.hidden = false;
  apply();
  root.dataset.ready = String(articles.length);
})();
"""
