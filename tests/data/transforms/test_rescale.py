import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxlab import data


@pytest.mark.exhaustive
def test_an_image_loses_detail_as_in_pil():
  image = np.random.default_rng(0).random((24, 24, 1)).astype(np.float32)
  rescale = jax.jit(data.random_rescale, static_argnames='low')
  sides = set()
  for seed in range(8):
    key = jax.random.key(seed)
    small = int(jax.random.randint(key, (), 10, 25))
    sides.add(small)
    picture = Image.fromarray(image[..., 0])
    for side in (small, 24):
      pixels = np.clip(np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)), 0, 1)
      picture = Image.fromarray(pixels)
    found = rescale(key, image, low=10)[..., 0]
    np.testing.assert_allclose(found, np.asarray(picture), atol=2e-3)
  assert len(sides) > 3
  np.testing.assert_allclose(data.random_rescale(jax.random.key(0), image, 24), image, atol=1e-6)


@pytest.mark.parametrize(('shape', 'low'), [((8, 6, 1), 4), ((8, 8, 1), 0), ((8, 8, 1), 9)])
def test_impossible_arguments_are_named(shape, low):
  with pytest.raises(ValueError, match='expected a square'):
    data.random_rescale(jax.random.key(0), jnp.zeros(shape), low)
