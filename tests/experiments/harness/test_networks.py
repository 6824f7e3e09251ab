import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments.harness import networks
from experiments.harness.data import Images
from experiments.harness.networks import Network
from experiments.harness.runs import Call
from experiments.harness.sections import Experiment, Mesh, Recipe, Schedule
from experiments.harness.settings import SettingsError, fill, problems, require
from experiments.harness.tasks import ImageTask
from jaxlab import models, parallel

CONFIG = Experiment(mesh=Mesh(), eval_batch_size=64)
DIGITS = fill(Images, {'name': 'digits'})
MODEL = {'name': 'mlp', 'hidden': (8,), 'num_classes': 10}


@pytest.fixture
def network():
  recipe = Recipe(epochs=1, batch_size=64, schedule=Schedule(0.1))
  return Network(model=MODEL, data=DIGITS, recipe=recipe)


def test_a_network_is_trained_once_and_found_again(network, tmp_path, capsys):
  first = networks.load(CONFIG, network, tmp_path / 'net')
  assert 'net (in float): 20 steps' in capsys.readouterr().out
  again = networks.load(CONFIG, network, tmp_path / 'net')
  assert 'finished before' in capsys.readouterr().out
  for a, b in zip(*map(jax.tree.leaves, (first.variables, again.variables)), strict=True):
    np.testing.assert_array_equal(a, b)
  score = first.score(first.variables)
  assert score['logit_mse'] == 0 and score['accuracy'] > 20
  assert len(first.train) == 1297 and len(first.test) == 500
  halved = jax.tree.map(lambda leaf: leaf / 2, first.variables)
  assert first.score(halved)['logit_mse'] > 0
  hooks = (models.Hook('.*', output=lambda site, y: 0 * y),)
  assert first.score(first.variables, hooks)['accuracy'] < 20
  other = dataclasses.replace(network, model={**MODEL, 'hidden': (9,)})
  with pytest.raises(ValueError, match='hidden'):
    networks.load(CONFIG, other, tmp_path / 'net')


@pytest.mark.parametrize('broken', ['reference', 'outputs'])
def test_agreement_with_what_is_nan_is_nan(broken):
  model, task = networks.create(MODEL), ImageTask.of(DIGITS)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  nan = jax.tree.map(lambda leaf: leaf * jnp.nan, variables)
  own, other = (nan, variables) if broken == 'reference' else (variables, nan)
  batch = {'image': np.zeros((2, 8, 8, 1), np.uint8), 'label': np.zeros(2, np.int32)}
  options = {'model': model, 'hooks': (), 'task': task}
  assert networks.judge(variables, variables, batch, **options)['agrees'].tolist() == [1, 1]
  assert np.isnan(networks.judge(own, other, batch, **options)['agrees']).all()


def test_calibration_batches_are_shuffled_training_inputs(network, tmp_path):
  loaded = networks.load(CONFIG, network, tmp_path / 'net')
  batches = loaded.calibration(32, 16)
  assert [batch.shape for batch in batches] == [(16, 8, 8, 1)] * 2
  again = loaded.calibration(32, 16)
  np.testing.assert_array_equal(batches[1], again[1])
  assert not np.array_equal(batches[0], batches[1])
  other = dataclasses.replace(loaded, config=dataclasses.replace(CONFIG, seed=1))
  assert not np.array_equal(batches[0], other.calibration(32, 16)[0])


def test_public_weights_are_read_and_judged_without_training(network, tmp_path, monkeypatch):
  model = networks.create(MODEL)
  variables = jax.tree.map(np.asarray, model.init(jax.random.key(3), jnp.zeros((1, 8, 8, 1))))
  asked = []

  def load_pretrained(name, **fields):
    asked.append((name, fields))
    return model, variables

  monkeypatch.setattr(models, 'load_pretrained', load_pretrained)
  own = dataclasses.replace(network, pretrained='mlp.public', recipe=None)
  loaded = networks.load(CONFIG, own, tmp_path / 'net')
  assert asked == [('mlp.public', {'hidden': (8,), 'num_classes': 10})]
  assert not (tmp_path / 'net').exists()
  for a, b in zip(*map(jax.tree.leaves, (loaded.variables, variables)), strict=True):
    np.testing.assert_array_equal(a, b)
    assert isinstance(a, jax.Array)


def test_public_weights_with_a_recipe_are_fine_tuned_under_a_new_classifier(
  network, tmp_path, monkeypatch
):
  features = networks.create(MODEL, num_classes=None)
  x = jnp.zeros((1, 8, 8, 1))
  public = jax.tree.map(np.asarray, jax.jit(features.init)(jax.random.key(3), x))
  asked = []

  def load_pretrained(name, **fields):
    asked.append(fields['num_classes'])
    return features, public

  monkeypatch.setattr(models, 'load_pretrained', load_pretrained)
  still = dataclasses.replace(network.recipe, schedule=Schedule(0.0))
  own = dataclasses.replace(network, pretrained='mlp.public', recipe=still)
  loaded = networks.load(CONFIG, own, tmp_path / 'net')
  assert asked == [None] and loaded.model.num_classes == 10
  np.testing.assert_array_equal(
    loaded.variables['params']['fc0']['kernel'], public['params']['fc0']['kernel']
  )
  assert loaded.variables['params']['fc']['kernel'].shape == (8, 10)
  with pytest.raises(ValueError, match='pretrained'):
    networks.load(CONFIG, dataclasses.replace(own, pretrained='mlp.other'), tmp_path / 'net')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'recipe': None}, 'expected public weights, a recipe, or both'),
    ({'pretrained': 'resnet18.x'}, "'resnet18.x' are weights of another network than 'mlp'"),
    ({'model': {'name': 'mlpp'}}, 'model: .*mlpp'),
  ],
)
def test_a_network_that_cannot_be_is_refused(network, changes, message):
  with pytest.raises(SettingsError, match=message):
    require(problems(dataclasses.replace(network, **changes)))


def test_a_normal_head_has_a_deviation_of_a_hundredth_and_no_bias():
  head = networks.classifier(MODEL, 500, kernel_init='normal').head
  drawn = head.init(jax.random.key(0), jnp.zeros((1, 40)))['params']
  assert float(jnp.std(drawn['kernel'])) == pytest.approx(0.01, rel=0.03)
  np.testing.assert_array_equal(drawn['bias'], 0)


@pytest.mark.parametrize(
  ('head', 'kernel_init', 'message'),
  [('linaer', 'torch', "head='linaer'"), ('linear', 'he', "kernel_init='he'")],
)
def test_a_head_that_does_not_exist_is_refused(head, kernel_init, message):
  with pytest.raises(ValueError, match=message):
    networks.classifier(MODEL, 10, head, kernel_init)


@pytest.mark.parametrize(
  ('size', 'spec'), [(16, PartitionSpec(('data', 'fsdp'))), (3, PartitionSpec())]
)
def test_a_small_calibration_batch_lies_whole_on_every_device(size, spec):
  sharding = networks.calibration_sharding(parallel.make_mesh(), size)
  assert sharding.spec == spec


def test_a_call_is_traced_and_lowered_for_a_mesh():
  def make(mesh):
    sharding = parallel.batch_sharding(mesh)
    shape = jax.ShapeDtypeStruct((8 * mesh.size, 4), jnp.float32, sharding=sharding)
    return (lambda x, y: jnp.sum(x * y)), (shape, shape)

  call = Call(make)
  call.trace()
  lowered = call.lower(parallel.make_mesh())
  assert jax.device_count() == 8 and 'tensor<64x4xf32>' in lowered.as_text()
  x = jnp.ones((64, 4))
  assert (
    float(
      lowered.compile()(*(jax.device_put(x, parallel.batch_sharding(parallel.make_mesh())),) * 2)
    )
    == 256
  )

  def wrong(mesh):
    shapes = [jax.ShapeDtypeStruct((n, 4), jnp.float32) for n in (2, 3)]
    return (lambda x, y: x + y), shapes

  with pytest.raises(TypeError, match='incompatible shapes'):
    Call(wrong).trace()
