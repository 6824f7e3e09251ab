import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import data, parallel
from jaxlab.data.transforms.image import apply_separable


def _image(shape=(9, 7, 3), seed=0):
  return np.random.default_rng(seed).random(shape, np.float32)


def test_example_keys_depend_on_step_and_record_alone():
  key = jax.random.key(0)
  indices = jnp.array([4, 9, 2])
  keys = jax.random.key_data(data.example_keys(key, 7, indices))
  turned = jax.random.key_data(data.example_keys(key, 7, indices[::-1]))
  np.testing.assert_array_equal(keys[::-1], turned)
  alone = jax.random.fold_in(jax.random.fold_in(key, 7), 9)
  np.testing.assert_array_equal(keys[1], jax.random.key_data(alone))
  assert (jax.random.key_data(data.example_keys(key, 8, indices)) != keys).any(axis=1).all()


def test_composed_functions_run_in_order_with_their_own_keys():
  seen = []

  def note(key, image):
    seen.append(np.asarray(jax.random.key_data(key)).tolist())
    return image

  double, increase = data.deterministic(lambda x: 2 * x), data.deterministic(lambda x, y: x + y, 1)
  out = data.compose(note, double, increase, note)(jax.random.key(0), jnp.full((1, 1, 1), 3.0))
  assert out.item() == 7.0 and seen[0] != seen[1]


def test_random_apply_chooses_with_its_probability():
  keys = jax.random.split(jax.random.key(0), 2000)
  flip = data.random_apply(0.8, data.deterministic(lambda x: 1 - x))
  out = jax.jit(jax.vmap(flip, (0, None)))(keys, jnp.zeros((1, 1, 1)))
  assert abs(out.mean() - 0.8) < 0.04 and set(np.unique(out)) == {0.0, 1.0}


@pytest.mark.parametrize(
  ('augment', 'changed'),
  [
    (data.random_flip, lambda x: x[:, ::-1]),
    (data.random_grayscale, lambda x: np.repeat(x @ [[0.2989], [0.587], [0.114]], 3, axis=-1)),
    (data.random_solarize, lambda x: np.where(x >= 0.5, 1 - x, x)),
  ],
)
def test_coin_augmentations_change_all_or_nothing(augment, changed):
  image = _image()
  image[0, 0] = 0.5  # solarized at the threshold itself
  keys = jax.random.split(jax.random.key(1), 300)
  out = np.asarray(jax.jit(jax.vmap(augment, (0, None)))(keys, image))
  is_changed = np.abs(out - changed(image)).max(axis=(1, 2, 3)) < 1e-6
  is_same = (out == image).all(axis=(1, 2, 3))
  assert (is_changed ^ is_same).all()
  assert 0.1 < is_changed.mean() < 0.6


@pytest.mark.exhaustive
def test_rotation_turns_a_picture_around_its_center():
  image = np.zeros((5, 5, 1), np.float32)
  image[2, 4] = 1.0  # to the right of the center
  keys = jax.random.split(jax.random.key(0), 200)
  turned = jax.jit(jax.vmap(lambda key: data.random_rotation(key, image, np.pi / 2)))(keys)
  angles = np.asarray(
    jax.vmap(lambda key: jax.random.uniform(key, (), minval=-np.pi / 2, maxval=np.pi / 2))(keys)
  )
  row, column = np.meshgrid(range(5), range(5), indexing='ij')
  total = np.asarray(turned).sum((1, 2, 3))
  center = [(np.asarray(turned)[..., 0] * grid).sum((1, 2)) / total for grid in (row, column)]
  right = np.abs(angles) < 0.9 * np.pi / 2
  np.testing.assert_array_less(center[0][right & (angles > 0.3)], 2)  # counterclockwise is up
  assert (center[0][right & (angles < -0.3)] > 2).all()
  np.testing.assert_array_equal(data.random_rotation(keys[0], image, 0.0), image)
  with pytest.raises(ValueError, match='limit is -1'):
    data.random_rotation(keys[0], image, -1)


def test_noise_has_the_deviation_that_is_asked_for():
  image = np.full((100, 100, 1), 0.5, np.float32)
  noisy = data.random_noise(jax.random.key(0), image, 0.2)
  assert abs(np.std(noisy) - 0.2) < 0.01 and abs(np.mean(noisy) - 0.5) < 0.01
  with pytest.raises(ValueError, match='std is -1'):
    data.random_noise(jax.random.key(0), image, -1)


def test_gray_images_stay_as_they_are():
  image = _image((4, 4, 1))
  np.testing.assert_array_equal(data.grayscale(image), image)


@pytest.mark.parametrize(('sigma', 'kernel_size'), [(0.1, 3), (0.7, 5), (2.0, 7), (1.3, 13)])
def test_blur_agrees_with_a_padded_convolution(sigma, kernel_size):
  image = _image()
  radius = kernel_size // 2
  taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
  taps /= taps.sum()
  padded = np.pad(image.astype(np.float64), ((radius,) * 2, (radius,) * 2, (0, 0)), mode='reflect')
  expected = np.zeros(image.shape)
  for dy in range(kernel_size):
    for dx in range(kernel_size):
      expected += taps[dy] * taps[dx] * padded[dy : dy + 9, dx : dx + 7]
  blur = jax.jit(data.gaussian_blur, static_argnums=2)
  np.testing.assert_allclose(blur(image, sigma, kernel_size), expected, atol=2e-6)


def test_blur_draws_a_sigma_for_each_image():
  image = np.zeros((9, 9, 1), np.float32)
  image[4, 4] = 1
  keys = jax.random.split(jax.random.key(0), 100)
  blur = functools.partial(data.random_gaussian_blur, sigma=(0.5, 2.0), kernel_size=9)
  out = jax.jit(jax.vmap(blur, (0, None)))(keys, image)
  sigma = np.sqrt(0.5 / np.log(np.asarray(out[:, 4, 4, 0] / out[:, 4, 5, 0])))
  assert 0.499 < sigma.min() < 0.55 and 1.95 < sigma.max() < 2.01


def test_separable_filter_is_the_double_sum():
  image, rows, columns = _image((3, 4, 2)), _image((5, 3), 1), _image((2, 4), 2)
  expected = np.einsum('ph,qw,hwc->pqc', rows, columns, image)
  np.testing.assert_allclose(apply_separable(image, rows, columns), expected, rtol=1e-5)


def test_normalization_is_per_channel():
  image = _image()
  mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
  expected = (image - np.array(mean)) / np.array(std)
  np.testing.assert_allclose(data.normalize(image, mean, std), expected, rtol=1e-5, atol=1e-6)
  half = data.normalize(jnp.asarray(image, jnp.bfloat16), 0.5, 0.5)
  assert half.dtype == jnp.bfloat16


def test_bytes_become_floats_in_the_unit_interval():
  values = jnp.arange(256, dtype=jnp.uint8)
  np.testing.assert_allclose(data.to_float(values), np.arange(256) / 255, rtol=1e-6)
  assert data.to_float(values, jnp.bfloat16).dtype == jnp.bfloat16
  floats = jnp.ones(3)
  np.testing.assert_array_equal(data.to_float(floats), floats)


@pytest.mark.exhaustive
def test_the_same_views_on_one_and_on_eight_devices():
  augment = data.compose(data.random_crop, data.random_flip)
  images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
  index = np.arange(16, dtype=np.int32)

  @jax.jit
  def views(images, index):
    return jax.vmap(augment)(data.example_keys(jax.random.key(0), 3, index), data.to_float(images))

  sharding = parallel.batch_sharding(jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,)))
  many = views(*jax.device_put((images, index), sharding))
  assert len(many.sharding.device_set) == 8
  np.testing.assert_allclose(many, views(images, index), atol=1e-6)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda k, x: data.gaussian_blur(x, 1.0, 4), 'kernel_size is 4, expected a positive odd'),
    (lambda k, x: data.gaussian_blur(x, 1.0, 23), 'more than 11 pixels a side'),
    (lambda k, x: data.random_gaussian_blur(k, x, (0.0, 1.0), 3), r'sigma is \(0.0, 1.0\)'),
    (lambda k, x: data.random_apply(1.5, data.random_flip), 'probability is 1.5'),
    (
      lambda k, x: data.random_apply(0.5, lambda k, x: x[:3])(k, x),
      'keeps shape and dtype',
    ),
    (lambda k, x: data.compose(), 'at least one'),
    (lambda k, x: data.normalize(x, (0.1, 0.2), 1.0), 'mean has 2 values, .* 3 channels'),
    (lambda k, x: data.normalize(x, 0.0, 0.0), 'std is 0.0'),
    (
      lambda k, x: data.normalize(jnp.uint8(x), 0.5, 0.5),
      'images has dtype uint8, expected floats',
    ),
    (lambda k, x: data.to_float(x.astype(jnp.int32)), 'images have dtype int32'),
    (lambda k, x: data.grayscale(x[..., :2]), '2 channels'),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(jax.random.key(0), jnp.asarray(_image()))
