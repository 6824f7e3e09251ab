import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from safetensors import numpy as safetensors_numpy

from jaxlab import models


@golden('sfn', 'delta_stethoscope')
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_delta_agrees_with_reference(vectors, dtype):
  base, tuned = (vectors[f'in_weight_{name}'].astype(dtype) for name in ('base', 'tuned'))
  norm = models.parameter_distances({'w': base}, {'w': tuned})['w']
  assert_close(norm, vectors['out_l2_norm_of_difference'], 1e-6)
  change = models.relative_change(base, tuned)
  assert change.dtype == dtype
  assert_close(change.ravel(), vectors['out_relative_change_clipped'], 1e-6)
  counts, normalized, edges = models.change_histogram(change, len(vectors['out_histogram_counts']))
  np.testing.assert_array_equal(counts, vectors['out_histogram_counts'])
  assert_close(normalized, vectors['out_histogram_normalised'], 1e-9)
  assert_close(edges, vectors['out_bin_edges'], 1e-6)


def _network(value: float, dtype=jnp.float32):
  model = models.Llama(vocab_size=11, width=8, depth=2, num_heads=2, hidden=12, attention_bias=True)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3), int))['params']
  return jax.tree.map(lambda a: jnp.full(a.shape, value, dtype), params)


def test_delta_by_type_and_block_counts_weight_matrices_alone():
  base, tuned = _network(1.0), _network(1.0)
  tuned['layers_1']['self_attn']['o_proj'] = jax.tree.map(
    lambda a: a + 1, tuned['layers_1']['self_attn']['o_proj']
  )
  found = models.delta_norms(base, tuned)
  attention, mlp = ('q_proj', 'k_proj', 'v_proj', 'o_proj'), ('gate_proj', 'up_proj', 'down_proj')
  assert set(found) == {f'self_attn/{n}' for n in attention} | {f'mlp/{n}' for n in mlp}
  assert found.pop('self_attn/o_proj').tolist() == [0, 8]
  assert all(norms.tolist() == [0, 0] for norms in found.values())
  ranked = models.parameter_distances(base, tuned)
  first, second = list(ranked.items())[:2]
  assert first == ('layers_1/self_attn/o_proj/kernel', 8)
  assert second == ('layers_1/self_attn/o_proj/bias', pytest.approx(np.sqrt(8)))
  half = models.delta_norms(_network(1.0, jnp.bfloat16), _network(1.0078125, jnp.bfloat16))
  np.testing.assert_allclose(half['self_attn/q_proj'], 8 * 0.0078125)


def test_checkpoints_on_disk_are_compared_one_tensor_at_a_time(tmp_path):
  base = {'model.layers.0.mlp.up_proj.weight': np.zeros((2, 2), np.float32)}
  base |= {'lm_head.weight': np.zeros((3, 2), jnp.bfloat16)}
  tuned = {name: array + np.ones((), array.dtype) for name, array in base.items()}
  safetensors_numpy.save_file(base, tmp_path / 'base.safetensors')
  (tmp_path / 'tuned').mkdir()
  for index, (name, array) in enumerate(tuned.items()):
    safetensors_numpy.save_file({name: array}, tmp_path / f'tuned/{index}.safetensors')
  first = models.open_state_dict(tmp_path / 'base.safetensors')
  second = models.open_state_dict(tmp_path / 'tuned')
  assert set(second) == set(tuned) and len(second) == 2 and 'other' not in second
  assert models.parameter_distances(first, second) == models.parameter_distances(base, tuned)
  assert models.delta_norms(first, second)['mlp/up_proj'].tolist() == [2]

  safetensors_numpy.save_file(base, tmp_path / 'tuned/9.safetensors')
  with pytest.raises(ValueError, match=r'lm_head.weight is in .*9\.safetensors'):
    models.open_state_dict(tmp_path / 'tuned')
  (tmp_path / 'cut.safetensors').write_bytes(b'\0' * 4)
  with pytest.raises(ValueError, match='no whole safetensors file'):
    models.open_state_dict(tmp_path / 'cut.safetensors')
  for name in ('none.safetensors', 'empty'):
    with pytest.raises(FileNotFoundError, match=name):
      models.open_state_dict(tmp_path / name)


def test_one_reading_gives_norm_and_distribution_of_each_parameter(monkeypatch):
  rng = np.random.default_rng(0)
  draw = lambda: {  # noqa: E731
    'embed_tokens': {'embedding': rng.normal(size=(11, 4))},
    **{f'layers_{i}': {'mlp': {'up_proj': {'kernel': rng.normal(size=(30, 7)), 'bias': rng.normal(size=7)}}}
       for i in range(2)},
  }  # fmt: skip
  base, tuned = draw(), draw()
  tuned['layers_1'] = base['layers_1']
  whole = {own.path: own for own in models.parameter_changes(base, tuned, bins=20)}
  assert {path: own.histogram for path, own in whole.items()}.keys() == {
    'embed_tokens/embedding',
    *(f'layers_{i}/mlp/up_proj/{leaf}' for i in range(2) for leaf in ('kernel', 'bias')),
  }
  kernel = whole['layers_0/mlp/up_proj/kernel']
  assert (kernel.block, kernel.module, kernel.num_axes) == (0, 'mlp/up_proj', 2)
  first, second = (tree['layers_0']['mlp']['up_proj']['kernel'] for tree in (base, tuned))
  assert kernel.norm == pytest.approx(np.sqrt(np.sum((second - first) ** 2)), rel=1e-12)
  change = (second - first) / (np.abs(first) + 1e-8)
  inside = change[np.abs(change) < 0.99]
  np.testing.assert_array_equal(kernel.histogram.counts, np.histogram(inside, 20, (-1, 1))[0])
  unchanged = whole['layers_1/mlp/up_proj/kernel']
  assert unchanged.norm == 0 and unchanged.histogram.counts[10] == 210
  assert whole['embed_tokens/embedding'].block is None
  found = models.changes_by_module(whole.values())
  assert {name: set(own) for name, own in found.items()} == {'mlp/up_proj': {0, 1}}
  # Part by part, with a part that is not full.
  monkeypatch.setattr('jaxlab.models.parameter_differences._PART', 37)
  for own in models.parameter_changes(base, tuned, bins=20):
    assert own.norm == pytest.approx(whole[own.path].norm, rel=1e-12)
    np.testing.assert_array_equal(own.histogram.counts, whole[own.path].histogram.counts)
    np.testing.assert_allclose(own.histogram.normalized, whole[own.path].histogram.normalized)
  with pytest.raises(ValueError, match='bins=0'):
    next(models.parameter_changes(base, tuned, bins=0))


def test_zero_weights_and_the_signs_of_changes():
  change = models.relative_change([-1.0, -1.0, 0.0, 0.0, 1.0], [-0.5, -1.5, -1.0, 0.0, 9.0])
  np.testing.assert_allclose(change, [0.5, -0.5, -1, 0, 1], rtol=1e-6)
  nothing = models.change_histogram([1.0, -0.99])
  assert not nothing.counts.any() and not nothing.normalized.any()


def test_two_modes_are_told_from_one():
  rng = np.random.default_rng(0)
  noise = 0.1 * rng.standard_normal((2, 20000))
  two = models.change_histogram(np.concatenate([noise[0] - 0.4, noise[1] + 0.4]))
  one = models.change_histogram(noise)
  same_side = models.change_histogram(np.concatenate([noise[0] + 0.3, noise[1] + 0.8]))
  assert models.is_bimodal(two.counts)
  assert not models.is_bimodal(one.counts)
  assert not models.is_bimodal(same_side.counts)
  assert not models.is_bimodal(np.zeros(200))


@pytest.mark.parametrize('bins', [200, 201])
def test_weights_that_did_not_change_are_no_mode_and_hide_none(bins):
  rng = np.random.default_rng(0)
  left, right = 0.1 * rng.standard_normal((2, 20000)) + [[-0.4], [0.4]]
  found = lambda *parts: models.change_histogram(np.concatenate(parts), bins).counts  # noqa: E731
  for unchanged in (200, 8000, 400000):
    same = np.zeros(unchanged)
    assert models.is_bimodal(found(left, right, same))
    for one in (left, right, left + 0.4):
      assert not models.is_bimodal(found(one, same))
  assert not models.is_bimodal(found(left, right[:1000]))
  assert models.is_bimodal(found(left, right[:1000]), min_height=0.01)


@pytest.mark.parametrize('seed', range(5))
def test_ripples_of_a_small_matrix_are_no_modes(seed):
  change = 0.31 * np.random.default_rng(seed).standard_cauchy(96 * 96)
  counts = models.change_histogram(np.clip(change, -1, 1)).counts
  assert not models.is_bimodal(counts)


@pytest.mark.parametrize(
  'draw', [lambda rng, n: rng.standard_cauchy(n), lambda rng, n: 0.6 * rng.standard_normal(n),
           lambda rng, n: rng.laplace(0, 0.2, n)]
)  # fmt: skip
def test_chance_makes_no_modes_of_a_flat_distribution(draw):
  rng = np.random.default_rng(0)
  for size in (1000, 4000, 9216):
    draws = [models.change_histogram(np.clip(draw(rng, size), -1, 1)).counts for _ in range(20)]
    assert sum(map(models.is_bimodal, draws)) <= 1
    assert sum(models.is_bimodal(own, deviations=0) for own in draws) >= sum(
      map(models.is_bimodal, draws)
    )


def test_bad_input_is_named():
  base = {'a': np.zeros(2), 'b': np.zeros(3)}
  with pytest.raises(ValueError, match='b: in base, missing in tuned'):
    models.parameter_distances(base, {'a': np.zeros(2)})
  with pytest.raises(ValueError, match='c: in tuned, missing in base'):
    models.parameter_distances(base, {**base, 'c': np.zeros(2)})
  with pytest.raises(ValueError, match=r'b: base has \(3,\), tuned \(2,\)'):
    models.parameter_distances(base, {**base, 'b': np.zeros(2)})
  with pytest.raises(ValueError, match='no weight matrix in a block'):
    models.delta_norms(base, base)
  with pytest.raises(ValueError, match=r'base has \(2,\), tuned \(3,\)'):
    models.relative_change(np.zeros(2), np.zeros(3))
  with pytest.raises(ValueError, match='epsilon must be positive, got 0'):
    models.relative_change(np.zeros(2), np.zeros(2), epsilon=0)
  with pytest.raises(ValueError, match='drop=2'):
    models.change_histogram(np.zeros(2), drop=2)
  with pytest.raises(ValueError, match='window must be odd'):
    models.is_bimodal(np.zeros(20), window=4)
  with pytest.raises(ValueError, match='vector of at least 9 bins'):
    models.is_bimodal(np.zeros(5))
  with pytest.raises(ValueError, match=r'min_height must be in \[0, 1\], got 2'):
    models.is_bimodal(np.zeros(20), min_height=2)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('heavy', [False, True])
def test_one_mode_with_ripples_in_its_tails_is_one(seed, heavy):
  rng = np.random.default_rng(seed)
  change = rng.standard_t(2, 40000) * 0.2 if heavy else rng.normal(0, 0.2, 40000)
  assert not models.is_bimodal(models.change_histogram(np.clip(change, -1, 1)).counts)
  two = np.concatenate([change * 0.3 - 0.5, change * 0.3 + 0.5])
  assert models.is_bimodal(models.change_histogram(np.clip(two, -1, 1)).counts)
