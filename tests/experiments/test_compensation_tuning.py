import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compensation_tuning, launcher, networks, post_training, qwt
from jaxlab import models, quantizers
from jaxlab.quantizers import compensation

HEAD = r'head|fc'


@pytest.fixture(scope='module')
def built():
  """Returns the section of a tiny transformer, the network, quantized, and compensated."""
  config = launcher.load_config(launcher.CONFIGS / 'qwt' / 'embedded.py')
  with config.unlocked():
    config.network.vit.model.update(width=8, depth=1, num_heads=2, patch_size=4)
  own = networks.section(config, 'vit')
  model = models.create(**own.model)
  x = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
  variables = model.init(jax.random.key(1), x)
  head = jax.random.normal(jax.random.key(2), variables['params']['head']['kernel'].shape)
  variables['params']['head']['kernel'] = head  # zeros by design
  quantized = post_training.quantize(own, model, variables, x, '2w3a')
  found = compensation.compensate(model, quantized, [x], blocks=own.blocks)
  return config, own, model, quantized, found, x


def trained_and_frozen(built):
  _, _, _, quantized, found, _ = built
  trained, frozen = compensation_tuning.split(found.variables, HEAD)
  floats, _ = compensation_tuning.split({'params': quantized.float_variables['params']}, HEAD)
  return {**trained, **floats}, frozen


def test_compensation_and_classifier_are_trained_from_the_closed_form(built):
  _, _, _, _, found, _ = built
  trained, frozen = trained_and_frozen(built)
  assert set(trained) == {'compensation', 'params'} and set(trained['params']) == {'head'}
  assert 'head' not in frozen['params'] and 'compensation' not in frozen
  merged = compensation_tuning.merge(trained, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(dict(found.variables))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), merged, found.variables
  )


def test_trained_classifier_stays_on_the_codes_of_its_calibration(built):
  _, _, _, quantized, _, _ = built
  trained, frozen = trained_and_frozen(built)
  constants = quantized.variables['quantization']['head']['kernel']
  moved = jax.tree.map(lambda leaf: leaf + 0.01, trained)
  kernel = compensation_tuning.merge(moved, frozen)['params']['head']['kernel']
  codes = kernel / constants['scale'] + constants['zero_point']
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
  assert codes.min() > -0.01 and codes.max() < 255.01
  assert np.any(kernel != quantized.variables['params']['head']['kernel'])


def test_gradients_reach_all_that_is_trained_through_the_quantizers(built):
  _, _, model, quantized, found, x = built
  trained, frozen = trained_and_frozen(built)
  hook = compensation.compensation_hook(found.report.paths, jnp.float32)

  def loss(trained):
    merged = compensation_tuning.merge(trained, frozen)
    return jnp.sum(jnp.sin(models.apply(model, merged, x, hooks=(*quantized.hooks, hook))))

  gradient = jax.jit(jax.grad(loss))(trained)
  for leaf in jax.tree.leaves(gradient):
    assert np.all(np.isfinite(leaf)) and np.any(leaf != 0)
  assert gradient['params']['head']['kernel'].dtype == jnp.float32


def test_networks_without_classifier_tune_the_compensation_alone(built):
  _, _, _, quantized, found, _ = built
  trained, _ = compensation_tuning.split(found.variables, 'lm_head')
  assert set(trained) == {'compensation'}
  assert not jax.tree.leaves(compensation_tuning.split(quantized.variables, 'lm_head')[0])


def test_section_replaces_the_training_and_says_where_it_starts(built):
  config, own, *_ = built
  merged = compensation_tuning.section(own, config.qwt.fine_tuning, {'row': 'QwT', 'bits': '2w3a'})
  assert merged.schedule.to_dict() == config.qwt.fine_tuning.schedule.to_dict()
  assert merged.batch_size == config.qwt.fine_tuning.batch_size and 'bits' not in merged
  assert (merged.start.row, merged.start.quantization, merged.start.blocks) == (
    'QwT',
    'repq',
    own.blocks,
  )


def test_bit_widths_are_the_lowest_or_all(built):
  config, own, *_ = built
  settings = config.qwt.fine_tuning
  assert compensation_tuning.bit_widths(config, own, settings) == (config.bits[-1],)
  settings = settings.copy_and_resolve_references()
  settings.bits = 'all'
  assert compensation_tuning.bit_widths(config, own, settings) == tuple(config.bits)
  for changes, message in (
    ({'bits': '2w3a'}, r'fine_tuning\.bits'),
    ({'batch_size': 2048}, 'at most 1297'),
    ({'batch_size': 12}, '8'),
  ):
    wrong = settings.copy_and_resolve_references()
    wrong.update(changes)
    with pytest.raises(ValueError, match=message):
      compensation_tuning.bit_widths(config, own, wrong)
  settings.tasks = ('language',)
  assert compensation_tuning.bit_widths(config, own, settings) == ()


def test_runs_tune_are_resumed_and_refuse_another_start(tmp_path, capsys):
  config = launcher.load_config(launcher.CONFIGS / 'qwt' / 'embedded.py')
  with config.unlocked():
    config.networks, config.bits = ('vit',), ('4w4a', '2w3a')
    config.networks_dir = str(tmp_path / 'networks')
    config.calibration = {'ranges': 12, 'compensation': 64, 'batch_size': 64}
    config.network.vit.model.update(width=16, depth=1, num_heads=2, patch_size=4)
    config.network.vit.update(epochs=4, eval_batch_size=256)
    config.network.vit.schedule.warmup_epochs = 0
    config.qwt.fine_tuning.schedule.base = 0.03
  found = launcher.launch(qwt.run, config, tmp_path / 'run')
  rows = {row['name']: row for row in found['rows']}
  assert (rows['PTQ*']['role'], rows['QwT*']['role']) == ('baseline', 'method')
  for title, base in (('PTQ*', 'PTQ'), ('QwT*', 'QwT')):
    own, start = rows[title]['metrics'], rows[base]['metrics']
    assert 'vit_4w4a_accuracy' not in own  # the lowest bits alone
    assert own['vit_2w3a_megabytes'] == start['vit_2w3a_megabytes']
    assert own['vit_2w3a_logit_mse'] != start['vit_2w3a_logit_mse']
    log = tmp_path / 'run' / 'fine_tuning' / f'vit-2w3a-{base}-seed0' / 'metrics.jsonl'
    losses = [json.loads(line)['loss'] for line in log.read_text().splitlines()]
    assert losses[-1] < losses[0]
  assert rows['QwT*']['metrics']['vit_extra_parameters'] > 0
  assert {c['method'] for c in found['claims']} >= {'QwT', 'QwT*'}

  capsys.readouterr()
  again = launcher.launch(qwt.run, config, tmp_path / 'run')
  assert again['rows'] == found['rows']
  steps = 1297 // config.qwt.fine_tuning.batch_size
  assert f'vit 2w3a QwT*: finished before, at step {steps}' in capsys.readouterr().out
  config.calibration.ranges = 10
  with pytest.raises(ValueError, match='ranges'):
    qwt.run(config, tmp_path / 'run')
  config.qwt.fine_tuning = None
  assert not qwt.tunings(config)


def test_the_training_of_imagenet_traces():
  config = launcher.load_config(launcher.CONFIGS / 'qwt' / 'imagenet.py')
  with config.unlocked():
    config.network.deit_tiny.model.depth = 1
  own = networks.section(config, 'deit_tiny')
  model = models.create(**own.model)
  image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  variables = models.abstract_variables(model, (224, 224, 3))
  quantized, floats = jax.eval_shape(
    lambda v, x: post_training.quantize(own, model, v, x, '4w4a')[:2], variables, image
  )
  trained, frozen = compensation_tuning.split(quantized, config.qwt.fine_tuning.head)
  master, _ = compensation_tuning.split({'params': floats['params']}, config.qwt.fine_tuning.head)
  assert set(master['params']) == {'head'}
  section = compensation_tuning.section(own, config.qwt.fine_tuning, {'row': 'PTQ', 'bits': '4w4a'})
  program = compensation_tuning.program(
    section, model, quantizers.operand_hooks(), ({**trained, **master}, frozen), 10
  )
  state = jax.eval_shape(program.init, jax.random.key(0))
  new, metrics = jax.eval_shape(program.step, state, {}, program.batch)
  assert jax.tree.structure(new) == jax.tree.structure(state) and metrics['loss'].shape == ()
