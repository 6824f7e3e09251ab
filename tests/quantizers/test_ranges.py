import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.quantizers import AffineQuantizer, params_from_range, ranges


def observed(observer, *batches):
  state = observer.init()
  for batch in batches:
    state = jax.jit(observer.update)(state, batch)
  return observer.range(state)


@golden('quantisers', 'observers')
def test_observers_agree_with_ssql_toolbox(vectors):
  bits = vectors.param('bits')
  kinds = {
    'minmax': ranges.min_max_observer,
    'momentum_minmax': ranges.averaged_running_min_max_observer,
    'gaussian': ranges.gaussian_observer,
  }
  with jax.enable_x64(True):
    batches = [jnp.asarray(vectors[f'in_batch{i}']) for i in (1, 2)]
    for granularity in ('layerwise', 'channelwise'):
      per = {'granularity': 'channel', 'axis': 1} if granularity == 'channelwise' else {}
      quantizer = AffineQuantizer(bits, 'asymmetric', **per)
      for kind, make in kinds.items():
        low, high = observed(make(quantizer), *batches)
        params = params_from_range(quantizer, low, high)
        values = {'min': low, 'max': high, 'scale': params.scale, 'zero_point': params.zero_point}
        for name, value in values.items():
          assert_close(value.squeeze(), vectors[f'out_{name}_{kind}_{granularity}'], 1e-9)
    quantizer = AffineQuantizer(bits, 'asymmetric')
    low, high = ranges.mse_ternary_range(quantizer, batches[0])
    params = params_from_range(quantizer, low, high)
    values = {'min': low, 'max': high, 'scale': params.scale, 'zero_point': params.zero_point}
    for name, value in values.items():
      assert_close(value.squeeze(), vectors[f'out_{name}_mse_ternary'], 1e-9)
    low, high = ranges.top_k_percentile_range(
      quantizer, jnp.concatenate(batches), vectors.param('percentile_alpha')
    )
    assert_close(low.squeeze(), vectors['out_min_topk_percentile'], 1e-6)
    assert_close(high.squeeze(), vectors['out_max_topk_percentile'], 1e-6)


@golden('quantisers', 'omse_percentile_log2')
def test_searches_agree_with_fq_vit(vectors):
  quantizer = AffineQuantizer(vectors.param('bits'), 'asymmetric_clipped')
  x1, x2 = jnp.asarray(vectors['in_x1']), jnp.asarray(vectors['in_x2'])

  def check(name, low, high, bounds=True):
    params = params_from_range(quantizer, low, high)
    assert_close(params.scale.squeeze(), vectors[f'out_{name}_scale'], 2e-6)
    assert_close(params.zero_point.squeeze(), vectors[f'out_{name}_zero_point'], 2e-6)
    if bounds:
      assert_close(low.squeeze(), vectors[f'out_{name}_min'], 2e-6)
      assert_close(high.squeeze(), vectors[f'out_{name}_max'], 2e-6)

  check('omse', *ranges.mse_range(quantizer, x1), bounds=False)
  check('percentile', *observed(ranges.quantile_observer(quantizer), x1, x2))
  check('ema', *observed(ranges.averaged_min_max_observer(quantizer), x1, x2))
  params = ranges.power_of_two_factor(jnp.asarray(vectors['in_ptf']), vectors.param('bits'))
  assert_close(params.scale.squeeze(), vectors['out_ptf_scale'], 2e-6)
  assert_close(params.zero_point.squeeze(), vectors['out_ptf_zero_point'], 2e-6)


def error(x, quantizer, bounds):
  return float(jnp.mean(ranges._squared_error(quantizer, x, params_from_range(quantizer, *bounds))))


@pytest.mark.parametrize('seed', range(3))
def test_searches_beat_the_extremes_on_heavy_tails(seed):
  rng = np.random.default_rng(seed)
  for x in (rng.laplace(size=20000), rng.standard_t(5, size=20000)):
    x = jnp.asarray(x, jnp.float32)
    quantizer = AffineQuantizer(4, 'asymmetric')
    plain = error(x, quantizer, ranges.min_max(quantizer, x))
    percentile = error(x, quantizer, ranges.percentile_range(quantizer, x))
    omse = error(x, quantizer, ranges.mse_range(quantizer, x))
    assert omse < percentile < plain


def test_channels_are_searched_one_by_one():
  x = jax.random.t(jax.random.key(0), 4.0, (200, 3)) * jnp.array([1.0, 10.0, 0.1])
  channel = AffineQuantizer(4, 'asymmetric', 'channel')
  tensor = AffineQuantizer(4, 'asymmetric')
  for search in (ranges.mse_range, ranges.percentile_range):
    low, high = search(channel, x)
    for c in range(3):
      expected = search(tensor, x[:, c])
      np.testing.assert_allclose(low[0, c], expected[0].squeeze(), rtol=1e-5)
      np.testing.assert_allclose(high[0, c], expected[1].squeeze(), rtol=1e-5)


def test_an_observer_that_saw_nothing_gives_no_parameters():
  observer = ranges.min_max_observer(AffineQuantizer())
  with pytest.raises(ValueError, match='not finite'):
    params_from_range(AffineQuantizer(), *observer.range(observer.init()))


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: ranges.quantile_observer(AffineQuantizer(granularity='channel')), "'tensor' alone"),
    (lambda: ranges.quantile_observer(AffineQuantizer(), quantile=0.2), r'quantile=0.2 must lie'),
    (lambda: ranges.percentile_range(AffineQuantizer(), jnp.ones(3), quantiles=()), 'at least one'),
    (
      lambda: ranges.mse_ternary_range(AffineQuantizer(granularity='channel'), jnp.ones((2, 2))),
      "'tensor' alone",
    ),
    (lambda: ranges.averaged_min_max_observer(AffineQuantizer(granularity='token')), 'token'),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
