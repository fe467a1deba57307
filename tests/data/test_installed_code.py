from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gircse.data import installed_code
from gircse.data.functions import CodePair, summarise
from gircse.data.installed_code import deduplicate, evaluation_set, harvest, split, to_rows
from gircse.data.rows import load_rows

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


def write(root: Path, name: str, text: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def function(summary: str, *body: str, name: str = "g") -> str:
    lines = body or (f"x = '{summary}'", "y = x + x", "return y")
    return f'def {name}(a):\n    """{summary}"""\n    ' + "\n    ".join(lines) + "\n\n"


def test_functions_of_a_file(tmp_path):
    write(tmp_path, "pkg/mod.py", MODULE.replace("\n", "\r\n"))
    area, walk, resume = harvest([tmp_path])
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


def test_tests_vendored_code_and_broken_files_are_skipped(tmp_path):
    good = function("Return what the good function is known for.")
    for i, folder in enumerate(
        ("tests", "_vendor", "third_party", "externals", "sub/testing", "gircse", "a.dist-info")
    ):
        write(
            tmp_path,
            f"{'' if folder == 'gircse' else 'pkg/'}{folder}/m.py",
            function(f"Return number {i} of the skipped ones."),
        )
    for i, file in enumerate(("test_m.py", "m_test.py", "conftest.py", "m.txt", "data.pyi")):
        write(tmp_path, f"pkg/{file}", function(f"Return file {i} of the skipped ones."))
    write(tmp_path, "pkg/syntax.py", good + "def (:\n")
    write(tmp_path, "pkg/latin.py", good.encode() + b"# \xff\n")
    write(tmp_path, "pkg/null.py", good.encode() + b"\0")
    write(tmp_path, "pkg/deep.py", good + "x = " + "(" * 5000 + ")" * 5000)
    write(tmp_path, "pkg/empty.py", "")
    os.symlink(tmp_path / "nowhere", tmp_path / "pkg" / "dangling.py")
    (tmp_path / "pkg" / "folder.py").mkdir()
    assert harvest([tmp_path]) == []
    write(tmp_path, "pkg/good.py", "\ufeff" + good)
    assert [p.module for p in harvest([tmp_path], progress=True)] == ["pkg.good"]
    assert harvest([tmp_path / "missing"]) == []


def test_length_limits_and_bodies_that_do_nothing(tmp_path):
    def names(*body: str) -> int:
        write(tmp_path, "m.py", function("Return the value after some work.", *body))
        return len(harvest([tmp_path]))

    assert names("a += 1", "return a") == 1
    assert names("return a") == 0
    assert names(*["a += 1"] * 79) == 1
    assert names(*["a += 1"] * 80) == 0
    assert names("a = '" + "x" * 400 + "'", "return a") == 0
    assert names("raise NotImplementedError(", "    'text'", ")") == 0
    assert names() == 1


def test_both_sides_are_unique_and_copies_go():
    def pair(summary: str, code: str, package: str = "a") -> CodePair:
        return CodePair(package, "m", "n", summary, code)

    lines = [f"    value_{i} = compute({i})" for i in range(10)]
    long = "def f(a):\n" + "\n".join(lines)
    copy = "def f(b):\n" + "\n".join([*lines[:9], "    something_else = 1"])
    other = "def f(b):\n" + "\n".join([*lines[:5], *(f"    other_{i} = compute({i})" for i in range(5))])
    first = pair("One thing", long)
    kept = deduplicate(
        [first, pair("One  THING.", other), pair("Two", long.upper()), pair("Three", copy), pair("4", other)]
    )
    assert kept == [first, pair("4", other)]
    shared = [pair("Run the step", f"def f():\n    return {'x' * i}") for i in range(1, 6)]
    assert deduplicate(shared) == []
    assert deduplicate(shared[:3]) == shared[:1]


def test_packages_are_distributions(tmp_path):
    write(tmp_path, "one/m.py", function("Return what the first one is known for."))
    write(tmp_path, "_one.py", function("Return what the second one is known for."))
    write(tmp_path, "loose/m.py", function("Return what the third one is known for."))
    write(
        tmp_path,
        "Some_One-1.0.dist-info/RECORD",
        "one/m.py,,\n_one.py,,\n../../bin/x,,\nSome_One-1.0.dist-info/RECORD,,\n",
    )
    assert [(p.package, p.module) for p in harvest([tmp_path])] == [
        ("some-one", "_one"), ("loose", "loose.m"), ("some-one", "one.m")
    ]  # fmt: skip
    assert [p.module for p in harvest([tmp_path], packages=["loose"])] == ["loose.m"]


# ---------------------------------------------------------------- a slice of the standard library


@pytest.fixture(scope="module")
def slice_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("site")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("email", "json", "logging", "asyncio"):
        shutil.copytree(stdlib / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("argparse.py", "ast.py", "statistics.py", "shutil.py", "tarfile.py", "os.py"):
        shutil.copy(stdlib / name, root / name)
    return root


def test_the_same_in_every_process(slice_root):
    script = (
        "import sys, hashlib\nfrom gircse.data import installed_code as c\np = c.harvest([sys.argv[1]])\n"
        "s = c.split(p, fraction=0.1)\ne = c.evaluation_set(s.test, num_queries=20, max_documents=50)\n"
        "print(hashlib.sha256(repr((p, s, e)).encode()).hexdigest())"
    )
    results = []
    for seed, locale in (("1", "C"), ("2", "C.UTF-8")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale, "PYTHONUTF8": "0"}
        environment["PYTHONPATH"] = str(Path(installed_code.__file__).parents[2])
        command = [sys.executable, "-c", script, str(slice_root)]
        results.append(
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        )
    pairs = harvest([slice_root])
    held = split(pairs, fraction=0.1)
    here = (pairs, held, evaluation_set(held.test, num_queries=20, max_documents=50))
    assert results == [hashlib.sha256(repr(here).encode()).hexdigest()] * 2


def test_real_pairs_keep_what_is_promised(slice_root):
    pairs = harvest([slice_root])
    assert len(pairs) > 300
    for pair in pairs:
        assert 5 <= len(pair.summary.split()) <= 64
        assert 3 <= len(pair.code.split("\n")) <= 80
        assert pair.code.startswith(("def f(", "async def f(", "def func(", "async def func("))
        assert pair.summary not in pair.code
        compile(pair.code, "code", "exec")
    for side in ("summary", "code"):
        texts = [" ".join(getattr(pair, side).lower().split()) for pair in pairs]
        assert len(set(texts)) == len(texts)


def test_split_by_package(slice_root):
    pairs = harvest([slice_root])
    leak = [CodePair("json", "m", "n", "A new text for it", p.code) for p in pairs if p.package == "email"][:5]
    leak += [
        CodePair("json", "m", "n", p.summary, f"def f({'x' * i}): 1")
        for i, p in enumerate(pairs)
        if p.package == "email"
    ][:5]
    result = split([*leak, *pairs], test_packages=["email"])
    assert result.test_packages == ("email",)
    assert {p.package for p in result.test} == {"email"}
    assert "email" not in {p.package for p in result.train}
    assert not {p.summary for p in result.train} & {p.summary for p in result.test}
    assert not {p.code for p in result.train} & {p.code for p in result.test}
    assert not set(leak) & set(result.train)
    assert len(result.train) > 0.95 * (len(pairs) - len(result.test))
    automatic = split(pairs, fraction=0.1)
    assert automatic.test_packages
    assert 0 < len(automatic.test) < len(automatic.train)
    assert split(pairs, fraction=0.1, seed=1) != automatic
    for packages in (["nothing"], {p.package for p in pairs}):
        with pytest.raises(ValueError, match="both are needed"):
            split(pairs, test_packages=packages)
    with pytest.raises(ValueError, match="no package to hold out"):
        split([p for p in pairs if p.package == "email"])


def test_rows_and_evaluation_set(slice_root):
    pairs = harvest([slice_root])
    rows = load_rows(to_rows(pairs[:3]))
    assert [(r.instruction, r.query, r.positives) for r in rows] == [
        (installed_code.INSTRUCTION, p.summary, (p.code,)) for p in pairs[:3]
    ]
    code_of = {p.summary: p.code for p in pairs}
    for queries, documents in ((20, 50), (500, 30), (7, 10_000)):
        data = evaluation_set(pairs, num_queries=queries, max_documents=documents, seed=3)
        assert len(data.documents) == min(documents, len(pairs))
        assert len(data.queries) == len(data.relevant) == min(queries, len(data.documents))
        for query, relevant in zip(data.queries, data.relevant, strict=True):
            assert [data.documents[i] for i in relevant] == [code_of[query]]
    assert evaluation_set(pairs, seed=1) != evaluation_set(pairs, seed=2)
    for arguments in ({"num_queries": 0}, {"max_documents": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            evaluation_set(pairs, **arguments)
    with pytest.raises(ValueError, match="pairs is empty"):
        evaluation_set([])
