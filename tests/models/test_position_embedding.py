import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.models.position_embedding import bicubic_matrix, resample_position_embedding


def check(vectors, dtype, rtol):
  grid = vectors.param('new_grid')
  with jax.enable_x64(dtype == 'float64'):
    pos_embed = jnp.asarray(vectors['in_pos_embed'], dtype)
    out = resample_position_embedding(pos_embed, grid if isinstance(grid, int) else tuple(grid))
    assert out.dtype == dtype
    assert_close(out, vectors['out_pos_embed'], rtol)


@golden('idmm', 'pos_embed_interpolation')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-9), ('float32', 1e-5)])
def test_square_grids_agree_with_reference(vectors, dtype, rtol):
  check(vectors, dtype, rtol)


@golden('peft_protocols', 'pos_embed_resize')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-9), ('float32', 1e-5)])
def test_any_grid_agrees_with_reference(vectors, dtype, rtol):
  check(vectors, dtype, rtol)


def test_same_grid_and_prefix_tokens_stay():
  pos_embed = jax.random.normal(jax.random.key(0), (1, 2 + 6, 5))
  out = resample_position_embedding(pos_embed, (2, 3), num_prefix_tokens=2, old_grid=(2, 3))
  np.testing.assert_array_equal(out, pos_embed)
  out = resample_position_embedding(pos_embed, (4, 3), num_prefix_tokens=2, old_grid=(2, 3))
  assert out.shape == (1, 14, 5)
  np.testing.assert_array_equal(out[:, :2], pos_embed[:, :2])


@pytest.mark.parametrize('old, new', [(7, 14), (14, 7), (5, 8), (1, 3)])
def test_weights_sum_to_one_and_keep_linear_ramps_inside(old, new):
  matrix = bicubic_matrix(old, new)
  np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
  assert (np.count_nonzero(matrix, axis=1) <= 4).all()


def test_resampling_is_linear_and_traces():
  pos_embed = jax.random.normal(jax.random.key(0), (1, 10, 3))
  resample = jax.jit(lambda p: resample_position_embedding(p, 5))
  assert_close(resample(3 * pos_embed), 3 * resample(pos_embed), 1e-5)
  gradient = jax.grad(lambda p: resample_position_embedding(p, 5).sum())(pos_embed)
  assert_close(gradient[:, :1], jnp.ones((1, 1, 3)), 1e-6)
  assert_close(gradient[:, 1:].sum(1), jnp.full((1, 3), 25.0), 1e-5)
  low = resample_position_embedding(pos_embed.astype(jnp.bfloat16), 5)
  assert low.dtype == jnp.bfloat16
  assert_close(low, resample(pos_embed), 0.02)


def test_tokens_that_are_no_grid_raise():
  with pytest.raises(ValueError, match=r'holds 9 tokens; without 1 prefix tokens'):
    resample_position_embedding(jnp.ones((1, 9, 2)), 4)  # a square only without a class token
  with pytest.raises(ValueError, match='no grid of 2 x 5'):
    resample_position_embedding(jnp.ones((1, 10, 2)), 4, old_grid=(2, 5))
