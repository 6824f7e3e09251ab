import importlib
import json

import jax
import pytest

from experiments import launcher, nbc, networks, post_training, qwt, qwt_v2
from jaxlab import models, parallel

PAPERS = {'qwt': qwt, 'qwt_v2': qwt_v2, 'nbc': nbc}
CONFIGS = [path for paper in PAPERS for path in sorted((launcher.CONFIGS / paper).glob('[!_]*.py'))]

TRACED: set[str] = set()


def tiny(paper, folder, **changes):
  """Returns the embedded setting with a transformer and a ResNet that compile and train in seconds."""
  config = launcher.load_config(launcher.CONFIGS / paper / 'embedded.py')
  with config.unlocked():
    config.networks, config.bits = ('vit',), ('4w4a',)
    config.networks_dir = str(folder)
    config.calibration = {'ranges': 16, 'compensation': 64, 'batch_size': 64}
    config.qwt.fine_tuning = None  # see test_compensation_tuning
    if paper != 'qwt':
      config[paper].variants = {}
    config.network.vit.model.update(width=8, depth=1, num_heads=2, patch_size=4)
    config.network.vit.update(epochs=1, eval_batch_size=256)
    config.network.vit.schedule.warmup_epochs = 0
    config.update(changes)
  return config


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_every_setting_builds_and_traces(path):
  config = launcher.load_config(path)
  importlib.import_module(f'experiments.{config.paper}').methods(config)
  for name in config.network if config.paper == 'qwt' else config.networks:
    own = networks.section(config, name)
    judged = ('quantization', 'gptq', 'edges', 'blocks', 'layer_blocks', 'conv_act_bits')
    rest = ('paper', 'setting', 'eval_batch_size', *judged)
    traced = {k: v for k, v in own.to_dict().items() if k not in rest}
    if repr(traced) in TRACED:  # the papers share their networks
      continue
    TRACED.add(repr(traced))
    if own.get('pretrained'):
      model = models.create(**own.model)
      size = own.data.get('image_size')
      shapes = models.abstract_variables(model, size and (size, size, own.data.channels))
      assert shapes['params']
      continue
    program = networks.program(own)
    state = jax.eval_shape(program.init, jax.random.key(0))
    new, metrics = jax.eval_shape(program.step, state, {}, program.batch)
    assert jax.tree.structure(new) == jax.tree.structure(state) and metrics['loss'].shape == ()


def test_the_imagenet_pipeline_lowers_for_a_mesh():
  config = launcher.load_config(launcher.CONFIGS / 'qwt' / 'imagenet.py')
  with config.unlocked():
    config.networks = ('deit_tiny',)
    config.network.deit_tiny.model.depth = 1
  lowered = qwt.lower(config, parallel.make_mesh())
  assert set(lowered) == {'quantize', 'block', 'forward'}
  (logits,) = jax.tree.leaves(lowered['forward'].out_info)
  assert logits.shape == (config.network.deit_tiny.eval_batch_size, 1000)


def test_the_language_pipeline_lowers_for_a_mesh_that_splits_the_weights():
  config = launcher.load_config(launcher.CONFIGS / 'qwt' / 'llama3_8b.py')
  with config.unlocked():
    config.network.llama.model.depth = 1
  lowered = qwt.lower(config, parallel.make_mesh(**config.mesh))
  assert set(lowered) == {'block', 'forward'}
  assert lowered['forward'].out_info.shape == (16, 2048, 128256)
  head = 'tensor<4096x128256xbf16> {sdy.sharding = #sdy.sharding<@mesh, [{}, {"fsdp"}]>}'
  assert head in lowered['forward'].as_text()


def test_weights_alone_by_gptq_and_a_compensation_behind_them(tmp_path):
  config = launcher.load_config(launcher.CONFIGS / 'qwt' / 'embedded_gptq.py')
  with config.unlocked():
    config.bits, config.networks_dir = ('2w16a',), str(tmp_path / 'networks')
    config.calibration = {'ranges': 8, 'compensation': 16, 'batch_size': 8}
    config.network.text.model.update(width=16, depth=1, num_heads=2)
    config.network.text.data.update(train_options={'length': 16, 'stride': 16, 'limit': 64})
    config.network.text.data.update(test_options={'length': 16, 'limit': 64}, length=16)
    config.network.text.data.train_size = 64
  found = launcher.launch(qwt.run, config, tmp_path / 'run')
  metrics = {row['name']: row['metrics'] for row in found['rows']}
  assert metrics['PTQ']['text_2w16a_megabytes'] < 0.9 * metrics['float']['text_2w16a_megabytes']
  assert metrics['QwT']['text_2w16a_block_error_ratio'] <= 1.001


def test_runs_leave_all_rows_and_share_the_float_network(tmp_path, capsys):
  for paper, module in PAPERS.items():
    config = tiny(paper, tmp_path / 'networks')
    found = launcher.launch(module.run, config, tmp_path / paper)
    rows = {row['name']: row for row in found['rows']}
    assert {'float', 'PTQ', 'QwT'} <= set(rows) and rows['float']['role'] == 'reference'
    assert set(module.methods(config)) <= set(rows)
    for title in module.methods(config):
      metrics = rows[title]['metrics']
      assert metrics['vit_4w4a_block_error_ratio'] <= 1.001
      assert metrics['vit_extra_parameters'] > 0
      assert 0 <= metrics['vit_4w4a_accuracy'] <= 100
    assert json.loads((tmp_path / paper / 'results.json').read_text())['rows'] == found['rows']
    assert {path.name for path in (tmp_path / paper).glob('*.png')} == {
      'accuracy_over_bits.png',
      'block_errors.png',
    }
    assert [c for c in found['claims'] if 'vit_4w4a' in c['metric']]
  floats = [path.name for path in (tmp_path / 'networks').iterdir()]
  assert floats == ['vit-seed0']
  text = capsys.readouterr().out
  assert text.count('vit in float: accuracy') == 3 and 'extra_parameters' in text


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'networks': ('vti',)}, 'no network.vti; sections: .*vit'),
    ({'bits': ('9w4a',)}, 'outside of 2 to 8'),
    ({'bits': ('w4a4',)}, 'named such as 2w4a'),
    ({'calibration': {'ranges': 16, 'compensation': 100, 'batch_size': 64}}, 'multiple'),
  ],
)
def test_wrong_settings_are_refused_before_training(tmp_path, changes, message):
  config = tiny('qwt', tmp_path / 'networks', **changes)
  with pytest.raises(ValueError, match=message):
    qwt.run(config, tmp_path)
  assert not (tmp_path / 'networks').exists()


def test_an_unknown_quantization_is_refused(tmp_path):
  config = tiny('qwt', tmp_path / 'networks')
  config.network.vit.quantization = 'gpt'
  with pytest.raises(ValueError, match=r"network.vit.quantization='gpt'"):
    post_training.compare(config, tmp_path, qwt.methods(config))
