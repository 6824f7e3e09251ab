import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import losses
from jaxlab.models import masked_autoencoder as mae


@pytest.fixture(params=['float32', 'float64'])
def rtol(request):
  """Runs a test in both precisions; the tolerance of each."""
  with jax.enable_x64(request.param == 'float64'):
    yield {'float32': 1e-5, 'float64': 1e-9}[request.param]


def features(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


random_masking = jax.jit(mae.random_masking, static_argnums=1)


@golden('ssl_baselines', 'mae_pieces')
def test_masked_autoencoder_pieces_agree_with_reference(vectors, rtol):
  images = jnp.asarray(vectors['in_images_nchw']).transpose(0, 2, 3, 1)
  patch_size = vectors.param('patch_size')
  patches = mae.patchify(images, patch_size)
  assert_close(patches, vectors['out_patches'], rtol)
  restored = mae.unpatchify(jnp.asarray(vectors['out_patches']), patch_size)
  assert_close(restored.transpose(0, 3, 1, 2), vectors['out_unpatchified'], rtol)
  keep, mask, restore = random_masking(vectors['in_noise'], vectors.param('mask_ratio'))
  np.testing.assert_array_equal(mask, vectors['out_mask'])
  np.testing.assert_array_equal(restore, vectors['out_ids_restore'])
  kept = jax.jit(mae.keep_tokens)(vectors['in_tokens'], keep)
  assert_close(kept, vectors['out_tokens_kept'], rtol)
  for name, normalize in (('raw', False), ('normpix', True)):
    loss = functools.partial(losses.mae_loss, normalize_patches=normalize)
    value, grad = jax.jit(jax.value_and_grad(loss))(vectors['in_pred'], patches, mask)
    assert_close(value, vectors[f'out_loss_{name}'], rtol)
    assert_close(grad, vectors[f'grad_pred_{name}'], rtol)


@golden('ssl_baselines', 'mae_sincos_pos_embed')
def test_sincos_position_code_agrees_with_reference(vectors, rtol):
  code = mae.sincos_2d(
    vectors.param('dim'),
    vectors.param('grid'),
    class_token=True,
    dtype=jnp.result_type(float),
  )
  assert_close(code, vectors['out_pos_embed_with_cls'], rtol)


def test_position_code_of_a_rectangle_has_columns_first():
  code = mae.sincos_2d(8, (2, 3))
  assert code.shape == (6, 8)
  grid = np.asarray(code).reshape(2, 3, 8)
  assert np.array_equal(grid[0, :, :4], grid[1, :, :4])
  assert np.array_equal(grid[:, 0, 4:], grid[:, 1, 4:])


def test_unpatchify_inverts_patchify_on_rectangles():
  images = features(0, 2, 4, 6, 3)
  patches = mae.patchify(images, 2)
  assert patches.shape == (2, 6, 12)
  assert np.array_equal(mae.unpatchify(patches, 2, grid=(2, 3)), images)


def test_restoring_puts_kept_tokens_back_and_mask_tokens_elsewhere():
  tokens, noise = features(0, 2, 8, 3), jax.random.uniform(jax.random.key(0), (2, 8))
  keep, mask, restore = random_masking(noise, 0.5)
  kept = jax.jit(mae.keep_tokens)(tokens, keep)
  full = jax.jit(mae.restore_tokens)(kept, np.full(3, 9.0), restore)
  assert np.array_equal(full, jnp.where(mask[..., None] == 1, 9.0, tokens))
  assert np.array_equal(jnp.sum(mask, axis=1), [4, 4])


def test_loss_reads_only_masked_patches():
  predictions, patches = features(0, 2, 4, 6), features(1, 2, 4, 6)
  mask = jnp.array([[1, 0, 0, 1], [0, 0, 0, 1]])
  grad = jax.jit(jax.grad(losses.mae_loss))(predictions, patches, mask)
  assert np.array_equal(np.any(grad != 0, axis=-1), mask == 1)
  assert float(losses.mae_loss(predictions, patches, jnp.zeros((2, 4)))) == 0


def test_loss_of_constant_patches_is_finite_when_standardized():
  loss = functools.partial(losses.mae_loss, normalize_patches=True)
  constant, mask = np.ones((1, 4, 6), np.float32), np.ones((1, 4))
  value, grad = jax.jit(jax.value_and_grad(loss))(features(0, 1, 4, 6), constant, mask)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))


def test_loss_agrees_eagerly_and_in_bfloat16():
  arguments = features(0, 2, 4, 6), features(1, 2, 4, 6), np.ones((2, 4), np.float32)
  loss = jax.jit(functools.partial(losses.mae_loss, normalize_patches=True))
  value = loss(*arguments)
  assert_close(losses.mae_loss(*arguments, normalize_patches=True), value, 1e-6)
  half = loss(*(a.astype(jnp.bfloat16) for a in arguments))
  assert half.dtype == jnp.float32
  assert_close(half, value, 2e-2)


PATCHES = np.ones((2, 6, 12))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: mae.patchify(np.ones((1, 8, 9, 3)), 4), 'multiples of patch_size'),
    (lambda: mae.patchify(np.ones((8, 8, 3)), 4), 'batch, height'),
    (lambda: mae.unpatchify(PATCHES, 2), 'pass grid'),
    (lambda: mae.unpatchify(PATCHES, 2, grid=(2, 2)), 'grid of 2x2'),
    (lambda: mae.unpatchify(PATCHES, 5, grid=(2, 3)), 'whole channels'),
    (lambda: mae.random_masking(np.ones((2, 8)), 1.0), r'\[0, 1\)'),
    (lambda: mae.random_masking(np.ones((2, 8)), 0.95), 'keeps none'),
    (lambda: mae.sincos_2d(6, 2), 'multiple of 4'),
    (lambda: losses.mae_loss(PATCHES, PATCHES, np.ones((2, 5))), 'mask must be'),
    (lambda: losses.mae_loss(PATCHES, PATCHES[:, :3], np.ones((2, 3))), 'one shape'),
    (
      lambda: losses.mae_loss(
        PATCHES[..., :1], PATCHES[..., :1], np.ones((2, 6)), normalize_patches=True
      ),
      'at least 2 values',
    ),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()
