"""How many rows a batch has under ``batch_size="auto"``: by what it holds of a row, and beside what."""

from __future__ import annotations

__all__ = ["MOST_DECODED", "MOST_ROWS", "batch_rows"]

# As `python benchmarks/batches.py` found it on two CPU cores: a batch gains from more rows until its tensors leave the caches,
# and up to 150 rows even beyond. Every train batch reads the queries' gradients once, so where those are large it should not be
# small beside them. No tensor of the graph should reach 32 MiB, from where on glibc asks the system for every block anew; nor,
# beyond 150 rows, should a batch's scores. Rows that a dataset makes may be padded to the longest of their batch, and are read
# while the batch before is computed, so that fewer are taken at once. The first batch is short: it is checked against autograd,
# which costs several passes over it.
CACHED_BYTES, BATCH_BYTES, TENSOR_BYTES = 48 << 20, 384 << 20, 31 << 20
MOST_ROWS, MOST_DECODED, ENOUGH_ROWS, FEWEST_CHECKED, MOST_CHECKED = 2048, 512, 150, 8, 64


def batch_rows(
    row_bytes: int, memory: int, queries: int = 0, tensor: int = 1, scores: int = 1, most: int = MOST_ROWS
) -> tuple[int, int]:
    """Rows of the first batch and of the others, where the user left it to us.

    Args:
        row_bytes: What a batch holds of one row: the graph, and gradients that are multiplied out.
        memory: The bound that the user gave, of which a batch may take a fifth, or a third beside large queries.
        queries: Bytes of the queries' gradients, multiplied out, where each batch reads them.
        tensor: What one row adds to the graph's largest tensor.
        scores: Bytes of one row's scores.
        most: No more rows than this.

    Returns:
        The two sizes.

    Example:
        >>> batch_rows(3_000, 2 << 30), batch_rows(1 << 20, 2 << 30), batch_rows(40 << 20, 2 << 30, 220 << 20)
        ((64, 2048), (37, 150), (8, 16))
    """
    affordable = max(1, max(min(BATCH_BYTES, memory // 5), min(3 * queries, memory // 3)) // row_bytes)
    cached = min(CACHED_BYTES // row_bytes, TENSOR_BYTES // scores)
    rows = min(most, affordable, max(ENOUGH_ROWS, cached))
    rows = min(rows, max(1, TENSOR_BYTES // tensor))
    return min(rows, max(FEWEST_CHECKED, min(MOST_CHECKED, rows // 4))), rows
