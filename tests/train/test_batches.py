"""What makes up a batch: from (seed, step) alone, of one source or mixed, in the asked shares, duplicates masked."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gircse.data.errors import DataError
from gircse.data.false_negatives import false_negatives
from gircse.data.rows import Row
from gircse.data.sources import RecordSource
from gircse.train.batches import Example, TrainingData, mask_of
from gircse.train.config import TrainConfig

RETRIEVAL = "retrieve passages"


def rows(name: str, count: int) -> list[Row]:
    """Row i has 1 + i % 2 positives and i % 4 negatives."""
    positives = [(f"{name} p{i}", f"{name} r{i}")[: 1 + i % 2] for i in range(count)]
    negatives = [tuple(f"n{i}{j}" for j in range(i % 4)) for i in range(count)]
    return [Row(RETRIEVAL, f"{name} {i}", positives[i], negatives[i]) for i in range(count)]


def data(sizes: dict[str, int], **options) -> TrainingData:
    sources = [RecordSource(name, rows(name, count)) for name, count in sizes.items()]
    return TrainingData(sources, TrainConfig(**{"batch_size": 4, **options}))


def sources_of(batch: list[Example]) -> list[str]:
    return [example.id.split(":")[0] for example in batch]


def write(path, name: str, count: int) -> str:
    fields = ("prompt", "query", "pos", "neg")
    lines = [dict(zip(fields, astuple(row), strict=True)) for row in rows(name, count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


SIZES = {"a": 11, "b": 30, "c": 8}
KINDS = [
    {},
    {"weights": (1, 2, 5)},
    {"batching": "mixed"},
    {"batching": "mixed", "weights": (1, 2, 5)},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_batch_depends_on_seed_and_step_alone(options):
    forward = data(SIZES, seed=3, **options)
    batches = [forward.batch(step) for step in range(60)]
    again = data(SIZES, seed=3, **options)
    assert [again.batch(step) for step in reversed(range(60))] == batches[::-1]
    assert data(SIZES, seed=3, **options).batch(41) == batches[41]  # a run that goes on there
    assert [data(SIZES, seed=4, **options).batch(step) for step in range(60)] != batches
    assert all(len(batch) == 4 for batch in batches)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(4, 30), min_size=1, max_size=4),
    st.sampled_from(["homogeneous", "mixed"]),
    st.booleans(),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 60), min_size=1, max_size=5),
)
def test_any_step_can_be_the_first(sizes, batching, weighted, seed, steps):
    options = {"batching": batching, "seed": seed, "weights": range(1, len(sizes) + 1) if weighted else ()}
    options["weights"] = tuple(options["weights"])
    named = {chr(97 + i): size for i, size in enumerate(sizes)}
    walked = data(named, **options)
    in_order = {step: walked.batch(step) for step in range(max(steps) + 1)}
    for step in steps:
        assert data(named, **options).batch(step) == in_order[step]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_that_share_a_batch_see_the_batch_of_one_process(world_size):
    """A rank slices the batch; which step comes next does not depend on how many there are."""
    whole = data(SIZES, seed=1)
    ranks = [data(SIZES, seed=1) for _ in range(world_size)]
    for step in (0, 1, 7, 30):
        parts = [rank.batch(step)[number::world_size] for number, rank in enumerate(ranks)]
        assert sorted(e.id for part in parts for e in part) == sorted(e.id for e in whole.batch(step))


def test_homogeneous_batches_pass_once_through_every_source_in_an_epoch():
    trained = data(SIZES)
    assert trained.num_rows == 49
    assert trained.steps_per_epoch == 11 // 4 + 30 // 4 + 8 // 4
    orders = set()
    for epoch in range(5):
        batches = [trained.batch(epoch * 11 + step) for step in range(11)]
        assert all(len(set(sources_of(batch))) == 1 for batch in batches)
        orders.add(tuple(sources_of(batch)[0] for batch in batches))
        ids = Counter(example.id for batch in batches for example in batch)
        assert max(ids.values()) == 1
        assert Counter(i.split(":")[0] for i in ids) == {"a": 8, "b": 28, "c": 8}
    assert len(orders) == 5


def test_weights_are_shares_of_the_batches():
    trained = data(SIZES, weights=(1, 2, 5))
    drawn = Counter(sources_of(trained.batch(step))[0] for step in range(800))
    for source, expected in {"a": 100, "b": 200, "c": 500}.items():
        assert abs(drawn[source] - expected) <= 3
    # each source goes through its own permutations: of 200 batches of b, every 7 are 28 of its 30 rows
    of_b = [batch for step in range(800) if sources_of(batch := trained.batch(step))[0] == "b"]
    for start in range(0, 196, 7):
        ids = [example.id for batch in of_b[start : start + 7] for example in batch]
        assert len(set(ids)) == 28


def test_mixed_batches_are_permutations_of_all_rows():
    trained = data(SIZES, batching="mixed")
    assert trained.steps_per_epoch == 49 // 4
    mixed = 0
    for epoch in range(3):
        batches = [trained.batch(epoch * 12 + step) for step in range(12)]
        ids = [example.id for batch in batches for example in batch]
        assert len(set(ids)) == 48
        mixed += sum(len(set(sources_of(batch))) > 1 for batch in batches)
    assert mixed > 25


def test_mixed_batches_with_weights_have_the_shares_in_every_batch():
    trained = data(SIZES, batching="mixed", weights=(1, 1, 2), batch_size=8)
    assert trained.steps_per_epoch == 6
    places = Counter()
    for step in range(100):
        sources = sources_of(trained.batch(step))
        assert Counter(sources) == {"a": 2, "b": 2, "c": 4}
        places[sources[0]] += 1
    assert len(places) == 3
    ids = Counter(example.id for step in range(15 * 20) for example in trained.batch(step) if example.id[0] == "b")
    assert len(ids) == 30
    assert set(ids.values()) == {20}  # 600 rows of b: twenty whole permutations of 30


def test_one_source_is_the_plain_sampler():
    from gircse.data.sampling import BatchSampler

    sampler = BatchSampler(30, 4, seed=9)
    for options in ({}, {"batching": "mixed"}, {"weights": (3.0,)}):
        trained = data({"b": 30}, seed=9, **options)
        for step in (0, 5, 77):
            assert [e.id for e in trained.batch(step)] == [f"b:row {i}" for i in sampler.batch(step)]


def test_texts_are_written_and_chosen():
    trained = data({"b": 30}, max_negatives=2)
    seen = set()
    for step in range(70):
        for example in trained.batch(step):
            number = int(example.id.removeprefix("b:row "))
            assert example.query == f"Instruct: {RETRIEVAL}\nQuery:b {number}"
            assert len(example.negatives) == min(2, number % 4)
            assert set(example.negatives) <= {f"n{number}{j}" for j in range(4)}
            both = {f"b p{number}", f"b r{number}"} if number % 2 else {f"b p{number}"}
            assert {example.positive, *example.other_positives} == both
            assert example.positive not in example.other_positives
            seen.add((number, example.positive))
    assert len(seen) == 45  # every positive of every row had its turn
    assert len(data({"b": 30}).batch(0)[0].negatives) <= 3
    symmetric = TrainingData([RecordSource("s", [Row("same meaning", "q", ("p", "r"))])], TrainConfig(batch_size=1))
    example = symmetric.batch(0)[0]
    prefix = "Instruct: same meaning\nQuery:"
    assert {example.positive, *example.other_positives} == {prefix + "p", prefix + "r"}


def test_files_and_settings_of_a_run(tmp_path):
    files = (write(tmp_path / "a.jsonl", "a", 9), write(tmp_path / "b.jsonl", "b", 9))
    trained = TrainingData.open(TrainConfig(data=files, weights=(2, 1), batch_size=3))
    assert {example.id.rsplit(":", 1)[0] for step in range(20) for example in trained.batch(step)} == set(files)
    for example in trained.batch(0):
        file, line = example.id.rsplit(":", 1)
        assert json.loads(Path(file).read_text().splitlines()[int(line) - 1])["query"] in example.query
    memory = TrainingData.open(TrainConfig(batch_size=3, data=files), rows=rows("m", 7))
    assert memory.num_rows == 7
    assert memory.batch(0)[0].id.startswith("rows:row ")
    with open(files[0], "r+") as file:
        file.write("?")
    with pytest.raises(DataError, match=r"a\.jsonl:1: has changed"):
        [trained.batch(step) for step in range(9)]


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({}, {}, "data: got no training rows"),
        ({"a": 3}, {}, "batch_size: got 4, expected at most the number of rows, 3 in a$"),
        ({"a": 9, "b": 3}, {}, r"the number of rows, 3 in b \(batching = 'mixed' fills a batch from all sources\)"),
        ({"a": 2, "b": 1}, {"batching": "mixed"}, "the number of rows, 3 in a, b$"),
        ({"a": 2, "b": 1}, {"batching": "mixed", "weights": (1, 1)}, "the number of rows, 3 in all sources"),
        ({"a": 9, "b": 9}, {"weights": (1,)}, "weights: got 1, expected one for each of the 2 sources"),
    ],
)
def test_data_that_do_not_fit_the_settings(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        data(sizes, **options)


def test_a_run_goes_on_with_the_data_it_began_with(tmp_path):
    saved = tmp_path / "train_data.json"
    before = data({"a": 8, "b": 9})
    saved.write_text(before.to_json())
    data({"a": 8, "b": 9}).check_continues(saved)
    data({"x": 8, "b": 9}).batch(0)
    with pytest.raises(ValueError, match=r"since the run was started: a: had 8 rows, has 7; b: had 9 rows, has 10"):
        data({"a": 7, "b": 10}).check_continues(saved)
    other = TrainingData([RecordSource("a", rows("z", 8)), RecordSource("b", rows("b", 9))], TrainConfig(batch_size=4))
    with pytest.raises(ValueError, match=r"a: 8 rows, but others$"):
        other.check_continues(saved)
    assert other.fingerprint != before.fingerprint == data({"a": 8, "b": 9}, seed=5).fingerprint
    with pytest.raises(ValueError, match="started with 2 sources of data, now there are 1"):
        data({"a": 8}).check_continues(saved)
    for damaged in ("[", "3", "[{}]"):
        saved.write_text(damaged)
        with pytest.raises(ValueError, match=r"train_data\.json: cannot be read"):
            before.check_continues(saved)


# ---------------------------------------------------------------- false negatives


_numbers = itertools.count()


def example(positive: str, *negatives: str, query: str | None = None, others: tuple[str, ...] = ()) -> Example:
    """Its query is no other example's where none is given."""
    return Example("x:1", f"q {next(_numbers)}" if query is None else query, positive, negatives, others)


def test_duplicates_of_a_positive_are_masked():
    batch = [example("p", "n"), example("q", "p", "p"), example("p"), example("s", "s", "n")]
    # candidates:  p n | q p p | p | s s n
    mask = mask_of(batch)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 0],
    ]


def test_all_listed_positives_and_only_white_space_is_forgiven():
    batch = [example("a", others=("b", "a")), example("B", "b"), example(" a\n", "a  c"), example("a c")]
    # candidates:  a | B b | a_ "a  c" | "a c"
    assert mask_of(batch).int().tolist() == [
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
    ]


def test_rows_with_the_same_query_have_the_positives_of_each_other():
    """One positive a line is a common layout; what one line calls a negative may be right by another one."""
    batch = [
        example("a", "n", query="q"),
        example("b", "a", query=" q ", others=("c",)),
        example("c", query="other"),
        example("n", query="Q"),
    ]
    # candidates:  a n | b a | c | n
    assert mask_of(batch).int().tolist() == [
        [0, 0, 1, 1, 1, 0],
        [1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
    ]


def test_queries_as_candidates_are_masked_too():
    batch = [
        example("a", query="q"),
        example("q", query="r"),  # symmetric: a pair that comes the other way round elsewhere
        example("r", query="q"),
        example("z", query="a"),
    ]
    # candidates:  a | q | r | z, then the queries  q r q a
    assert mask_of(batch, include_queries=True).int().tolist() == [
        [0, 1, 1, 0, 0, 1, 1, 1],
        [0, 0, 1, 0, 1, 0, 1, 0],
        [1, 1, 0, 0, 1, 1, 0, 1],
        [1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert mask_of([example("a"), example("b")], include_queries=True) is None


def test_nothing_to_mask():
    assert mask_of([example("a", "n"), example("b", "n")]) is None
    assert mask_of([example("a", others=("c",))]) is None
    assert mask_of([]) is None


texts = st.sampled_from(["a", "b", " a", "c  d", "c d", "e"])
row_of_texts = st.tuples(texts, texts, st.lists(texts, max_size=3), st.lists(texts, max_size=2))


@given(st.lists(row_of_texts, max_size=6), st.booleans())
def test_the_mask_is_its_definition(batch, include_queries):
    examples = [example(positive, *negs, query=query, others=tuple(others)) for query, positive, negs, others in batch]
    candidates, targets = [], []
    for e in examples:
        targets.append(len(candidates))
        candidates += [e.positive, *e.negatives]
    count = len(candidates)
    candidates += [e.query for e in examples] * include_queries

    def right(text: str, row: int) -> bool:
        same = [e for e in examples if e.query.split() == examples[row].query.split()]
        return any(text.split() == p.split() for e in same for p in (e.query, e.positive, *e.other_positives))

    expected = [
        [place not in (target, count + row) and right(c, row) for place, c in enumerate(candidates)]
        for row, target in enumerate(targets)
    ]
    mask = mask_of(examples, include_queries=include_queries)
    assert (mask.tolist() if mask is not None else None) == (expected if any(map(any, expected)) else None)


def test_texts_may_be_token_ids():
    queries, candidates = [(1, 2), (1, 2)], [(3,), (4,), (5,), (1, 2)]
    assert false_negatives(queries, candidates, [0, 1]).int().tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]
