"""Texts to embeddings: tokens, batches, devices and files around the generation engine.

    tokens.py         texts to token ids: checks, prompt template, the cut to a length, padding
    pipeline.py       `encode` and `encode_stream`: windows of texts through the engine, in order
    devices.py        one process, several devices
    files.py          files of texts in, files of embeddings out

Training uses `tokens.py` only. Imports `gircse.embedder` and what is below it.
"""
