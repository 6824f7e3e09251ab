"""LAST end to end: one forward pass for several rates, the start, costs, settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables

from experiments import last
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import (
  adaptation,
  adaptation_comparison,
  adaptation_costs,
  side_adaptation,
)
from experiments.protocols.replicas import sweep
from jaxlab import adapters, models
from jaxlab.training import cast_floating, step_keys

TINY = (
  "network.model={'name': 'vit_tiny_patch4_16', 'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_ratio': 2.0}",
  'network.data.train_options.length=64',
  'network.data.train_size=64',
  'network.data.test_options.length=32',
  'network.recipe.epochs=1',
  'network.recipe.schedule.warmup_epochs=0',
  'network.recipe.batch_size=32',
  *(f'target.rotation.data.{part}_options.length=48' for part in ('train', 'test')),
  'target.rotation.data.train_size=48',
  'tasks=rotation,',
  'recipe.batch_size=8',
  'recipe.epochs=3',
  'recipe.schedule.warmup_epochs=1',
  'side.rank=2',
  'held_out=16',
  'accounted={}',
  'claims=()',
)  # fmt: skip


def tiny_config(*changes):
  return launcher.load('last', 'embedded', [*TINY, *changes])


@pytest.fixture(scope='module')
def network():
  model = adaptation.backbone(tiny_config())
  return model, random_variables(model, jnp.zeros((1, 16, 16, 1)))


def made(config, name, **fields):
  target = config.target['rotation']
  own = config.tuned(name, 'rotation')
  return adaptation.adapted(config, last.table(config)[name], own, target, target.size, **fields)


def a_batch(size=8):
  rng = np.random.default_rng(0)
  return {
    'image': jnp.asarray(rng.integers(0, 256, (size, 16, 16, 1), np.uint8)),
    'label': jnp.asarray(rng.integers(0, 4, size).astype(np.int32)),
    'index': jnp.arange(size, dtype=jnp.int32),
  }


@pytest.mark.parametrize('pool', tables.first(['mean_patches', 'model']))
def test_side_networks_start_as_the_linear_probe(network, pool):
  model, variables = network
  config = tiny_config(f'pool={pool}')
  images = jnp.asarray(random_images((3, 16, 16, 1)))
  tokens = adapters.collect_features(model, variables, images)
  tokens = [np.asarray(z, np.float64) for z in tokens]
  norm = variables['params']['norm']

  def pooled(z):
    z = z[:, 1:].mean(1) if pool == 'mean_patches' else z[:, 0]
    unit = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-6)
    return unit * norm['scale'] + norm['bias']

  for name in ('linear', 'last', 'mlp', 'after', 'uncorrected'):
    own = made(config, name)
    params = jax.jit(own.program.init)(jax.random.key(1)).params
    found = jax.jit(own.logits)(params, own.frozen(variables, 1e-3, 0.0), images)
    read = pooled(np.sum(tokens, 0) if name == 'uncorrected' else tokens[-1])
    head = params['head']
    assert_close(found, read @ head['kernel'] + head['bias'], 1e-5)


@pytest.mark.exhaustive
def test_several_rates_are_what_each_is_alone_with_one_forward_pass_a_batch(network, monkeypatch):
  _, variables = network
  passes = []
  collect = adapters.collect_features

  def counted(model, variables, images, **options):
    def seen(site, y):
      del site
      # With a value, so that it would run once a copy if copies had passes of their own.
      jax.debug.callback(passes.append, y[0, 0, 0])
      return y

    hook = models.Hook('blocks_1', output=seen)
    return collect(model, variables, images, hooks=[hook], **options)

  monkeypatch.setattr(side_adaptation.adapters, 'collect_features', counted)
  own = made(tiny_config(), 'last')
  rates, decays, steps = (1e-2, 1e-3, 3e-2, 1e-2), (0.0, 0.5, 0.1, 0.5), 3

  def trained(program, frozen):
    state, step = jax.jit(program.init)(jax.random.key(3)), jax.jit(program.step)
    for _ in range(steps):
      state, _ = step(state, frozen, a_batch())
    jax.effects_barrier()
    return state.params

  many = sweep(own.program, {'rate': rates, 'decay': decays})
  found = trained(many, own.frozen(variables, rates, decays))
  assert len(passes) == steps
  for index in (0, 1, 2, 3):
    alone = trained(own.program, own.frozen(variables, rates[index], decays[index]))
    jax.tree.map(lambda a, b, i=index: assert_close(a[i], b, 0, 2e-5), found, alone)
  assert len(passes) == 5 * steps


# Megabytes that modules on given tokens keep for the backward pass, computed beforehand for these sizes: 64
# channels, 50 tokens, batches of 32, six blocks.
KEPT = {'linear': 0.009, 'mist': 4.2, 'one_module': 13.7, 'last': 57, 'remat': 10}


def test_what_is_kept_falls_from_full_tuning_to_the_linear_probe():
  config = launcher.load('last', 'embedded', ['side.modules=4'])
  edge = adaptation.Row(
    'MIST', 'method', lambda *a, **o: side_adaptation.gathered_attention(*a, rank=8, depth=2, **o)
  )
  side = adaptation.Row('DTL', 'method', second_half)
  rows = {**last.table(config), 'mist': edge, 'dtl': side}
  kept = {}
  for name in ('linear', 'mist', 'one_module', 'remat', 'last', 'dtl', 'lora', 'full'):
    own = adaptation_costs.accounted(config, rows[name], name)
    state = jax.eval_shape(own.program.init, jax.random.key(0))
    given = own.program.frozen, own.program.batch, jax.eval_shape(step_keys, state)
    kept[name] = adapters.residual_bytes(own.loss, state.params, *given) / 1e6
  order = [kept[name] for name in ('linear', 'mist', 'one_module', 'dtl', 'lora', 'full')]
  assert order == sorted(order) and len(set(order)) == len(order)
  assert kept['mist'] < kept['remat'] < kept['dtl'] < kept['last']
  assert kept['one_module'] < 0.5 * kept['lora']
  for name, expected in KEPT.items():
    assert kept[name] == pytest.approx(expected, rel=0.1), name


def test_what_is_kept_is_of_the_type_that_a_step_computes_in():
  own = made(tiny_config('recipe.precision=bfloat16'), 'last')
  state = jax.eval_shape(own.program.init, jax.random.key(0))
  given = own.program.frozen, own.program.batch, jax.eval_shape(step_keys, state)
  narrow = jax.eval_shape(lambda tree: cast_floating(tree, jnp.bfloat16), state.params)
  kept = [adapters.residual_bytes(own.loss, tree, *given) for tree in (state.params, narrow)]
  assert kept[0] == kept[1]


def test_rates_are_searched_under_the_schedule_of_a_training():
  config = tiny_config('runs=linear,', 'tuning={linear: {rates: [0.01], decays: [0.0, 0.1]}}')
  plan = adaptation_comparison.plans(config, last.table(config))['linear', 'rotation']
  assert (plan.search.num_steps, plan.training.num_steps) == (3 * 4, 3 * 6)

  def last_rate(run, frozen):
    state = jax.eval_shape(run.program.init, jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    state = state.replace(step=jnp.int32(run.num_steps - 1))
    return jax.jit(run.program.step)(state, frozen, a_batch())[1]['learning_rate']

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), plan.training.program.frozen)
  own = [{**zeros, 'rate': jnp.full(n, 0.01), 'decay': jnp.zeros(n)} for n in ((), (2,))]
  rate = last_rate(plan.training, own[0])
  assert rate < 1e-3
  assert last_rate(plan.search, own[1]) == pytest.approx(rate)


def second_half(model, images, *, pool):
  """DTL: a state of rank 2, added from the middle on."""
  widths, paths = adapters.block_widths(model, images), models.anatomy(model).block_paths

  def features(own, variables, images, **options):
    return adapters.apply_side_network(
      model, variables, own, images, adding=paths[len(paths) // 2 :],
      pool_patches=pool == 'mean_patches', **options,
    )  # fmt: skip

  return adaptation.Method(features, lambda key, params: adapters.init_side_network(key, widths, 2))


def test_a_run_chooses_rates_and_compares(tmp_path):
  config = tiny_config(
    'runs=linear,last', 'tuning={last: {rates: [0.0, 0.01], decays: [0.0, 0.1]}}'
  )
  found = launcher.launch(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['linear probe', 'LAST']
  own = rows['LAST']
  assert own['trained'] == 2 * (4 * 16 * 2 + 2 * 16)
  assert own['structured'] == own['mean'] == own['rotation'] and 0 <= own['mean'] <= 100
  assert rows['linear probe']['residual_mb'] < own['residual_mb']
  assert (tmp_path / 'accuracy_over_memory.png').stat().st_size > 5000
  assert (tmp_path / 'last_rotation_search' / 'metrics.jsonl').exists()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('side.rank=-1', 'rank=-1'),
    ('side.rank=0', 'rank=0'),
    ('side.gap=3', 'gap=3 does not divide the depth=2'),
    ('side.modules=0', 'depth=0'),
    ('side.combine=between', "one of 'before', 'after'"),
    ('runs=last,mist', "'mist' are none of the rows"),
    ("network.model={'name': 'cifar_resnet20'}", 'of a ViT'),
    (
      "network.model={'name': 'deit_tiny_distilled_patch16_224', 'image_size': 16}",
      'distillation token',
    ),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))
