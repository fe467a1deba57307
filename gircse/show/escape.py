"""Any string as safe, visible text: for a terminal and for HTML.

Texts and tokens come from anywhere. An escape sequence must not reach a terminal, markup must not reach a page, and a
right-to-left override must not turn what stands beside it. What cannot be seen is written out instead of dropped.
"""

from __future__ import annotations

import html
import unicodedata

_JOINERS = "\u200c\u200d"  # shape scripts and emoji, and cannot do harm


def terminal_text(text: str) -> str:
    """On one line: runs of white space become one blank, what is not printable becomes an escape such as \\x1b."""
    return "".join(c if c.isprintable() or c in _JOINERS else _escape(c) for c in " ".join(text.split()))


def html_text(text: str) -> str:
    """HTML of a whole text; line breaks and tabs stay (style it `white-space: pre-wrap`)."""
    text = text.replace("\r\n", "\n")
    return "".join(c if c in "\n\t" else _html_character(c) for c in text)


def html_token(token: str) -> str:
    """HTML of one token: blanks at its ends, line breaks and everything invisible are shown as signs."""
    inner = token.strip(" ")
    before = len(token) - len(token.lstrip(" "))
    after = len(token) - before - len(inner)
    if not token:
        return _mark("\u2205", "nothing: part of a character")
    blank = '<span class="blank" title="blank">\u2423</span>'
    return blank * before + "".join(map(_html_character, inner)) + blank * after


def _html_character(character: str) -> str:
    return html.escape(character) if _is_visible(character) else _mark(_escape(character), _name(character))


def _name(character: str) -> str:
    return unicodedata.name(character, "").lower() or f"U+{ord(character):04X}"


def _is_visible(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")


def _mark(sign: str, name: str) -> str:
    # its own left-to-right island: inside right-to-left text the backslash would change sides
    return f'<bdi dir="ltr" class="mark" title="{html.escape(name)}">{sign}</bdi>'


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
