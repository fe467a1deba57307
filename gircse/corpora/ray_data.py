"""`encode_dataset`: a column of a Ray Data dataset becomes a column of embeddings, on any number of machines.

    ds = ray.data.read_parquet("s3://bucket/corpus/")
    encode_dataset(ds, "path/to/model", workers=(1, 8), num_gpus=1).write_parquet("s3://bucket/embeddings/")

Each worker is an actor that loads the model once. Ray decides where they run, how many there are, and what is done
again after a machine was lost.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gircse.corpora.job import ROWS_PER_TASK, WINDOW, EncodeJob, output_columns, path_of
from gircse.integers import check_integer

if TYPE_CHECKING:
    import pyarrow as pa


class EncodingActor:
    """A `TextEncoder` in a process of its own. It refuses rows without a value of `id_column`, where there is one."""

    def __init__(self, job: EncodeJob, threads: int, id_column: str | None) -> None:
        import torch

        from gircse.corpora.text_encoder import TextEncoder

        torch.set_num_threads(threads)
        self.encoder = TextEncoder(job)
        self.id_column = id_column

    def __call__(self, table: pa.Table) -> pa.Table:
        from gircse.corpora.text_encoder import is_broken_device

        if self.id_column and table[self.id_column].null_count:
            raise ValueError(f"id: got null in column {self.id_column!r}, expected a value in every row")
        try:
            return self.encoder(table)
        except Exception as error:
            if is_broken_device(error):
                os._exit(1)  # Ray starts another process, and gives it this table
            raise


def encode_dataset(
    ds: Any,
    model: str | os.PathLike[str],
    *,
    column: str | Sequence[str] | Mapping[str, str] = "text",
    instruction: str | Mapping[str, str | None] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    num_steps: int | str | None = None,
    return_steps: bool = False,
    output_dtype: str = "float32",
    on_error: str = "raise",
    load: Mapping[str, Any] | None = None,
    window: int = WINDOW,
    rows_per_task: int = ROWS_PER_TASK,
    workers: int | tuple[int, int] = 1,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    memory: float | None = None,
    preserve_order: bool = False,
    max_restarts: int = 5,
    max_task_retries: int = -1,
    **encode: Any,
) -> Any:
    """A `ray.data.Dataset` with columns of embeddings behind its own. It is lazy: nothing runs before it is consumed.

    A row that ends its process (not one that raises, see `on_error`) ends the job once its actor was restarted
    `max_restarts` times.

    Args:
        ds: a `ray.data.Dataset`.
        model: a folder that every machine sees, or a hub name.
        column: the column of texts, whose embeddings become "embedding"; or several, which become "<column>_embedding";
            or a mapping to the names of the results.
        instruction, adapter, num_steps, return_steps, output_dtype, on_error, load, encode: see `EncodeJob`.
        window: rows that are encoded at once, at most `rows_per_task`.
        rows_per_task: rows of a block: what an actor gets at a time, and what is done again when it is lost.
        workers: how many actors; or the fewest and the most.
        num_gpus: of each actor; default: 1 if the cluster has any, else 0.
        num_cpus: of each actor, and its number of threads; default: 1.
        memory: bytes that Ray sets aside for each actor.
        preserve_order: the rows come in the order of `ds`, at some cost in speed. It is a setting of `ds.context`.
        max_restarts: how often an actor is restarted. Each loss of its machine is one.
        max_task_retries: how often a block is given to another actor; -1 without limit.

    Raises:
        ValueError: an argument is out of range, or so many workers that no processor is left to read and write, for
            which Ray would wait without a word.
    """
    job = EncodeJob(
        path_of(model),
        adapter=None if adapter is None else path_of(adapter),
        columns=output_columns(column),
        instruction=instruction,
        num_steps=num_steps,
        return_steps=return_steps,
        load=load or {},
        encode=encode,
        output_dtype=output_dtype,
        on_error=on_error,
    )
    if preserve_order:
        ds.context.execution_options.preserve_order = True
    return map_job(
        ds,
        job,
        window=window,
        rows_per_task=rows_per_task,
        workers=workers,
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        memory=memory,
        max_restarts=max_restarts,
        max_task_retries=max_task_retries,
    )


def map_job(
    ds: Any,
    job: EncodeJob,
    *,
    window: int = WINDOW,
    rows_per_task: int = ROWS_PER_TASK,
    workers: int | tuple[int, int] = 1,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    memory: float | None = None,
    max_restarts: int = 5,
    max_task_retries: int = -1,
) -> Any:
    """`encode_dataset` of a job, with the arguments of the same names and their errors. Where the dataset has a
    checkpoint, a row without an id raises."""
    import ray

    low, high = (workers, workers) if isinstance(workers, int) else workers
    check_integer("workers", low, least=1)
    check_integer("workers", high, least=low)
    check_integer("rows_per_task", rows_per_task, least=1)
    check_integer("window", window, least=1)
    resources = ray.cluster_resources()
    if num_gpus is None:
        num_gpus = 1 if resources.get("GPU") else 0
    num_cpus = 1 if num_cpus is None else num_cpus
    checkpoint = ds.context.checkpoint_config
    # A run that goes on has an actor that leaves out the rows of the checkpoint. With no CPU left Ray waits for ever.
    cpus, others = resources.get("CPU", 0), 1 if checkpoint is None else 2
    if low * num_cpus + others > cpus:
        raise ValueError(
            f"workers: got {low} of {num_cpus:g} CPUs each, expected at most {max(0, cpus - others):g} CPUs in all: of "
            f"the cluster's {cpus:g} CPUs one is left to read and write"
            + ("" if checkpoint is None else ", one to find the rows that are done")
        )
    load = dict(job.load)
    if not num_gpus:
        # Without this Ray leaves an actor all GPUs of its machine, which others were given.
        load["device"] = load.get("device") or "cpu"
        if str(load["device"]).startswith("cuda"):
            raise ValueError(f"num_gpus: got 0 with device {load['device']!r}, expected more")
    # Ray cuts blocks by bytes, and a million short texts are one block, which a single actor would get.
    ds = ds.repartition(target_num_rows_per_block=rows_per_task)
    with warnings.catch_warnings():
        # The last two arguments have no other place in the versions that gircse[ray] names.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        return ds.map_batches(
            EncodingActor,
            fn_constructor_args=(
                replace(job, load=load),
                max(1, int(num_cpus)),
                None if checkpoint is None else checkpoint.id_column,
            ),
            batch_size=min(window, rows_per_task),
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
            num_gpus=num_gpus or None,
            num_cpus=num_cpus,
            memory=memory,
            udf_modifying_row_count=False,
            # Without a limit a row that ends its process restarts it for ever. With fewer restarts the loss of a
            # machine ends the job.
            max_restarts=max_restarts,
            max_task_retries=max_task_retries,
        )
