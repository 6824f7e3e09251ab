import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from jaxlab.compression import distinct_labels, require_recognized, synthesize, variation


def test_variation_is_the_sum_over_four_directions():
  x = np.random.default_rng(0).normal(size=(2, 4, 5, 3))
  total = 0.0
  for rows, columns in ((0, 1), (1, 0), (1, 1), (1, -1)):
    squares = [
      np.sum((x[:, i, j] - x[:, i + rows, j + columns]) ** 2)
      for i in range(4 - rows)
      for j in range(5)
      if 0 <= j + columns < 5
    ]
    total += np.sum(squares) ** 0.3
  assert_close(variation(x, 0.6), total, 1e-5)


@pytest.mark.exhaustive
def test_flat_images_have_no_variation_and_a_finite_gradient():
  value, slope = jax.value_and_grad(variation)(jnp.ones((1, 3, 3, 1)), 0.6)
  assert value == 0 and np.all(np.isfinite(slope))


def linear(images):
  weights = jax.random.normal(jax.random.key(3), (6 * 6 * 1, 4))
  return images.reshape(len(images), -1) @ weights / 6


def test_images_are_recognized_and_valid_and_those_of_the_lowest_loss():
  labels = distinct_labels(jax.random.key(1), 8, 4)
  make = jax.jit(
    lambda key: synthesize(
      key, linear, labels, (6, 6, 1), low=-1.0, high=2.0, steps=60, warmup_steps=5, shift=0,
      learning_rate=0.1, flip=False, variation_weight=1e-3,
    )
  )  # fmt: skip
  images, history = make(jax.random.key(0))
  assert images.shape == (8, 6, 6, 1) and images.min() >= -1 and images.max() <= 2
  assert history.shape == (60,) and history[-1] < 0.5 * history[0]
  assert require_recognized(linear(images), labels) == 1.0
  errors = -jnp.take_along_axis(jax.nn.log_softmax(linear(images)), labels[:, None], 1).mean()
  norms = jnp.linalg.norm(images.reshape(8, -1), axis=1).mean()
  assert_close(errors + 1e-3 * variation(images) + 1e-5 * norms, history.min(), 1e-5)


def test_labels_are_of_different_classes():
  found = np.asarray(distinct_labels(jax.random.key(0), 10, 4))
  assert sorted(np.bincount(found, minlength=4)) == [2, 2, 3, 3]
  assert len(set(np.asarray(distinct_labels(jax.random.key(0), 50, 1000)).tolist())) == 50


def made(**changes):
  given = {'labels': jnp.arange(2), 'steps': 2, 'warmup_steps': 0, 'shift': 0, **changes}
  labels = given.pop('labels')
  return synthesize(jax.random.key(0), linear, labels, (6, 6, 1), low=0.0, high=1.0, **given)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: made(labels=jnp.zeros(2)), 'labels must be integers'),
    (lambda: made(steps=5, warmup_steps=5), 'warmup_steps=5, steps=5'),
    (lambda: made(shift=6), 'shift=6'),
    (lambda: made(learning_rate=0.0), 'learning_rate=0.0'),
    (lambda: variation(jnp.ones((1, 1, 4, 1))), 'of 2x2 or more'),
    (lambda: variation(jnp.ones((1, 2, 4, 1)), 0.0), 'power=0.0'),
    (lambda: distinct_labels(jax.random.key(0), 0, 4), 'count=0'),
    (lambda: require_recognized(jnp.eye(2), jnp.array([0, 0])), 'recognizes 50% of the images'),
  ],
)
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_an_image_of_zeros_has_a_gradient():
  # Kept at zeros by its range, where the norm has no derivative of its own.
  images, history = synthesize(
    jax.random.key(0), lambda x: jnp.zeros((len(x), 2)), jnp.zeros(1, jnp.int32), (4, 4, 1),
    low=0.0, high=0.0, steps=3, warmup_steps=1, shift=0,
  )  # fmt: skip
  assert np.isfinite(history).all() and not np.any(images)
