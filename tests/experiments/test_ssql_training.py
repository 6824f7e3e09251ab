import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import launcher, quantized_features, ssql
from jaxlab import parallel

CONFIGS = sorted(path for path in (launcher.CONFIGS / 'ssql').glob('[!_]*.py'))


def tiny_config(**changes):
  """Returns the embedded setting with a network that compiles in seconds."""
  config = launcher.load_config(launcher.CONFIGS / 'ssql' / 'embedded.py')
  with config.unlocked():
    config.model.backbone.update(stage_sizes=(1,), strides=(2,), width=8)
    config.model.projector.update(hidden=8, features=8)
    config.model.predictor_hidden = 8
    config.batch_size = 16
    config.queue_size = 32
    config.update(changes)
  if config.base == 'moco':
    config.model.projector = {'hidden': 8, 'features': 8}
  return config


def random_batch(config, seed=0):
  rng = np.random.default_rng(seed)
  shape = (config.batch_size, *config.data.stored_image)
  return {
    'image': jnp.asarray(rng.integers(0, 256, shape, np.uint8)),
    'index': jnp.arange(config.batch_size, dtype=jnp.int32),
  }


@functools.cache
def compiled(base):
  """Returns the tiny setting of `base`, with the compiled functions of its program."""
  config = tiny_config(base=base)
  program = ssql.program(config)
  return config, jax.jit(program.init), jax.jit(program.step)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_setting_builds_and_traces(path):
  config = launcher.load_config(path)
  with config.unlocked():  # one block a stage: more of them are traced the same way
    config.model.backbone.stage_sizes = (1,) * len(config.model.backbone.get('stage_sizes', '1234'))
  program = ssql.program(config)
  state = jax.eval_shape(program.init, jax.random.key(0))
  new, metrics = jax.eval_shape(program.step, state, {}, program.batch)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(
    lambda a: (a.shape, a.dtype), state
  )
  assert metrics['loss'].shape == ()


@pytest.mark.parametrize('base', ['simsiam', 'byol', 'moco'])
def test_a_step_serves_all_drawn_bits_with_one_compilation(base):
  config, init, step = compiled(base)
  state = init(jax.random.key(0))
  assert (
    float(jnp.max(jnp.abs(state.model_state['batch_stats']['encoder']['backbone']['bn1']['mean'])))
    == 0
  )
  drawn = set()
  for _ in range(4):
    bits = ssql.draw_bits(jax.random.fold_in(jax.random.key(3), state.step), config, 'ssql')
    drawn.add(tuple(int(b) for b in bits))
    before = state
    state, metrics = step(state, {}, random_batch(config))
    assert np.isfinite(metrics['loss'])
  assert len(drawn) > 1 and step._cache_size() == 1
  assert int(state.step) == 4
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, state.params)
  frozen = moved['encoder']['projector'].get('fc2', {}).pop('bias', False)
  assert not frozen and all(jax.tree.leaves(moved))
  if base == 'moco':
    assert int(state.extra['queue_pointer']) == 4 * 16 % 32


def test_bits_are_drawn_from_the_whole_range_ends_included():
  config = tiny_config()
  keys = jax.random.split(jax.random.key(0), 400)
  weight, activation = jax.vmap(lambda key: jnp.stack(ssql.draw_bits(key, config, 'ssql')))(keys).T
  assert set(weight.tolist()) == set(range(2, 9))
  assert set(activation.tolist()) == set(range(4, 9))


def test_the_reverse_variant_gives_the_quantized_pass_no_gradient():
  config, init, _ = compiled('simsiam')
  nets = ssql.networks(config)
  state = init(jax.random.key(0))
  views = [jax.random.normal(jax.random.key(i), (16, 16, 16, 1)) for i in (1, 2)]
  stats = state.model_state['batch_stats']
  policy = ssql.bit_policy(4, 4)

  @jax.jit
  def gradients(params):
    in_float = ssql.online_pass(nets, params, stats, views, policy)
    quantized = ssql.online_pass(nets, params, in_float.batch_stats, views, policy, in_float.ranges)
    targets = quantized.projections

    def predicted(params):
      return ssql.siamese_loss(
        ssql.online_pass(nets, params, stats, views, policy).predictions, targets
      )

    def reverse(params):
      return ssql.objective(nets, params, stats, views, (4, 4), variant='reverse')[0]

    return jax.grad(predicted)(params), jax.grad(reverse)(params)

  expected, actual = gradients(state.params)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_step_is_the_same_on_one_and_on_eight_devices():
  config, *plain = compiled('simsiam')
  mesh = parallel.make_mesh(data=2, fsdp=4, devices=jax.devices()[:8])
  sharded = parallel.shard_program(ssql.program(config), mesh, fsdp_min_size=64)
  batch = random_batch(config)
  results = []
  for init, step, placed in (
    (*plain, batch),
    (sharded.init, sharded.step, jax.device_put(batch, parallel.batch_sharding(mesh))),
  ):
    state, metrics = step(init(jax.random.key(0)), {}, placed)
    results.append(jax.device_get((metrics['loss'], state.params, state.model_state)))
  np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-4)
  # Wider than float32's rounding: a sum that is rounded differently can move an output over the edge
  # of a quantization step.
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.max(np.abs(b)) + 1e-6)


def test_a_run_leaves_both_methods_and_the_untrained_network(tmp_path, capsys):
  config = tiny_config(epochs=1, batch_size=256)
  with config.unlocked():
    config.eval.update(bits=('8w8a', '2w4a'), calibration=32)
    config.data.test_options.pastes = 1
  outcome = launcher.launch(ssql.run, config, tmp_path)
  assert [(r['name'], r['role']) for r in outcome['rows']] == [
    ('untrained', 'reference'),
    ('SimSiam', 'baseline'),
    ('SSQL', 'method'),
  ]
  assert len(outcome['claims']) == 3
  for item in outcome['rows'][1:]:
    metrics = item['metrics']
    assert metrics['drop_2w4a'] == pytest.approx(metrics['probe_fp'] - metrics['probe_2w4a'])
    assert abs(metrics['probe_8w8a'] - metrics['probe_fp']) < 8
    assert metrics['cosine_8w8a'] > 0.99 > metrics['cosine_2w4a']
  assert (tmp_path / 'accuracy_over_bits.png').stat().st_size > 1000
  assert 'probe_2w4a' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'batch_size': 12}, 'batch_size=12 does not divide'),
    ({'bits': {'weight': (2, 8), 'activation': (4, 17)}}, r'bits must lie in \[0, 16\]; got 17'),
  ],
)
def test_bad_settings_are_refused_before_training(tmp_path, changes, match):
  config = tiny_config(**changes)
  with pytest.raises(ValueError, match=match):
    ssql.run(config, pathlib.Path(tmp_path))


@pytest.mark.parametrize('text', ['2w', 'w4a', '2a4w', 'fp'])
def test_bit_names_are_checked(text):
  with pytest.raises(ValueError, match='named such as 2w4a'):
    quantized_features.parse_bits(text)
