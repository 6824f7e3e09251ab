import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.quantizers.compensation.channel_affine import (
  ChannelAffine,
  apply_channel_affine,
  channel_affine_errors,
  fit_channel_affine,
  gate_channel_affine,
  init_channel_affine_stats,
  merge_channel_affine_stats,
  solve_channel_affine,
  update_channel_affine_stats,
)


def outputs(n=64, channels=5, seed=0):
  rng = np.random.default_rng(seed)
  full = rng.standard_normal((n, 3, channels)).astype(np.float32)
  return (0.7 * full + 0.3 * rng.standard_normal(full.shape) - 0.2).astype(np.float32), full


def squares(y, full, axis=-1):
  return np.mean(np.moveaxis(np.asarray(y - full), axis, -1) ** 2, axis=tuple(range(y.ndim - 1)))


@golden('qwt_v2', 'channel_affine')
@pytest.mark.parametrize('x64', [True, False])
def test_channel_affine_fit_agrees_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 1e-5
  with jax.enable_x64(x64):
    quant, full = jnp.asarray(vectors['in_y_quant']), jnp.asarray(vectors['in_y_full'])
    axis = vectors.param('channel_axis')
    for fit in (fit_channel_affine, jax.jit(fit_channel_affine, static_argnums=2)):
      affine = fit(quant, full, axis)
      assert_close(affine.gamma, vectors['out_gamma'], rtol)
      assert_close(affine.beta, vectors['out_beta'], rtol)
    new = apply_channel_affine(quant, affine, axis)
    assert_close(new, vectors['out_y_compensated'], rtol)
    stats = init_channel_affine_stats(quant.shape[axis])
    stats = update_channel_affine_stats(stats, quant, full, axis)
    identity = ChannelAffine(jnp.ones_like(affine.gamma), jnp.zeros_like(affine.beta))
    assert_close(channel_affine_errors(stats, identity), vectors['out_mse_before'], rtol)
    assert_close(channel_affine_errors(stats, affine), vectors['out_mse_after'], rtol)
    assert_close(squares(new, full, axis), vectors['out_mse_after'], rtol)


@pytest.mark.parametrize('seed', range(4))
def test_no_channel_gets_worse_on_the_rows_of_the_fit(seed):
  quant, full = outputs(seed=seed)
  quant[..., 1] = 3.1  # constant
  quant[..., 2] = full[..., 2]  # exact
  new = apply_channel_affine(quant, fit_channel_affine(quant, full))
  assert np.all(squares(new, full) <= squares(quant, full) * (1 + 1e-6) + 1e-12)


def test_streamed_and_merged_statistics_are_those_of_all_rows_at_once():
  quant, full = outputs()
  once = update_channel_affine_stats(init_channel_affine_stats(5), quant, full)
  stream = init_channel_affine_stats(5)
  for i in range(0, 64, 16):
    stream = update_channel_affine_stats(stream, quant[i : i + 16], full[i : i + 16])
  halves = [
    update_channel_affine_stats(
      init_channel_affine_stats(5), quant, full, weights=jnp.asarray(np.arange(64) % 2 == i)
    )
    for i in (0, 1)
  ]
  for other in (stream, merge_channel_affine_stats(*halves)):
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), other, once)


def test_constant_channels_are_found_in_float32_however_large():
  quant, full = outputs()
  quant[..., 0] = 12345.678
  affine = fit_channel_affine(quant, full)
  assert float(affine.gamma[0]) == 1
  assert_close(affine.beta[0], full[..., 0].mean() - 12345.678, 1e-6)


def test_large_means_cost_no_precision():
  quant, full = outputs(512)
  affine = fit_channel_affine(quant + 1000, full)
  q = (quant + np.float32(1000)).astype(np.float64).reshape(-1, 5)
  f = full.astype(np.float64).reshape(-1, 5)
  centered = q - q.mean(0)
  assert_close(affine.gamma, (centered * f).sum(0) / (centered**2).sum(0), 1e-4)


def test_clipped_gamma_keeps_its_sign_and_warns():
  full = np.linspace(-1, 1, 20, dtype=np.float32)[:, None] * np.array([-100.0, 1.0], np.float32)
  quant = np.linspace(-1, 1, 20, dtype=np.float32)[:, None] * np.ones(2, np.float32)
  stats = update_channel_affine_stats(init_channel_affine_stats(2), quant, full)
  with pytest.warns(RuntimeWarning, match='gamma of 1 channels'):
    affine = solve_channel_affine(stats, clip=True)
  assert_close(affine.gamma, [-16.0, 1.0], 1e-5)
  assert_close(solve_channel_affine(stats).gamma, [-100.0, 1.0], 1e-5)


def test_held_out_gate_keeps_the_identity_where_the_fit_harms():
  quant, full = outputs()
  full = full.copy()
  full[1::2, :, 3] = quant[1::2, :, 3]  # held out rows of channel 3 are exact as they are
  even, odd = (
    update_channel_affine_stats(init_channel_affine_stats(5), quant[i::2], full[i::2])
    for i in (0, 1)
  )
  fit = solve_channel_affine(even)
  gated = gate_channel_affine(fit, fit, odd)
  assert float(gated.gamma[3]) == 1 and float(gated.beta[3]) == 0
  np.testing.assert_array_equal(np.delete(gated.gamma, 3), np.delete(fit.gamma, 3))


def test_bad_arguments_raise():
  quant, full = outputs()
  with pytest.raises(ValueError, match='differ in shape'):
    fit_channel_affine(quant, full[1:])
  with pytest.raises(ValueError, match='axis=3 is not an axis'):
    fit_channel_affine(quant, full, 3)
  with pytest.raises(ValueError, match='axis=-4'):
    apply_channel_affine(quant, ChannelAffine(jnp.ones(5), jnp.zeros(5)), -4)
  with pytest.raises(ValueError, match='at least two rows'):
    fit_channel_affine(quant[:1, :1], full[:1, :1])
  with pytest.raises(ValueError, match='not finite'):
    fit_channel_affine(quant * np.nan, full)
  with pytest.raises(ValueError, match='Statistics of 4 channels'):
    update_channel_affine_stats(init_channel_affine_stats(4), quant, full)
