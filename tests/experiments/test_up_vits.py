import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import up_vits
from experiments.harness import data as harness_data
from experiments.harness import launcher, networks
from experiments.harness.settings import SettingsError
from jaxlab import compression, data, losses

SHAPE = "{'name': 'vit_tiny_patch4_8', 'depth': 2, 'num_classes': 10, "
TINY = (
  "network.data={'name': 'digits', 'train_options': {'test_size': 1669}, 'train_size': 128}",
  'network.model=' + SHAPE + "'width': 16, 'num_heads': 4, 'mlp_ratio': 2.0}",
  'target=' + SHAPE + "'width': 8, 'num_heads': 2, 'mlp_ratio': 2.0, 'drop_path': 0.1}",
  'network.recipe.epochs=3',
  'network.recipe.batch_size=32',
  'proxy={total: 13}',
  'proxy_batch=8',
  'candidates=1',
  'recipe.epochs=2',
  'recipe.batch_size=32',
  'recipe.schedule.warmup_epochs=0',
)


def tiny_config(*changes):
  return launcher.load('up_vits', 'embedded', [*TINY, *changes])


def test_scores_are_sums_over_the_images_and_go_on_where_they_were_left(tmp_path):
  config = tiny_config()
  model, _ = up_vits.both(config)
  blank = jnp.zeros((1, *config.network.data.view))
  variables = jax.jit(model.init)(jax.random.key(0), blank)
  # Confident predictions: of a divergence of 1e-5 rounding leaves too few digits to compare.
  variables['params']['head']['kernel'] *= 10
  source = harness_data.load(config.network.data, 'train')
  net = networks.Loaded(config, config.network, model, variables, source, source)
  whole = up_vits.measure(config, net, tmp_path / 'whole.npz')
  assert set(whole) == set(compression.structure(model).groups)
  # One channel less by cutting it out, on the same images.
  chosen = config.proxy.draw(np.random.default_rng(config.seed), source)
  x = config.network.task.inputs(chosen.gather(np.arange(13)))
  plan = compression.plan(model, {'neck': np.arange(16) != 5})

  @jax.jit
  def divergence(variables, x):
    less = compression.slice_network(model, variables, plan)
    told = model.apply(variables, x)
    return losses.distillation_loss(less[0].apply(less[1], x), told, 1.0).sum()

  np.testing.assert_allclose(whole['neck'][5], divergence(variables, x), rtol=1e-3)
  # A run that was lost behind the first of two batches.
  first = up_vits.measure(tiny_config('proxy={total: 8}'), net, tmp_path / 'first.npz')
  stored = dict(np.load(tmp_path / 'whole.npz'))
  np.savez(tmp_path / 'whole.npz', **{**stored, **first, 'done': 1})
  again = up_vits.measure(config, net, tmp_path / 'whole.npz')
  for name, values in whole.items():
    np.testing.assert_allclose(again[name], values, rtol=1e-6)
    assert first[name].sum() < values.sum()
  with pytest.raises(ValueError, match='scores of other settings'):
    up_vits.measure(tiny_config('seed=3'), net, tmp_path / 'whole.npz')


def test_a_step_learns_from_both_labels_and_from_the_full_network():
  config = tiny_config()
  program = up_vits.training(config, 'selected').program
  full, small = up_vits.both(config)
  state = jax.jit(program.init)(jax.random.key(0))
  teacher = jax.jit(full.init)(jax.random.key(1), jnp.zeros((1, *config.network.data.view)))
  source = harness_data.load(config.network.data, 'train')
  records = source.gather(np.arange(32))
  batch = {name: jnp.asarray(records[name]) for name in ('image', 'label', 'index')}
  before = jax.device_get(state)
  new, metrics = jax.jit(program.step)(state, {'teacher': teacher}, batch)

  from jaxlab.training import step_keys

  keys = step_keys(before)
  x, partners, share = data.cutmix(
    keys['mixup'], config.network.task.inputs(batch), config.cutmix, own_half=True
  )
  rngs = {'drop_path': jax.random.fold_in(keys['dropout'], 1)}
  labels = batch['label']

  @jax.jit
  def expected(params, teacher, x):
    logits = small.apply({'params': params}, x, train=True, rngs=rngs)
    told = losses.distillation_loss(logits, full.apply(teacher, x), 1.0)
    own, other = (losses.cross_entropy(logits, y) for y in (labels, labels[partners]))
    return jnp.mean(share * own + (1 - share) * other + 6.4 * told)

  np.testing.assert_allclose(metrics['loss'], expected(before.params, teacher, x), rtol=1e-4)
  for a, b in zip(*(jax.tree.leaves(own.extra['average']) for own in (before, new)), strict=True):
    np.testing.assert_array_equal(a, b)  # the epoch has four steps


def test_a_run_leaves_rows_plans_scores_and_a_picture(tmp_path):
  config = tiny_config('runs=selected,labels')
  found = launcher.launch(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['full', 'UP-ViT', 'drawn anew, labels alone']
  assert rows['UP-ViT']['parameters'] < 0.5 * rows['full']['parameters']
  assert rows['UP-ViT']['macs'] < 0.5 * rows['full']['macs']
  assert 'untuned' not in rows['drawn anew, labels alone']
  scores, plan = (
    np.load(tmp_path / 'scores.npz'),
    compression.Plan.load(tmp_path / 'plan_scores.json'),
  )
  assert plan.keep['neck'] == tuple(compression.highest_channels(scores['neck'], 8))
  assert plan.heads == {f'blocks_{i}/attention/qkv': 2 for i in range(2)}
  assert (tmp_path / 'scores_and_accuracy.png').stat().st_size > 5000


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('target.width=24', 'neck, which becomes neck: count=24: expected 1 to 16'),
    ('target={name: vit_tiny_patch4_8, width: 1, num_heads: 1, depth: 2}', 'of one channel'),
    ('target.num_heads=3', 'width=8 is not divisible by num_heads=3'),
    ('target.mlp_ratio=8', 'count=64: expected 1 to 32'),
    ('target.depth=3', 'target'),
    ('target.name=cifar_resnet20', 'target'),
    ('proxy={}', 'expected total or per_class'),
    ('proxy={total: 999}', 'proxy: 999 images'),
    ('proxy_batch=20', 'proxy_batch=20 does not divide over'),
    ('candidates=0', 'candidates=0'),
    ('cutmix=-1', 'cutmix=-1'),
    ('weight=-1', 'weight=-1'),
    ('decay=2', 'decay=2'),
    ('recipe.cutmix=1', 'recipe.cutmix: expected 0'),
    ('recipe.batch_size=256', 'recipe.batch_size=256 exceeds data.train_size=128'),
    ('runs=half,', "'half'"),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))
