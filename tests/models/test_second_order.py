"""Second-order pooling: reference vectors, definitions, delicate maps, and heads over any network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close, golden
from models.random_variables import random_images, random_variables, run

from jaxlab import models
from jaxlab.models import (
  MapClassifier,
  SecondOrderHead,
  bilinear_pool,
  compact_bilinear,
  covariance_pool,
  draw_sketches,
  isqrt_cov,
  newton_schulz_sqrt,
  upper_triangle,
)

MAPS = random_images((3, 4, 5, 6))


def test_the_covariance_is_numpys_with_the_divisor_of_positions():
  for own, found in zip(MAPS, np.asarray(covariance_pool(MAPS)), strict=True):
    assert_close(found, np.cov(own.reshape(-1, 6).T.astype(np.float64), bias=True), 1e-5)


@golden('fgia', 'isqrt_cov')
def test_isqrt_cov_and_its_gradient_agree_with_official_code(vectors):
  iterations = vectors.param('iterations')
  x = jnp.asarray(np.moveaxis(vectors['in_feature_nchw'], 1, -1), jnp.float32)
  covariance = covariance_pool(x)
  assert_close(covariance, vectors['out_covariance'], 1e-5)
  assert_close(newton_schulz_sqrt(covariance, iterations), vectors['out_sqrt'], 1e-5)
  y, back = jax.vjp(lambda x: isqrt_cov(x, iterations), x)
  assert_close(y, vectors['out_vector_raw'].reshape(y.shape), 1e-5)
  (gradient,) = back(jnp.asarray(vectors['in_cotangent'], jnp.float32))
  assert_close(np.moveaxis(gradient, -1, 1), vectors['grad_feature'], 1e-5)


@golden('fgia', 'bilinear_pool')
def test_signed_bilinear_pooling_and_its_gradient_agree_with_official_code(vectors):
  x = jnp.asarray(np.moveaxis(vectors['in_feature_nchw'], 1, -1), jnp.float32)
  y, back = jax.vjp(lambda x: bilinear_pool(x, vectors.param('threshold'), signed=True), x)
  assert_close(y, vectors['out_vector'], 1e-5)
  (gradient,) = back(jnp.asarray(vectors['in_cotangent'], jnp.float32))
  assert_close(np.moveaxis(gradient, -1, 1), vectors['grad_feature'], 1e-5)


def test_a_sketch_is_the_convolution_of_the_sketches_at_every_position():
  hashes, signs = draw_sketches(3, 6, 16)
  z = np.zeros((3, 16))
  for batch, own in enumerate(MAPS.reshape(3, -1, 6).astype(np.float64)):
    for row in own:
      first, second = np.zeros(16), np.zeros(16)
      np.add.at(first, hashes[0], signs[0] * row)
      np.add.at(second, hashes[1], signs[1] * row)
      z[batch] += np.fft.ifft(np.fft.fft(first) * np.fft.fft(second)).real
  roots = np.sign(z) * np.sqrt(np.abs(z) + 1e-8)
  expected = roots / np.linalg.norm(roots, axis=1, keepdims=True)
  assert_close(compact_bilinear(jnp.asarray(MAPS), hashes, signs, 16), expected, 1e-4)


@pytest.mark.parametrize('channels, errors', [(6, (0.05, 0.01, 1e-3)), (24, (0.35, 0.15, 1e-3))])
def test_roots_come_closer_with_every_iteration(channels, errors):
  rng = np.random.default_rng(channels)
  vectors = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
  s = jnp.asarray((vectors * rng.uniform(1, 3, channels)) @ vectors.T, jnp.float32)
  found = []
  for iterations in (4, 5, 8):
    root = newton_schulz_sqrt(s, iterations)
    found.append(float(jnp.linalg.norm(root @ root - s) / jnp.linalg.norm(s)))
  assert found == sorted(found, reverse=True)
  assert all(error < bound for error, bound in zip(found, errors, strict=True)), found
  one = s / jnp.trace(s)
  expected = jnp.sqrt(jnp.trace(s)) * one @ (3 * jnp.eye(channels) - one) / 2
  assert_close(newton_schulz_sqrt(s, 1), expected, 1e-5)


@pytest.mark.parametrize('shape', tables.first([((2, 3, 3, 4),), ((2, 1, 1, 4),)]))
def test_constant_maps_have_zero_roots_and_finite_gradients(shape):
  x = jnp.full(shape, 0.7).at[1].set(0.0)
  for pool in (isqrt_cov, lambda x: bilinear_pool(x, 1e-8, signed=True)):
    y, back = jax.jit(lambda x, pool=pool: jax.vjp(pool, x))(x)
    assert not np.any(y[1])
    assert np.isfinite(y).all() and np.isfinite(back(jnp.ones_like(y))[0]).all()
  assert not np.any(isqrt_cov(x))


@pytest.mark.exhaustive
def test_transformations_and_low_precision_change_nothing_but_digits():
  x = jnp.asarray(MAPS)
  for pool in (isqrt_cov, lambda x: bilinear_pool(x, 1e-8, signed=True)):
    expected = pool(x)
    assert_close(jax.vmap(lambda one, pool=pool: pool(one[None])[0])(x), expected, 1e-5)
    low = pool(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    assert_close(low, expected, 0.05)


HEADS = {
  'mean': ({'pooling': 'mean'}, 4),
  'bilinear': ({'pooling': 'bilinear', 'reduction': 3}, 9),
  'compact': ({'pooling': 'compact_bilinear', 'sketch_dim': 10}, 10),
  'isqrt': ({'pooling': 'isqrt_cov', 'reduction': 3, 'iterations': 3}, 6),
  'cosine': ({'pooling': 'isqrt_cov', 'cosine': True}, 10),
}


@pytest.mark.parametrize('fields, dim', HEADS.values(), ids=HEADS)
def test_heads_classify_the_pooled_map(fields, dim):
  head, x = SecondOrderHead(5, **fields), jnp.asarray(MAPS[..., :4])
  variables = random_variables(head, x)
  pooled = run(head.clone(num_classes=None), variables, x)
  assert pooled.shape == (3, dim)
  fc = variables['params']['fc']
  if head.cosine:
    unit = [np.asarray(a) / np.linalg.norm(a, axis=i, keepdims=True)
            for a, i in ((pooled, 1), (fc['kernel'], 0))]  # fmt: skip
    expected = unit[0] @ unit[1]
  else:
    expected = pooled @ fc['kernel'] + fc['bias']
  assert_close(run(head, variables, x), expected, 1e-5)
  if head.reduction:
    kernel, stats = variables['params']['reduce']['kernel'], variables['batch_stats']['bn']
    bn = variables['params']['bn']
    y = x @ kernel[0, 0]
    y = np.maximum((y - stats['mean']) / np.sqrt(stats['var'] + 1e-5) * bn['scale'] + bn['bias'], 0)
    own = SecondOrderHead(None, head.pooling, iterations=head.iterations)
    assert_close(own.apply({}, jnp.asarray(y)), pooled, 1e-4)


@pytest.mark.parametrize(
  'name, fields, path',
  [
    ('resnet18', {'stage_sizes': (1, 1), 'width': 4, 'strides': (1, 1)}, None),
    ('vgg11', {'stage_sizes': (1, 1), 'widths': (4, 6), 'hidden': None}, 'blocks_1_0'),
    ('vit_tiny_patch16_224', {'width': 8, 'depth': 1, 'num_heads': 2, 'image_size': 32}, None),
  ],
)  # fmt: skip
def test_any_network_stands_under_a_head(name, fields, path):
  backbone = models.create(name, num_classes=None, **fields)
  model = MapClassifier(backbone, SecondOrderHead(3, reduction=5), map_path=path)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
  assert shapes['params']['head']['fc']['kernel'].shape == (15, 3)
  assert shapes['params']['head']['reduce']['kernel'].shape[-1] == 5


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: covariance_pool(MAPS[0]), r'\[batch, height, width, channels\]'),
    (lambda: isqrt_cov(MAPS.astype(int)), 'x must be floats'),
    (lambda: isqrt_cov(MAPS, 0), 'iterations=0'),
    (lambda: newton_schulz_sqrt(MAPS), r'square matrices \[..., n, n\], got \(3, 4, 5, 6\)'),
    (lambda: upper_triangle(np.eye(2, dtype=int)), 's must be floats'),
    (lambda: compact_bilinear(MAPS, np.zeros((2, 5), int), np.ones((2, 5)), 4), r'\[2, 6\]'),
    (lambda: compact_bilinear(MAPS, np.full((2, 6), 4), np.ones((2, 6)), 4), 'dim - 1 = 3'),
    (lambda: compact_bilinear(MAPS, np.zeros((2, 6), int), np.ones((2, 6)), 0), 'dim=0'),
    (lambda: SecondOrderHead(3, 'covariance'), "pooling='covariance', expected one of mean"),
    (lambda: SecondOrderHead(3, reduction=0), 'reduction=0'),
    (lambda: SecondOrderHead(0), 'num_classes=0'),
  ],
)
def test_what_cannot_be_pooled_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
