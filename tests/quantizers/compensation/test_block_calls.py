"""Blocks however they are called and whatever they return: which array is compensated, from which."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from models.random_variables import call, random_variables

from jaxlab.models import Anatomy
from jaxlab.quantizers import percentile_ptq, uniform_rules
from jaxlab.quantizers.compensation import QwT, QwTv2, compensate

X = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
PARTS = Anatomy(('stem',), ('block_0', 'block_1'), head=('head',))


class Block(nn.Module):
  """A block of two arguments, of which `x` is its input, though `bias` comes first in the alphabet.

  Attributes:
    returns: what it returns besides.
  """

  returns: str = 'array'

  @nn.compact
  def __call__(self, x, bias=None):
    y = x + nn.Dense(6, name='fc2')(nn.relu(nn.Dense(6, name='fc1')(inputs=x))) + bias
    return {
      'array': y,
      'tuple': (3, jnp.arange(2), y, None),
      'dict': {'aux': jnp.ones((7,)), 'cache': None, 'y': y},
      'twins': {'a': 2 * y, 'b': y},
      'nothing': None,
    }[self.returns]


class Network(nn.Module):
  """Two blocks.

  Attributes:
    returns: see `Block`.
    keywords: whether they are called by keywords.
  """

  returns: str = 'array'
  keywords: bool = True

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, name='stem')(x)
    for name in PARTS.block_paths:
      bias, block = 0.1 * jnp.ones_like(x), Block(self.returns, name=name)
      y = block(bias=bias, x=x) if self.keywords else block(x, bias)
      if isinstance(y, dict):
        y = y.get('y', y.get('b'))
      x = y[2] if isinstance(y, tuple) else x if y is None else y
    return nn.Dense(3, name='head')(x)


def run(method, returns='array', keywords=True):
  model = Network(returns, keywords)
  quantized = percentile_ptq(model, random_variables(model, X), X, uniform_rules(2, 8))
  return compensate(quantized, [X[:40], X[40:]], method, anatomy=PARTS, dtype=jnp.float32)


@functools.cache
def plain(method):
  return run(method, keywords=False)


@pytest.mark.parametrize(
  ('method', 'returns'),
  tables.cells([QwT(), QwTv2(), QwTv2('block')], ['array', 'tuple', 'dict'], 3),
)
def test_the_compensation_is_that_of_plain_calls(method, returns):
  found, expected = run(method, returns), plain(method)
  for own, right in zip(
    jax.tree.leaves(found.variables), jax.tree.leaves(expected.variables), strict=True
  ):
    np.testing.assert_allclose(own, right, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(call(found, X), call(expected, X), rtol=1e-4, atol=1e-4)
  assert np.all(found.report.error_after < found.report.error_before)


def test_what_cannot_be_told_is_named():
  with pytest.raises(
    ValueError, match=r"'block_0' returns .*'a': .*'b': .* which array goes on to the next"
  ):
    run(QwT(), 'twins')
  with pytest.raises(ValueError, match=r"'block_0' returns .* of no array"):
    run(QwT(), 'nothing')

  class Loose(nn.Module):
    @nn.compact
    def __call__(self, **values):
      return nn.Dense(6, name='fc')(values['x']) + values['bias']

  class Around(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Loose(name='block_0')(x=x, bias=jnp.ones(6))

  model = Around()
  quantized = percentile_ptq(model, random_variables(model, X), X, uniform_rules(4, 8))
  with pytest.raises(
    ValueError, match=r"'block_0' is called with .* which array are its activations"
  ):
    compensate(quantized, X, QwT(), blocks='block_0')
