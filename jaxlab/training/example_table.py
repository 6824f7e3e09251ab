"""State of every training example: tables of which a step reads and writes the rows of its batch alone.

A table is an array, or a pytree of them, with a row for every example, found by the `index` of a batch: label
logits, pseudo-labels, predictions, features. It lies in the train state (`extra`), where it is saved with it
and may be split over devices by its rows. Rows beyond the examples fill it up to a multiple of `MULTIPLE`, so
that it divides; they are zero and nobody reads them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxlab.parallel.partition import Rules
from jaxlab.tracing import is_concrete

PyTree = Any

MULTIPLE = 256


def padded_rows(count: int) -> int:
  """Returns the rows of a table of `count` examples: the next multiple of `MULTIPLE`.

  >>> padded_rows(1), padded_rows(256), padded_rows(257)
  (256, 256, 512)
  """
  return -(-count // MULTIPLE) * MULTIPLE


def pad_rows(rows: PyTree) -> PyTree:
  """Returns `rows`, arrays `[examples, ...]`, with zeros up to `padded_rows(examples)` behind them."""

  def pad(leaf: ArrayLike) -> ArrayLike:
    numeric = np if isinstance(leaf, np.ndarray) else jnp
    extra = padded_rows(len(leaf)) - len(leaf)
    return numeric.pad(leaf, ((0, extra), *[(0, 0)] * (leaf.ndim - 1)))

  return jax.tree.map(pad, rows)


def blank_rows(shapes: PyTree) -> PyTree:
  """Returns zeros for `jax.ShapeDtypeStruct`s `[examples, ...]`, padded as `pad_rows` does."""
  return jax.tree.map(
    lambda leaf: jnp.zeros((padded_rows(leaf.shape[0]), *leaf.shape[1:]), leaf.dtype), shapes
  )


def row_rules(mesh: Mesh, pattern: str) -> Rules:
  """Returns the partition rules that split tables by rows over all devices that share a batch.

  None where `MULTIPLE` does not divide by their number: then every device holds the whole.

  Args:
    mesh: from `make_mesh`.
    pattern: of the tables' paths in the state, such as `'extra/table/.*'`.
  """
  if MULTIPLE % (mesh.shape['data'] * mesh.shape['fsdp']):
    return ()
  return ((pattern, PartitionSpec(('data', 'fsdp'))),)


def read_rows(table: PyTree, index: ArrayLike) -> PyTree:
  """Returns the rows at `index`, int `[batch]`, of all arrays of a table.

  Raises:
    ValueError: if the index is no integer vector, or (concrete) outside of the table.
  """
  index = _index(table, index)
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], table)


def write_rows(
  table: PyTree, index: ArrayLike, rows: PyTree, where: ArrayLike | None = None
) -> PyTree:
  """Returns the table with other rows at `index`; all others as they were.

  Args:
    table: arrays `[rows, ...]`.
    index: int `[batch]`, distinct where `where` is True.
    rows: of the same structure, `[batch, ...]`.
    where: bool `[batch]`, which are written; None: all.

  Raises:
    ValueError: if rows are not of the table's structure and shapes, the index is no integer vector, or
      (concrete) an index is outside of the table, or comes twice.

  Examples:
    >>> write_rows(jnp.zeros(4), jnp.array([2, 0]), jnp.array([5.0, 6.0])).tolist()
    [6.0, 0.0, 5.0, 0.0]
  """
  index = _index(table, index)
  _require_distinct(index, where)
  _require_rows(table, index, rows)
  at = _places(table, index, where)
  return jax.tree.map(
    lambda leaf, own: _set(jnp.asarray(leaf), at, own),
    table,
    rows,
  )


def step_rows(
  table: PyTree,
  index: ArrayLike,
  gradients: PyTree,
  rate: ArrayLike,
  where: ArrayLike | None = None,
) -> PyTree:
  """Returns the table behind a plain gradient step in the rows at `index`: `row - rate * gradient`.

  Args:
    table: arrays `[rows, ...]`.
    index: int `[batch]`, distinct where `where` is True.
    gradients: of the same structure, `[batch, ...]`.
    rate: step size.
    where: bool `[batch]`, which are updated; None: all.

  Raises:
    ValueError: as `write_rows`.

  Examples:
    >>> step_rows(jnp.ones((3, 1)), jnp.array([1]), jnp.array([[2.0]]), 0.25).tolist()
    [[1.0], [0.5], [1.0]]
  """
  index = _index(table, index)
  _require_rows(table, index, gradients)
  rows = jax.tree.map(lambda row, own: row - rate * own, read_rows(table, index), gradients)
  return write_rows(table, index, rows, where)


def _set(leaf: jax.Array, at: jax.Array, rows: ArrayLike) -> jax.Array:
  return leaf.at[at].set(jnp.asarray(rows).astype(leaf.dtype), mode='drop')


def _places(table: PyTree, index: ArrayLike, where: ArrayLike | None) -> jax.Array:
  """Returns where rows are written, behind the table's end for those that are not."""
  size = jax.tree.leaves(table)[0].shape[0]
  return jnp.asarray(index) if where is None else jnp.where(jnp.asarray(where), index, size)


def _require_rows(table: PyTree, index: ArrayLike, rows: PyTree) -> None:
  """Raises ValueError unless `rows` hold a row of every array of the table for each index."""
  wanted = jax.tree.map(lambda leaf: (*jnp.shape(index), *jnp.shape(leaf)[1:]), table)
  given = jax.tree.map(jnp.shape, rows)
  if wanted != given:
    raise ValueError(f'rows of shapes {wanted} are wanted by this table and index, got {given}.')


def _index(table: PyTree, index: ArrayLike) -> jax.Array:
  """Returns the index as an array; raises ValueError unless it is a vector of rows of the table."""
  sizes = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(table)}
  if len(sizes) != 1:
    raise ValueError(f'the arrays of a table have one number of rows, got {sorted(sizes)}.')
  index = jnp.asarray(index)
  if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
    raise ValueError(f'index must be integers [batch], got {index.dtype} {index.shape}.')
  if is_concrete(index) and index.size:
    size, values = sizes.pop(), np.asarray(index)
    if values.min() < 0 or values.max() >= size:
      raise ValueError(
        f'index must lie in 0 to {size - 1}, the rows of the table, got {values.min()} to {values.max()}.'
      )
  return index


def _require_distinct(index: ArrayLike, where: ArrayLike | None) -> None:
  if is_concrete(index) and (where is None or is_concrete(where)):
    values = np.asarray(index) if where is None else np.asarray(index)[np.asarray(where)]
    if len(np.unique(values)) < len(values):
      raise ValueError(
        'index holds a row twice: of two writes to one row, either could be the last.'
      )
