import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close

from experiments import nrs
from experiments.harness import data as harness_data
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from jaxlab import losses, models

TINY = (
  'recipe.epochs=1', 'hidden=(8,)', "layers={'NRS': {'n_mul': 2}}", 'claims=()', 'repeats=1',
  'trees=decision_tree,',
)  # fmt: skip


def tiny_config(setting='embedded', *changes):
  return launcher.load('nrs', setting, [*TINY, *changes])


def test_a_table_of_ones_own_is_compared(tmp_path):
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(90, 9)), rng.integers(0, 3, 90)
  np.savez(tmp_path / 'own.npz', features=x, labels=y)
  changes = [f'data.train={tmp_path}/own.npz', 'recipe.batch_size=16', 'recipe.eval_every=2']
  found = launcher.launch(tiny_config('table', *changes), tmp_path / 'run')
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['MLP', 'NRS', 'decision tree']
  for name, metrics in rows.items():
    assert 0 <= metrics['accuracy'] <= 100
    assert metrics['fit_seconds'] > 0 and metrics['predict_ms'] > 0
    assert ('best_accuracy' in metrics) == ('parameters' in metrics) == (name != 'decision tree')
  assert rows['NRS']['best_accuracy'] >= rows['NRS']['accuracy']
  # Kernels, biases and norms of 18 patches, of 8 units, and of 3 classes.
  assert rows['NRS']['parameters'] == 18 * (9 + 3) + 8 * (18 + 3) + 3 * 9
  assert rows['MLP']['parameters'] == 8 * (9 + 3) + 8 * (8 + 3) + 3 * 9
  assert (tmp_path / 'run' / 'accuracy.png').stat().st_size > 1000
  # Tables are read anew: the sizes of another one are refused.
  wrong = tiny_config('table', *changes, 'data.num_classes=2')
  with pytest.raises(ValueError, match=r'data.num_classes=2, but table has 3'):
    launcher.launch(wrong, tmp_path / 'other')


def test_rows_differ_in_the_layer_alone():
  config = tiny_config('images')
  plain, own = (nrs.network(config, layer) for layer in (None, config.layers['NRS']))
  x = jnp.zeros((2, 8, 8, 1))
  trees = [jax.eval_shape(model.init, jax.random.key(0), x)['params'] for model in (plain, own)]
  assert trees[0]['backbone'] == trees[1]['backbone']
  wide, narrow = (trees[1]['head']['head'], trees[0]['head'])
  assert wide['fc0']['kernel'].shape[0] == 2 * narrow['fc0']['kernel'].shape[0]
  assert set(trees[1]['head']) == {'nrs', 'head'}


@pytest.mark.exhaustive
def test_transforms_of_clouds_are_held_orthogonal():
  config = tiny_config(
    'points', 'transform_weight=0.5', 'recipe.batch_size=8', 'trees=()', "layers={'NRS': {'n_per': 8}}",
    "model={'name': 'pointnet', 'widths': (8, 8, 16), 'hidden': (8,)}", 'dropout=0.0',
    'point_augment.scale=(1, 1)', 'point_augment.shift=0',
  )  # fmt: skip
  launcher.check(config)
  program = nrs.programs(config)['NRS'].program
  state = jax.jit(program.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  batch = {
    'features': jnp.asarray(rng.normal(size=(8, 64, 3)), jnp.float32),
    'label': jnp.arange(8, dtype=jnp.int32), 'index': jnp.arange(8, dtype=jnp.int32),
  }  # fmt: skip
  new, metrics = jax.jit(program.step)(state, {}, batch)
  variables = {'params': state.params, **state.model_state}
  network = nrs.network(config, config.layers['NRS'])
  (logits, _), parts = jax.jit(
    lambda v, x: models.capture(network, v, [nrs.MATRIX], x, train=True, mutable=['batch_stats'])
  )(variables, batch['features'])
  values = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
  penalty = losses.orthogonality_loss(parts[nrs.MATRIX]).mean()
  assert float(penalty) > 0.1
  assert_close(metrics['loss'], values.mean() + 0.5 * penalty, 1e-4)
  index = [one.model_state['constants']['head']['nrs']['index'] for one in (state, new)]
  np.testing.assert_array_equal(*index)


@pytest.mark.exhaustive
def test_a_backbone_starts_from_public_weights_and_its_head_anew(monkeypatch):
  config = tiny_config('images', 'recipe.batch_size=64', 'pretrained=cifar_resnet18', 'trees=()')
  backbone = nrs.networks.create(config.model, num_classes=None)
  public = jax.jit(backbone.init)(jax.random.key(7), jnp.zeros((2, 8, 8, 1)))
  monkeypatch.setattr(models, 'load_pretrained', lambda name, **fields: (backbone, public))
  start = nrs.beginning(config)
  one = nrs.programs(config, harness_data.load(config.data, 'train'))['NRS']
  state = jax.jit(one.program.init)(jax.random.key(0))
  taken = nrs.runs.take_over(state, start, ('head/.*',))
  for a, b in zip(*map(jax.tree.leaves, (taken.params['backbone'], public['params'])), strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(
    taken.model_state['constants']['head']['nrs']['index'],
    state.model_state['constants']['head']['nrs']['index'],
  )


@pytest.mark.parametrize(
  ('setting', 'changes', 'message'),
  [
    ('embedded', ('layers={}',), 'layers is empty'),
    ('embedded', ("layers={'MLP': {}}",), "'MLP' is the name of another row"),
    ('embedded', ("layers={'NRS': {'patch': 4}}",), 'layers.NRS.layer: patch=4'),
    ('embedded', ("layers={'NRS': {'n_per': 7}}",), 'layers.NRS: NRSLayer: 64 features'),
    ('embedded', ('hidden=()',), r'hidden=\(\)'),
    ('embedded', ('trees=decision_tree,oak',), 'oak'),
    ('embedded', ("tree_options={'decision_tree': {'depth': 3}}",), 'tree_options.decision_tree'),
    ('embedded', ('data.test_share=1',), 'test_share=1.0'),
    ('embedded', ('data.test=a.csv',), 'has no other test records'),
    ('embedded', ('recipe.batch_size=2000',), 'exceeds data.train_size=1257'),
    ('embedded', ('recipe.batch_size=1', 'mesh.data=1'), 'at least 2'),
    ('embedded', ("model={'name': 'mlp'}",), 'expected none for a table'),
    ('images', ('model=none',), 'expected a model'),
    ('images', ('dropout=1.0',), 'dropout'),
    ('points', ('trees=()', "model={'name': 'pointnot'}"), 'pointnet'),
  ],
)
def test_impossible_settings_are_named(setting, changes, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(setting, *changes))
