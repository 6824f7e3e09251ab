import jax
import numpy as np
import pytest
import tables
from golden_vectors import assert_close, golden
from torch_resnets import batches, network, variables

from experiments import mir
from experiments.harness import launcher
from experiments.harness.sections import Mesh
from experiments.harness.settings import SettingsError
from experiments.protocols import few_shot_compression
from jaxlab import compression, data

DATA = "{'name': 'digits', 'train_options': {'test_size': 1597}, 'test_options': {'test_size': 100}, 'train_size': 200}"  # noqa: E501


def tiny(*changes):
  """Returns the settings of a narrow ResNet of two stages and few images."""
  return launcher.load('mir', 'embedded', [
    f'network.data={DATA}', 'network.model.stage_sizes=(2, 1)', 'network.model.width=4',
    'network.recipe.epochs=1', 'network.recipe.batch_size=32', 'network.augment.kind=none',
    'augment.kind=none', 'totals=10', 'tuning.steps=2', 'tuning.batch_size=8', 'eval_batch_size=64',
    'claims=()', *changes,
  ])  # fmt: skip


def of_vectors(vectors):
  """Returns the settings of a reference file's network and loop."""
  whole = network(vectors.tree('param_origin_'))
  images = batches(vectors, 'images_nchw')[0]
  model = {
    'name': 'cifar_resnet18', 'num_classes': whole.num_classes, 'width': whole.width,
    **{name: tuple(getattr(whole, name)) for name in ('stage_sizes', 'widths', 'strides')},
  }  # fmt: skip
  own = {
    'name': 'digits', 'num_classes': whole.num_classes, 'stored_image': images.shape[1:],
    'dtype': 'float32', 'mean': 0.0, 'std': 1.0, 'train_size': 100,
  }  # fmt: skip
  optimizer = {
    'name': 'sgd', 'momentum': vectors.param('momentum'), 'weight_decay': vectors.param('weight_decay')
  }  # fmt: skip
  tuning = {
    'steps': vectors.param('num_steps'),
    'rate': vectors.param('lr'),
    'optimizer': optimizer,
  }
  stage = vectors.param('drop_stage')
  drop = [f'layer{s}_{b}' for s, b in zip(stage, vectors.param('drop_block'))]
  return launcher.load('mir', 'embedded', {
    'network.model': model, 'network.data': own, 'augment': {'kind': 'none'}, 'tuning': tuning,
    'totals': (len(images),), 'ratio': 0.0, 'drop': tuple(drop), 'label_rate': vectors.param('lr'),
  })  # fmt: skip


def tuned_like(vectors, name):
  config = of_vectors(vectors)
  images, labels = batches(vectors, 'images_nchw'), batches(vectors, 'labels')
  run = mir.programs(config)[f'{name}_{len(images[0])}']
  assert run.recipe.batch_size == len(images[0]) and run.num_steps == vectors.param('num_steps')
  whole = variables(vectors.tree('param_origin_'))
  model = few_shot_compression.whole_network(config)
  small, start = compression.slice_network(model, whole, mir.pruning(config, whole))
  jax.tree.map(np.testing.assert_array_equal, start, variables(vectors.tree('param_student_init_')))
  state = run.program.init(jax.random.key(0))
  state = state.replace(params=start['params'], model_state={'batch_stats': start['batch_stats']})
  frozen = {'teacher': whole} if run.program.frozen else {}
  step, losses = jax.jit(run.program.step), []
  for index in range(run.num_steps):
    at = index % len(images)
    batch = {
      'image': images[at].astype(np.float32), 'label': labels[at].astype(np.int32),
      'index': np.arange(len(labels[at]), dtype=np.int32),
    }  # fmt: skip
    state, metrics = step(state, frozen, batch)
    losses.append(metrics['loss'])
  assert_close(losses, vectors['out_losses'], 1e-5)
  found = {'params': state.params, **state.model_state}
  expected = variables(vectors.tree('out_student_'), np.float64)
  jax.tree.map(lambda a, b: assert_close(a, b, 2e-5), found, expected)
  logits = jax.jit(small.apply)(found, images[0].astype(np.float32))
  assert_close(logits, vectors['out_eval_logits'], 2e-5)
  return start, found


@golden('mir', 'mir_finetune')
def test_mimicking_agrees_with_official_code_to_the_last_weight(vectors):
  start, found = tuned_like(vectors, 'mir')
  # The head stays bit for bit: no gradient, no decay.
  jax.tree.map(np.testing.assert_array_equal, found['params']['fc'], start['params']['fc'])


@golden('mir', 'bp_finetune')
def test_fine_tuning_on_labels_agrees_with_official_code_to_the_last_weight(vectors):
  start, found = tuned_like(vectors, 'bp')
  assert np.abs(found['params']['fc']['kernel'] - start['params']['fc']['kernel']).max() > 1e-4


def test_a_run_has_a_row_for_every_way_and_number_of_images(tmp_path):
  found = launcher.launch(tiny('totals=10,8', 'runs=mir'), tmp_path)
  rows = {item['name']: item['metrics'] for item in found['rows']}
  assert list(rows) == ['whole', 'pruned', 'MiR']
  hits = [own[f'accuracy_{total}'] for own in rows.values() for total in (10, 8)]
  np.testing.assert_allclose(hits, np.round(hits), atol=1e-6)  # of 100 test images
  assert rows['whole']['macs'] == 100 > rows['pruned']['macs']
  plan = compression.Plan.load(tmp_path / 'plan.json')
  assert plan.kept_sizes['layer1_1/conv1'] == 2 and plan.kept_sizes['layer2_0/conv1'] == 8
  assert (tmp_path / 'accuracy_over_images.png').exists()


@pytest.mark.parametrize('origin', tables.few(['noise', 'synthetic', 'other'], 'synthetic'))
def test_images_may_come_from_elsewhere(origin, tmp_path, monkeypatch):
  other = "other={'name': 'digits', 'train_options': {'classes': (3,)}, 'train_size': 126}"
  config = tiny(
    f'origin={origin}', 'runs=mir', 'synthesis={"steps": 3, "warmup_steps": 1, "shift": 1}',
    'network.recipe.schedule.base=0.0', *([other] if origin == 'other' else []),
  )  # fmt: skip
  monkeypatch.setattr(compression, 'require_recognized', lambda *args: 1.0)
  launcher.check(config)
  nets = few_shot_compression.load(config, tmp_path)
  images = data.materialize(few_shot_compression.tiny_set(config, nets, 10))['image']
  again = data.materialize(few_shot_compression.tiny_set(config, nets, 10))['image']
  np.testing.assert_array_equal(images, again)
  assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
  if origin == 'other':
    threes = data.materialize(data.load('digits', 'train', classes=(3,)))['image']
    assert all((threes == own).all((1, 2, 3)).any() for own in images)
  else:
    normal = images / 255 - config.network.data.mean
    assert np.abs(normal.std() / config.network.data.std - 1) < 0.4


@pytest.mark.exhaustive
def test_synthetic_images_are_made_in_parts(monkeypatch):
  config = tiny(
    'origin=synthetic', 'runs=mir', 'synthesis={"count": 8, "steps": 2, "warmup_steps": 1, "shift": 1}',
    'network.recipe.epochs=1',
  )  # fmt: skip
  launcher.check(config)
  model = few_shot_compression.whole_network(config)
  variables = dict(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32)))
  sizes = []

  def made(own, images, model, variables, key, labels):
    sizes.append(len(labels))  # once: parts have one size
    return (
      np.ones((len(labels), *images.view)) * jax.random.uniform(key),
      labels,
      jax.nn.one_hot(labels, 10),
    )

  monkeypatch.setattr(few_shot_compression.synthetic_images, 'made', made)
  own, data_section = few_shot_compression.synthesis(config), config.network.data
  given = data_section, model, variables, jax.random.key(3)
  images, labels, logits = few_shot_compression.synthetic_images.make(own, *given, total=21)
  assert sizes == [7] and images.shape == (21, 8, 8, 1) and logits.shape == (21, 10)
  assert set(np.bincount(labels, minlength=10)) == {2, 3}
  assert len(np.unique(images[:, 0, 0, 0])) == 3  # each part has a noise of its own


@pytest.mark.parametrize('steps', [2, 50])
def test_a_tuning_too_short_for_running_statistics_is_said(steps, monkeypatch, capsys):
  config = tiny(f'tuning.steps={steps}')
  run = mir.training(config, 'bp', few_shot_compression.whole_network(config), 10)
  monkeypatch.setattr(
    few_shot_compression.runs, 'train', lambda *a, **k: type('', (), {'variables': 1})
  )
  assert few_shot_compression.tune(run, None, None, {}, {}) == 1
  assert ('WARNING: labels (BP) in 2 steps' in capsys.readouterr().out) == (steps == 2)


def test_latencies_are_of_images_on_the_device(monkeypatch):
  config = tiny('timed=2', 'timed_batch=4')
  seen = []
  monkeypatch.setattr(jax, 'jit', lambda apply: lambda variables, images: seen.append(images))
  monkeypatch.setattr(
    compression,
    'paired_latency',
    lambda sides, repeats: {name: own() for name, own in sides.items()},
  )
  model = few_shot_compression.whole_network(config)
  few_shot_compression.latencies(config, {'a': (model, {}), 'b': (model, {})})
  assert all(isinstance(own, jax.Array) and own.shape == (4, 8, 8, 1) for own in seen)
  assert len(seen) == 2


def test_the_rate_falls_twice_at_shares_of_the_steps():
  whole = Mesh()
  recipe = few_shot_compression.Tuning(steps=2000).recipe(50, whole)
  schedule = recipe.schedule.make(recipe.epochs, 1)
  assert recipe.batch_size == 48  # of 50, over the tests' eight devices
  for step, rate in ((0, 2e-2), (799, 2e-2), (800, 2e-3), (1599, 2e-3), (1600, 2e-4), (1999, 2e-4)):
    assert float(schedule(step)) == pytest.approx(rate)
  for steps in (1, 2, 3, 4):
    few_shot_compression.Tuning(steps=steps).recipe(100, whole, 1e-4).schedule.make(steps, 1)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('ratio=0', r'ratio=0\.0: expected a share above 0, or blocks in drop'),
    ('ratio=1.0', r'ratio, drop: ratio=1.0: expected a share in \[0, 1\)'),
    ('drop=layer9_1', "ratio, drop: .*'layer9_1' cannot be left out"),
    ('totals=[]', r'totals=\(\): expected numbers of images'),
    ('totals=10,10', 'each once'),
    ('totals=1', 'totals: 1: expected 2 to 200'),
    ('totals=300', 'totals: 300: expected 2 to 200'),
    ('totals=15', 'totals: 15 is no multiple of the 10 classes'),
    ('origin=noise', "'bp' learns labels, which images of origin='noise' do not have"),
    ('origin=other', "expected a data set for 'other' alone"),
    ('tuning.steps=0', 'tuning.steps=0'),
    ('tuning.rate=0', 'rate=0.0: expected a positive number'),
    ('tuning.step_share=0', 'step_share=0.0'),
    ('label_rate=0', 'label_rate=0.0'),
    ('temperature=0', 'temperature=0.0'),
    ('runs=[]', 'runs is empty'),
    ('synthesis={"step": 3}', 'synthesis: .*step: unknown key; expected steps'),
    ('synthesis={"steps": 3}', 'synthesis: warmup_steps=100'),
    ('synthesis={"count": 0}', 'synthesis: count=0'),
    (
      ('origin=synthetic', 'runs=mir', 'synthesis={"shift": 8}'),
      r'synthesis.shift=8: expected 0 to 7',
    ),
    ('timed=-1', 'timed=-1'),
    ("network.model={'name': 'mlp', 'hidden': (8,), 'num_classes': 10}", 'network.model: The map'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny(*([change] if isinstance(change, str) else change)))
