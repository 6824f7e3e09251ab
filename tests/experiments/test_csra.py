import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from experiments import csra
from experiments.harness import data as harness_data
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import multi_label_evaluation
from jaxlab import evaluation, models

TINY = (
  "model={'name': 'vgg11_bn', 'stage_sizes': (1, 1), 'widths': (4, 6), 'hidden': None}",
  'map_path=blocks_1_0',
  "heads={'csra': {'num_heads': 2, 'lam': 0.5}}",
  'data.train_size=64',
  'data.train_options.length=64',
  'data.test_options.length=48',
  'recipe.batch_size=16',
  'recipe.epochs=1',
  "recipe.schedule={'name': 'constant', 'base': 0.02}",
  'test_time=0.5,1.0',
  'claims=()',
  'pictured=()',
)


def tiny_config(*changes):
  """Returns the embedded setting with a network that compiles in seconds; 4 steps."""
  return launcher.load('csra', 'embedded', [*TINY, *changes])


@functools.cache
def start():
  own = csra.programs(tiny_config())['csra'].program
  return own, jax.jit(own.init)(jax.random.key(0))


def test_one_step_is_the_papers_loss_and_its_classifier_learns_ten_times_as_fast():
  config, (own, state) = tiny_config(), start()
  rng = np.random.default_rng(0)
  batch = {
    'image': jnp.asarray(rng.integers(0, 256, (16, 32, 32, 1), np.uint8)),
    'multi_label': jnp.asarray(rng.random((16, 10)) < 0.3, jnp.float32),
    'index': jnp.arange(16, dtype=jnp.int32),
  }
  images, labels = batch['image'] / np.float32(255), np.asarray(batch['multi_label'])
  model = csra.network(config, 'csra')

  def loss(params):
    variables = {'params': params, **state.model_state}
    logits, _ = model.apply(variables, images, train=True, mutable=['batch_stats'])
    share = jax.nn.sigmoid(logits)
    return -jnp.mean(labels * jnp.log(share) + (1 - labels) * jnp.log(1 - share))

  new, metrics = jax.jit(own.step)(state, {}, batch)
  value, gradients = jax.jit(jax.value_and_grad(loss))(state.params)
  assert_close(metrics['loss'], value, 1e-5)
  for part, rate in (('backbone', 0.02), ('head', 0.2)):
    trees = state.params[part], new.params[part], gradients[part]
    for old, moved, gradient in zip(*map(jax.tree.leaves, trees), strict=True):
      assert_close(old - moved, rate * (gradient + 1e-4 * old), 1e-3, 1e-6)


def test_the_learning_rate_of_the_papers_settings_warms_up_and_falls_in_steps():
  for setting, steps, step in (('voc2007_resnet101', 313, 4), ('coco_resnet101', 5173, 5)):
    config = launcher.load('csra', setting)
    assert config.data.train_size // config.recipe.batch_size == steps == config.recipe.eval_every
    rate = config.recipe.schedule.make(config.recipe.epochs, steps)
    assert_close(rate(steps // 2), 0.01 * (steps // 2) / (2 * steps), 1e-6)
    for epoch in (3, 4, 5, 6, 9, 11, 20, 30):
      expected = 0.01 * 0.1 ** ((epoch - 1) // step)
      assert_close(rate((epoch - 1) * steps), expected, 1e-5)
      assert_close(rate(epoch * steps - 1), expected, 1e-5)


def test_scores_follow_the_protocol():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(40, 5)).astype(np.float32)
  labels, known = (rng.random((40, 5)) < 0.4).astype(np.float32), rng.random((40, 5)) < 0.8
  probabilities = 1 / (1 + np.exp(-logits))
  voc = np.where(labels > 0, 1, np.where(known, -1, 0))
  wider = np.where(labels > 0, 1, np.where(known, 0, 99))
  for protocol, told, targets in (
    ('coco', None, labels), ('voc07', known, voc), ('wider', known, wider)
  ):  # fmt: skip
    found = multi_label_evaluation.classifier_scores(logits, labels, told, protocol)
    assert tuple(found) == multi_label_evaluation.classifier_metrics()
    expected = evaluation.multi_label_metrics(probabilities, targets, protocol)
    best = evaluation.multi_label_metrics(probabilities, targets, protocol, top=3)
    assert_close(found['mAP'], 100 * expected.mean_average_precision, 1e-5)
    assert_close(found['CF1'], 100 * expected.class_f1, 1e-5)
    assert_close(found['OP_top3'], 100 * best.overall_precision, 1e-5)


@pytest.mark.exhaustive
def test_rows_of_the_untrained_residual_are_mean_and_maximum_of_the_pooled_network():
  config = tiny_config()
  model, source = csra.network(config, 'gap'), harness_data.load(config.data, 'test')
  images = jnp.asarray(source.arrays['image']) / np.float32(255)
  variables = dict(jax.jit(model.init)(jax.random.key(1), images[:2]))
  found = csra.evaluator(config, 'gap', source)(variables)
  read = jax.jit(lambda v, x: model.apply(v, x, method='features'))
  features = read(variables, images).reshape(48, -1, 6)
  weight = np.asarray(variables['params']['head']['weight'][0])
  scores = features @ (weight / np.linalg.norm(weight, axis=1, keepdims=True)).T
  labels = source.arrays['multi_label']
  for title, lam in (('', 0.0), ('GAP, mean + 0.5 max', 0.5), ('GAP, mean + 1 max', 1.0)):
    logits = scores.mean(1) + lam * scores.max(1)
    expected = 100 * evaluation.mean_average_precision(logits, labels)
    assert_close(found[title]['mAP'], expected, 1e-3)
  trained = start()[1]
  variables = {'params': trained.params, **trained.model_state}
  assert set(csra.evaluator(config, 'csra', source)(variables)) == {''}


@pytest.mark.exhaustive
def test_records_without_any_label_may_be_left_out():
  config = tiny_config('drop_unlabeled=True')
  model, source = csra.network(config, 'gap'), harness_data.load(config.data, 'test')
  source.arrays['multi_label'] = source.arrays['multi_label'].copy()
  source.arrays['multi_label'][:20] = 0
  variables = dict(jax.jit(model.init)(jax.random.key(1), jnp.zeros((2, 32, 32, 1))))
  found = csra.evaluator(config, 'gap', source)(variables)['']['mAP']
  images = jnp.asarray(source.arrays['image'][20:]) / np.float32(255)
  logits = jax.jit(model.apply)(variables, images)
  expected = evaluation.mean_average_precision(logits, source.arrays['multi_label'][20:])
  assert_close(found, 100 * expected, 1e-3)
  with pytest.raises(ValueError, match="protocol='voc07' leaves out entries"):
    multi_label_evaluation.require_known(source, 'voc07')


def test_public_weights_are_those_of_the_backbone(monkeypatch):
  config = launcher.load(
    'csra', 'wider_vit_base', ["model={'name': 'vit_tiny_patch16_224', 'depth': 1}"]
  )
  asked = {}

  def load_pretrained(name, **fields):
    model = models.create('vit_tiny_patch16_224', **fields)
    asked.update(fields, name=name)
    return model, models.abstract_variables(model)

  monkeypatch.setattr(models, 'load_pretrained', load_pretrained)
  given = csra.public_weights(config)
  assert asked == {
    'name': 'vit_base_patch16_224.orig_in21k_ft_in1k', 'depth': 1, 'num_classes': None
  }  # fmt: skip
  shapes = csra.supervised.abstract_variables(csra.network(config, 'csra'), config.task)
  merged = csra.runs.matched(shapes, given, ('head/.*',))
  assert merged['params']['head']['weight'].shape == (1, 14, 192)


@pytest.mark.parametrize(
  ('changes', 'messages'),
  [
    (
      (
        "heads={'gap': {}, 'one': {'lam': -1.0}, 'three': {'num_heads': 3}}",
        *('data.multi_label=False', 'test_time=0.0,', 'runs=two,', 'recipe.batch_size=65'),
      ),
      (
        *("'gap' is the name", 'lam is -1.0', 'num_heads is 3', 'data.multi_label=False'),
        *('test_time=(0.0,)', "runs: ['two']", 'at least recipe.batch_size=65'),
      ),
    ),
    (
      ("heads={'one': {'title': 'GAP'}}", 'protocol=voc07', 'map_path=avgpool'),
      ('titles that differ', 'map_path: ', 'no map of features'),
    ),
    (
      (
        "recipe.optimizer.lr_multipliers=[['fc/.*', 10.0]]",
        "heads={'one': {'temperatures': (0.0,)}}",
      ),
      ("no parameter matches 'fc/.*'", 'temperature is 0.0'),
    ),
    (
      (
        "claims=[{'statement': 'x', 'metric': 'ap', 'baseline': 'GAP', 'method': 'GAP, mean + 2 max'}]",
      ),
      ("no row 'GAP, mean + 2 max'", "no metric 'ap'"),
    ),
    (('data.stored_image=(32, 0, 1)',), ('expected positive sizes',)),
  ],
)
def test_impossible_settings_are_named_all_at_once(changes, messages):
  with pytest.raises(SettingsError) as caught:
    launcher.check(tiny_config(*changes))
  for message in messages:
    assert message in str(caught.value)


def test_a_run_compares_rows_and_draws_where_they_look(tmp_path, monkeypatch):
  monkeypatch.setattr(csra, 'DRAWN', 2)  # axes take seconds to draw
  config = tiny_config('recipe.eval_every=4', 'recipe.best_metric=mAP', 'pictured=csra,')
  launcher.check(config)
  found = csra.run(config, tmp_path)
  names = ['GAP', 'GAP, mean + 0.5 max', 'GAP, mean + 1 max', 'csra']
  assert [row['name'] for row in found['rows']] == names
  for row in found['rows']:
    assert all(0 <= row['metrics'][name] <= 100 for name in csra.SHOWN)
  for name in ('attention_csra', 'average_precision'):
    assert (tmp_path / f'{name}.png').stat().st_size > 5000
  assert not (tmp_path / 'attention_gap.png').exists()
