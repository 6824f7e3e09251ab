import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close, golden

from jaxlab.quantizers import AffineQuantizer, params_from_range
from jaxlab.quantizers.numerics import ranges


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
  quantizer = AffineQuantizer(vectors.param('bits'), 'asymmetric_clipped', hold_zero=False)
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
  x = jnp.asarray(vectors['in_ptf'])
  params = ranges.power_of_two_factor(x, vectors.param('bits'), hold_zero=False)
  assert_close(params.scale.squeeze(), vectors['out_ptf_scale'], 2e-6)
  assert_close(params.zero_point.squeeze(), vectors['out_ptf_zero_point'], 2e-6)


def error(x, quantizer, bounds):
  return float(jnp.mean(ranges._squared_error(quantizer, x, params_from_range(quantizer, *bounds))))


@pytest.mark.parametrize('seed', tables.first(range(3)))
def test_searches_beat_the_extremes_on_heavy_tails(seed):
  rng = np.random.default_rng(seed)
  for x in (rng.laplace(size=20000), rng.standard_t(5, size=20000)):
    x = jnp.asarray(x, jnp.float32)
    quantizer = AffineQuantizer(4, 'asymmetric')
    plain = error(x, quantizer, ranges.min_max(quantizer, x))
    percentile = error(x, quantizer, ranges.percentile_range(quantizer, x))
    omse = error(x, quantizer, ranges.mse_range(quantizer, x))
    assert omse < percentile < plain


@pytest.mark.exhaustive
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


OBSERVERS = [
  ranges.min_max_observer,
  ranges.averaged_running_min_max_observer,
  ranges.averaged_min_max_observer,
  ranges.gaussian_observer,
]
KINDS = [(make, per) for make in OBSERVERS for per in ('tensor', 'channel')]


@pytest.mark.parametrize(
  ('make', 'granularity'), tables.some([*KINDS, (ranges.quantile_observer, 'tensor')], 3)
)
def test_a_state_made_for_a_batch_is_carried_through_scan(make, granularity):
  observer = make(AffineQuantizer(4, 'asymmetric', granularity))
  batches = jax.random.normal(jax.random.key(0), (3, 8, 5), jnp.bfloat16)
  start = observer.init(jax.ShapeDtypeStruct(batches.shape[1:], batches.dtype))
  assert int(start.batches) == 0 and np.all(np.isinf(start.minimum))
  scanned, _ = jax.lax.scan(lambda s, x: (observer.update(s, x), None), start, batches)
  assert int(scanned.batches) == 3
  for a, b in zip(observer.range(scanned), observed(observer, *batches)):
    assert a.shape == b.shape
    assert_close(a, b, 1e-6)


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


@pytest.mark.parametrize(
  'search',
  tables.first([ranges.mse_range, ranges.mse_ternary_range, ranges.percentile_range]),
  ids=lambda search: search.__name__,
)
def test_searches_on_bfloat16_are_those_of_its_values_in_float32(search):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), jnp.bfloat16)
  quantizer = AffineQuantizer(bits=4, rule='asymmetric')
  found, expected = search(quantizer, x), search(quantizer, x.astype(jnp.float32))
  assert found[0].dtype == jnp.float32
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_top_k_counts_over_all_elements_and_cuts_each_channel_or_group_alone():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(150, 4)), jnp.float32)
  quantizer = AffineQuantizer(granularity='channel', axis=-1)
  low, high = ranges.top_k_percentile_range(quantizer, x, 0.01)  # 6 of 600: 1 of a channel
  largest = np.abs(x).max(0, keepdims=True)
  np.testing.assert_array_equal(low, np.maximum(np.min(x, 0, keepdims=True), -largest))
  np.testing.assert_array_equal(high, np.minimum(np.max(x, 0, keepdims=True), largest))
  groups = AffineQuantizer(granularity='group', axis=0, group_size=50)
  low, _ = ranges.top_k_percentile_range(groups, x, 0.05)  # 30 of 600: 2 of a group
  cut = np.sort(np.abs(x.reshape(3, 50, 4)), 1)[:, -2]
  assert np.all(np.abs(low).reshape(3, 4) <= cut + 1e-7)


def test_averaged_extremes_follow_the_channel_axis():
  observer = ranges.averaged_min_max_observer(AffineQuantizer(granularity='channel', axis=1))
  x = jnp.arange(30.0).reshape(2, 3, 5)
  low, high = observer.range(observer.update(observer.init(), x))
  np.testing.assert_allclose(jnp.ravel(low), [0, 5, 10], rtol=1e-6)
  np.testing.assert_allclose(jnp.ravel(high), [19, 24, 29], rtol=1e-6)
