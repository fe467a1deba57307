"""Files of texts to a folder of Parquet on a Ray cluster; started again it encodes what is missing.

FOLDER/*.parquet              rows with their embeddings, in no order
FOLDER/.gircse/job.json       the settings that decide the result
FOLDER/.gircse/checkpoint/    the ids of the rows that are written (Ray Data's own)
"""

from __future__ import annotations

import logging
from typing import Any

import pyarrow.json as pa_json
import pyarrow.parquet as pq

from gircse.corpora.encode_files import check_source, encode_files
from gircse.corpora.job import EncodeJob
from gircse.corpora.manifest import STATE, begin, forget_if_empty
from gircse.corpora.objects import find_files, is_local, place
from gircse.corpora.ray_data import map_job
from gircse.corpora.sources import Source


def encode_files_on_ray(
    source: Source,
    output: str,
    job: EncodeJob,
    *,
    id_column: str | None,
    address: str | None = None,
    rows_per_task: int,
    **resources: Any,
) -> int:
    """
    Args:
        source: Parquet or JSON Lines.
        output: a folder, which all machines see, or a URL.
        id_column: a column of values that differ in all rows.
        address: of the cluster; default: the one of RAY_ADDRESS or of this machine, else one that is started here.
        resources: `workers`, `num_gpus`, `num_cpus`, `memory` of `gircse.corpora.encode_dataset`.

    Returns:
        The number of rows that the folder has in the end.

    Raises:
        ValueError: a bad argument, other settings than the folder was begun with, a row that cannot be encoded; ids
            that are not unique, found by rows that are missing at the end.
    """
    if source.kind == "text":
        raise ValueError("input: got lines of text, expected Parquet or JSON Lines with an id column for Ray")
    if output.endswith(".parquet"):
        raise ValueError(f"output: got {output!r}, expected a folder, into which many machines write")
    if id_column is None or source.schema.names.count(id_column) != 1:
        names = ", ".join(source.schema.names)
        raise ValueError(f"id: got {id_column!r}, expected one of {names}: by it a run that goes on knows what is done")
    check_source(source, job)
    if not source.total:
        return encode_files(source, output, job).rows  # Ray would write nothing
    output = place(output)[1] if is_local(output) else output.rstrip("/")
    begin(output, {**job.settings(), "input": source.identity(), "id": id_column, "by": "ray"})

    import ray
    from ray.data.checkpoint import CheckpointConfig

    if not ray.is_initialized():
        ray.init(address=address, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current().copy()
    # The newer reader lists files in threads, and two that import a module at the same moment can see half of it.
    context.use_datasource_v2 = False
    with ray.data.DataContext.current(context):  # Ray's own reading of the checkpoint goes by it, too
        # By default Ray makes a column of a folder named lang=en, leaves out files that end in .pq, and takes texts of
        # JSON Lines for times where they look like it.
        if source.kind == "parquet":
            ds = ray.data.read_parquet(source.files, partitioning=None, file_extensions=None)
        else:
            types = pa_json.ParseOptions(explicit_schema=source.schema)
            options: dict[str, Any] = {"partitioning": None, "parse_options": types}
            ds = ray.data.read_json(source.files, **options)
        ds.context.raise_original_map_exception = True
        ds.context.checkpoint_config = CheckpointConfig(
            id_column=id_column, checkpoint_path=f"{output}/{STATE}/checkpoint", delete_checkpoint_on_success=False
        )
        try:
            map_job(ds, job, rows_per_task=rows_per_task, **resources).write_parquet(output, mode="append")
        except Exception as error:
            forget_if_empty(output)  # so that settings that were wrong can be set right
            raise ValueError(_what_matters(error)) from error
    there = _rows(output)
    if there != source.total:
        raise ValueError(
            f"id: {output} has {there} rows, the input {source.total}; expected values of {id_column!r} that differ in "
            "all rows, and a folder that nothing else writes into"
        )
    return there


def _rows(folder: str) -> int:
    """The rows of all Parquet files, by their footers."""
    count = 0
    for file in find_files([f"{folder}/*.parquet"]):
        system, path = place(file)
        with system.open(path, "rb") as opened:
            count += pq.read_metadata(opened).num_rows
    return count


def _what_matters(error: BaseException) -> str:
    """The line of the error that a worker raised: Ray wraps it in errors of its own, with pages of traceback."""
    while type(error).__module__.startswith("ray."):
        inner = getattr(error, "cause", None) or error.__cause__
        if inner is None:  # one of Ray's own, such as a worker that could not start: the line ends the traceback
            return str(error).strip().splitlines()[-1]
        error = inner
    return str(error).splitlines()[0]  # Ray adds advice behind it
