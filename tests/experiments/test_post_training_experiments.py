import importlib
import json

import jax
import pytest

from experiments.harness import launcher, settings
from experiments.protocols import post_training, quantized_networks
from jaxlab import models, parallel
from jaxlab.models import any_of
from jaxlab.quantizers import Quantized

PAPERS = ('qwt_v2', 'nbc')  # `test_compensation_tuning` runs QwT


def tiny(paper, folder, *changes):
  """Returns assignments under which the embedded setting compiles and trains in seconds."""
  variants = ('variants={}',) if paper != 'qwt' else ('fine_tuning=none',)
  return [
    'networks=vit', 'bits=4w4a', f'networks_dir={folder}', 'eval_batch_size=256',
    'calibration.ranges=16', 'calibration.compensation=64', 'calibration.batch_size=64',
    'network.vit.model.width=8', 'network.vit.model.depth=1', 'network.vit.model.num_heads=2',
    'network.vit.model.patch_size=4', 'network.vit.recipe.epochs=1',
    'network.vit.recipe.schedule.warmup_epochs=0', *variants, *changes,
  ]  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where the float network is kept, once it is trained."""
  return tmp_path_factory.mktemp('networks')


def shallow(paper, setting, *changes):
  """Returns a setting and its lowered programs."""
  config = launcher.load(paper, setting, changes)
  found = importlib.import_module(f'experiments.{paper}').programs(config)
  mesh = config.mesh.make() if setting == 'llama3_8b' else parallel.make_mesh()
  return config, {name: program.lower(mesh) for name, program in found.items()}


@pytest.mark.exhaustive
def test_the_imagenet_pipeline_lowers_for_a_mesh():
  changes = ('networks=deit_tiny', 'network.deit_tiny.model.depth=1')
  config, lowered = shallow('qwt', 'imagenet', *changes)
  assert set(lowered) == {'quantize', 'block', 'forward', 'fine_tuning'}
  (logits,) = jax.tree.leaves(lowered['forward'].out_info)
  assert logits.shape == (config.eval_batch_size, 1000)


def test_the_language_pipeline_lowers_for_a_mesh_that_splits_the_weights():
  _, lowered = shallow('qwt', 'llama3_8b', 'network.llama.model.depth=1')
  assert set(lowered) == {'block', 'forward'}
  assert lowered['forward'].out_info.shape == (16, 2048, 128256)
  head = 'tensor<4096x128256xbf16> {sdy.sharding = #sdy.sharding<@mesh, [{}, {"fsdp"}]>}'
  assert head in lowered['forward'].as_text()


def test_public_networks_have_the_parts_that_are_quantized():
  config = launcher.load('qwt', 'imagenet')
  for own in config.network.values():
    parts = models.anatomy(models.create(**own.model))
    assert parts.blocks and len(parts.edges) >= 2
    assert own.quantization == ('percentile' if 'resnet' in own.pretrained else 'repq')
    assert own.data.view == (224, 224, 3)


def test_compensation_reaches_between_the_blocks_of_swin_where_it_is_asked_to(monkeypatch):
  given = []
  monkeypatch.setattr(
    quantized_networks.compensation, 'compensate', lambda *_, blocks, **__: given.append(blocks)
  )
  model = models.create('swin_tiny_patch4_window7_224')
  rows = importlib.import_module('experiments.qwt_v2').methods(launcher.load('qwt_v2', 'imagenet'))
  for title in ('QwT-v2', 'QwT-v2, blocks', 'QwT'):
    own = launcher.load('qwt_v2', 'imagenet').network['swin_tiny']
    quantized_networks.compensate(own, Quantized(model, {}), [], rows[title])
  inside = any_of(models.anatomy(model).block_paths)
  assert given[1:] == [inside, inside]
  assert given[0].startswith(inside) and 'layers_1/downsample' in given[0]


@pytest.mark.exhaustive
def test_weights_alone_by_gptq_and_a_compensation_behind_them(tmp_path):
  changes = {
    'bits': '2w16a', 'networks_dir': tmp_path / 'networks', 'eval_batch_size': 64,
    'calibration.ranges': 8, 'calibration.compensation': 16, 'calibration.batch_size': 8,
    'network.text.model.width': 16, 'network.text.model.depth': 1, 'network.text.model.num_heads': 2,
    'network.text.data.train_options': {'length': 16, 'stride': 16, 'limit': 64},
    'network.text.data.test_options': {'length': 16, 'limit': 64},
    'network.text.data.length': 16, 'network.text.data.train_size': 64,
  }  # fmt: skip
  found = launcher.run('qwt', 'embedded_gptq', workdir=tmp_path / 'run', overrides=changes)
  metrics = {row['name']: row['metrics'] for row in found['rows']}
  assert metrics['PTQ']['text_2w16a_megabytes'] < 0.9 * metrics['float']['text_2w16a_megabytes']
  assert metrics['QwT']['text_2w16a_block_error_ratio'] <= 1.001


def test_runs_leave_all_rows_and_share_the_float_network(tmp_path, folder, capsys):
  for paper in PAPERS:
    changes = tiny(paper, folder)
    methods = importlib.import_module(f'experiments.{paper}').methods(
      launcher.load(paper, 'embedded', changes)
    )
    found = launcher.run(paper, workdir=tmp_path / paper, overrides=changes)
    rows = {row['name']: row for row in found['rows']}
    assert {'float', 'PTQ', 'QwT'} <= set(rows) and rows['float']['role'] == 'reference'
    for title, method in methods.items():
      metrics = rows[title]['metrics']
      assert rows[title]['role'] == method.role
      assert metrics['vit_4w4a_block_error_ratio'] <= 1.001
      assert metrics['vit_extra_parameters'] > 0
      assert 0 <= metrics['vit_4w4a_accuracy'] <= 100
    assert json.loads((tmp_path / paper / 'results.json').read_text())['rows'] == found['rows']
    assert {path.name for path in (tmp_path / paper).glob('*.png')} == {
      'accuracy_over_bits.png',
      'block_errors.png',
    }
    assert [c for c in found['claims'] if 'vit_4w4a' in c['metric']]
  floats = [path.name for path in folder.iterdir()]
  assert floats == ['vit-seed0']
  text = capsys.readouterr().out
  assert text.count('vit in float: accuracy') == len(PAPERS) and 'extra_parameters' in str(found)


@pytest.mark.parametrize(
  'changes, message',
  [
    (['networks=vti'], 'no network.vti; sections: .*vit'),
    (['bits=9w4a'], 'outside of 2 to 8'),
    (['bits=4w16a'], 'outside of 2 to 8'),
    (['bits=w4a4'], 'named such as 2w4a'),
    (['calibration.compensation=100', 'calibration.batch_size=64'], 'multiple'),
    (['calibration.ranges=2000'], r'calibration\.ranges=2000: expected 1 to 1297 \(vit\)'),
    (['network.vit.quantization=gpt'], r"network\.vit\.quantization.*'repq', 'percentile', 'gptq'"),
    (['network.vit.pretrained=resnet18'], 'network.vit.pretrained: .* of another network'),
    (['fitting.start_block=3'], r'QwT: start_block=3 is none of 3 blocks \(vit\)'),
    (['fine_tuning.bits=2w3a'], r"fine_tuning\.bits.*'lowest', 'all'"),
    (['fine_tuning.recipe.batch_size=2048'], 'at most 1297'),
    (['fine_tuning.recipe.batch_size=12'], 'fine_tuning.recipe.batch_size=12'),
    (['fine_tuning.recipe.mixup=0.2'], 'not mixed here'),
    (['fine_tuning.label_smoothing=1'], 'label_smoothing=1.0: expected a share'),
  ],
)
def test_wrong_settings_are_refused_before_training(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    launcher.run(
      'qwt', workdir=tmp_path / 'run', overrides=['networks_dir=' + str(tmp_path / 'n'), *changes]
    )
  assert not (tmp_path / 'n').exists()


def test_claims_about_what_cannot_be_measured_are_found():
  config = launcher.load('qwt', 'embedded', ['fine_tuning=none'])
  launcher.check(config)  # its rows may be left out
  for changes, message in (
    ({'metric': 'vit_2w3a_accurary'}, "there is no metric 'vit_2w3a_accurary'"),
    ({'method': 'QwT-v2'}, "there is no row 'QwT-v2'"),
  ):
    claim = {'statement': 'x', 'metric': 'vit_2w3a_accuracy', 'baseline': 'PTQ', 'method': 'QwT'}
    values = {**settings.plain(config), 'claims': [claim | changes]}
    with pytest.raises(settings.SettingsError, match=message):
      launcher.check(settings.fill(type(config), values))


def test_data_of_all_networks_are_looked_at_before_the_first_is_trained(tmp_path):
  changes = ['networks=vit,resnet', 'network.resnet.data.train_size=1000']
  with pytest.raises(ValueError, match=r'data\.train_size=1000, but 1297'):
    launcher.run('qwt', workdir=tmp_path, overrides=[*tiny('qwt', tmp_path / 'n', *changes)])
  assert not (tmp_path / 'n').exists()


def test_rows_go_on_only_where_there_is_something_to_go_on_from(tmp_path, folder):
  config = launcher.load('qwt', 'embedded', tiny('qwt', folder))
  given = []

  def make(point):
    given.append((point.name, point.bits, point.base is point.quantized))

  further = {'more': post_training.Further('reference', 'PTQ', make)}
  found = post_training.compare(config, tmp_path, {}, further)
  assert given == [('vit', '4w4a', True)]
  assert [row['name'] for row in found['rows']] == ['float', 'PTQ']


def test_what_is_not_quantized_as_asked_is_said(capsys):
  skipped = {f'conv{i}': 'no extent' for i in range(7)}
  network = Quantized(models.create('mlp'), {}, skipped=skipped, rounded={'expert': 'no token'})
  post_training._At({}, 'net', '4w4a', 1.0).say_exceptions('GPTQ', network)
  _, first, second = capsys.readouterr().out.splitlines()
  assert first.startswith('net 4w4a GPTQ: stay in float: conv0 (no extent), conv1 (no extent), ')
  assert first.endswith('conv4 (no extent), 2 more')
  assert second == 'net 4w4a GPTQ: are rounded to nearest: expert (no token)'
