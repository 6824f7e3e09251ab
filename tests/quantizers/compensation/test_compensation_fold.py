import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from models.random_variables import call, random_images, random_variables

from jaxlab import models, quantizers
from jaxlab.quantizers import compensation

X = random_images((16, 8, 8, 3))
NETWORKS = {
  'vit': (
    models.ViT(patch_size=4, image_size=8, width=8, depth=1, num_heads=2, num_classes=3),
    quantizers.repq,
  ),
  'resnet': (
    models.ResNet(stage_sizes=(1,), width=4, stem='cifar', num_classes=3),
    quantizers.percentile_ptq,
  ),
}


@functools.cache
def compensated(name):
  """The network compensated at its layers; one channel's factor is negative."""
  model, quantize = NETWORKS[name]
  variables = random_variables(model, X)
  quantized = quantize(model, variables, X, quantizers.edge_rules(4, 4))
  found = compensation.compensate(quantized, [X], compensation.QwTv2())
  tree = found.variables['compensation']
  path, leaf = jax.tree.leaves_with_path(tree)[-1]
  assert path[-1].key == 'gamma'
  flipped = leaf.at[0].multiply(-1)
  tree = jax.tree.map_with_path(lambda p, a: flipped if p == path else a, tree)
  return found.update(compensation=tree)


@pytest.mark.parametrize('name', tables.few(NETWORKS, 'resnet'))
def test_folded_network_is_the_compensated_one_with_the_codes_it_had(name):
  before = compensated(name)
  after = compensation.fold_compensation(before)
  assert 'compensation' not in after.variables and len(after.hooks) == len(before.hooks) - 1
  run = jax.jit(lambda network: network(X))
  expected, folded = run(before), run(after)
  # Rounding may move an element over a tie of a later quantizer, by one of its 16 steps.
  close = np.isclose(folded, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
  assert close.mean() > 0.9 and np.allclose(folded, expected, atol=0.1 * np.abs(expected).max())

  def codes(network):
    network = quantizers.integer_network(network)
    leaves = jax.tree.leaves(
      network.variables, is_leaf=lambda leaf: isinstance(leaf, quantizers.QuantizedArray)
    )
    return [leaf.codes for leaf in leaves if isinstance(leaf, quantizers.QuantizedArray)]

  plain = before.update(compensation={})
  old, new = codes(plain), codes(after)
  assert len(old) > 3
  for a, b in zip(old, new, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.exhaustive
def test_what_is_no_scale_and_shift_of_a_layer_is_refused():
  model, quantize = NETWORKS['vit']
  variables = random_variables(model, X)
  quantized = quantize(model, variables, X, quantizers.edge_rules(4, 4))
  for method in (compensation.QwT(), compensation.QwTv2(granularity='block')):
    found = compensation.compensate(quantized, [X], method, dtype=jnp.float32)
    with pytest.raises(ValueError, match="'blocks_0' cannot be folded"):
      compensation.fold_compensation(found)


class Up(nn.Module):
  """A block whose layer has its outputs on the second last axis of the kernel."""

  @nn.compact
  def __call__(self, x):
    x = nn.ConvTranspose(3, (3, 3), transpose_kernel=True, name='up')(x)
    return nn.relu(x)


class Ups(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Up(name='block')(x)


def test_transposed_kernels_are_scaled_on_the_axis_of_their_outputs():
  model = Ups()
  quantized = quantizers.percentile_ptq(
    model, random_variables(model, X), X, quantizers.uniform_rules(3)
  )
  method = compensation.QwTv2(recalibrate=False)
  before = compensation.compensate(quantized, [X], method, blocks='block', dtype=jnp.float32)
  tree = jax.tree.map(lambda a: a * jnp.array([1.0, -2.0, 0.5]), before.variables['compensation'])
  before = before.update(compensation=tree)
  after = compensation.fold_compensation(before)
  np.testing.assert_allclose(call(after, X), call(before, X), rtol=1e-4, atol=1e-5)
  codes = [
    network.variables['params']['block']['up']['kernel']
    / network.variables['quantization']['block']['up']['kernel']['scale']
    for network in (before, after)
  ]
  np.testing.assert_allclose(*codes, rtol=1e-4, atol=1e-4)
