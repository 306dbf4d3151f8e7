"""Rows from files and from the hub, one at a time, each with its place."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.artifact import sha256_file
from llmtune.config import DATA_FILES
from llmtune.errors import DataError, LlmtuneError

HUB_ID = re.compile(
    r"^(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:((?P<config>[\w.-]+)/)?(?P<split>[\w\[\]%:]+))?$"
)


@dataclass(frozen=True)
class Row:
    place: str
    fields: dict[str, Any]


def read_rows(source: str) -> Iterator[Row]:
    """Every row of a `.json`, `.jsonl`, `.csv` or `.parquet` file, or of a hub dataset `org/name@revision:split`
    (`:config/split` where it comes in several).

    Streams, except for `.json`, which is one document. Raises DataError for a missing, empty or malformed file; a
    malformed line is named by its number.
    """
    path = Path(source)
    if _is_local(path):
        readers = dict(zip(DATA_FILES, (_json, _jsonl, _csv, _parquet), strict=True))
        if path.suffix.lower() not in readers:
            raise DataError(path, f"is none of {', '.join(DATA_FILES)}")
        rows = readers[path.suffix.lower()](path)
    else:
        rows = _hub(source)
    empty = True
    try:
        for row in rows:
            empty = False
            if not isinstance(row.fields, dict):
                raise DataError(row.place, "a row is an object with named fields")
            yield row
    except UnicodeDecodeError as error:
        raise DataError(path, f"is not UTF-8 text ({error.reason})") from None
    if empty:
        raise DataError(source, "holds no rows")


def fingerprint(source: str) -> str:
    """sha256 of a file's bytes, or of the hub id with the revision it stands at now."""
    path = Path(source)
    if _is_local(path):
        return sha256_file(path)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    match = HUB_ID.match(source)
    try:
        info = HfApi().dataset_info(match["id"], revision=match["revision"]) if match else None
    except (HfHubHTTPError, OSError) as error:
        raise LlmtuneError(f"{source}: the hub cannot be reached ({error}); is this machine offline?") from None
    return hashlib.sha256(f"{source}@{info.sha if info else None}".encode()).hexdigest()


def _is_local(path: Path) -> bool:
    """Whether a source is a file here, rather than a hub id. Raises DataError for a file that is not there."""
    if path.suffix.lower() not in DATA_FILES and not path.exists():
        return False
    if not path.is_file():
        raise DataError(path, "is a folder, and a file of rows is needed" if path.exists() else "no such file")
    return True


def _json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}", f"is not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(path, "is not JSON: it is nested too deeply") from None
    if not isinstance(rows, list):
        raise DataError(path, "a .json file of rows is one list of objects; one object a line is .jsonl")
    yield from (Row(f"{path.name} row {number}", row) for number, row in enumerate(rows, 1))


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield Row(f"{path.name}:{number}", json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}", f"is not JSON: {error.msg}") from None
                except RecursionError:
                    raise DataError(f"{path}:{number}", "is not JSON: it is nested too deeply") from None


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of more than 128 KB
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}:{reader.line_num}",
                        f"has other than the {len(reader.fieldnames or [])} cells of its header",
                    )
                yield Row(f"{path.name}:{reader.line_num}", row)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}", f"is not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield Row(f"{path.name} row {number}", row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(path, f"is not a whole Parquet file: {error}") from None


def _hub(source: str) -> Iterator[Row]:
    match = HUB_ID.match(source)
    if not match:
        raise DataError(
            source, f"is neither a file ({', '.join(DATA_FILES)}) nor a hub id like org/name@revision:split"
        )
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        rows = datasets.load_dataset(
            match["id"], match["config"], revision=match["revision"], split=match["split"] or "train", streaming=True
        )
        yield from (Row(f"{source} row {number}", row) for number, row in enumerate(rows, 1))
    except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
        raise DataError(source, f"cannot be read from the hub: {error}") from None
    except (HfHubHTTPError, OSError) as error:
        raise LlmtuneError(f"{source}: the hub cannot be reached ({error}); is this machine offline?") from None
