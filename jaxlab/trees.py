"""Pytrees by the paths of their leaves."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any


def tree_paths(tree: PyTree) -> list[tuple[str, Any]]:
  """Returns `(path, leaf)` of all leaves, in the tree's order.

  >>> tree_paths({'conv1': {'kernel': 1}, 'momentum': (2, 3)})
  [('conv1/kernel', 1), ('momentum/0', 2), ('momentum/1', 3)]
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]


def on_host(tree: Any) -> Any:
  """Returns the leaves as NumPy arrays, whole in every process: what lies on other hosts is gathered."""

  def whole(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)

  return jax.tree.map(whole, tree)
