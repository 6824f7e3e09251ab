import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import friends_and_foes
from experiments.friends_and_foes import Friends
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import noisy_labels, selected_labels
from jaxlab import data, losses

TINY = (
  "model={'name': 'convnet', 'widths': (4,), 'hidden': (8,)}",
  'data.open.max_count=40',
  "ssl.heads={'hidden': 8, 'features': 8, 'predictor': 4}",
  'ssl.recipe.epochs=1',
  'ssl.recipe.batch_size=16',
  'warmup.epochs=1',
  'warmup.batch_size=16',
  'recipe.epochs=2',
  'recipe.batch_size=16',
  'recipe.eval_every=20',
  'runs=ce,ff',
)


def tiny_config(*changes):
  return launcher.load('friends_and_foes', 'embedded', [*TINY, *changes])


@functools.cache
def sources():
  return noisy_labels.load(tiny_config())


def test_training_records_have_both_kinds_of_noise_and_unequal_classes():
  found, config = sources(), tiny_config()
  assert len(found.train) == config.data.size == data.exponential_counts(7, 40, 5).sum()
  assert data.source_labels(found.train).tolist() == found.given.tolist()
  outside = found.true == -1
  assert abs(outside.mean() - 0.2) < 0.04
  assert abs(np.mean(found.given[~outside] != found.true[~outside]) - 0.3) < 0.12
  # Images of no class are those of the other digits.
  others = data.in_memory(data.load('digits', 'train', classes=(7, 8, 9))).arrays['image']
  known = {image.tobytes() for image in others}
  images = data.in_memory(found.train).arrays['image']
  assert [image.tobytes() in known for image in images] == outside.tolist()
  assert len(found.test) == 351 and data.source_labels(found.test).max() == 6


def test_classes_that_look_alike_are_left_out_of_ncifar():
  config = launcher.load('friends_and_foes', 'ncifar10')
  assert config.data.open.without == data.CIFAR100_LIKE_CIFAR10
  assert config.data.size == data.exponential_counts(10, 5000, 10).sum()


def test_the_warm_up_moves_the_classifier_alone():
  config = tiny_config()
  run = friends_and_foes.warm_up(config, Friends())
  state = jax.jit(run.program.init)(jax.random.key(0))
  before = jax.device_get(state)
  batch = next(data.epoch_batches(sources().train, 16))
  batch = {name: jnp.asarray(batch[name]) for name in run.program.batch}
  new, _ = jax.jit(run.program.step)(state, {}, batch)
  for path, leaf in jax.tree_util.tree_leaves_with_path(new.params):
    old = functools.reduce(lambda tree, key: tree[key.key], path, before.params)
    assert np.any(leaf != old) == (path[0].key == 'fc'), path
  jax.tree.map(np.testing.assert_array_equal, new.model_state, before.model_state)
  draws = run.sampler(sources().train)(0)
  counts = np.bincount(sources().given[draws], minlength=7)
  assert counts.min() > 0.4 * counts.max()


def test_the_loss_weighs_what_is_kept():
  config = tiny_config()
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)
  rows = {
    'label': jnp.array([1, 2, 3, 1]), 'keep': jnp.array([True, True, False, False]),
    'weight': jnp.array([0.5, 2.0, 9.0, 1.0]), 'guess': jnp.full((4, 7), 1 / 7),
  }  # fmt: skip
  ce = np.asarray(losses.cross_entropy(logits, rows['label']))
  expected = (0.5 * ce[0] + 2 * ce[1]) / 2.5
  found = friends_and_foes.kept_loss(config, Friends(), logits, rows)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  distance = np.mean((np.asarray(jax.nn.softmax(logits))[2:] - 1 / 7) ** 2)
  semi = friends_and_foes.kept_loss(config, Friends(leftover='semi'), logits, rows)
  np.testing.assert_allclose(semi, expected + 25 * distance, rtol=1e-5)
  nothing = {**rows, 'keep': jnp.zeros(4, bool)}
  value, gradient = jax.jit(
    jax.value_and_grad(lambda z: friends_and_foes.kept_loss(config, Friends(), z, nothing))
  )(logits)
  assert float(value) == 0 and not np.any(gradient)


@functools.cache
def tables():
  """Returns the tables by a network that was not trained, under several variants."""
  config, found = tiny_config('correction.confidence=0.6'), {}
  run = friends_and_foes.training(config, 'ff')
  state = jax.jit(run.program.init)(jax.random.key(0))
  # Logits that are large enough for the network to be sure of some examples.
  sure = {**state.params, 'fc': jax.tree.map(lambda leaf: 8 * leaf, state.params['fc'])}
  state = state.replace(params=sure)
  for name, own in (
    ('ff', Friends()), ('semi', Friends(leftover='semi')), ('no_filter', Friends(filter='none')),
    ('no_correction', Friends(correct=False)),
  ):  # fmt: skip
    new = friends_and_foes.revised(config, own, sources(), state)
    found[name] = {k: np.asarray(v)[: config.data.size] for k, v in new.extra['table'].items()}
  return found


def test_filter_and_correction_decide_from_the_given_labels():
  found, given = tables(), sources().given
  own = found['ff']
  assert own['corrected'].any() and (~own['keep']).any()
  np.testing.assert_array_equal(own['label'][~own['corrected']], given[~own['corrected']])
  assert found['no_filter']['keep'].all() and not found['no_filter']['corrected'].any()
  assert not found['no_correction']['corrected'].any()
  np.testing.assert_array_equal(own['keep'], found['semi']['keep'])
  np.testing.assert_allclose(found['semi']['guess'].sum(1), 1, rtol=1e-5)


def test_kept_classes_have_equal_weight():
  for own in tables().values():
    kept = own['keep']
    sums = np.bincount(own['label'][kept], own['weight'][kept], minlength=7)
    there = np.bincount(own['label'][kept], minlength=7) > 0
    np.testing.assert_allclose(sums[there], kept.sum() / 7, rtol=1e-4)


def test_shares_are_of_each_kind_of_label():
  given = sources()._replace(given=np.array([0, 0, 1, 1, 2]), true=np.array([0, 1, 1, -1, -1]))
  table = {
    'keep': np.array([True, True, True, False, True, False]),
    'label': np.array([0, 1, 1, 1, 2, 0]),
    'corrected': np.array([False, True, False, False, True, True]),
  }
  assert selected_labels.left_out(table, given) == {'clean': 0, 'closed': 0, 'open': 50}
  assert selected_labels.right(table, given) == {'kept_right': 75, 'corrected_right': 50}


def test_a_run_filters_before_every_epoch_and_leaves_rows_and_a_picture(tmp_path, monkeypatch):
  config, at = tiny_config(), []
  steps = noisy_labels.steps_per_epoch(config)
  own = friends_and_foes.revised

  def revised(*given):
    at.append(int(given[-1].step))
    return own(*given)

  monkeypatch.setattr(friends_and_foes, 'revised', revised)
  found = launcher.launch(config, tmp_path)
  assert at == [0, steps]
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['CE', 'F&F', 'F&F, clean labels', 'F&F, closed noise', 'F&F, open noise']
  recalls = {'macro_recall', 'best', 'fall', 'macro_f1', 'harmonic', 'accuracy'}
  assert set(rows['CE']) == recalls and {*recalls, 'kept_right'} <= set(rows['F&F'])
  assert [verdict['metric'] for verdict in found['claims']] == ['macro_recall', 'dropped']
  assert (tmp_path / 'recall_over_epochs.png').stat().st_size > 5000
  # The features that SimSiam learned are where the warm-up starts, and stay there.
  assert {'ssl', 'warmup_linear_ssl', 'ff', 'ce'} <= {path.name for path in tmp_path.iterdir()}


def test_a_revision_is_a_function_of_the_state_and_keeps_its_shapes():
  config = tiny_config()
  run = friends_and_foes.training(config, 'ff')
  state = jax.jit(run.program.init)(jax.random.key(0))
  once = friends_and_foes.revised(config, Friends(), sources(), state)
  again = friends_and_foes.revised(config, Friends(), sources(), once)
  jax.tree.map(np.testing.assert_array_equal, once.extra['table'], again.extra['table'])
  shapes = [
    jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), own.extra['table']) for own in (state, once)
  ]
  assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('data.open.closed_rate=0.8', 'sum below 1'),
    ('data.open.imbalance=0.5', 'imbalance, max_count'),
    ('data.held_out=5', 'neither noise nor held_out'),
    ('correction.confidence=1.5', 'confidence=1.5'),
    ('correction.temperature=0', 'temperature=0'),
    ('runs=ff,foes', 'foes'),
    ('recipe.mixup=0.5', 'no mixup'),
    ('pretrained=resnet18', 'ssl: expected None'),
    ('ssl.augment.kind=none', 'which draws the views'),
    ('warmup.batch_size=4096', 'warmup.batch_size=4096 exceeds'),
    ('recipe.eval_every=0', 'recipe.eval_every'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))
