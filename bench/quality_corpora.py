"""The two corpora of `bench/quality.py`: text that differs in kind, with labels that people gave it, and no download.

code      what a function of Python's standard library does -> its code, the name masked. Trained on the functions of
          all other installed packages. Labels: the area of the library; pairs are as related as their modules.
packages  the synopsis of a Debian package -> its long description, in prose. Trained on other source packages.
          Labels: the archive's section; pairs are as related as their debtags (Jaccard index of those that say what a
          package is for).

Both give a retrieval task, and labels and graded pairs over its *documents*, so that one encoding serves all three
measures.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from zlib import crc32

from gircse.data import installed_code
from gircse.data.retrieval_task import RetrievalTask
from gircse.evaluation.stdlib_text import draw, function_texts
from gircse.files.atomic import new_file

MAX_TRAINING_ROWS = 12_000
GRADES = 4  # levels of relatedness that pairs are drawn from, equally many of each
CODE_INSTRUCTION = "Retrieve the function that does this"
PACKAGE_INSTRUCTION = "Retrieve the package that this describes"


@dataclass(frozen=True)
class StudyCorpus:
    """Training rows and one test set, read and written as JSON.

    Attributes:
        training: (query, positive) each.
        documents: the texts to search; `labels[i]` belongs to `documents[i]`.
        queries: `queries[i]` is answered by `documents[relevant[i]]` alone.
        pairs: (i, j, relatedness) over `documents`.
    """

    name: str
    instruction: str
    training: list[tuple[str, str]]
    queries: list[str]
    documents: list[str]
    relevant: list[int]
    labels: list[str]
    pairs: list[tuple[int, int, float]]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything: another one is another corpus."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def task(self) -> RetrievalTask:
        return RetrievalTask(self.instruction, self.queries, self.documents, [{i} for i in self.relevant])

    def rows(self) -> list[dict[str, str | list[str]]]:
        """Training rows of the schema of docs/method.md §7, without hard negatives."""
        return [{"prompt": self.instruction, "query": q, "pos": [p], "neg": []} for q, p in self.training]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            partial.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> StudyCorpus:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["training"] = [tuple(pair) for pair in values["training"]]
        values["pairs"] = [(int(i), int(j), float(score)) for i, j, score in values["pairs"]]
        return cls(**values)


def build(name: str, *, queries: int, documents: int, pairs: int) -> StudyCorpus:
    """The corpus `name` ("code" or "packages") of this machine; the same machine gives the same one.

    Raises:
        FileNotFoundError: its texts are not on this machine; says what to do.
        ValueError: unknown name, or fewer texts than asked for.
    """
    if name not in BUILDERS:
        raise ValueError(f"corpus: got {name!r}, expected one of {', '.join(BUILDERS)}")
    return BUILDERS[name](queries, documents, pairs)


def _code(queries: int, documents: int, pairs: int) -> StudyCorpus:
    split = installed_code.split(installed_code.harvest(), test_packages=(installed_code.STDLIB,))
    texts = draw([text for text in function_texts() if text.action], documents, seed=0)
    training = [(pair.summary, pair.code) for pair in draw(split.train, MAX_TRAINING_ROWS, seed=0)]

    def related(i: int, j: int) -> float:
        first, second = texts[i], texts[j]
        if first.area != second.area:
            return 0.0
        return 1.0 if first.module != second.module else 3.0 if first.action == second.action else 2.0

    scored = ((i, j, related(i, j)) for i, j in combinations(range(len(texts)), 2))
    return StudyCorpus(
        name="code",
        instruction=CODE_INSTRUCTION,
        training=training,
        queries=[text.summary for text in texts[:queries]],
        documents=[text.code for text in texts],
        relevant=list(range(min(queries, len(texts)))),
        labels=[text.area for text in texts],
        pairs=_balanced(scored, pairs),
    )


# ---------------------------------------------------------------- Debian packages

LISTS = Path("/var/lib/apt/lists")
# Sections that say what a package is for. Those that say what it is made of (libs, python, doc, ..) group by form.
SECTIONS = (
    "admin",
    "editors",
    "electronics",
    "games",
    "graphics",
    "mail",
    "math",
    "net",
    "science",
    "sound",
    "text",
    "web",
)
# Facets of debtags that say what a package is for; others say what it is written in or how it looks.
_FACETS = re.compile(r"(?:use|works-with|field|game|network|protocol|web|sound|science|mail|security|admin|hardware)::")
_UNUSED = ("doc", "debug", "libdevel", "metapackages", "oldlibs", "localization", "tasks", "introspection")
_TEST_SHARE = 3  # one source package in so many is tested on
_DESCRIPTION_WORDS = 60


@dataclass(frozen=True)
class Package:
    name: str
    source: str
    section: str
    tags: frozenset[str]
    synopsis: str
    description: str


def _packages_corpus(queries: int, documents: int, pairs: int) -> StudyCorpus:
    packages = debian_packages()
    test_sources = {p.source for p in packages if crc32(p.source.encode()) % _TEST_SHARE == 0}
    known = [p for p in packages if p.source in test_sources and p.section in SECTIONS and p.tags]
    per_section = -(-documents // len(SECTIONS))
    test = [p for section in SECTIONS for p in _drawn((p for p in known if p.section == section), per_section)]
    test = _drawn(test, documents)
    training = _drawn((p for p in packages if p.source not in test_sources), MAX_TRAINING_ROWS)

    def related(i: int, j: int) -> float:
        ours, theirs = test[i].tags, test[j].tags
        return len(ours & theirs) / len(ours | theirs)

    scored = ((i, j, related(i, j)) for i, j in combinations(range(len(test)), 2))
    return StudyCorpus(
        name="packages",
        instruction=PACKAGE_INSTRUCTION,
        training=[(p.synopsis, p.description) for p in training],
        queries=[p.synopsis for p in test[:queries]],
        documents=[p.description for p in test],
        relevant=list(range(min(queries, len(test)))),
        labels=[p.section for p in test],
        pairs=_balanced(scored, pairs),
    )


def debian_packages(lists: Path = LISTS) -> list[Package]:
    """One package of each source package that has a synopsis and a long description, by name, without duplicates.

    Raises:
        FileNotFoundError: no Debian system, or its package lists have no long descriptions.
    """
    indices = sorted(path for path in lists.glob("*_Packages*") if "security" not in path.name)
    translations = sorted(path for path in lists.glob("*_Translation-en*") if "security" not in path.name)
    if not indices or not translations:
        raise FileNotFoundError(
            f"corpus: {lists} has no package lists with descriptions; on a Debian system, as root: "
            "apt-get update -o Acquire::Languages=en"
        )
    long_texts = {
        record["Description-md5"]: record["Description-en"]
        for path in translations
        for record in _records(path)
        if "Description-md5" in record and "Description-en" in record
    }
    found: dict[str, Package] = {}
    seen: set[str] = set()
    for path in indices:
        for record in _records(path):
            section = record.get("Section", "").rsplit("/", 1)[-1]
            text = long_texts.get(record.get("Description-md5", ""))
            if text is None or section in _UNUSED:
                continue
            source = record.get("Source", record["Package"]).split(" ")[0]
            synopsis, description = _texts(text)
            keys = {synopsis.lower(), description.lower()[:160]}
            if source in found or keys & seen or len(description.split()) < 12 or len(synopsis.split()) < 3:
                continue
            seen |= keys
            tags = frozenset(tag for tag in re.split(r",\s*", record.get("Tag", "")) if _FACETS.match(tag))
            found[source] = Package(record["Package"], source, section, tags, synopsis, description)
    return sorted(found.values(), key=lambda package: package.name)


def _texts(description: str) -> tuple[str, str]:
    """Description-en -> synopsis, the first words of the long description."""
    synopsis, _, rest = description.partition("\n")
    words = re.sub(r"(?m)^ \.$", "", rest).split()
    return synopsis.strip(), " ".join(words[:_DESCRIPTION_WORDS])


def _records(path: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a file of apt's, in whatever compression apt keeps it."""
    text = subprocess.run(
        ["/usr/lib/apt/apt-helper", "cat-file", str(path)], capture_output=True, check=True
    ).stdout.decode("utf-8", errors="replace")
    for paragraph in text.split("\n\n"):
        record: dict[str, str] = {}
        key = ""
        for line in paragraph.split("\n"):
            if line.startswith((" ", "\t")) and key:
                record[key] += "\n" + line
            elif ":" in line:
                key, value = line.split(":", 1)
                record[key] = value.strip()
        if "Package" in record:
            yield record


def _drawn(packages: Iterable[Package], count: int) -> list[Package]:
    """At most `count`, by their names alone: a new package elsewhere changes nothing."""
    return sorted(packages, key=lambda package: (crc32(package.name.encode()), package.name))[:count]


# ---------------------------------------------------------------- pairs


def _balanced(scored: Iterable[tuple[int, int, float]], count: int) -> list[tuple[int, int, float]]:
    """`count` pairs, as many of each of `GRADES` levels: most random pairs are unrelated, and say nothing.

    Levels: 0, and the rest cut where the scores cut themselves, at thirds of the largest.

    Raises:
        ValueError: a level has too few pairs.
    """
    pairs = list(scored)
    largest = max(score for _, _, score in pairs)
    levels: list[list[tuple[int, int, float]]] = [[] for _ in range(GRADES)]
    for pair in pairs:
        share = pair[2] / largest
        levels[0 if share == 0 else 1 + min(2, int(share * 3 - 1e-9))].append(pair)
    size = count // GRADES
    rng = random.Random(0)
    drawn = []
    for level, found in enumerate(levels):
        if len(found) < size:
            raise ValueError(f"pairs: got {count}, but level {level} of relatedness has {len(found)} pairs, not {size}")
        drawn += rng.sample(found, size)
    return drawn


BUILDERS = {"code": _code, "packages": _packages_corpus}
