"""Mixed precision: parameters in float32, computation in a shorter type."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def cast_floating(tree: PyTree, dtype: jnp.dtype) -> PyTree:
  """Returns `tree` with its floating-point arrays cast to `dtype`; integers, booleans and keys stay.

  Cast the parameters inside the loss, and the gradient comes back in the parameters' own type:

    `jax.grad(lambda params: loss(cast_floating(params, jnp.bfloat16), images))(params)`

  >>> cast_floating({'kernel': jnp.ones(2), 'step': jnp.int32(3)}, jnp.bfloat16)['kernel'].dtype
  dtype(bfloat16)
  """

  def cast(leaf):
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

  return jax.tree.map(cast, tree)
