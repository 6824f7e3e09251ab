"""Embedding tables: quantized by rules of their own, one range a row, and with them the heads tied to them.

A rule for `'embedding'` names the module of a table. As a kernel of a tied head a row is an output, so that
the lookup and the head share the table's codes; the head's input is then quantized where a rule for `'input'`
names the module. Rules for kernels leave tables alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.intercept import Site
from jaxlab.quantizers.networks.batches import Call, trace_calls
from jaxlab.quantizers.networks.operands import (
  CHANNEL,
  METHODS,
  affine_constants,
  fake_quantize_operand,
  is_concrete,
  join,
)
from jaxlab.quantizers.networks.rules import Bits

Array = jax.Array
PyTree = Any


def find_tables(
  model: nn.Module, variables: Mapping[str, PyTree], call: Call
) -> tuple[list[str], list[str]]:
  """Returns the embeddings that a model calls, by path, and those of them that are heads, too.

  Traces abstractly: no computation.
  """
  tables: dict[str, None] = {}
  tied: dict[str, None] = {}

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if isinstance(site.module, nn.Embed):
      tables.setdefault(site.path)
      if site.method == 'attend':
        tied.setdefault(site.path)
    return call(*args, **kwargs)

  trace_calls(model, variables, call, visit, methods=METHODS)
  return list(tables), list(tied)


def quantize_tables(
  params: PyTree, bits: Mapping[str, Bits]
) -> tuple[PyTree, dict[str, dict[str, Array]]]:
  """Returns `params` with fake-quantized tables, and `{path: constants}` of the collection's `embedding`.

  Args:
    params: parameter tree.
    bits: bit-width by path of the module.

  Returns:
    Parameters, and for each table `{scale, zero_point, low, high}`, the first two `[rows, 1]`.

  Raises:
    ValueError: if a table is not finite.
  """
  if not bits:
    return params, {}
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  found = {}
  for path, width in bits.items():
    name = join(path, 'embedding')
    flat[name], found[path] = _quantize_table(flat[name], width)
    scale = found[path]['scale']
    if is_concrete(scale) and not np.all(np.isfinite(scale)):
      raise ValueError(
        f'The table of {path!r} is not finite: are the weights free of NaN and infinity?'
      )
  return traverse_util.unflatten_dict(flat, sep='/'), found


@jax.jit
def _quantize_table(table: Array, bits: Bits) -> tuple[Array, dict[str, Array]]:
  constants = affine_constants(CHANNEL, table.T, bits)
  rows = {
    name: jnp.expand_dims(leaf, -1) if leaf.ndim else leaf for name, leaf in constants.items()
  }
  return fake_quantize_operand(table, rows), rows
