"""Tokens between the blocks of frozen transformers, and what is made of them for another machine."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables

from jaxlab import adapters, models
from jaxlab.models import ViT
from jaxlab.models.vit import stack_blocks

FIELDS = {
  'patch_size': 4,
  'image_size': 8,
  'width': 8,
  'depth': 4,
  'num_heads': 2,
  'num_classes': 3,
}
IMAGES = jnp.asarray(random_images((2, 8, 8, 3)))


@pytest.fixture(scope='module')
def vit():
  model = ViT(**FIELDS)
  return model, random_variables(model, IMAGES)


def embedded(params):
  """Returns the tokens before the first block, by NumPy."""
  images = np.asarray(IMAGES, np.float64)
  patches = images.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, -1)
  embed = params['patch_embed']['proj']
  x = patches @ np.asarray(embed['kernel']).reshape(-1, 8) + embed['bias']
  cls = np.broadcast_to(params['cls_token'], (2, 1, 8))
  return np.concatenate([cls, x], 1) + params['pos_embed']


def test_collected_tokens_are_those_between_the_blocks(vit):
  model, variables = vit
  features = jax.jit(lambda v, x: adapters.collect_features(model, v, x))(variables, IMAGES)
  assert [z.shape for z in features] == [(2, 5, 8)] * 5
  assert_close(features[0], embedded(variables['params']), 1e-5)
  x = features[0]
  for i in range(4):
    x = models.vit.Block(2).apply({'params': variables['params'][f'blocks_{i}']}, x)
    assert_close(features[i + 1], x, 1e-5)
  grouped = adapters.collect_features(model, variables, IMAGES, gap=2)
  for found, expected in zip(grouped, features[::2], strict=True):
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize(
  'options', [{'remat': True}, {'scan': True}, {'remat': True, 'scan': True}]
)
def test_transformed_blocks_hand_on_the_same(vit, options):
  model, variables = vit
  other = ViT(**FIELDS, **options)
  own = variables
  if options.get('scan'):
    own = {'params': stack_blocks(variables['params'])}
  for a, b in zip(
    adapters.collect_features(other, own, IMAGES, gap=2),
    adapters.collect_features(model, variables, IMAGES, gap=2),
    strict=True,
  ):
    assert_close(a, b, 1e-5)


def test_no_gradient_reaches_the_network(vit):
  model, variables = vit
  side = adapters.init_attention_side_network(jax.random.key(0), 8, 4, rank=2, modules=1)
  side = jax.tree.map(lambda leaf: leaf + 0.1, side)

  def loss(v, own):
    features = adapters.collect_features(model, v, IMAGES)
    return jnp.sum(jnp.sin(adapters.apply_attention_side_network(own, features)))

  frozen, trained = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, side)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(trained))
  # Nothing of the network is kept for the backward pass: as much as with features that are given.
  features = adapters.collect_features(model, variables, IMAGES)
  given = adapters.residual_bytes(
    lambda own: jnp.sum(jnp.sin(adapters.apply_attention_side_network(own, features))), side
  )
  assert adapters.residual_bytes(lambda own: loss(variables, own), side) == given


def test_networks_with_stages_hand_on_maps_that_no_sum_is_made_of():
  model = models.create(
    'swin_tiny_patch4_window7_224', image_size=56, width=8, depths=(1, 1), num_heads=(2, 2)
  )
  images = jax.ShapeDtypeStruct((1, 56, 56, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  features = jax.eval_shape(lambda v, x: adapters.collect_features(model, v, x), variables, images)
  assert [z.shape for z in features] == [(1, 14, 14, 8), (1, 14, 14, 8), (1, 7, 7, 16)]
  with pytest.raises(ValueError, match='expected some, all of one shape'):
    jax.eval_shape(adapters.gather_sum, features)


def test_networks_without_blocks_and_gaps_that_do_not_divide_are_refused(vit):
  model, variables = vit
  with pytest.raises(ValueError, match='gap=3 does not divide the depth=4'):
    adapters.collect_features(model, variables, IMAGES, gap=3)
  with pytest.raises(ValueError, match='parts of Dense are not known'):
    adapters.collect_features(nn.Dense(3), {}, IMAGES)


def test_gathered_sums_are_those_of_the_layers_in_float32():
  rng = np.random.default_rng(0)
  features = [rng.standard_normal((2, 3, 4)).astype(np.float16) for _ in range(4)]
  for indices in (None, (0, 2), (3,)):
    chosen = range(4) if indices is None else indices
    expected = np.sum([features[i].astype(np.float64) for i in chosen], 0)
    found = adapters.gather_sum(features, indices, dtype=jnp.float32)
    assert_close(found, expected, 1e-6)
    assert adapters.gather_sum(features, indices).dtype == jnp.float16
  np.testing.assert_array_equal(adapters.gather_last(features), features[-1])
  # Partial sums of 6e4 + 3e4 overflow float16 on the way to 3e4.
  large = [jnp.full((1, 1, 1), x, jnp.float16) for x in (6e4, 3e4, -6e4)]
  assert float(adapters.gather_sum(large)[0, 0, 0]) == float(np.float16(3e4))
  joined = adapters.gather_concat(features)
  assert joined.shape == (2, 3, 16)
  for own, given in zip(adapters.split_layers(joined, 4), features, strict=True):
    np.testing.assert_array_equal(own, given)


def test_bytes_of_a_transfer_are_those_of_the_arrays():
  rng = np.random.default_rng(0)
  features = [rng.standard_normal((1, 5, 8)).astype(np.float32) for _ in range(5)]
  one, all_layers = adapters.gather_sum(features), adapters.gather_concat(features)
  assert adapters.transfer_bytes((5, 8)) == one.nbytes == features[0].nbytes
  assert adapters.transfer_bytes((5, 8), num_tensors=5) == all_layers.nbytes == 5 * one.nbytes
  assert adapters.transfer_bytes((5, 8), jnp.float16) == one.nbytes // 2
  assert adapters.transfer_bytes((5, 8), 'bfloat16') == one.nbytes // 2


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda z: adapters.gather_sum(z, ()), r'indices=\(\): expected different ones of 0..2'),
    (lambda z: adapters.gather_sum(z, (0, 3)), r'indices=\(0, 3\)'),
    (lambda z: adapters.gather_sum(z, (-1,)), r'indices=\(-1,\)'),
    (lambda z: adapters.gather_sum(z, (1, 1)), r'indices=\(1, 1\)'),
    (lambda z: adapters.gather_sum([]), 'shapes none'),
    (lambda z: adapters.gather_concat([z[0], z[1][:, :1]]), 'all of one shape'),
    (lambda z: adapters.split_layers(z[0], 3), 'does not divide into 3 layers'),
    (lambda z: adapters.leading_layers(5, 4), 'k=5: expected 0 to 4'),
    (lambda z: adapters.spaced_layers(4, 4), 'k=4: expected at least 2, with k - 1 a divisor'),
    (lambda z: adapters.spaced_layers(1, 4), 'k=1'),
    (lambda z: adapters.transfer_bytes((-1, 3)), r'shape=\(-1, 3\)'),
  ],
)
def test_what_cannot_be_gathered_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make([np.ones((1, 2, 4), np.float32)] * 3)


def test_both_readings_of_k_end_with_all_layers():
  assert adapters.leading_layers(4, 4) == adapters.spaced_layers(5, 4) == (0, 1, 2, 3, 4)
  assert adapters.spaced_layers(3, 4) == (0, 2, 4) and adapters.leading_layers(0, 4) == (0,)


PROGRAM = """
import sys
from jaxlab import adapters, data, losses, training
adapters.apply_edge_network, adapters.gather_sum, adapters.apply_attention_side_network
print([name for name in sys.modules if name.startswith('jaxlab.models')])
adapters.collect_features
print('jaxlab.models' in sys.modules)
"""


def test_edge_devices_load_no_networks():
  done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True, check=True)
  assert done.stdout.splitlines() == ['[]', 'True']
