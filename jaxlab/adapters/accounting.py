"""What tuning a network costs: numbers that are trained, and bytes that are kept for the backward pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

PyTree = Any


def bias_mask(params: Mapping[str, PyTree], head: str = 'head(_dist)?/.*') -> dict[str, PyTree]:
  """Returns what BitFit trains: True for biases and for the head, False for all others.

  Zaken et al. 2022, arXiv 2106.10199. A mask for `optax.masked`, or for freezing the rest.

  Args:
    params: of the network.
    head: pattern of the paths of the classifier's parameters.

  >>> bias_mask({'norm': {'scale': 1, 'bias': 0}, 'head': {'kernel': 1, 'bias': 0}})
  {'norm': {'scale': False, 'bias': True}, 'head': {'kernel': True, 'bias': True}}
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  chosen = {
    path: path.rpartition('/')[2] == 'bias' or bool(re.fullmatch(head, path)) for path in flat
  }
  return traverse_util.unflatten_dict(chosen, sep='/')


def count_parameters(tree: PyTree, mask: PyTree = None) -> int:
  """Returns the numbers in a tree of arrays or shapes; with a `mask` those of its true leaves."""
  sizes = jax.tree.map(lambda leaf: int(np.prod(leaf.shape)), tree)
  if mask is not None:
    sizes = jax.tree.map(lambda size, chosen: size * bool(chosen), sizes, mask)
  return sum(jax.tree.leaves(sizes))


def residual_bytes(fn: Callable[..., jax.Array], trained: PyTree, *others: PyTree) -> int:
  """Returns the bytes that reverse differentiation of `fn` keeps from the forward to the backward pass.

  Nothing is computed. Frozen arrays are `others`, or in the closure of `fn`; those that the backward pass
  reads count as well, once.

  Args:
    fn: of the trained arrays, and of `others`, such as a loss on a batch.
    trained: arrays or shapes.
    *others: arrays or shapes that are not differentiated: frozen parameters, a batch, keys.

  >>> residual_bytes(lambda w: (w * jax.numpy.ones(3)).sum(), jax.numpy.ones(3)) <= 24
  True
  """

  def pulled_back(own: PyTree, *rest: PyTree) -> Any:
    return jax.vjp(lambda own: fn(own, *rest), own)[1]

  pullback = jax.eval_shape(pulled_back, trained, *others)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
