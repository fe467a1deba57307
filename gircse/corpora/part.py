"""A fixed share of a corpus, for a scheduler that starts many commands: `--part 2/8` is the second of eight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One of `count` shares, numbered from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def of(cls, text: str) -> Part:
        """
        Raises:
            ValueError: the text is not i/n with 1 <= i <= n.
        """
        index, _, count = text.partition("/")
        if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise ValueError(f"part: got {text!r}, expected i/n with i from 1 to n, such as 2/8")

    def of_blocks(self, rows: int, size: int) -> range:
        """The blocks of `size` rows that belong to this share. An input without rows has one block, which is empty, so
        that its output tells the dimension."""
        blocks = max(1, -(-rows // size))
        return range(blocks * (self.index - 1) // self.count, blocks * self.index // self.count)

    def of_rows(self, rows: int, size: int) -> range:
        """The rows of these blocks."""
        blocks = self.of_blocks(rows, size)
        return range(min(rows, blocks.start * size), min(rows, blocks.stop * size))


WHOLE = Part()
