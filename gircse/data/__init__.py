"""Rows of texts: how they are read, checked, drawn, and made into tasks.

| file | what is in it |
|---|---|
| `rows.py` | the schema of a row, its checks, files as lists of rows, and how a row is written for the model |
| `jsonl.py` | the lines of a JSONL file, plain or gzip |
| `errors.py` | how problems are collected and reported |
| `sources.py` | checked rows that stay on disk, read by offset |
| `sampling.py` | which rows make up a batch, as a function of seed and step |
| `false_negatives.py` | candidates of a batch that must not count as negatives |
| `retrieval_task.py`, `labelled_texts.py` | data to evaluate on |
| `functions.py`, `installed_code.py` | pairs of description and code out of the installed Python packages |

Imports `lm` (prompts).
"""
