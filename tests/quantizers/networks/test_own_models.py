"""Every method on models as their users have them: other variables, dtypes and ways to be called."""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from models.random_variables import random_variables

from jaxlab.models import Anatomy, Norm
from jaxlab.quantizers import (
  gptq_ptq,
  integer_network,
  lsq,
  percentile_ptq,
  ptq,
  repq,
  uniform_rules,
)
from jaxlab.quantizers.compensation import NBC, QwT, QwTv2, compensate

X = np.random.default_rng(0).normal(size=(48, 8)).astype(np.float32)
BLOCKS = ('block_0', 'block_1')
PARTS = Anatomy(
  ('stem',), BLOCKS, head=('head',), norms=[Norm(f'{b}/norm', readers=[f'{b}/fc1']) for b in BLOCKS]
)


class Block(nn.Module):
  """Keeps statistics and a cache, notes an intermediate value, drops activations in training."""

  dtype: Any = None

  @nn.compact
  def __call__(self, x, train=False):
    y = nn.LayerNorm(name='norm', dtype=self.dtype)(x)
    y = nn.Dense(8, name='fc1', dtype=self.dtype)(y)
    y = nn.BatchNorm(not train, name='bn', dtype=self.dtype)(y)
    y = nn.Dropout(0.5, deterministic=not train)(nn.relu(y))
    self.sow('intermediates', 'hidden', y)
    calls = self.variable('cache', 'calls', lambda: jnp.zeros((), jnp.int32))
    if self.is_mutable_collection('cache'):
      calls.value += 1
    return x + nn.Dense(8, name='fc2', dtype=self.dtype)(y)


class Own(nn.Module):
  """A model whose work is done by a method; takes a second input.

  Attributes:
    dtype: of the computation.
  """

  dtype: Any = None

  @nn.compact
  def features(self, x, aside=None, train=False):
    """Returns all but what follows."""
    x = nn.Dense(8, name='stem', dtype=self.dtype)(x)
    x = x if aside is None else x + aside
    for name in BLOCKS:
      x = Block(self.dtype, name=name)(x, train=train)
    return nn.Dense(3, name='head', dtype=self.dtype)(x)

  def __call__(self, x, aside=None, train=False):
    """Returns twice the features."""
    return 2 * self.features(x, aside=aside, train=train)


def narrow(dtype, tree):
  return jax.tree.map(lambda a: a.astype(dtype) if a.dtype == np.float32 else a, tree)


FLOAT = random_variables(Own(), X)
FLOAT = {**FLOAT, 'cache': jax.tree.map(np.zeros_like, FLOAT['cache'])}
FLOAT.pop('intermediates', None)
MODELS = {
  'plain': (Own(), FLOAT, [X[:32], X[32:]], {}),
  'frozen dict': (Own(), flax.core.freeze(FLOAT), [X[:32], X[32:]], {}),
  'bfloat16': (
    Own(jnp.bfloat16), narrow(jnp.bfloat16, FLOAT), [narrow(jnp.bfloat16, jnp.asarray(X))], {}
  ),
  'float16': (Own(), narrow(jnp.float16, FLOAT), [X.astype(np.float16)], {}),
  'float16 parameters': (Own(jnp.float32), narrow(jnp.float16, FLOAT), [X], {}),
  'dropout': (Own(), FLOAT, [X], {'rngs': {'dropout': jax.random.key(1)}}),
  'several inputs': (Own(), FLOAT, [(X[:32], X[:32]), (X[32:], X[32:])], {}),
  'method': (Own(), FLOAT, [X], {'method': 'features'}),
}  # fmt: skip
METHODS = (
  'ptq',
  'percentile_ptq',
  'repq',
  'gptq_ptq',
  'lsq',
  'QwT',
  'QwTv2',
  'NBC',
  'integer_network',
)


@functools.cache
def base(name, weights=8):
  model, variables, batches, options = MODELS[name]
  return percentile_ptq(
    model, variables, batches, uniform_rules(weights, 8), anatomy=PARTS, **options
  )


def quantize(method, name):
  model, variables, batches, options = MODELS[name]
  if method == 'percentile_ptq':
    return base(name)
  if method == 'integer_network':
    return integer_network(base(name))
  if method in ('QwT', 'QwTv2', 'NBC'):
    own = {'QwT': QwT(), 'QwTv2': QwTv2(), 'NBC': NBC()}[method]
    kept = {key: value for key, value in options.items() if key == 'rngs'}
    return compensate(base(name, 3), batches, own, anatomy=PARTS, dtype=jnp.float32, **kept)
  function = {'ptq': ptq, 'repq': repq, 'gptq_ptq': gptq_ptq, 'lsq': lsq}[method]
  rules = uniform_rules(8, None if method == 'ptq' else 8, learned=method == 'lsq')
  return function(model, variables, batches, rules, anatomy=PARTS, **options)


@pytest.mark.parametrize(('method', 'name'), tables.cells(METHODS, list(MODELS), 16))
def test_a_model_of_a_user_is_quantized(method, name):
  model, variables, batches, options = MODELS[name]
  found = quantize(method, name)
  args = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
  expected = np.asarray(model.apply(variables, *args, **options), np.float32)
  y = jax.jit(lambda own, *args: own(*args))(found, *args)
  assert y.dtype == model.apply(variables, *args, **options).dtype
  error = np.std(np.asarray(y, np.float32) - expected) / np.std(expected)
  bounds = {'lsq': 0.3, 'QwT': 0.8, 'QwTv2': 0.8, 'NBC': 0.8}
  assert 0 < error < bounds.get(method, 0.05)
  if method in ('QwT', 'QwTv2', 'NBC'):
    before = np.asarray(base(name, 3)(*args), np.float32)
    assert error < np.std(before - expected) / np.std(expected)
  kept = found.variables['cache'], found.variables['batch_stats']
  assert jax.tree.all(
    jax.tree.map(lambda a, b: np.all(a == b), kept, (variables['cache'], variables['batch_stats']))
  )


def test_what_a_model_writes_is_refused_and_intermediates_come_back():
  model, variables, batches, _ = MODELS['plain']
  with pytest.raises(ValueError, match=r"mutable=\['cache'\]: what a model writes"):
    percentile_ptq(model, variables, batches, uniform_rules(8, 8), mutable=['cache'])
  _, state = base('plain')(X, mutable=['intermediates'])
  assert state['intermediates']['block_1']['hidden'][0].shape == (48, 8)
