"""RepQ rescales a norm with all that read it, or refuses; the float network stays the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from models.random_variables import call, random_variables

from jaxlab.models import Anatomy, HookPoint, Norm
from jaxlab.quantizers import Rule, repq, uniform_rules

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 5, 6)).astype(np.float32)


class Parallel(nn.Module):
  """Branches that read one norm: layers, one of them without a bias, and perhaps the residual sum.

  Attributes:
    residual: whether the sum reads the norm, too.
    conv: whether a convolution does.
  """

  residual: bool = False
  conv: bool = False

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm(name='norm')(x)
    z = nn.tanh(nn.Dense(4, name='a')(y)) @ jnp.ones((4, 6))
    z += nn.DenseGeneral((2, 3), use_bias=False, name='b')(y).reshape(x.shape)
    z += y if self.residual else 0
    z += nn.Conv(6, (3,), name='conv')(y) if self.conv else 0
    return nn.Dense(3, name='head')(x + z)


class OneNorm(nn.Module):
  """The norm of all branches is one; the second reads values of another size."""

  @nn.compact
  def __call__(self, x):
    norm = nn.LayerNorm(name='norm', epsilon=1.0)
    x = x + nn.Dense(6, name='a')(norm(x))
    return nn.Dense(3, name='head')(nn.Dense(6, name='b')(norm(10 * x)))


def variables_of(model):
  """Channels of the norm differ by a factor of 30."""
  variables = random_variables(model, X)
  norm = variables['params']['norm']
  norm['scale'] = (norm['scale'] * np.geomspace(0.2, 6, 6)).astype(np.float32)
  return variables


def parts(*readers):
  return Anatomy(head=('head',), norms=[Norm('norm', readers=readers)])


@pytest.mark.parametrize(
  ('readers', 'rules'), tables.cells([('a',), ('b',), ('a', 'b')], ['all', 'a', 'b'], 3)
)
def test_all_readers_make_up_for_the_rescaled_norm(readers, rules):
  model = Parallel()
  variables = variables_of(model)
  own = uniform_rules(8, 8, path='.*' if rules == 'all' else rules)
  found = repq(model, variables, X, own, anatomy=parts(*readers))
  expected = jax.jit(model.apply)(variables, X)
  scale = found.float_variables['params']['norm']['scale']
  assert np.ptp(np.log(scale)) < 0.7 * np.ptp(np.log(variables['params']['norm']['scale']))
  np.testing.assert_allclose(found.in_float()(X), expected, rtol=1e-4, atol=1e-4)
  assert np.std(call(found, X) - expected) < 0.03 * np.std(expected)
  inputs = {path for path in 'ab' if 'input' in found.variables['quantization'].get(path, {})}
  assert inputs == ({'a', 'b'} if rules == 'all' else {rules})


def test_a_norm_that_something_else_reads_is_named():
  model = Parallel(residual=True)
  with pytest.raises(
    ValueError, match=r"Rescaling 'norm' \(by 0?.* moves the outputs of the float network"
  ):
    repq(model, variables_of(model), X, uniform_rules(8, 8), anatomy=parts('a', 'b'))
  model = Parallel(conv=True)
  with pytest.raises(ValueError, match=r"'conv' \(Conv\) reads the norm 'norm', too"):
    repq(model, variables_of(model), X, uniform_rules(8, 8), anatomy=parts('a', 'b'))
  found = repq(model, variables_of(model), X, uniform_rules(8, 8), anatomy=parts())
  np.testing.assert_allclose(
    found.in_float()(X), jax.jit(model.apply)(variables_of(model), X), atol=1e-4
  )


@pytest.mark.exhaustive
def test_a_norm_of_several_calls_has_the_ranges_of_all():
  model = OneNorm()
  variables = variables_of(model)
  found = repq(model, variables, X, uniform_rules(8, 8), anatomy=parts('a', 'b'))
  expected = jax.jit(model.apply)(variables, X)
  np.testing.assert_allclose(found.in_float()(X), expected, rtol=1e-4, atol=1e-4)
  assert np.std(call(found, X) - expected) < 0.03 * np.std(expected)
  # One range for both readers: what the norm gives in either call, after the transform.
  first, second = (found.variables['quantization'][path]['input'] for path in 'ab')
  for name in ('scale', 'zero_point'):
    np.testing.assert_array_equal(first[name], second[name])
  norm = found.float_variables['params']['norm']
  layer_norm = nn.LayerNorm(epsilon=1.0)
  x = (
    X
    + jax.jit(layer_norm.apply)({'params': norm}, X)
    @ found.float_variables['params']['a']['kernel']
  )
  x = x + found.float_variables['params']['a']['bias']
  rows = [jax.jit(layer_norm.apply)({'params': norm}, values) for values in (X, 10 * x)]
  low, high = (-first['zero_point'] * first['scale'], (255 - first['zero_point']) * first['scale'])
  assert low < 0.9 * min(map(np.min, rows)) and high > 0.9 * max(map(np.max, rows))


def test_hook_points_between_a_norm_and_its_readers_are_no_readers():
  class Pointed(nn.Module):
    @nn.compact
    def __call__(self, x):
      y = HookPoint(name='point')(nn.LayerNorm(name='norm')(x))
      return nn.Dense(3, name='head')(nn.Dense(6, name='a')(y) + nn.Dense(6, name='b')(y))

  model = Pointed()
  found = repq(model, variables_of(model), X, [Rule('.*', 'input', 8)], anatomy=parts('a'))
  expected = model.apply(variables_of(model), X)
  np.testing.assert_allclose(found.in_float()(X), expected, rtol=1e-4, atol=1e-4)
