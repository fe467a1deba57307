"""Any string as safe, visible text for a terminal and for HTML.

Texts and tokens come from files of any origin. An escape sequence must not reach a terminal, markup must not reach a
page, and a right-to-left override must not turn the text beside it. Characters that cannot be seen are written out, so
that the reader knows that they are there.
"""

from __future__ import annotations

import html
import unicodedata

_JOINERS = "\u200c\u200d"  # they shape scripts and emoji, and are harmless


def terminal_text(text: str) -> str:
    """The text on one line. Runs of white space become one blank, and unprintable characters escapes such as \\x1b."""
    return "".join(c if c.isprintable() or c in _JOINERS else _escape(c) for c in " ".join(text.split()))


def html_text(text: str) -> str:
    """HTML of a whole text. Line breaks and tabs stay, so the style must be `white-space: pre-wrap`."""
    text = text.replace("\r\n", "\n")
    return "".join(c if c in "\n\t" else _html_character(c) for c in text)


def html_token(token: str) -> str:
    """HTML of one token. Signs show blanks at its ends, line breaks and every other invisible character."""
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
    # Isolated from its surroundings, because inside right-to-left text the backslash would change sides.
    return f'<bdi dir="ltr" class="mark" title="{html.escape(name)}">{sign}</bdi>'


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
