import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from experiments import fgia
from experiments.harness import data as harness_data
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from jaxlab import data, models

SHORT = ("recipe.schedule={'name': 'constant', 'base': 0.02}", 'recipe.batch_size=16')
SHORT += ('recipe.epochs=1', 'data.train_size=48')
TINY = (
  "model={'name': 'convnet', 'widths': (4,), 'pools': (2,), 'hidden': ()}",
  *(f'{part}.{text}' for part in ('recognition', 'retrieval') for text in SHORT),
  "recognition.data.train_options={'limit': 48}",
  "retrieval.data.train_options={'limit': 48, 'classes': (0, 1, 2, 3, 4, 5, 6)}",
  'claims=()',
)


def tiny_config(*changes):
  """Returns the embedded setting with a network that compiles in a second; 3 steps."""
  return launcher.load('fgia', 'embedded', [*TINY, *changes])


def batch(size=16, classes=7):
  rng = np.random.default_rng(0)
  return {
    'image': jnp.asarray(rng.integers(0, 256, (size, 16, 16, 1), np.uint8)),
    'label': jnp.asarray(rng.integers(classes, size=size, dtype=np.int32)),
    'index': jnp.arange(size, dtype=jnp.int32),
  }


@functools.cache
def start(kind, name='isqrt', step='whole', *changes):
  own = fgia.training(tiny_config(*changes), kind, name, step).program
  return own, jax.jit(own.init)(jax.random.key(0))


def test_retrieval_learns_from_scaled_cosines_to_class_vectors():
  config, (own, state) = tiny_config(), start('retrieval')
  records = batch()
  model = fgia.network(config, config.retrieval, 'isqrt')
  images = config.retrieval.task.inputs(records)

  def loss(params):
    variables = {'params': params, **state.model_state}
    cosines, _ = model.apply(variables, images, train=True, mutable=['batch_stats'])
    share = jax.nn.softmax(16 * cosines)
    return -jnp.mean(jnp.log(share[jnp.arange(16), records['label']]))

  new, metrics = jax.jit(own.step)(state, {}, records)
  value, gradients = jax.jit(jax.value_and_grad(loss))(state.params)
  assert_close(metrics['loss'], value, 1e-5)
  trees = state.params, new.params, gradients
  for old, moved, gradient in zip(*map(jax.tree.leaves, trees), strict=True):
    assert_close(old - moved, 0.02 * (gradient + 1e-4 * old), 1e-3, 1e-6)


def test_a_first_step_trains_the_head_alone_and_faster():
  recipe = "{'epochs': 1, 'batch_size': 16, 'schedule': {'name': 'constant', 'base': 0.02}}"
  changes = (f'recognition.classifier={recipe}', 'heads.isqrt.classifier_rate=5.0')
  config = tiny_config(*changes)
  assert [*fgia.programs(config)][:2] == ['gap_recognition_classifier', 'gap_recognition']
  own, state = start('recognition', 'isqrt', 'classifier', *changes)
  new, _ = jax.jit(own.step)(state, {}, batch())
  for part in ('backbone', 'head'):
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params[part], new.params[part])
    assert all(jax.tree.leaves(moved)) == any(jax.tree.leaves(moved)) == (part == 'head')
  jax.tree.map(np.testing.assert_array_equal, state.model_state, new.model_state)
  plain, head = config.recognition.recipe, config.head('isqrt')
  assert head.recipe(plain, True).optimizer.lr_multipliers == (('head/fc/.*', 5.0),)
  assert head.recipe(plain, False) == plain
  faster = fgia.Head(rate=4.0).recipe(plain, False)
  assert faster.schedule.base == pytest.approx(0.08)


@pytest.mark.exhaustive
def test_test_images_are_judged_with_their_mirror_images():
  config = tiny_config('recognition.mirrored=True')
  source = data.subset(harness_data.load(config.recognition.data, 'test'), np.arange(40))
  model = fgia.network(config, config.recognition, 'gap')
  variables = fgia.beginning(config, config.recognition, 'gap')
  images = config.recognition.task.inputs({'image': jnp.asarray(source.arrays['image'])})
  logits = model.apply(variables, images) + model.apply(variables, images[:, :, ::-1])
  expected = np.mean(np.argmax(logits, 1) == source.arrays['label'])
  found = fgia.judges(config, config.recognition, 'gap', source)(variables)
  assert found == {'accuracy': pytest.approx(100 * expected)}


def test_the_papers_settings_are_those_of_the_code():
  config = launcher.load('fgia', 'cub_isqrt_resnet50')
  recipe = config.head('isqrt').recipe(config.recognition.recipe, True)
  assert (recipe.epochs, recipe.batch_size, recipe.optimizer.weight_decay) == (100, 10, 1e-4)
  assert recipe.schedule.make(100, 599)(30_000) == pytest.approx(1.2e-3)
  assert recipe.optimizer.lr_multipliers == (('head/fc/.*', 5.0),)
  network = fgia.network(config, config.recognition, 'isqrt', embeds=True)
  images = jnp.zeros((1, 448, 448, 3))
  shapes = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), images)[0])
  assert shapes.shape == (1, 256 * 257 // 2)
  features = jax.eval_shape(
    lambda: network.init_with_output(jax.random.key(0), images, method='features')[0]
  )
  assert features.shape == (1, 28, 28, 2048)
  config = launcher.load('fgia', 'cub_bilinear_vgg16')
  steps = config.recognition.classifier, config.recognition.recipe
  first, second = (config.head('bilinear').recipe(r, r is steps[0]) for r in steps)
  assert first.schedule.base * dict(first.optimizer.lr_multipliers)['head/fc/.*'] == 1.0
  assert second.schedule.base == 1e-3 and not second.optimizer.lr_multipliers
  config = launcher.load('fgia', 'cub_retrieval_resnet50')
  splits = data.FINE_GRAINED_DATASETS['cub200'].splits
  assert config.retrieval.data.train_size == splits['retrieval_train'].images
  assert len(config.retrieval.data.test_options['classes']) == splits['retrieval_test'].classes


@pytest.mark.exhaustive
def test_public_weights_are_those_of_the_backbone(monkeypatch):
  small = "model={'name': 'resnet18', 'stage_sizes': (1, 1), 'width': 4}"
  config = launcher.load('fgia', 'cub_isqrt_resnet50', [small])

  def load_pretrained(name, **fields):
    assert (name, fields['num_classes'], fields['width']) == ('resnet50.tv_in1k', None, 4)
    model = models.create('resnet18', **fields)
    return model, jax.tree.map(lambda leaf: jnp.ones(leaf.shape), models.abstract_variables(model))

  monkeypatch.setattr(models, 'load_pretrained', load_pretrained)
  part = config.recognition
  small_part = type(part)(
    data=type(part.data)(name='x', num_classes=3, stored_image=(32, 32, 3)), recipe=part.recipe
  )
  variables = fgia.beginning(config, small_part, 'isqrt')
  assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(variables['params']['backbone']))
  assert variables['params']['head']['reduce']['kernel'].std() > 0


@pytest.mark.parametrize(
  ('changes', 'messages'),
  [
    (
      (
        "heads={'gap': {}, 'one': {'pooling': 'isqrt_cov', 'iterations': 0, 'rate': 0.0}}",
        *('retrieval.ks=(0, 2)', 'retrieval.scale=0.0', 'runs=two,', 'recognition=None'),
      ),
      (
        *("'gap' is the name", 'iterations=0', 'rate=0.0', 'ks=(0, 2)', 'scale=0.0'),
        "runs: ['two']",
      ),
    ),
    (
      ("heads={'one': {'title': 'GAP'}}", 'map_path=fc', 'retrieval.recipe.batch_size=65'),
      (
        *('titles that differ', 'model, map_path: ', 'retrieval.data.train_size=48'),
        'retrieval.recipe.batch_size=65',
      ),
    ),
    (
      (
        'recognition=None',
        'retrieval=None',
        "claims=[{'statement': 'x', 'metric': 'ap', 'baseline': 'GAP', 'method': 'Y'}]",
      ),
      ('expected at least one of the two', "no row 'Y'", "no metric 'ap'"),
    ),
  ],
)
def test_impossible_settings_are_named_all_at_once(changes, messages):
  with pytest.raises(SettingsError) as caught:
    launcher.check(tiny_config(*changes))
  for message in messages:
    assert message in str(caught.value)


def test_a_run_compares_heads_and_draws_what_they_find(tmp_path, monkeypatch):
  monkeypatch.setattr(fgia, 'QUERIES', 2)  # axes take seconds to draw
  monkeypatch.setattr(fgia, 'NEAREST', 2)
  config = tiny_config('runs=isqrt,', 'pictured=iSQRT-COV,')
  launcher.check(config)
  found = fgia.run(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert [*rows] == ['GAP', 'iSQRT-COV', 'GAP, untrained', 'iSQRT-COV, untrained', 'Pixels']
  for name, metrics in rows.items():
    assert ('accuracy' in metrics) == (name in ('GAP', 'iSQRT-COV'))
    shares = [value for metric, value in metrics.items() if metric != 'dim']
    assert all(0 <= share <= 100 for share in shares)
    assert metrics['recall_1'] <= metrics['recall_8']
  assert [row['dim'] for row in rows.values()] == [4, 10, 4, 10, 256]
  for name in ('retrieved_isqrt', 'scores'):
    assert (tmp_path / f'{name}.png').stat().st_size > 3000
  assert not (tmp_path / 'retrieved_gap.png').exists()


def test_untrained_networks_are_those_that_training_begins_with():
  config, (_, state) = tiny_config(), start('retrieval')
  drawn = fgia.beginning(config, config.retrieval, 'isqrt')
  jax.tree.map(np.testing.assert_array_equal, drawn['params'], dict(state.params))
