"""Post-training pipelines: what is quantized with how many bits, and what is fitted behind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from jax.sharding import NamedSharding, PartitionSpec

from experiments import colinearity_decay
from experiments.harness import launcher
from experiments.harness.networks import Loaded
from experiments.protocols import pipelines
from experiments.protocols.pipelines import Pipeline
from experiments.protocols.quantized_networks import Method
from jaxlab import data, models
from jaxlab.quantizers import Quantized, compensation

SMALL = ['network.model.width=8', 'network.model.depth=1', 'network.model.num_heads=2']


@functools.cache
def images():
  own = ['network.model.patch_size=4', 'eval_batch_size=64', 'calibration.count=64']
  config = launcher.load('colinearity_decay', 'embedded', [*SMALL, *own])
  records = {
    split: data.subset(data.load('digits', split), range(64)) for split in ('train', 'test')
  }
  x = np.zeros((1, 8, 8, 1), np.float32)
  whole = NamedSharding(config.mesh.make(), PartitionSpec())
  variables = jax.jit(config.model.init, out_shardings=whole)(jax.random.key(0), x)
  return Loaded(config, config.network, config.model, variables, **records)


def tokens():
  """A network whose head is tied to its embedding, and which has no stem."""
  config = launcher.load('tweo', 'text', SMALL)
  x = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.int32)
  variables = jax.jit(config.model.init)(jax.random.key(0), x[:1])
  return Loaded(config, config.network, config.model, variables, None, None), [jnp.asarray(x)]


@pytest.mark.parametrize('name', tables.few(colinearity_decay.QUANTIZERS, 'SmoothQuant'))
def test_all_quantizers_quantize_the_same_operands(name):
  network = images()
  quantize = colinearity_decay.quantizers_of(48)[name](network, network.calibration(64, 32))
  parts = models.anatomy(network.model)
  for bits, weights, inputs in (('4w3a', 4, 3), ('16w3a', None, 3)):
    expected = dict.fromkeys(parts.layers, (weights, inputs))
    expected |= dict.fromkeys(parts.edges, (weights and 8, inputs and 8))
    found = quantize(bits).operands()
    assert {p: (own.get('kernel'), own.get('input')) for p, own in found.items()} == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', tables.few(colinearity_decay.QUANTIZERS, 'RepQ'))
def test_networks_without_stem_and_head_are_quantized_inside(name):
  network, batches = tokens()
  made = colinearity_decay.quantizers_of(8)[name](network, batches)('4w3a')
  layers = models.anatomy(network.model).layers
  found = {p: (own.get('kernel'), own.get('input')) for p, own in made.operands().items()}
  assert found == dict.fromkeys(layers, (4, 3)) and 'h_0/mlp/c_fc' in layers


def test_searches_take_the_first_inputs_of_several_batches():
  batches = [jnp.arange(3) + 10 * i for i in range(3)]
  np.testing.assert_array_equal(pipelines.first_inputs(batches, 5), [0, 1, 2, 10, 11])
  np.testing.assert_array_equal(pipelines.first_inputs(batches, 2), [0, 1])
  with pytest.raises(ValueError, match='10 inputs are more than the 9'):
    pipelines.first_inputs(batches, 10)


def test_scores_are_those_of_the_network_behind_each_pipeline():
  """A quantizer adds 9 to a channel of the block, which a compensation with a bias takes away."""
  network = images()
  params = jax.tree.map(np.asarray, network.variables['params'])
  bias = params['blocks_0']['mlp']['fc2']['bias'] + 9 * np.eye(8)[0]
  fc2 = {**params['blocks_0']['mlp']['fc2'], 'bias': bias.astype(np.float32)}
  shifted = {
    **params,
    'blocks_0': {**params['blocks_0'], 'mlp': {**params['blocks_0']['mlp'], 'fc2': fc2}},
  }

  def prepare(network, batches):
    made = Quantized.of(network.model, {'params': shifted}, network.variables, ())
    return lambda bits: made

  records = [network.test[i] for i in range(64)]
  inputs = network.network.task.inputs({'image': np.stack([r['image'] for r in records])})
  labels = np.array([r['label'] for r in records])

  def accuracy(params):
    logits = np.asarray(network.model.apply({'params': params}, inputs))
    return 100 * np.mean(logits.argmax(-1) == labels)

  behind = Method('method', compensation.QwT())
  found = pipelines.scores(
    network,
    {'AbsMax': Pipeline(prepare), 'AbsMax + QwT-v2': Pipeline(prepare, behind)},
    ['3w3a'],
    network.calibration(64, 64),
  )
  expected = {
    'absmax_3w3a_accuracy': accuracy(shifted),
    'absmax_qwt_v2_3w3a_accuracy': accuracy(params),
  }
  assert found == pytest.approx(expected)
  assert expected['absmax_3w3a_accuracy'] != expected['absmax_qwt_v2_3w3a_accuracy']


def test_pipelines_are_found_by_their_names():
  config = images().config
  made = colinearity_decay.pipeline(config, 'RepQ + QwT-v2')
  assert made.prepare.func is pipelines.repq and made.prepare.keywords == {'count': 64}
  assert isinstance(made.behind.compensation, compensation.QwTv2) and made.behind.transitions
  assert colinearity_decay.pipeline(config, 'RepQ') == (made.prepare, None)
  assert pipelines.metric('RepQ + QwT-v2', '3w3a', 'accuracy') == 'repq_qwt_v2_3w3a_accuracy'
  for name in ('GPTQ', 'RepQ + GPTQ', 'RepQ + '):
    with pytest.raises(ValueError, match='is no pipeline'):
      colinearity_decay.pipeline(config, name)
