import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden

from jaxlab import data, parallel
from jaxlab.data.transforms.mixup import mix_images, mixup, mixup_loss
from jaxlab.parallel import aot

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@pytest.mark.parametrize('x64', [True, False])
@golden('btm', 'mixup')
def test_mixed_images_and_loss_agree_with_reference(vectors, x64):
  with jax.enable_x64(x64):
    rtol = 1e-9 if x64 else 2e-6
    dtype = jnp.float64 if x64 else jnp.float32
    permutation, lam = vectors['in_permutation'], vectors.param('lambda')
    images = jnp.asarray(vectors['in_images_nhwc'], dtype)
    mixed = jax.jit(mix_images)(images, permutation, lam)
    assert_close(mixed, vectors['out_mixed_images'], rtol)

    def loss(logits):
      values = mixup_loss(cross_entropy, logits, vectors['in_labels'], permutation, lam)
      assert values.shape == vectors['in_labels'].shape
      return jnp.mean(values)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(vectors['in_logits'], dtype))
    assert_close(value, vectors['out_loss'], rtol)
    assert_close(gradient, vectors['grad_logits'], rtol)


@golden('s3l', 'mixup')
def test_partners_and_mixed_loss_agree_with_reference(vectors):
  with jax.enable_x64(True):
    permutation, lam = vectors['in_perm'], vectors.param('lambda')
    images = jnp.asarray(vectors['in_images_nchw'].transpose(0, 2, 3, 1))
    mixed = jax.jit(mix_images)(images, permutation, lam)
    assert_close(mixed, vectors['out_mixed'].transpose(0, 2, 3, 1), 1e-9)
    np.testing.assert_array_equal(vectors['in_labels'][permutation], vectors['out_labels_b'])

    def loss(logits):
      return jnp.mean(mixup_loss(cross_entropy, logits, vectors['in_labels'], permutation, lam))

    value, gradient = jax.jit(jax.value_and_grad(loss))(vectors['in_logits'])
    assert_close(value, vectors['out_loss'], 1e-9)
    assert_close(gradient, vectors['grad_logits'], 1e-9)


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.vmap, in_axes=(0, None))
def _draw(key, alpha):
  return mixup(key, jnp.eye(5), alpha)


@pytest.mark.parametrize('alpha', [0.2, 1.0])
def test_coefficient_and_partners_follow_their_law(alpha):
  mixed, permutation, lam = map(np.asarray, _draw(jax.random.split(jax.random.key(0), 4000), alpha))
  assert (np.sort(permutation, axis=1) == np.arange(5)).all()
  assert abs(np.mean(permutation == np.arange(5)) - 0.2) < 0.02
  # Mean and variance of Beta(alpha, alpha).
  assert abs(lam.mean() - 0.5) < 0.03
  assert abs(lam.var() / (0.25 / (2 * alpha + 1)) - 1) < 0.1
  expected = lam[:, None, None] * np.eye(5) + (1 - lam)[:, None, None] * np.eye(5)[permutation]
  assert_close(mixed, expected, 1e-6)


@pytest.mark.parametrize('alpha', [-1.0, float('nan')])
def test_a_negative_alpha_is_refused(alpha):
  with pytest.raises(ValueError, match=f'alpha={alpha}: expected a number of at least 0'):
    mixup(jax.random.key(0), jnp.ones((2, 1)), alpha)


def test_without_alpha_the_images_stay():
  images = jnp.asarray([[jnp.inf], [1.0], [2.0]])
  mixed, permutation, lam = mixup(jax.random.key(0), images, 0)
  np.testing.assert_array_equal(mixed, images)
  assert permutation.tolist() == [0, 1, 2] and float(lam) == 1 and lam.dtype == jnp.float32


def test_bfloat16_images_are_mixed_in_float32():
  images = jax.random.uniform(jax.random.key(1), (6, 2, 2, 1)).astype(jnp.bfloat16)
  mixed, permutation, lam = mixup(jax.random.key(2), images, 1.0)
  exact = mix_images(images.astype(jnp.float32), permutation, lam)
  assert mixed.dtype == jnp.bfloat16
  np.testing.assert_array_equal(mixed, exact.astype(jnp.bfloat16))


@pytest.mark.exhaustive
def test_result_does_not_depend_on_the_mesh():
  images = jax.random.uniform(jax.random.key(1), (16, 2))
  mix = jax.jit(mixup, static_argnums=2)
  expected = mix(jax.random.key(2), images, 0.5)
  mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  for a, b in zip(mix(jax.random.key(2), jax.device_put(images, rows), 0.5), expected):
    assert_close(a, b, 1e-6)


def test_bad_input_is_named():
  key = jax.random.key(0)
  for alpha in (0, 0.2):
    with pytest.raises(ValueError, match='dtype uint8, expected floats'):
      mixup(key, jnp.zeros((2, 2, 2, 1), jnp.uint8), alpha)
    with pytest.raises(ValueError, match='images is a scalar'):
      mixup(key, 1.0, alpha)
  with pytest.raises(ValueError, match=r'permutation has shape \(3,\), expected \(2,\)'):
    mix_images(jnp.zeros((2, 4)), jnp.arange(3), 0.5)


def test_an_image_can_be_at_least_half_of_its_mixture():
  images = jnp.arange(4.0)[:, None]
  for seed in range(8):
    _, order, lam = mixup(jax.random.key(seed), images, 0.5)
    mixed, same, share = mixup(jax.random.key(seed), images, 0.5, own_half=True)
    np.testing.assert_array_equal(order, same)
    np.testing.assert_allclose(share, max(lam, 1 - lam), rtol=1e-6)
    np.testing.assert_allclose(mixed, mix_images(images, order, share), rtol=1e-6)


@pytest.mark.parametrize('mix', [mixup, data.cutmix])
def test_partners_may_be_those_of_the_mirrored_batch(mix):
  images = jax.random.normal(jax.random.key(7), (5, 6, 6, 2))
  found = mix(jax.random.key(0), images, 0.7, partners='flip')
  np.testing.assert_array_equal(found[1], [4, 3, 2, 1, 0])
  own = mix(jax.random.key(0), images, 0.7)
  assert found[2] == own[2]  # the same share
  if mix is mixup:
    np.testing.assert_array_equal(found[0], mix_images(images, found[1], found[2]))
  else:
    changed = np.asarray(found[0] != images)
    np.testing.assert_array_equal(found[0], np.where(changed, images[::-1], images))
    assert changed.any()
  with pytest.raises(ValueError, match="partners='next': expected 'permutation' or 'flip'"):
    mix(jax.random.key(0), images, 0.7, partners='next')


@pytest.mark.parametrize('mix', [mixup, data.cutmix])
def test_mirrored_partners_are_exchanged_by_pairs_of_devices(mix):
  split = parallel.batch_sharding(parallel.make_mesh(devices=jax.devices()[:8]))
  moved = {}
  for partners in ('permutation', 'flip'):
    function = jax.jit(
      functools.partial(mix, alpha=1.0, partners=partners), in_shardings=(None, split)
    )
    shapes = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((64, 8, 8, 3), 'f4')
    moved[partners] = aot.collectives(function.lower(*shapes).compile().as_text())
  assert 'all-gather' not in moved['flip']
  assert moved['flip']['collective-permute']['bytes'] == 64 // 8 * 8 * 8 * 3 * 4
  assert moved['permutation']['all-gather']['bytes'] >= 64 * 8 * 8 * 3 * 4
