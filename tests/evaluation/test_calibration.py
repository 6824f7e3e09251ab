import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.evaluation.calibration import expected_calibration_error

error_of = jax.jit(expected_calibration_error, static_argnums=2)


@pytest.mark.parametrize('x64', [True, False])
@golden('long_tail_protocols', 'expected_calibration_error')
def test_errors_and_bins_agree_with_reference(vectors, x64):
  correct = vectors['in_predictions'] == vectors['in_labels']
  with jax.enable_x64(x64):
    result = error_of(vectors['in_confidences'], correct, vectors.param('num_bins'))
    rtol = 1e-9 if x64 else 1e-5
    assert_close(result.ece, vectors['out_ece'], rtol)
    assert_close(result.mce, vectors['out_mce'], rtol)
    np.testing.assert_array_equal(result.counts, vectors['out_bin_counts'])


def test_bins_are_closed_on_the_right_and_zero_is_in_none():
  result = expected_calibration_error(
    np.array([0.0, 0.25, 0.2501, 0.5, 0.75, 1.0]), np.array([1, 0, 1, 1, 0, 1]), num_bins=4
  )
  assert result.counts.tolist() == [1, 2, 1, 1]
  assert_close(result.accuracy, [0, 1, 0, 1])
  assert_close(result.confidence, [0.25, 0.37505, 0.75, 1], 1e-6)
  assert_close(result.ece, (0.25 + 2 * 0.62495 + 0.75 + 0) / 5, 1e-6)
  assert_close(result.mce, 0.75, 1e-6)


def test_calibrated_confidences_have_a_small_error_and_others_their_offset():
  rng = np.random.default_rng(0)
  confidences = rng.uniform(0.1, 0.9, 20000)
  correct = rng.uniform(size=20000) < confidences
  assert error_of(confidences, correct, 15).ece < 0.02
  assert_close(error_of(confidences + 0.1, correct, 15).ece, 0.1, atol=0.01)


@pytest.mark.exhaustive
def test_masked_examples_do_not_count():
  rng = np.random.default_rng(1)
  confidences, correct = rng.uniform(size=32).astype(np.float32), rng.uniform(size=32) < 0.5
  part = expected_calibration_error(confidences[:20], correct[:20])
  padded = np.where(np.arange(32) < 20, confidences, np.nan)
  result = expected_calibration_error(padded, correct, mask=np.arange(32) < 20)
  for a, b in zip(result, part):
    assert_close(a, b, 1e-6)
  empty = expected_calibration_error(confidences, correct, mask=np.zeros(32, bool))
  assert np.isnan(empty.ece) and np.isnan(empty.mce)


def test_result_does_not_depend_on_the_mesh_and_bfloat16_is_close():
  rng = np.random.default_rng(1)
  confidences, correct = rng.uniform(size=32).astype(np.float32), rng.uniform(size=32) < 0.5
  expected = error_of(confidences, correct, 5)
  mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  sharded = error_of(*jax.device_put((confidences, correct), rows), 5)
  for a, b in zip(sharded, expected):
    assert_close(a, b, 1e-6)
  rounded = error_of(jnp.asarray(confidences, jnp.bfloat16), correct, 5)
  assert rounded.ece.dtype == jnp.float32
  assert_close(rounded.ece, expected.ece, atol=0.1)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: expected_calibration_error([0.5, 1.2], [1, 0]), 'from 0.5 to 1.2, expected prob'),
    (lambda: expected_calibration_error([0.5, np.nan], [1, 0]), 'expected probabilities'),
    (lambda: expected_calibration_error([0.5], [1, 0]), r'shape \(1,\), correct \(2,\)'),
    (lambda: expected_calibration_error([0.5], [1], 0), 'num_bins is 0'),
    (lambda: expected_calibration_error([0.5], [1], mask=[1, 1]), r'mask has shape \(2,\)'),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_nan_confidence_under_jit_makes_the_errors_nan_unless_it_is_masked():
  confidences, correct = np.array([0.5, np.nan]), np.array([True, True])
  found = jax.jit(expected_calibration_error)(confidences, correct)
  assert np.isnan(found.ece) and np.isnan(found.mce)
  assert expected_calibration_error(confidences, correct, mask=np.array([1, 0])).ece == 0.5
