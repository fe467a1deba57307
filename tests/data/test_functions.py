"""Summaries and masked code of the functions of a file."""

from __future__ import annotations

import pytest

from gircse.data.functions import pairs_of_file, summarise

MODULE = '''
class Shape:
    def area(self, f=None):
        """Return the area of the shape in square metres.

        Longer text.
        """
        # comment
        if self.empty:
            return 0
        return self.width * self.area(f) + other.area(1)

    @property
    def size(self):
        """See base class for what this returns here."""
        x = self.x
        return x

    def later(self):
        """Compute the thing in a subclass of this one."""
        raise NotImplementedError

def walk(node, depth):
    """walk(node, depth) -> list. Visit every child of the node down to a depth."""
    out = [node]
    for child in node:
        out += walk(child, depth - 1)  # walk on
    return out

if True:
    async def résumé(text, ü="ü"):
        """Wait for the parts of the text, `joined` by a :class:`~pkg.Blank`.

        Args:
            text: the text
        """
        ü = "é", await résumé(text)
        return """
  kept as it is""" + text

def short(a):
    """Return the only argument that was given."""
    return a

def test_something(a):
    """Return the only argument that was given, in a test."""
    b = a
    return b
'''


def test_functions_of_a_file(tmp_path):
    (tmp_path / "mod.py").write_text(MODULE, encoding="utf-8", newline="\r\n")
    area, walk, resume = pairs_of_file(tmp_path / "mod.py", "pkg", "pkg.mod")
    assert (area.package, area.module, area.name) == ("pkg", "pkg.mod", "Shape.area")
    assert area.summary == "Return the area of the shape in square metres."
    assert area.code == (
        "def func(self, f=None):\n    # comment\n    if self.empty:\n        return 0\n"
        "    return self.width * self.func(f) + other.area(1)"
    )
    assert walk.summary == "Visit every child of the node down to a depth."
    assert walk.code == (
        "def f(node, depth):\n    out = [node]\n    for child in node:\n"
        "        out += f(child, depth - 1)  # walk on\n    return out"
    )
    assert resume.summary == "Wait for the parts of the text, joined by a Blank."
    assert resume.code == (
        'async def f(text, ü="ü"):\n    ü = "é", await f(text)\n    return """\n  kept as it is""" + text'
    )


@pytest.mark.parametrize(
    "docstring",
    [
        "See base class.",
        "Initialize self. See help(type(self)) for accurate signature.",
        "Return self, as iterators are expected to.",
        "Deprecated alias of another function, kept for old code.",
        "Test that the model can be loaded from disk.",
        "Alias for the function that does it all.",
        "Overrides the method of the parent class here.",
        "Same as the other one but without a check.",
        "This function is deprecated, use the new one instead.",
        "Sort the values; see the documentation for details and options.",
        "Too few words here",
        "x = a * b + c / d ** 2 - f(x)[0] (1.0, 2.0)",
        ":param a: the value that is going to be returned",
        "labels (`Tensor` of shape `(a, b)`, *optional*):\n    The labels for computing the loss of it.",
        "Args:\n    a: the first of all the arguments there are",
        "word " * 65,
        "",
    ],
)
def test_contentless_summaries_are_dropped(docstring):
    assert summarise(docstring, "name") is None


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("name(a, b)\n\nAdd two numbers of any kind.", "Add two numbers of any kind."),
        ("name: add two numbers of any kind", "add two numbers of any kind"),
        ("Add two numbers of any kind. Valid kinds are:\n\n- int", "Add two numbers of any kind."),
        ("Compute the sum of two, which is given by::\n\n    a + b", "Compute the sum of two, which is given"),
        ("Add two numbers of any kind. See :func:`other`.", "Add two numbers of any kind."),
        ("Add *two*\n  numbers of ``any`` kind [1]_.\nReturns: the sum", "Add *two* numbers of any kind."),
        (
            "Raise the number to x**(1/2), or do **nothing** at all",
            "Raise the number to x**(1/2), or do nothing at all",
        ),
        ("Add two numbers of any kind. " + "And more words. " * 30, "Add two numbers of any kind."),
        ("Test whether two numbers of any kind are equal.", "Test whether two numbers of any kind are equal."),
    ],
)
def test_summaries_are_cleaned(docstring, summary):
    assert summarise(docstring, "name") == summary


def test_length_limits_and_bodies_that_do_nothing(tmp_path):
    def names(*body: str) -> int:
        lines = ["def g(a):", '"""Return the value after some work."""', *body]
        (tmp_path / "m.py").write_text("\n    ".join(lines))
        return len(pairs_of_file(tmp_path / "m.py", "m", "m"))

    assert names("a += 1", "return a") == 1
    assert names("return a") == 0
    assert names(*["a += 1"] * 79) == 1
    assert names(*["a += 1"] * 80) == 0
    assert names("a = '" + "x" * 400 + "'", "return a") == 0
    assert names("raise NotImplementedError(", "    'text'", ")") == 0
