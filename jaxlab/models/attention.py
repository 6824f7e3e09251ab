"""The arithmetic of attention, shared by all transformers: scores, softmax, weighted values.

Heads come before tokens in every product, `[batch, heads, tokens, head width]`, so that forward and backward
multiply the matrices as they lie: einsums over `[batch, tokens, heads, head width]` transpose and copy, on a
CPU, even the scores.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def attention_scores(query: Array, key: Array) -> Array:
  """Returns `q k^T / sqrt(head width)`, in at least float32.

  Args:
    query: `[batch, queries, heads, head width]`.
    key: `[batch, keys, key-value heads, head width]`; the heads are a multiple of these, and query head h
      reads key-value head `h // (heads / key-value heads)`.

  Returns:
    `[batch, heads, queries, keys]`.
  """
  batch, queries, heads, width = query.shape
  keys, kv_heads = key.shape[1:3]
  query = (query * width**-0.5).transpose(0, 2, 1, 3)
  # The query heads of one key head are rows of one product.
  query = query.reshape(batch, kv_heads, heads // kv_heads * queries, width)
  scores = _product(query, key.transpose(0, 2, 1, 3), 3)
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  return scores.reshape(batch, heads, queries, keys)


def weighted_values(weights: Array, value: Array) -> Array:
  """Returns the sum of the values under each query's weights, heads merged.

  Args:
    weights: `[batch, heads, queries, keys]`.
    value: `[batch, keys, key-value heads, head width]`, as `key` of `attention_scores`.

  Returns:
    `[batch, queries, heads * head width]`.
  """
  batch, heads, queries, keys = weights.shape
  kv_heads, width = value.shape[2:]
  weights = weights.reshape(batch, kv_heads, heads // kv_heads * queries, keys)
  y = _product(weights, value.transpose(0, 2, 1, 3), 2)
  y = y.reshape(batch, heads, queries, width).transpose(0, 2, 1, 3)
  return y.reshape(batch, queries, heads * width)


@jax.custom_jvp
def softmax(scores: Array) -> Array:
  """Returns `exp(s) / sum(exp(s))` over the last axis, in the dtype of `scores`.

  The derivative `dy = y (ds - sum(y ds))` needs nothing but the result, which the product with the values
  stores anyway.
  """
  shifted = scores - jnp.max(scores, -1, keepdims=True)
  exponentials = jnp.exp(shifted)
  return exponentials / jnp.sum(exponentials, -1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
  y = softmax(*primals)
  (ds,) = tangents
  return y, y * (ds - jnp.sum(y * ds, -1, keepdims=True))


def _product(x: Array, y: Array, contracted: int) -> Array:
  """Contracts the last axis of `x` with an axis of `y`, both `[batch, heads, ., .]`."""
  return jax.lax.dot_general(x, y, (((3,), (contracted,)), ((0, 1), (0, 1))))
