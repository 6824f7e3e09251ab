import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.random_variables import run_capture

from jaxlab import models
from jaxlab.models import masked_autoencoder


def small_vit(**options):
  return models.ViT(patch_size=4, image_size=16, width=8, depth=2, num_heads=2, **options)


@pytest.fixture(scope='module')
def trained():
  images = jax.random.normal(jax.random.key(0), (3, 16, 16, 1))
  vit = small_vit()
  return vit, vit.init(jax.random.key(1), images), images


def test_an_encoder_that_sees_all_patches_is_the_plain_network(trained):
  vit, variables, images = trained
  order = jnp.stack([jax.random.permutation(jax.random.key(i), 16) for i in range(3)])
  tokens = masked_autoencoder.encode_visible(vit, variables, images, order)
  _, plain = run_capture(vit, variables, ['norm'], images)
  np.testing.assert_allclose(tokens[:, 0], plain['norm'][:, 0], rtol=1e-4, atol=1e-5)
  for i in range(3):
    expected = plain['norm'][i, 1:][order[i]]
    np.testing.assert_allclose(tokens[i, 1:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_hidden_patches_change_nothing(trained):
  vit, variables, images = trained
  keep = jnp.asarray([[0, 5, 9]] * 3)
  patches = masked_autoencoder.patchify(images, 4)
  others = jnp.setdiff1d(jnp.arange(16), keep[0])
  blank = masked_autoencoder.unpatchify(patches.at[:, others].set(7.0), 4)
  seen = [masked_autoencoder.encode_visible(vit, variables, x, keep) for x in (images, blank)]
  assert seen[0].shape == (3, 4, 8)
  np.testing.assert_array_equal(*seen)


def test_an_encoder_under_scan_is_refused(trained):
  _, variables, images = trained
  with pytest.raises(ValueError, match='scan=False'):
    masked_autoencoder.encode_visible(
      small_vit(scan=True), variables, images, jnp.zeros((3, 2), jnp.int32)
    )


@pytest.mark.exhaustive
def test_the_decoder_puts_patches_back_where_they_were():
  decoder = masked_autoencoder.MAEDecoder(4, (2, 3), channels=2, width=8, depth=1, num_heads=2)
  noise = jax.random.uniform(jax.random.key(0), (2, 6))
  keep, _, restore = masked_autoencoder.random_masking(noise, 0.5)
  patches = jax.random.normal(jax.random.key(1), (2, 7, 5))  # the class token and 6 patches

  def tokens(order):
    rows = masked_autoencoder.keep_tokens(patches[:, 1:], order)
    return jnp.concatenate([patches[:, :1], rows], 1)

  variables = jax.jit(decoder.init)(jax.random.key(2), tokens(keep), restore)
  pixels = decoder.apply(variables, tokens(keep), restore)
  assert pixels.shape == (2, 6, 32)
  # The same patches kept in another order are the same picture.
  swapped = keep[:, ::-1]
  places = jnp.where(restore < 3, 2 - restore, restore)
  np.testing.assert_allclose(
    decoder.apply(variables, tokens(swapped), places), pixels, rtol=1e-4, atol=1e-5
  )


@pytest.mark.exhaustive
def test_hidden_patches_are_told_apart_by_their_places():
  decoder = masked_autoencoder.MAEDecoder(4, (2, 3), channels=2, width=8, depth=1, num_heads=2)
  restore = jnp.arange(6)[None]
  tokens = jax.random.normal(jax.random.key(0), (1, 3, 5))  # the class token and two of six patches
  variables = jax.jit(decoder.init)(jax.random.key(1), tokens, restore)
  assert variables['params']['mask_token'].ndim == 3  # so that it is decayed
  pixels = decoder.apply(variables, tokens, restore)[0]
  distances = np.abs(pixels[2:, None] - pixels[None, 2:]).max(-1)
  assert np.all(distances[~np.eye(4, dtype=bool)] > 1e-3)
