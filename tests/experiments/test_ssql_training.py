import functools

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from experiments import ssql
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import siamese_methods
from jaxlab import parallel

TINY = (
  "model={'name': 'cifar_resnet18', 'stage_sizes': (1,), 'strides': (2,), 'width': 8}",
  *(f'heads.{name}=8' for name in ('hidden', 'features', 'predictor')),
  'recipe.batch_size=16',
  'target.queue_size=32',
)


def tiny_config(*changes):
  """Returns the embedded setting with a network that compiles in seconds."""
  return launcher.load('ssql', 'embedded', [*TINY, *changes])


def random_batch(config, seed=0):
  rng = np.random.default_rng(seed)
  shape = (config.recipe.batch_size, *config.data.stored_image)
  return {
    'image': jnp.asarray(rng.integers(0, 256, shape, np.uint8)),
    'index': jnp.arange(config.recipe.batch_size, dtype=jnp.int32),
  }


@functools.cache
def compiled(base):
  """Returns the tiny setting of `base`, with the compiled functions of its program."""
  config = tiny_config(f'base={base}')
  program = ssql.training(config, 'ssql').program
  return config, jax.jit(program.init), jax.jit(program.step)


@pytest.mark.parametrize('base', tables.few(['simsiam', 'byol', 'moco'], 'simsiam'))
def test_a_step_serves_all_drawn_bits_with_one_compilation(base):
  config, init, step = compiled(base)
  state = init(jax.random.key(0))
  assert (
    float(jnp.max(jnp.abs(state.model_state['batch_stats']['encoder']['backbone']['bn1']['mean'])))
    == 0
  )
  drawn = set()
  with compilations.counted() as count:
    for _ in range(4):
      bits = ssql.draw_bits(jax.random.fold_in(jax.random.key(3), state.step), config.bits)
      drawn.add(tuple(int(b) for b in bits))
      before = state
      state, metrics = step(state, {}, random_batch(config))
      assert np.isfinite(metrics['loss'])
  # None where another test has compiled it.
  assert len(drawn) > 1 and count['step'] <= 1
  assert int(state.step) == 4
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, state.params)
  frozen = moved['encoder']['projector'].get('fc2', {}).pop('bias', False)
  assert not frozen and all(jax.tree.leaves(moved))
  if base == 'moco':
    assert int(state.extra['queue_pointer']) == 4 * 16 % 32


def test_bits_are_drawn_from_the_whole_range_ends_included():
  config = tiny_config()
  keys = jax.random.split(jax.random.key(0), 400)
  weight, activation = jax.vmap(lambda key: jnp.stack(ssql.draw_bits(key, config.bits)))(keys).T
  assert set(weight.tolist()) == set(range(2, 9))
  assert set(activation.tolist()) == set(range(4, 9))


@pytest.mark.exhaustive
def test_the_reverse_variant_gives_the_quantized_pass_no_gradient():
  config, init, _ = compiled('simsiam')
  nets, _ = ssql.base_method(config)
  state = init(jax.random.key(0))
  views = [jax.random.normal(jax.random.key(i), (16, 16, 16, 1)) for i in (1, 2)]
  stats = state.model_state['batch_stats']
  rules = ssql.bit_rules(4, 4)

  @jax.jit
  def gradients(params):
    in_float = ssql.online_pass(nets, params, stats, views, rules)
    quantized = ssql.online_pass(
      nets, params, in_float.batch_stats, views, rules, in_float.collections['ranges']
    )
    targets = quantized.projections

    def predicted(params):
      return siamese_methods.siamese_loss(
        ssql.online_pass(nets, params, stats, views, rules).predictions, targets
      )

    def reverse(params):
      return ssql.objective(nets, params, stats, views, (4, 4), variant='reverse')[0]

    return jax.grad(predicted)(params), jax.grad(reverse)(params)

  expected, actual = gradients(state.params)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.exhaustive
def test_the_step_is_the_same_on_one_and_on_eight_devices():
  config, *plain = compiled('simsiam')
  mesh = parallel.make_mesh(data=2, fsdp=4, devices=jax.devices()[:8])
  sharded = parallel.shard_program(ssql.training(config, 'ssql').program, mesh, fsdp_min_size=64)
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


@pytest.mark.exhaustive
def test_the_momentum_encoder_follows_as_if_moved_before_every_step():
  config, init, step = compiled('byol')
  first = state = init(jax.random.key(0))
  moved = first.extra['target']['params']
  for _ in range(2):
    state, _ = step(state, {}, random_batch(config))
    moved = jax.tree.map(lambda a, b: 0.99 * a + 0.01 * b, moved, state.params['encoder'])
  for a, b in zip(*map(jax.tree.leaves, (state.extra['target']['params'], moved)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  stats = state.extra['target']['batch_stats']['backbone']['bn1']['mean']
  assert not np.array_equal(stats, first.extra['target']['batch_stats']['backbone']['bn1']['mean'])


def test_a_run_leaves_both_methods_and_the_untrained_network(tmp_path):
  changes = ['recipe.epochs=1', 'recipe.batch_size=256', "eval.bits=('8w8a', '2w4a')"]
  config = tiny_config(*changes, 'eval.calibration=32', "data.test_options={'pastes': 1}")
  outcome = launcher.launch(config, tmp_path)
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
  assert 'probe_2w4a' in str(outcome)


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    ('recipe.batch_size=12', 'batch_size=12 does not divide'),
    ('bits.activation=(4, 17)', r'bits.activation=.* expected two numbers in \[1, 16\]'),
    ("eval.bits=('4w4a',)", "there is no metric 'drop_2w4a'"),
    ("eval.bits=('2w',)", 'named such as 2w4a'),
    ("eval.probe.options={'epochs': 3}", "unexpected keyword argument 'epochs'"),
    ('eval.calibration=2000', 'expected 1 to 1297'),
    ('augment.kind=none', "expected 'resized_crop'"),
    ('recipe.mixup=0.2', 'there are no labels to mix'),
    ('runs=base*0', "expected names such as 'ssql'"),
    ('heads.style=mlp', 'heads.style, target.final'),
    ('target.final=1.0', 'heads.style, target.final'),
  ],
)
def test_bad_settings_are_refused_before_training(tmp_path, change, match):
  with pytest.raises(SettingsError, match=match):
    launcher.launch(tiny_config(change), tmp_path)
  assert not list(tmp_path.iterdir())


def test_claims_compare_with_the_method_that_is_built_on():
  assert {claim.baseline for claim in tiny_config('base=byol').claims} == {'BYOL'}
