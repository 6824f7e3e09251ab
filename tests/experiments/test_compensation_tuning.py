import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.random_variables import call

from experiments import qwt
from experiments.harness import launcher
from experiments.protocols import compensation_tuning, quantized_networks
from jaxlab import models, quantizers
from jaxlab.quantizers import compensation

TINY = [
  'networks=vit', 'eval_batch_size=256', 'network.vit.model.width=8', 'network.vit.model.depth=1',
  'network.vit.model.num_heads=2', 'network.vit.model.patch_size=4', 'network.vit.recipe.epochs=1',
  'network.vit.recipe.schedule.warmup_epochs=0',
]  # fmt: skip


@pytest.fixture(scope='module')
def built():
  """Returns a tiny transformer, quantized, compensated, and its inputs."""
  own = launcher.load('qwt', 'embedded', TINY).network['vit']
  model = models.create(**own.model)
  x = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
  variables = jax.jit(model.init)(jax.random.key(1), x)
  head = jax.random.normal(jax.random.key(2), variables['params']['head']['kernel'].shape)
  variables['params']['head']['kernel'] = head  # zeros by design
  quantized = quantized_networks.quantize(own, model, variables, x, '2w3a')
  return model, quantized, compensation.compensate(quantized, [x]), x


def trained_and_frozen(built):
  model, quantized, found, _ = built
  floats = quantized.float_variables['params']
  return compensation_tuning.beginning(model, found.unbind()[0], floats)


def test_compensation_and_classifier_are_trained_from_the_closed_form(built):
  _, _, found, _ = built
  trained, frozen = trained_and_frozen(built)
  assert set(trained) == {'compensation', 'params'} and set(trained['params']) == {'head'}
  assert 'head' not in frozen['params'] and 'compensation' not in frozen
  merged = compensation_tuning.merge(trained, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(found.unbind()[0])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), merged, found.unbind()[0]
  )


def test_trained_classifier_stays_on_the_codes_of_its_calibration(built):
  _, quantized, _, _ = built
  trained, frozen = trained_and_frozen(built)
  constants = quantized.variables['quantization']['head']['kernel']
  moved = jax.tree.map(lambda leaf: leaf + 0.01, trained)
  kernel = compensation_tuning.merge(moved, frozen)['params']['head']['kernel']
  codes = kernel / constants['scale'] + constants['zero_point']
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
  assert codes.min() > -0.01 and codes.max() < 255.01
  assert np.any(kernel != quantized.variables['params']['head']['kernel'])


def test_gradients_reach_all_that_is_trained_through_the_quantizers(built):
  model, quantized, _, x = built
  trained, frozen = trained_and_frozen(built)
  hook = compensation.compensation_hook(jnp.float32)

  def loss(trained):
    merged = compensation_tuning.merge(trained, frozen)
    return jnp.sum(jnp.sin(models.apply(model, merged, x, hooks=(*quantized.hooks, hook))))

  gradient = jax.jit(jax.grad(loss))(trained)
  for leaf in jax.tree.leaves(gradient):
    assert np.all(np.isfinite(leaf)) and np.any(leaf != 0)
  assert gradient['params']['head']['kernel'].dtype == jnp.float32


def test_networks_without_classifier_tune_the_compensation_alone(built):
  _, quantized, found, _ = built
  trained, _ = compensation_tuning.split(found.unbind()[0], ())
  assert set(trained) == {'compensation'}
  assert not jax.tree.leaves(compensation_tuning.split(quantized.unbind()[0], ())[0])


def test_bit_widths_are_the_lowest_or_all():
  config = launcher.load('qwt', 'embedded')
  assert compensation_tuning.tuned(config.fine_tuning, config, 'vit') == config.bits[-1:]
  assert compensation_tuning.tuned(config.fine_tuning, config, 'text') == ()
  config = launcher.load('qwt', 'embedded', ['fine_tuning.bits=all', 'fine_tuning.tokens=true'])
  for name in ('vit', 'text'):
    assert compensation_tuning.tuned(config.fine_tuning, config, name) == config.bits


@pytest.mark.exhaustive
def test_runs_tune_are_resumed_and_refuse_another_start(tmp_path, capsys):
  changes = [
    *TINY, 'bits=4w4a,2w3a', f'networks_dir={tmp_path / "networks"}', 'log_every=20',
    'network.vit.model.width=16', 'network.vit.recipe.epochs=4',
    'calibration.ranges=12', 'calibration.compensation=64', 'calibration.batch_size=64',
    'fine_tuning.recipe.schedule.base=0.03',
  ]  # fmt: skip
  found = launcher.run('qwt', workdir=tmp_path / 'run', overrides=changes)
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
  (tmp_path / 'run' / 'results.json').unlink()
  again = launcher.run('qwt', workdir=tmp_path / 'run', overrides=changes)
  assert again['rows'] == found['rows']
  assert 'vit-2w3a-QwT-seed0: finished before' in capsys.readouterr().out
  with pytest.raises(ValueError, match='ranges'):
    launcher.run('qwt', workdir=tmp_path / 'run', overrides=[*changes, 'calibration.ranges=10'])


def test_without_fine_tuning_there_is_none():
  config = launcher.load('qwt', 'embedded', ['fine_tuning=none'])
  assert not qwt.tuned(config) and 'fine_tuning' not in qwt.programs(config)


@pytest.mark.exhaustive
def test_the_training_of_imagenet_traces():
  changes = ['networks=deit_tiny', 'network.deit_tiny.model.depth=1']
  config = launcher.load('qwt', 'imagenet', changes)
  (call,) = compensation_tuning.programs(config, config.fine_tuning).values()
  call.trace()
  _, (state, frozen, batch) = call.make(config.mesh.make())
  assert set(state.params) == {'params'} and set(state.params['params']) == {'head'}
  assert 'head' not in frozen['params'] and batch['image'].shape == (256, 256, 256, 3)


def test_nothing_is_compiled_where_nothing_can_be_tuned():
  for setting in ('embedded_gptq', 'embedded'):
    config = launcher.load('qwt', setting, ['networks=text', 'fine_tuning.tokens=true'])
    assert not compensation_tuning.programs(config, config.fine_tuning)  # its embedding is tied


def test_hooks_of_the_training_are_those_of_the_quantized_network(built):
  model, quantized, _, x = built
  variables, _ = quantized.unbind()
  hooks = quantizers.operand_hooks()
  plain = jax.jit(lambda v: models.apply(model, v, x, hooks=hooks))(variables)
  np.testing.assert_allclose(plain, call(quantized, x), rtol=1e-5, atol=1e-6)
