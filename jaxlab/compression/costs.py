"""What a network costs: multiply-accumulates, parameters, and time on a device."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

PyTree = Any


def multiply_accumulates(
  model: nn.Module, variables: PyTree | None, *inputs: Any, **kwargs: Any
) -> int:
  """Returns the multiply-accumulates of a pass: those of convolutions and of products of matrices.

  Counted in the traced program, so attention's two products are in it, biases, norms and activations are not.
  Nothing is computed; arrays may be `jax.ShapeDtypeStruct`s. Of a batch of one they are the MACs of an image.

  Args:
    model: a network.
    variables: its collections. None: those of a network that is initialized with the same inputs, whose
      one trace is that of the pass as well (initializers draw, they multiply no matrices).
    *inputs: of a pass.
    **kwargs: of a pass.

  >>> import jax.numpy as jnp
  >>> from jaxlab.models import create
  >>> model, x = create('resnet50'), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  >>> round(multiply_accumulates(model, None, x) / 1e9, 2)
  4.09
  """
  if variables is None:
    init = functools.partial(model.init, **kwargs)
    return _count(jax.make_jaxpr(init)(jax.random.key(0), *inputs).jaxpr)
  apply = functools.partial(model.apply, **kwargs)
  return _count(jax.make_jaxpr(apply)(variables, *inputs).jaxpr)


def _count(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    params = equation.params
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      lhs = equation.invars[0].aval.shape
      total += equation.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)
    elif 'feature_group_count' in params and 'rhs_dilation' in params:
      kernel = equation.invars[1].aval
      outputs = kernel.shape[params['dimension_numbers'].rhs_spec[0]]
      total += equation.outvars[0].aval.size * (kernel.size // outputs)
    else:
      times = params.get('length', 1) if equation.primitive.name == 'scan' else 1
      total += times * sum(map(_count, _inner(params)))
  return total


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
  """Yields the programs within an equation's parameters, closed or not."""
  for value in params.values():
    for own in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(own, 'eqns'):
        yield getattr(own, 'jaxpr', own)


def num_parameters(variables: Mapping[str, PyTree]) -> int:
  """Returns the number of trained numbers, those of the collection `params`.

  Raises:
    ValueError: for variables without it, such as the parameters alone.
  """
  if 'params' not in variables:
    raise ValueError(
      f"variables has {', '.join(map(str, variables))}, expected the collection 'params': "
      "{'params': params} of parameters alone."
    )
  return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(variables['params']))


def paired_latency(
  sides: Mapping[str, Callable[[], Any]], repeats: int = 10, *, warmups: int = 2
) -> dict[str, float]:
  """Returns the median time of each side in seconds, the sides taken in turns.

  In turns, since what else a machine does then meets all sides alike: their ratios hold where single times do
  not. Each call is waited for.

  Args:
    sides: functions without arguments that return arrays, compiled ones for a start.
    repeats: timed calls of each.
    warmups: calls of each before, in which it compiles.

  Raises:
    ValueError: without sides, or for fewer than one repeat.
  """
  if not sides or repeats < 1:
    raise ValueError(f'expected sides and at least one repeat, got {len(sides)} and {repeats=}.')
  for _ in range(warmups):
    for run in sides.values():
      jax.block_until_ready(run())
  times: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(repeats):
    for name, run in sides.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  return {name: float(np.median(own)) for name, own in times.items()}
