import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.random_variables import random_images, random_variables

from experiments import colinearity_decay, gplq
from experiments.harness import launcher, runs
from experiments.harness.settings import SettingsError
from experiments.harness.supervised import Seen, cross_entropy
from experiments.protocols import quantized_scores, quantized_training
from experiments.protocols.quantized_training import FLOAT, Stage, Trained
from jaxlab import models, quantizers

IMAGES = random_images((16, 8, 8, 1))
PERCEPTRON = "network.model={'name': 'mlp', 'hidden': (8, 8), 'num_classes': 2}"


def digits(classes, train_size, stored, view=8):
  """Returns the section of few digits of two classes, whose training records are `stored` pixels wide."""
  return (
    f"{{'name': 'digits', 'train_options': {{'classes': {classes}, 'test_size': 1597}}, 'num_classes': 2, "
    f"'test_options': {{'classes': {classes}, 'test_size': 100}}, 'train_size': {train_size}, "
    f"'stored_image': ({stored}, {stored}, 1), 'train_decode': {{'size': {stored}}}, "
    f"'image_size': {view}, 'test_decode': {{'size': {view}}}}}"
  )


def tiny(*changes, stored=8):
  """Returns the settings on few images, with a network of one narrow block.

  It sees 8x8 pixels: all of a training record, or a random part of a larger one, as of ImageNet.
  """
  return launcher.load('gplq', 'embedded', [
    f'network.data={digits((0, 1), 49, stored)}', f'transfer={{"unseen": {digits((2, 3), 43, stored)}}}',
    f'network.augment.kind={"none" if stored == 8 else "resized_crop"}', 'bits=3w3a', 'calibration=32',
    'network.model.name=vit_tiny_patch4_8', 'network.model.width=8', 'network.model.depth=1',
    'network.model.num_heads=2', 'network.model.num_classes=2', 'network.recipe.epochs=1',
    'network.recipe.batch_size=16', 'network.recipe.schedule.warmup_epochs=0', 'recipe.batch_size=16',
    'batch_size=16', 'timed=0', 'steps.attention=false', 'eval_batch_size=64', 'mimicking.multiple=2',
    'claims=()', *changes,
  ])  # fmt: skip


def flat_kernels(params):
  """Returns all kernels as one float64 vector."""
  flat = jax.tree_util.tree_leaves_with_path(params)
  return np.concatenate([np.ravel(leaf) for path, leaf in flat if path[-1].key == 'kernel']).astype(
    np.float64
  )


def components_by_numpy(features, share=0.6, multiple=2):
  """Returns the first principal components `[dim, count]`."""
  variance, vectors = np.linalg.eigh(np.cov(np.asarray(features, np.float64).T))
  variance, vectors = variance[::-1], vectors[:, ::-1]
  needed = np.searchsorted(np.cumsum(variance) / variance.sum(), share) + 1
  return vectors[:, : min(-(-needed // multiple) * multiple, len(variance))]


def test_a_run_leaves_all_rows(tmp_path):
  found = launcher.launch(tiny('rows=()'), tmp_path)
  rows = {item['name']: item['metrics'] for item in found['rows']}
  missing = {'float again', 'direct QAT', 'activations trained, no mimicking', 'GPLQ, no mimicking'}
  assert set(rows) == set(gplq.ROLES) - missing
  assert rows['float']['3w3a_pca_error'] == rows['float']['3w3a_kernel_distance'] == 0
  assert (
    rows['activations alone']['3w3a_kernel_distance'] == 0 < rows['PTQ']['3w3a_kernel_distance']
  )
  # Compensations change no kernel, and every one of them changes what the network says.
  for title in ('PTQ', 'RepQ-ViT', 'GPLQ'):
    plain, better = rows[title], rows[f'{title} + QwT']
    assert plain['3w3a_kernel_distance'] == better['3w3a_kernel_distance']
    assert plain['3w3a_pca_error'] != better['3w3a_pca_error']
  own = rows['activations trained']
  assert own['3w3a_kernel_distance'] == pytest.approx(own['3w3a_weight_distance'])
  assert rows['GPLQ']['3w3a_weight_distance'] == own['3w3a_weight_distance'] > 0
  # 27 test images of two classes, 23 of the two that the network never saw.
  for metric, count in (('accuracy', 27), ('transfer_unseen', 23)):
    hits = [item[f'3w3a_{metric}'] * count / 100 for item in rows.values()]
    np.testing.assert_allclose(hits, np.round(hits), atol=1e-6)
    assert all(0 <= hit <= count for hit in hits)
  assert (tmp_path / 'accuracy_and_transfer.png').exists()


@pytest.mark.exhaustive
def test_training_images_are_read_as_test_images_and_metrics_are_those_of_numpy(tmp_path):
  config = tiny(PERCEPTRON, 'transfer={}', 'rows=()', stored=10)
  nets = Trained(config, gplq.table(config), tmp_path)
  own, source = config.network.data, nets.loaded.train
  params = nets.loaded.variables['params']

  def by_numpy(source):
    x = np.asarray(source.arrays['image'], np.float64).reshape(len(source), -1) / 255
    x = (x - own.mean) / own.std
    for name in ('fc0', 'fc1'):
      x = np.maximum(x @ np.asarray(params[name]['kernel'], np.float64) + params[name]['bias'], 0)
    return x

  bank = by_numpy(source)
  found = nets.outputs(nets[FLOAT], source=source)
  np.testing.assert_allclose(found['features'], bank, rtol=1e-4, atol=1e-5)
  logits = bank @ np.asarray(params['fc']['kernel'], np.float64) + params['fc']['bias']
  np.testing.assert_array_equal(found['label'], source.arrays['label'])
  np.testing.assert_array_equal(found['correct'], logits.argmax(-1) == found['label'])
  assert quantized_training.accuracy(found) == pytest.approx(100 * found['correct'].mean())

  judge = gplq.Judge(config, nets)
  network = gplq.quantized_weights(config, 2, nets.start('activations_3w3a'))
  exact, new = by_numpy(nets.loaded.test), nets.outputs(network)['features']
  directions = components_by_numpy(bank)
  error = np.square((new - exact) @ directions).sum(-1).mean()
  spread = np.square((exact - exact.mean(0)) @ directions).sum(-1).mean()
  metrics = judge(network)
  assert metrics['pca_error'] == pytest.approx(error / spread, rel=1e-3)
  old, kernels = flat_kernels(params), flat_kernels(network.variables['params'])
  distance = 100 * np.linalg.norm(kernels - old) / np.linalg.norm(old)
  assert metrics['kernel_distance'] == pytest.approx(distance, rel=1e-4) and distance > 1


def test_the_loss_is_cross_entropy_and_the_distance_within_the_components():
  keys = jax.random.split(jax.random.key(0), 4)
  student, teacher, logits = (jax.random.normal(k, (4, n)) for k, n in zip(keys, (6, 6, 3)))
  features = jax.random.normal(keys[3], (32, 6)) * jnp.arange(1.0, 7.0)
  labels = np.array([0, 1, 2, 0])
  constants = gplq.components(tiny(), features)
  directions = components_by_numpy(features)
  assert constants['components'].shape == (6, 6) and directions.shape[1] == 2
  seen = Seen(0, None, {'pool': student}, {'pool': (teacher, None)}, constants)
  found = gplq.mimicking_loss(0.5, 'pool')(logits, labels, seen)
  z = np.asarray(logits, np.float64)
  entropy = np.log(np.exp(z).sum(-1)) - z[np.arange(4), labels]
  projected = np.asarray(student - teacher, np.float64) @ directions
  np.testing.assert_allclose(found, entropy + 0.5 * np.square(projected).sum(-1), rtol=1e-4)


@pytest.mark.exhaustive
def test_rows_quantize_what_they_say():
  config = tiny()
  model = models.create(**config.network.model)
  variables = random_variables(model, IMAGES)
  network = gplq.quantized_together(config, (3, 4), model, variables, IMAGES)
  assert network.operands()['blocks_0/mlp/fc1'] == {'input': 4, 'kernel': 3}
  assert network.operands()['head'] == {'input': 8, 'kernel': 8}
  activations = gplq.quantized_activations(config, 3, model, variables, IMAGES)
  assert activations.operands()['blocks_0/mlp/fc1'] == {'input': 3}
  weights = gplq.quantized_weights(config, 3, activations)
  for a, b in zip(
    *(jax.tree.leaves(own.variables.tree) for own in (weights.in_float(), activations))
  ):
    np.testing.assert_array_equal(a, b)
  kernel = weights.variables['params']['blocks_0']['mlp']['fc1']['kernel']
  assert max(len(np.unique(column.round(5))) for column in np.asarray(kernel).T) <= 8


def test_a_stage_starts_from_what_another_ends_with_and_its_step_runs_its_network(tmp_path):
  config = tiny(PERCEPTRON, 'timed=1')
  rules = quantizers.uniform_rules(4, 4, path='fc1', learned=True)
  quantize = lambda model, variables, x: quantizers.range_qat(model, variables, x, rules)  # noqa: E731
  stage = functools.partial(Stage, role='method', recipe=config.recipe)
  table = {
    'first': stage('first', quantize=quantized_training.in_float),
    'second': stage('second', quantize=quantize, learned=('learned_ranges',), start='first'),
  }
  nets = Trained(config, table, tmp_path)
  second = nets['second']
  start, first = nets.start('second'), nets['first']
  assert start is nets.start('second')
  for a, b in zip(*(jax.tree.leaves(own.variables['params']) for own in (start, first))):
    np.testing.assert_array_equal(a, b)
  costs = nets.costs(['second'], 'first')
  assert set(costs['first'].values()) == {1} and costs['second']['memory'] > 1
  params = [own.variables['params'] for own in (second, first, nets[FLOAT])]
  new, old, older = map(flat_kernels, params)
  assert quantized_scores.weight_distance(*params[1:]) > 0 < np.linalg.norm(old - older)
  expected = 100 * np.linalg.norm(new - old) / np.linalg.norm(old)
  assert quantized_scores.weight_distance(*params[:2]) == pytest.approx(expected, rel=1e-4)
  # The loss of a first step is that of the network as it was put together.
  own = quantized_training.run(config, table, 'second')
  images = np.asarray(nets.loaded.train.arrays['image'][:16])
  batch = {'image': images, 'label': nets.loaded.train.arrays['label'][:16], 'index': np.arange(16)}
  state = jax.jit(own.program.init)(jax.random.key(0))
  given = quantized_training.held(start)
  state = state.replace(
    params={part: given[part] for part in state.params},
    model_state={part: given[part] for part in state.model_state},
  )
  _, metrics = jax.jit(own.program.step)(state, {}, batch)
  logits = jax.jit(lambda network, x: network(x))(start, config.network.task.inputs(batch))
  np.testing.assert_allclose(
    metrics['loss'], cross_entropy(logits, batch['label'], None).mean(), rtol=1e-4
  )
  other = {**table, 'second': table['second']._replace(decides={'bits': 5})}
  with pytest.raises(ValueError, match='bits'):
    runs.train(
      quantized_training.run(config, other, 'second'), nets.loaded.train, tmp_path / 'second'
    )


def test_what_the_float_network_was_drawn_by_decides_every_stage_and_other_widths_none():
  def decided(*changes):
    config = tiny(*changes)
    own = gplq.table(config)
    return {name: quantized_training.ancestry(config, own, name) for name in own}

  plain = decided()
  scaled = decided("network.fan_in_scaled=['head/kernel']")
  assert all(plain[name] != scaled[name] for name in plain)
  assert len({str(own) for own in plain.values()}) == len(plain)
  wider = decided('bits=4w4a,3w3a')
  assert {name: wider[name] for name in plain} == plain and len(wider) == len(plain) + 3
  # The first stage quantizes activations alone.
  assert decided('bits=4w3a')['activations_4w3a'] == plain['activations_3w3a']


@pytest.mark.parametrize(
  ('setting', 'row'), [('after_plain', 'plain'), ('after_tweo', 'tweo'), ('after_cd', 'cd')]
)
def test_float_networks_without_outliers_are_those_of_the_papers_that_train_them(setting, row):
  narrow = [
    'network.model.width=8', 'network.model.depth=1', 'network.model.num_heads=2',
    'network.model.patch_size=4', 'network.recipe.schedule.warmup_epochs=0', 'timed=0',
  ]  # fmt: skip
  config = launcher.load('gplq', setting, narrow)
  other = launcher.load('colinearity_decay', 'combinations', narrow)
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 255, (96, 8, 8, 1)).astype(np.uint8),
    'label': rng.integers(0, 10, 96).astype(np.int32),
    'index': np.arange(96, dtype=np.int32),
  }
  runs_of = quantized_training.float_run(config), colinearity_decay.programs(other)[row]
  ends = []
  for own in runs_of:
    state = jax.jit(own.program.init)(jax.random.key(0))
    # Larger than drawn, so that TWEO's term, a fourth power, is felt.
    state = state.replace(params=jax.tree.map(lambda leaf: 3 * leaf, state.params))
    ends.append(jax.jit(own.program.step)(state, None, batch)[0].params)
  for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  # What it is trained with decides whether an earlier training can go on.
  sections = {name: getattr(config, name) for name in ('penalty', 'decay')}
  for name, section in sections.items():
    assert (name in runs_of[0].decides) == (section is not None)
    assert (name in quantized_training.ancestry(config, {}, FLOAT)) == (section is not None)


LARGER = digits((2, 3), 43, 10, view=10)
CONVOLUTIONS = "network.model={'name': 'cifar_resnet18', 'stage_sizes': (1,), 'strides': (1,), 'width': 4, 'num_classes': 2}"  # noqa: E501


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('bits=9w9a', "bits: '9w9a' is outside of 2 to 8"),
    ('bits=three', 'bits are named such as'),
    ('bits=[]', 'bits: expected at least one'),
    ('bits=3w3a,3w3a', 'expected each once'),
    ('timed=-1', 'timed=-1: expected a number of repeats'),
    ('batch_size=10', 'expected a divisor of calibration=32'),
    ('calibration=50', 'calibration=50: expected 1 to 49'),
    ('recipe.batch_size=64', r'recipe.batch_size=64 exceeds the 49 training images'),
    ('mimicking.weight=0', 'mimicking.weight=0.0: expected a positive number'),
    ('mimicking.share=1.5', r'mimicking.share=1.5: expected a share'),
    ('mimicking.multiple=0', r'mimicking.multiple=0: expected at least 1'),
    ('mimicking.images=7', r'mimicking.images=7: 7 images .* dimensions, 8'),
    ('network.model.name=gpt2', 'network.model'),
    ('network.model.name=vit_tiny_patch4_16', 'network.model'),
    (PERCEPTRON, 'network.model: the network has no blocks'),
    (CONVOLUTIONS, r'qwt.relative=True: the network has blocks of convolutions'),
    (f'transfer={{"unseen": {LARGER}}}', r'transfer.unseen: test images are read as \(10, 10, 1\)'),
    ('penalty={"tau": 0.0}', 'penalty: tau'),
    ('decay={"pairs": ()}', 'decay: '),
    ('network.data.labeled=false', 'network.data.labeled: digits has no labels'),
    ('network.data.test_decode={"size": 9}', r'network.data: test images are read as \(9, 9, 1\)'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny(change))


def test_a_network_that_is_not_trained_here_has_no_term_in_its_loss():
  with pytest.raises(SettingsError, match='penalty: is of the training of the float network, but'):
    launcher.check(launcher.load('gplq', 'deit_small', ['penalty={}']))


def test_all_that_is_wrong_is_said_at_once():
  changes = 'bits=[]', 'timed=-1', 'mimicking.images=7', f'transfer={{"unseen": {LARGER}}}'
  with pytest.raises(SettingsError) as caught:
    launcher.check(tiny(CONVOLUTIONS, *changes, 'recipe.batch_size=64'))
  text = str(caught.value)
  keys = 'bits', 'timed', 'transfer.unseen', 'recipe.batch_size', 'qwt.relative'
  assert all(f'\n  {key}' in text for key in keys), text
