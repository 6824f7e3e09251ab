import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import data

PLAIN = {
  'scale': (1.0, 1.0),
  'jitter': None,
  'grayscale_probability': 0.0,
  'blur_probability': 0.0,
  'flip_probability': 0.0,
}


@pytest.mark.parametrize(
  ('option', 'value', 'check'),
  [
    (
      'solarize_probability',
      1.0,
      lambda x, y: np.allclose(y, np.where(x >= 0.5, 1 - x, x), atol=1e-5),
    ),
    ('noise', 0.1, lambda x, y: 0.05 < np.std(y - x) < 0.15),
    ('rotation', 0.5, lambda x, y: np.abs(y - x).max() > 0.01),
  ],
)
def test_options_that_are_off_by_default_do_what_they_say(option, value, check):
  image = jax.random.uniform(jax.random.key(0), (12, 12, 1))
  keys = jax.random.split(jax.random.key(1), 1)
  square = {**PLAIN}
  plain = data.draw_views(data.resized_crop_augment(12, **square), keys, image[None], 1)[0]
  changed = data.draw_views(
    data.resized_crop_augment(12, **square, **{option: value}), keys, image[None], 1
  )[0]
  assert jnp.shape(changed) == (1, 12, 12, 1)
  whole = np.abs(np.asarray(plain) - np.asarray(image)).max() < 1e-4
  assert whole  # the crop is the whole square, whatever its drawn ratio, or this test says nothing
  assert check(np.asarray(plain), np.asarray(changed))
