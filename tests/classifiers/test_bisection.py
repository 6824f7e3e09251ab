import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.classifiers import bisect_epsilon, bisect_epsilon_compiled


def curve(vectors, exp):
  slope, center = (float(vectors[f'in_accuracy_curve_{name}']) for name in ('slope', 'centre'))
  return lambda epsilon: 1 / (1 + exp(slope * (epsilon - center)))


@golden('ibm2', 'bisection_trace')
@pytest.mark.parametrize('x64', [True, False])
def test_both_bisections_agree_with_the_reference_trace(vectors, x64):
  options = {'right': vectors.param('right'), 'tolerance': vectors.param('tolerance')}
  threshold = vectors.param('threshold')
  epsilon, trace = bisect_epsilon(curve(vectors, np.exp), threshold, **options)
  assert epsilon == float(vectors['out_epsilon'])
  assert_close(trace, vectors['out_trace_eps_acc_left_right'], 1e-12)

  with jax.enable_x64(x64):
    accuracy = curve(vectors, jnp.exp)
    search = jax.jit(
      lambda th: bisect_epsilon_compiled(lambda s, e, i: (s, accuracy(e)), (), th, **options)
    )
    _, epsilon, interval, trace = search(jnp.asarray(threshold, float if x64 else jnp.float32))
    rtol = 1e-12 if x64 else 1e-6
    assert_close(epsilon, vectors['out_epsilon'], rtol)
    assert_close(interval.mean(), vectors['out_epsilon'], rtol)
    assert_close(trace, vectors['out_trace_eps_acc_left_right'], rtol)


def test_the_interval_ends_below_the_tolerance_around_the_crossing():
  for right, tolerance in ((10.0, 0.05), (3.0, 0.4), (2.0, 0.5), (8.0, 1.0)):
    epsilon, trace = bisect_epsilon(lambda e: 1 - e / 10, 0.93, right=right, tolerance=tolerance)
    width = right / 2 ** len(trace)
    assert width < tolerance <= 2 * width
    assert abs(epsilon - 0.7) <= width / 2
    _, compiled, interval, its_trace = bisect_epsilon_compiled(
      lambda s, e, i: (s, 1 - e / 10), (), 0.93, right=right, tolerance=tolerance
    )
    assert_close(compiled, epsilon, 1e-6)
    assert_close(interval, [epsilon - width / 2, epsilon + width / 2], 1e-6)
    assert its_trace.shape == (len(trace), 4)


def test_the_state_goes_from_iteration_to_iteration():
  def evaluate(state, epsilon, iteration):
    return state.at[iteration].set(epsilon), 1 - epsilon / 10

  visited, *_, trace = bisect_epsilon_compiled(evaluate, jnp.zeros(8), 0.5)
  np.testing.assert_array_equal(visited, trace[:, 0])


def test_an_interval_that_is_short_from_the_start_is_not_searched():
  assert bisect_epsilon(lambda e: 1.0, 0.9, right=1.0, tolerance=2.0) == (0.5, [])
  _, epsilon, interval, trace = bisect_epsilon_compiled(
    lambda s, e, i: (s, e), (), 0.9, right=1.0, tolerance=2.0
  )
  assert float(epsilon) == 0.5 and interval.tolist() == [0, 1] and trace.shape == (0, 4)


def test_an_accuracy_on_the_threshold_does_not_pass():
  epsilon, _ = bisect_epsilon(lambda e: 0.9, 0.9)
  assert epsilon < 0.05


def test_a_range_that_is_fitted_to_its_end_warns():
  with pytest.warns(UserWarning, match='right=2 is too small'):
    epsilon, _ = bisect_epsilon(lambda e: 1.0, 0.9, right=2.0)
  assert epsilon > 1.95


@pytest.mark.parametrize('option', ['right', 'tolerance'])
def test_ranges_that_are_not_positive_raise(option):
  for value in (0.0, -1.0, float('nan')):
    with pytest.raises(ValueError, match=f'{option}=.* must be positive'):
      bisect_epsilon(lambda e: 1.0, 0.9, **{option: value})
    with pytest.raises(ValueError, match=f'{option}=.* must be positive'):
      bisect_epsilon_compiled(lambda s, e, i: (s, e), (), 0.9, **{option: value})
