"""Texts from anywhere on a terminal and in HTML."""

from __future__ import annotations

import html
import re

import pytest

from gircse.show.escape import html_text, html_token, terminal_text


def plain(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x07", r"a\x1b[31mred\x07"),
        ("two\nlines\tand  blanks ", "two lines and blanks"),
        ("\u202eevil", r"\u202eevil"),
        ("\u200dx\ud800", "\u200dx\\ud800"),
        ("שלום 👩‍👧", "שלום 👩‍👧"),
    ],
)
def test_nothing_reaches_the_terminal_that_it_would_obey(text, shown):
    assert terminal_text(text) == shown


def test_markup_is_text():
    attack = """<script>alert("1")</script><img src=x onerror='alert(2)'>&lt;"""
    for made in (html_text(attack), html_token(attack)):
        assert plain(made) == attack
        assert "<script" not in made
        assert "<img" not in made
        assert "'" not in re.sub(r"<[^>]*>", "", made)
        assert '"' not in re.sub(r"<[^>]*>", "", made)


@pytest.mark.parametrize(
    ("character", "sign", "name"),
    [
        ("\x00", r"\x00", "U+0000"),
        ("\x1b", r"\x1b", "U+001B"),
        ("\r", r"\r", "U+000D"),
        ("\u202e", r"\u202e", "right-to-left override"),
        ("\ufeff", r"\ufeff", "zero width no-break space"),
        ("\ud800", r"\ud800", "U+D800"),
        ("\U000e0001", r"\U000e0001", "language tag"),
    ],
)
def test_what_cannot_be_seen_is_written_out(character, sign, name):
    for made in (html_text(f"a{character}b"), html_token(f"a{character}b")):
        assert plain(made) == f"a{sign}b"
        assert f'title="{name}"' in made
        assert character not in made


def test_a_text_keeps_its_lines_and_a_token_shows_them():
    assert html_text("a\r\n\tb") == "a\n\tb"
    assert plain(html_token("\n\t")) == r"\n\t"


@pytest.mark.parametrize(("token", "shown"), [(" the", "␣the"), ("  ", "␣␣"), ("a b ", "a b␣"), ("", "∅")])
def test_blanks_of_a_token_are_seen(token, shown):
    assert plain(html_token(token)) == shown


def test_scripts_and_emoji_stay_as_they_are():
    text = "مرحبا שלום 👩‍👩‍👧 é 漢字 \u200d"
    assert html_text(text) == text
