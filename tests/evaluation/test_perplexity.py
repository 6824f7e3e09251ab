import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from jaxlab.evaluation.language import perplexity


def test_perplexity_is_the_exponential_of_the_mean_over_what_counts():
  losses = np.random.default_rng(0).uniform(0, 3, (4, 5))
  mask = np.random.default_rng(1).integers(0, 2, (4, 5))
  with jax.enable_x64(True):
    assert_close(perplexity(losses), np.exp(losses.mean()), 1e-12)
    assert_close(jax.jit(perplexity)(losses, mask), np.exp(losses[mask == 1].mean()), 1e-12)
    rows = np.array([True, False, True, True])
    assert_close(perplexity(losses, rows), np.exp(losses[rows].mean()), 1e-12)


def test_what_does_not_count_may_be_anything_and_nothing_counting_is_nan():
  assert_close(perplexity([1.0, np.inf], [1, 0]), np.e, 1e-6)
  assert np.isnan(perplexity([1.0, 2.0], [0, 0]))


def test_uniform_guessing_has_the_vocabulary_and_bfloat16_gives_float32():
  value = perplexity(jnp.full((2, 300), np.log(256), jnp.bfloat16))
  assert value.dtype == jnp.float32
  assert_close(value, 256, 0.02)


def test_a_mask_of_other_axes_raises():
  with pytest.raises(ValueError, match=r'mask \(3,\) must have the first axes'):
    perplexity(np.zeros((2, 3)), np.ones(3))
