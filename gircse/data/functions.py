"""From a Python source file to (what a function does, its code) pairs, clean enough for a person to match them.

The docstring's first paragraph becomes the summary; the function without docstring, comments and its own name becomes
the code. Summaries that say nothing, and functions that do nothing, are dropped.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MIN_WORDS, MAX_WORDS = 5, 64
MIN_LINES, MAX_LINES = 3, 80
MAX_LINE_CHARS = 300  # beyond it lies data, not code
MAX_FILE_BYTES = 4_000_000

# Most files that cannot hold a documented function are recognised without parsing them.
_HAS_DOCSTRING = re.compile(r"^(?![ \t]*class\b)[^\n#]*:[ \t]*(?:#[^\n]*)?\n\s*[rRuU]?(?:\"|')", re.MULTILINE)


@dataclass(frozen=True)
class CodePair:
    """One function: `summary` says what `code` does. `package`: its distribution; `name`: the hidden name."""

    package: str
    module: str
    name: str
    summary: str
    code: str


# ---------------------------------------------------------------- summaries

# A line that ends the summary: a section's title, a parameter ("x (int, optional): ..."), a list, a doctest, a rule.
_SECTION = re.compile(
    r"(?:args?|arguments?|params?|parameters?|returns?|yields?|raises?|examples?|notes?|usage|see also|references?|"
    r"attributes|inputs?|outputs?|keyword arguments|kwargs|options?|todo|warnings?|syntax|shape)\s*(?::|$)|"
    r"[`*]*\w+[`*]*\s*\([^:]+\)\s*:|:\w+[^:]*:(?:\s|$)|@\w+|>>>|\.\. |[-=~*^#]{3,}\s*$|[-*+] |\d+[.)] |```|\|",
    re.IGNORECASE,
)
_ROLE = re.compile(r":[\w:+.-]+:`([^`]*)`")
_MARKUP = re.compile(
    r"`+|(?<![\w)])\*\*(?=\w)|(?<=\w)\*\*(?![\w(])|\s*\[(?:\d+|[A-Z]\w*\d+)\]_"
)  # quotes, bold, citations
_SIGNATURE = re.compile(r"[\w.]+\s*\(.*\)\s*(?:->.*)?\.?$", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(\[])")
# Where a formula, a list or a link was cut off: "... given by", "... of the", "..., which is", "..., e.g."
_LOOSE_END = frozenset(
    [
        "e.g.",
        "i.e.",
        "an",
        "the",
        "of",
        "to",
        "in",
        "for",
        "with",
        "and",
        "or",
        "is",
        "are",
        "by",
        "as",
        "that",
        "which",
    ]
)
# The summary says nothing, or nothing about this function: it starts with one of these ...
_CONTENTLESS = re.compile(
    r"\W*(?:(?:please )?(?:see|refer to|cf\.?|same as|(?:just )?like|as)|identical to|equivalent (?:of|to)|"
    r"(?:an )?alias(?:es)?|inherited from|overrid(?:e|es|den|ing)|overloads?|calls? (?:the )?(?:super|parent|base)|"
    r"implement(?:s|ed|ation)?(?: of| for)? (?:the )?(?:abstract|base|parent|super|interface|method|protocol|\w+\.\w+)|"
    r"(?:wrapper|wraps|shortcut|short-?hand|synonym|proxy|stub|placeholder|hook) (?:for|of|to|around)|"
    r"delegat(?:e|es) to|(?:the )?(?:constructor|initiali[sz]er|destructor)|returns? self|"
    r"initiali[sz](?:e|es|ing)(?: an?| the| this)?(?: new)? (?:instance|self|object|class)|"
    r"construct(?:s|or)? (?:for )?(?:self|an? (?:new )?(?:instance|object))|"
    r"helper (?:function |method )?(?:for|of|to) \w+\W*$|"
    r"(?:internal|private|public) (?:use|helper|method|function|api)|"
    r"(?:not|un)[ -]?implemented|subclass(?:es)? (?:must|should|may|can)|"
    r"(?:must|should|to|can|may) be (?:overridden|implemented|called)|"
    r"this (?:method|function|class|api) (?:is|was|has been|should|must|can|may|will|only|exists)|we|previously|"
    r"deprecated|legacy|experimental|internal|private|todo|fixme|xxx|hack|do(?:es)? nothing|no[- ]?op|"
    r"(?:a )?(?:unit |regression |smoke |simple )?tests?(?! (?:if|whether|element))|check that|"
    r"(?:copied|adapted|taken|ported) from|based on|(?:automatically |auto)?generated|monkey[- ]?patch|docstring|"
    r"undocumented|documentation for|warning|note|usage|examples?|licen[cs]e|copyright|"
    r"default (?:implementation|handler|method)|property (?:for|of|that|getter|setter)|(?:getter|setter) (?:for|of)|"
    r"gh-?\d+|issue #?\d+|bug|(?:new|changed|added) in version)\b",
    re.IGNORECASE,
)
# ... or points elsewhere anywhere.
_POINTS_ELSEWHERE = re.compile(
    r"\b(?:(?:see|refer to|consult) (?:the )?(?:base|parent|super ?class|docs?|documentation|docstring|help|class)|"
    r"for (?:more|further) (?:info|detail)|(?:is|are|was|been) (?:now )?deprecated|deprecated (?:since|in|alias|and)|"
    r"will be removed|renamed to|docstring|regression test|unit test|"
    r"(?:super|base|parent)[- ]?class(?:'s)? (?:method|implementation|doc))\b|https?://",
    re.IGNORECASE,
)


def summarise(docstring: str, name: str) -> str | None:
    """The docstring's first paragraph as one line of 5 to 64 words, or None where it says nothing about the code."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip())
    first = paragraphs[0]
    if _SIGNATURE.match(first) and len(paragraphs) > 1:  # numpy and C style: the signature, then the text
        first = paragraphs[1]
    lines = first.split("\n")
    end = next((i for i, line in enumerate(lines) if _SECTION.match(line.strip())), len(lines))
    cut = end < len(lines)
    lines = lines[:end]
    if len(lines) > 1 and _SIGNATURE.match(lines[0]) and lines[0].startswith(name):
        lines = lines[1:]
    text = _ROLE.sub(lambda m: m[1].split("<")[0].strip().lstrip("~!").rsplit(".", 1)[-1] or m[1], " ".join(lines))
    text = " ".join(_MARKUP.sub("", text).split())
    # "name(args) -> result: text", "name: text", "name -- text": the name is hidden in the code, so it is only noise
    # here.
    if name in text[:80]:
        text = re.sub(rf"^(?:\w+\.)*{name}\s*(?:\([^)]*\))?\s*(?:->[^:.]*[.:]|[:=]|--?)\s+", "", text)
    sentences = _SENTENCE_END.split(text)
    # Not "Valid formats are" without the list that followed, nor "See the notes."
    while len(sentences) > 1 and (cut or text.endswith(":")) and not sentences[-1].endswith((".", "!", "?")):
        sentences.pop()
    while len(sentences) > 1 and re.match(r"\(?(?:See|Cf|Refer to|For (?:more|details|example))\b", sentences[-1]):
        sentences.pop()
    text = " ".join(sentences)
    if len(text.split()) > MAX_WORDS:
        text = sentences[0]
    text = text.rstrip(" :;,-")
    while text.rpartition(" ")[2].lower() in _LOOSE_END:
        text = text.rpartition(" ")[0].rstrip(" :;,-")
    words = re.findall(r"[^\W\d_]{2,}", text)
    if not MIN_WORDS <= len(text.split()) <= MAX_WORDS or len(words) < MIN_WORDS - 1:
        return None
    if sum(map(str.isascii, text)) < 0.95 * len(text):
        return None
    if sum(c.isalpha() or c == " " for c in text) < 0.8 * len(text):  # formulas, tables, signatures
        return None
    if ">>>" in text or text.count("->") > 1 or _CONTENTLESS.match(text) or _POINTS_ELSEWHERE.search(text):
        return None
    return text


# ---------------------------------------------------------------- code

_SAYS_F = re.compile(r"\bf\b")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(body: Sequence[ast.stmt], owner: str = "") -> Iterator[tuple[_Function, str]]:
    """Functions and methods with their qualified names; not those nested in functions, which lean on them."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, owner + node.name
        elif isinstance(node, ast.ClassDef):
            if not node.name.startswith("Test"):
                yield from _functions(node.body, f"{owner}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for field in ("body", "orelse", "finalbody"):
                yield from _functions(getattr(node, field, ()), owner)


def _is_trivial(body: Sequence[ast.stmt]) -> bool:
    """Whether a body (without docstring) does nothing: pass, ..., a raise, NotImplemented."""
    if len(body) != 1:
        return not body
    node = body[0]
    if isinstance(node, (ast.Pass, ast.Raise)):
        return True
    if isinstance(node, ast.Return):
        return node.value is None or (isinstance(node.value, ast.Name) and node.value.id in ("NotImplemented", "self"))
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _own_name_spans(node: _Function) -> tuple[list[tuple[int, int]], bool]:
    """(line, utf-8 column) of every use of the function's own name in its body, and whether `f` is taken there.

    A use is the bare name, or the attribute of self, cls or super(). Where the name is also a parameter or a local
    variable, the bare name means that one and stays.
    """
    name, size = node.name, len(node.name.encode())
    bare: list[tuple[int, int]] = []
    attributes: list[tuple[int, int]] = []
    rebound = taken = False
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            taken |= child.id == "f"
            if child.id == name:
                rebound |= not isinstance(child.ctx, ast.Load)
                bare.append((child.lineno, child.col_offset))
        elif isinstance(child, ast.arg):
            taken |= child.arg == "f"
            rebound |= child.arg == name
        elif isinstance(child, ast.Attribute) and child.attr == name:
            value = child.value
            if isinstance(value, ast.Call):
                value = value.func
            if isinstance(value, ast.Name) and value.id in ("self", "cls", "super"):
                # A chained call may put the attribute on a later line: its end is what is known exactly.
                attributes.append((child.end_lineno or child.lineno, (child.end_col_offset or 0) - size))
    return attributes + ([] if rebound else bare), taken


def mask_code(node: _Function, lines: Sequence[str]) -> str | None:
    """The function's source without decorators, docstring and name; None if it is too short, too long or does
    nothing.

    `lines` are the file's lines; the text is dedented, and comments stay.
    """
    doc, rest = node.body[0], node.body[1:]
    doc_end = doc.end_lineno or doc.lineno
    if _is_trivial(rest) or doc.lineno == node.lineno or rest[0].lineno <= doc_end:
        return None
    end = node.end_lineno or doc_end
    if end - node.lineno > 3 * MAX_LINES + doc_end - doc.lineno:
        return None
    kept = [n for n in range(node.lineno, end + 1) if not doc.lineno <= n <= doc_end]
    text = "\n".join(lines[n - 1] for n in kept)
    # Walking the syntax tree is the slow part, and most functions neither call themselves nor say `f`.
    spans, taken = _own_name_spans(node) if text.count(node.name) > 1 or _SAYS_F.search(text) else ([], False)
    mask = "func" if taken else "f"
    header, name = f"def {node.name}", node.name.encode()
    raw = {n: lines[n - 1].encode() for n in kept}
    for row, column in sorted(set(spans), reverse=True):  # from the right, so that columns stay true
        found = raw.get(row)
        # Name mangling or an f-string of Python < 3.12 (whose inner columns are wrong) may point elsewhere: then
        # leave it.
        if found is not None and found[column : column + len(name)] == name:
            raw[row] = found[:column] + mask.encode() + found[column + len(name) :]
    raw[node.lineno] = raw[node.lineno].replace(header.encode(), f"def {mask}".encode(), 1)
    indent = node.col_offset
    out: list[str] = []
    for number in kept:
        line = raw[number].decode()
        line = (line[indent:] if not line[:indent].strip() else line).rstrip()
        if line:
            out.append(line)
    if not MIN_LINES <= len(out) <= MAX_LINES or max(map(len, out)) > MAX_LINE_CHARS:
        return None
    return "\n".join(out)


def pairs_of_file(path: Path, package: str, module: str) -> list[CodePair]:
    """The pairs of one source file, in its order; none if it cannot be read, decoded or parsed."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return []
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        if not _HAS_DOCSTRING.search(text):
            return []
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    lines = text.split("\n")
    pairs = []
    for node, name in _functions(tree.body):
        if node.name.startswith("test") or (doc := ast.get_docstring(node, clean=False)) is None:
            continue
        summary = summarise(doc, node.name)
        code = mask_code(node, lines) if summary else None
        if summary and code:
            pairs.append(CodePair(package, module, name, summary, code))
    return pairs
