"""Rows as numpy columns in Python, and as blocks in Spark's shuffle: a few large rows instead of many small ones.

Spark moves, converts and sorts row by row. Processing whole columns takes a fraction of that time, even for the first
rows, because no code has to be compiled first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, Sequence, Tuple

if TYPE_CHECKING:
    import numpy as np
    from pyspark.sql import DataFrame

    Array = np.ndarray[Any, Any]
    #: Columns of equal length: name → numpy array.
    Columns = Dict[str, Any]

#: Name and numpy type of each column.
Layout = Sequence[Tuple[str, str]]

#: Schema of the rows that `exchange` shuffles: destination and packed columns.
BLOCK_SCHEMA = "partition_key int NOT NULL, block binary NOT NULL"

#: Maximum bytes of text in a batch, unless a single line is longer.
TEXT_PER_BATCH = 8 << 20


def map_text(
    lines: DataFrame, function: Callable[[Iterator[tuple[Array, Array]]], Iterator[Columns]], schema: str, padding: int
) -> DataFrame:
    """Apply `function` to the lines of a binary column.

    It receives (data, offsets) of many lines at a time: their bytes, back to back, with `padding` zeros before and
    after, and the offsets where each line begins and the last ends. It yields columns as in `schema`.
    """
    import numpy as np

    def texts(batches: Iterable[Any]) -> Iterator[tuple[Array, Array]]:
        for batch in batches:
            content, offsets = _text_of(batch)
            offsets = offsets.astype("i8")
            first = 0
            while first < len(offsets) - 1:
                last = int(np.searchsorted(offsets, offsets[first] + TEXT_PER_BATCH, side="right")) - 1
                last = max(last, first + 1)
                begin, end = int(offsets[first]), int(offsets[last])
                data = np.zeros(end - begin + 2 * padding, dtype="u1")
                data[padding : padding + end - begin] = content[begin:end]
                yield data, offsets[first : last + 1] - begin + padding
                first = last

    return _map_batches(lines, lambda batches: function(texts(batches)), schema)


def map_columns(frame: DataFrame, function: Callable[[Columns], Columns], schema: str) -> DataFrame:
    """Apply `function` to the columns, numbers without NULLs, of many rows at a time."""

    def columns(batches: Iterable[Any]) -> Iterator[Columns]:
        for batch in batches:
            names = list(batch.columns) if hasattr(batch, "iloc") else batch.schema.names
            yield function({name: _array_of(batch, name) for name in names})

    return _map_batches(frame, columns, schema)


def map_blocks(blocks: DataFrame, function: Callable[[list[bytes]], Iterator[Columns]], schema: str) -> DataFrame:
    """Apply `function` to all blocks of each partition of `exchange`; it yields columns as in `schema`."""

    def apply(batches: Iterable[Any]) -> Iterator[Columns]:
        return function([block for batch in batches for block in _values_of(batch, 1)])

    return _map_batches(blocks, apply, schema)


def exchange(blocks: DataFrame, partitions: int) -> DataFrame:
    """Shuffle rows of BLOCK_SCHEMA by ``partition_key``, which `split` has set for this number of partitions."""
    return blocks.repartition(partitions, "partition_key")


def split(columns: Columns, layout: Layout, partition: Array, keys: Array) -> Columns:
    """Pack `columns` into rows of BLOCK_SCHEMA that take each row to the partition numbered in `partition`.

    `keys` are the `partition_keys` of the number of partitions.
    """
    import numpy as np

    ordered = {name: columns[name] for name, _ in layout}
    if (partition[1:] < partition[:-1]).any():
        order = np.argsort(partition.astype("i4"), kind="stable")
        partition = partition[order]
        ordered = {name: values[order] for name, values in ordered.items()}
    bounds = np.searchsorted(partition, np.arange(len(keys) + 1))
    non_empty = np.flatnonzero(bounds[1:] > bounds[:-1])
    blocks = [pack({name: ordered[name][bounds[n] : bounds[n + 1]] for name, _ in layout}, layout) for n in non_empty]
    return {"partition_key": keys[non_empty].astype("i4"), "block": blocks}


def pack(columns: Columns, layout: Layout) -> bytes:
    """Pack columns into bytes, one column after another."""
    return b"".join(columns[name].astype(kind, copy=False).tobytes() for name, kind in layout)


def unpack(blocks: list[bytes], layout: Layout) -> Columns:
    """All columns of `blocks`, in block order."""
    return {name: column(blocks, layout, name) for name, _ in layout}


def column(blocks: list[bytes], layout: Layout, name: str) -> Array:
    """One column of `blocks`, in block order."""
    import numpy as np

    types = {each: np.dtype(kind) for each, kind in layout}
    width = sum(kind.itemsize for kind in types.values())
    names = [each for each, _ in layout]
    before = sum(types[each].itemsize for each in names[: names.index(name)])
    parts = []
    for block in blocks:
        rows = len(block) // width
        parts.append(np.frombuffer(block, dtype=types[name], count=rows, offset=before * rows))
    return np.concatenate(parts) if parts else np.empty(0, dtype=types[name])


def of_kind(packed: Iterable[bytes], kind: bytes) -> list[Any]:
    """Those of `packed` blocks that were marked with the byte `kind` in front, without it."""
    return [memoryview(block)[1:] for block in packed if block[:1] == kind]


def task_number() -> int:
    """Partition number of the calling task."""
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None, "not in a task"  # noqa: S101 - narrows the type
    return context.partitionId()


def partition_keys(partitions: int) -> Array:
    """For each partition number, an integer that Spark's hash partitioning sends to that partition.

    Spark hashes a 32-bit integer by MurmurHash3 (x86, 32 bits) with seed 42 and takes the non-negative remainder. If it
    used another hash, partitions would be uneven, but no row would be wrong.
    """
    import numpy as np

    keys = np.full(partitions, -1, dtype="i8")
    first = 0
    while (keys < 0).any():
        candidates = np.arange(first, first + 16 * partitions)
        numbers = _murmur3(candidates) % partitions
        # Assigned in reverse, so that the smallest candidate wins.
        free = keys[numbers] < 0
        keys[numbers[free][::-1]] = candidates[free][::-1]
        first += 16 * partitions
    return keys


def hash_ids(numbers: Array) -> Array:
    """Hash integers to the range 0 to 2**31 - 1."""
    import numpy as np

    # Fibonacci hashing: Knuth, The Art of Computer Programming, volume 3, 6.4. The upper bits are well mixed.
    result: Array = ((numbers.astype("u8") * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)).astype("i8")
    return result


def _murmur3(values: Array) -> Array:
    """Spark's hash of 32-bit integers: signed 32-bit values as int64."""
    import numpy as np

    u = np.uint32

    def rotate_left(word: Array, bits: int) -> Array:
        return (word << u(bits)) | (word >> u(32 - bits))

    word = rotate_left(values.astype("u4") * u(0xCC9E2D51), 15) * u(0x1B873593)
    word = rotate_left(u(42) ^ word, 13) * u(5) + u(0xE6546B64)
    word ^= u(4)  # the length in bytes
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> u(shift))) * u(factor)
    signed: Array = (word ^ (word >> u(16))).view("i4").astype("i8")
    return signed


def _map_batches(frame: DataFrame, function: Callable[[Iterator[Any]], Iterator[Columns]], schema: str) -> DataFrame:
    """`frame.mapInArrow`, or mapInPandas before Spark 3.3."""
    if hasattr(frame, "mapInArrow"):

        def in_arrow(batches: Iterator[Any]) -> Iterator[Any]:
            import pyarrow

            for columns in function(batches):
                # All batches must have the same types, and those of empty columns may differ.
                if not len(next(iter(columns.values()))):
                    continue
                arrays = [arrow_array(values) for values in columns.values()]
                yield pyarrow.RecordBatch.from_arrays(arrays, names=list(columns))

        return frame.mapInArrow(in_arrow, schema)

    def in_pandas(frames: Iterator[Any]) -> Iterator[Any]:
        import pandas

        for columns in function(frames):
            yield pandas.DataFrame(columns)

    return frame.mapInPandas(in_pandas, schema)


def arrow_array(values: Array | list[bytes], kind: Any = None, valid: Array | None = None) -> Any:
    """Arrow array of numbers or bytes, NULL where not `valid`. `kind` is its type, by default that of the values.

    pyarrow.array would import pandas to check for its types, which takes a third of a second in each process.

    Raises OverflowError if the values total 2 GB or more, TypeError for numbers of another width than `kind`.
    """
    import numpy as np
    import pyarrow

    if isinstance(values, list):
        offsets = np.cumsum([0, *map(len, values)])
        if offsets[-1] >= 1 << 31:
            raise OverflowError(f"{offsets[-1]:,} bytes do not fit into one Arrow batch")
        kind, buffers = kind or pyarrow.binary(), [offsets.astype("i4"), b"".join(values)]
    else:
        kind = kind or pyarrow.from_numpy_dtype(values.dtype)
        is_boolean = values.dtype == bool and pyarrow.types.is_boolean(kind)
        buffers = [np.packbits(values, bitorder="little") if is_boolean else np.ascontiguousarray(values)]
        if not is_boolean and kind.bit_width != 8 * values.dtype.itemsize:
            raise TypeError(f"{values.dtype} is not as wide as {kind}")
    bits = None if valid is None else np.packbits(valid, bitorder="little")
    pointers = [None if buffer is None else pyarrow.py_buffer(buffer) for buffer in (bits, *buffers)]
    return pyarrow.Array.from_buffers(kind, len(values), pointers)


def _array_of(batch: Any, name: str) -> Array:
    """Numeric column of a batch, without NULLs."""
    import numpy as np

    if hasattr(batch, "iloc"):
        values: Array = batch[name].to_numpy()
        return values
    column = batch.column(batch.schema.get_field_index(name))
    # Arrow's type names are numpy's, except for one. Arrow's to_numpy would import pandas (see arrow_array).
    content = column.buffers()[1] if len(column) else b""
    kind = str(column.type)
    values = np.frombuffer(content, dtype="f4" if kind == "float" else kind)
    return values[column.offset : column.offset + len(column)]


def _values_of(batch: Any, column: int) -> list[Any]:
    """Values of a column of a batch as Python objects."""
    values: list[Any] = batch.iloc[:, column].tolist() if hasattr(batch, "iloc") else batch.column(column).to_pylist()
    return values


def _text_of(batch: Any) -> tuple[Array, Array]:
    """(all bytes of the first column, offsets where each value begins and the last ends)."""
    import numpy as np

    if hasattr(batch, "iloc"):
        values = [value or b"" for value in batch.iloc[:, 0]]
        return np.frombuffer(b"".join(values), dtype="u1"), np.cumsum([0, *map(len, values)])
    column = batch.column(0)
    _, offsets, content = column.buffers()
    if content is None or not len(column):
        return np.empty(0, dtype="u1"), np.zeros(len(column) + 1, dtype="i8")
    width = "i8" if str(column.type).startswith("large_") else "i4"
    begins = np.frombuffer(offsets, dtype=width)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(content, dtype="u1")[begins[0] : begins[-1]], begins - begins[0]
