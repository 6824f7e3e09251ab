"""Gradient accumulation: a large batch in several passes of a smaller one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
LossFn = Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]]


def accumulate_gradients(
  loss_fn: LossFn, params: PyTree, model_state: PyTree, batch: PyTree, num_microbatches: int
) -> tuple[tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]], PyTree]:
  """Returns `value_and_grad(loss_fn, has_aux=True)`, computed over microbatches one after another.

  Loss, metrics and gradients are the means over the microbatches: equal to those of the whole batch
  where the loss is a mean over examples that do not see each other. Batch normalization sees one
  microbatch at a time, and `model_state` goes from each to the next: running statistics are updated
  `num_microbatches` times. Losses between examples (contrastive ones) see a microbatch only.

  Microbatch `i` holds the examples `i, i + n, i + 2n, ...` of the batch: so each device cuts its own part
  of a sharded batch, and no example moves. What is random per example takes its seed from the batch.

  Args:
    loss_fn: `(params, model_state, batch) -> (loss, (model_state, metrics))`; a mean over examples.
    params: what to differentiate by.
    model_state: what goes from each microbatch to the next, e.g. batch statistics; any pytree.
    batch: arrays with the examples along axis 0.
    num_microbatches: static; 1 is plain `value_and_grad`. A sharded batch needs
      `num_microbatches * data * fsdp` to divide its size.

  Returns:
    `((loss, (model_state, metrics)), gradients)`; sums run in the parameters' type, at least float32.

  Raises:
    ValueError: if the batch does not divide into `num_microbatches`.
  """
  size = jax.tree.leaves(batch)[0].shape[0]
  if num_microbatches < 1 or size % num_microbatches:
    raise ValueError(
      f'num_microbatches={num_microbatches} does not divide the batch of {size} examples.'
    )
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if num_microbatches == 1:
    return grad_fn(params, model_state, batch)

  def split(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1)

  def add(model_state: PyTree, total: PyTree, microbatch: PyTree) -> tuple[PyTree, PyTree]:
    (loss, (model_state, metrics)), gradients = grad_fn(params, model_state, microbatch)
    return model_state, jax.tree.map(jnp.add, total, _wide((loss, metrics, gradients)))

  microbatches = jax.tree.map(split, batch)
  first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), microbatches)
  (loss, (_, metrics)), gradients = jax.eval_shape(grad_fn, params, model_state, first)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, _wide_type(x.dtype)), (loss, metrics, gradients)
  )
  (model_state, total), _ = jax.lax.scan(
    lambda carry, microbatch: (add(*carry, microbatch), None), (model_state, zeros), microbatches
  )
  loss, metrics, gradients = jax.tree.map(
    lambda mean, like: (mean / num_microbatches).astype(like.dtype),
    total,
    (loss, metrics, gradients),
  )
  return (loss, (model_state, metrics)), gradients


def _wide_type(dtype: jnp.dtype) -> jnp.dtype:
  return jnp.promote_types(dtype, jnp.float32)


def _wide(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: x.astype(_wide_type(x.dtype)), tree)
