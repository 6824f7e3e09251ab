"""Applying a function to every record of a source, on a mesh and on all hosts."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlab.data.pipeline import epoch_batches, process_shard, to_device
from jaxlab.data.sources.source import Source
from jaxlab.parallel import batch_sharding, make_mesh

PyTree = Any


def map_batches(
  fn: Callable[[dict[str, jax.Array]], PyTree],
  source: Source,
  *,
  batch_size: int,
  mesh: Mesh | None = None,
  **options: Any,
) -> PyTree:
  """Returns `fn` of all records of `source`, in their order, as host arrays, in every process.

  Args:
    fn: `batch -> pytree of arrays [batch, ...]`, jitted; batches all have one shape (the last is padded, its
      surplus results are dropped).
    source: random-access source.
    batch_size: the global batch size.
    mesh: from `make_mesh`; all devices if None.
    **options: further arguments of `make_loader`: `transform`, `num_threads`, `num_workers`.
  """
  sharding = batch_sharding(make_mesh() if mesh is None else mesh)
  index, count = process_shard(sharding, batch_size)
  results = []
  for batch in epoch_batches(
    source, batch_size, process_index=index, process_count=count, **options
  ):
    out = fn(to_device(batch, sharding))
    results.append(
      multihost_utils.process_allgather(out, tiled=True) if count > 1 else jax.device_get(out)
    )
  return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(source)], *results)
