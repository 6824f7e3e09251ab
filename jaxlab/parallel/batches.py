"""Rows of a batch within a program for many devices: joined, parted and reordered where they lie.

A batch is split over devices along its first axis. What joins batches one behind the other, or takes rows in
another order, moves them between devices, and the compiler may then leave everything on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxlab.parallel.mesh import batch_spec

PyTree = Any


def over_batch(tree: PyTree) -> PyTree:
  """Returns arrays laid out as a batch is, inside a program that `shard_program` lays out; else as they are.

  For examples that a step takes in another order: gathered rows are on every device, and what follows would
  be computed by every device for the whole batch.

  A mesh of other axes than those of `make_mesh` says nothing of a batch.

  Args:
    tree: arrays `[batch, ...]`.
  """
  spec = batch_spec(jax.sharding.get_abstract_mesh())
  return tree if spec == PartitionSpec(None) else jax.lax.with_sharding_constraint(tree, spec)


def interleave(views: Sequence[ArrayLike]) -> jax.Array:
  """Returns views of the same images as one batch, image by image: row `count * i + v` is image i in view v.

  All views of an image stay on its device, and in its group where batch norms have groups. Behind one another
  (`jnp.concatenate`) the second view's rows would belong to other devices.

  Args:
    views: `count` arrays `[batch, ...]` of one shape.

  Returns:
    `[batch * count, ...]`.

  Raises:
    ValueError: for no views, or shapes that differ.

  >>> interleave([jnp.array([1, 2]), jnp.array([10, 20])]).tolist()
  [1, 10, 2, 20]
  """
  shapes = {jnp.shape(view) for view in views}
  if len(shapes) != 1:
    raise ValueError(f'views: expected one shape, got {sorted(shapes)}.')
  ((batch, *rest),) = shapes
  return jnp.stack([jnp.asarray(view) for view in views], 1).reshape(batch * len(views), *rest)


def deinterleave(rows: ArrayLike, count: int) -> jax.Array:
  """Returns each view's rows, `[count, batch, ...]`, out of what `interleave` joined.

  Args:
    rows: `[batch * count, ...]`.
    count: of views.

  Raises:
    ValueError: if the rows do not divide by `count`.

  >>> deinterleave(jnp.array([1, 10, 2, 20]), 2).tolist()
  [[1, 2], [10, 20]]
  """
  rows = jnp.asarray(rows)
  if count < 1 or rows.ndim < 1 or len(rows) % count:
    raise ValueError(f'rows of shape {rows.shape} are none of count={count} views each.')
  return jnp.moveaxis(rows.reshape(len(rows) // count, count, *rows.shape[1:]), 1, 0)
