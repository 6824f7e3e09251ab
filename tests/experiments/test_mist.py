"""MIST end to end: a cloud that gathers, a device in another process that has no backbone, costs."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from golden_vectors import assert_close
from models.random_variables import random_variables

from experiments import mist
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.harness.tasks import ImageTask
from experiments.protocols import (
  adaptation,
  adaptation_comparison,
  edge_training,
  gathered_features,
)
from experiments.protocols.gathered_features import Gather, Reading
from experiments.tools import edge as edge_command
from jaxlab import adapters, data
from jaxlab.training import read_metrics

TINY = (
  "network.model={'name': 'vit_tiny_patch4_16', 'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_ratio': 2.0}",
  'network.data.train_options.length=64',
  'network.data.train_size=64',
  'network.data.test_options.length=32',
  'network.recipe.epochs=1',
  'network.recipe.schedule.warmup_epochs=0',
  'network.recipe.batch_size=32',
  *(f'target.rotation.data.{part}_options.length=48' for part in ('train', 'test')),
  'target.rotation.data.train_size=48',
  'tasks=rotation,',
  'recipe.batch_size=8',
  'recipe.epochs=3',
  'recipe.schedule.warmup_epochs=1',
  'edge.rank=2',
  'eval_batch_size=40',
  'accounted={}',
  'timed=0',
  'claims=()',
)  # fmt: skip
EDGE = ('recipe.epochs=3', 'recipe.batch_size=8', 'recipe.schedule.warmup_epochs=1', 'edge.rank=2')


def tiny_config(*changes):
  return launcher.load('mist', 'embedded', [*TINY, *changes])


@pytest.fixture(scope='module')
def cloud(tmp_path_factory):
  """A cloud's run: its settings, results and folder."""
  folder = tmp_path_factory.mktemp('cloud')
  config = tiny_config('role=cloud', 'sent=float16')
  return config, launcher.launch(config, folder), folder


def test_a_cloud_writes_what_its_network_makes_of_all_images(cloud):
  config, found, folder = cloud
  (row,) = found['rows']
  features = folder / 'features' / 'all_float16'
  train, test = edge_training.pair_of(features, 'rotation')
  assert (len(train), len(test)) == (48, 48) and train.header.layers == '0+1+2'
  assert row['metrics']['kb_per_image'] == 17 * 16 * 2 / 1e3 and row['metrics']['images'] == 96
  variables = adaptation_comparison.load(config, folder)
  own = adaptation_comparison.sources(config, config.target['rotation'])
  task = ImageTask.of(config.target['rotation'].data)
  batch = {k: jnp.asarray(v) for k, v in data.materialize(own.train).items()}
  model = adaptation.backbone(config)
  z = jax.jit(lambda v, b: adapters.collect_features(model, v, task.inputs(b)))(variables, batch)
  expected = np.sum([np.asarray(own, np.float64) for own in z], 0)
  found = train.gather(np.arange(48))
  assert found['features'].dtype == np.float16
  assert_close(found['features'], expected, 1e-3)
  np.testing.assert_array_equal(found['label'], batch['label'])


DEVICE = """
import sys
from experiments.tools import edge
edge.command(sys.argv[1:])
print('networks:', [name for name in sys.modules if name.startswith('jaxlab.models')])
"""


def on_a_device(*arguments):
  """Runs the command in a process of its own."""
  return subprocess.run(
    [sys.executable, '-c', DEVICE, *map(str, arguments), *(f'--config.{own}' for own in EDGE)],
    capture_output=True, text=True, timeout=300,
  )  # fmt: skip


def test_a_device_trains_from_files_alone_and_loads_no_network(cloud, tmp_path):
  _, _, folder = cloud
  done = on_a_device('--features', folder / 'features' / 'all_float16', '--workdir', tmp_path)
  assert done.returncode == 0, done.stderr
  assert 'networks: []' in done.stdout
  held = json.loads((tmp_path / 'edge.json').read_text())
  assert 0 <= held['accuracy']['rotation'] <= 100 and held['received_bytes'] == 0
  assert held['bytes_per_image'] == 17 * 16 * 2 and held['layers'] == '0+1+2'
  size = 4 * (4 * 16 * 2 + 2 * 16) + 2 * 16 + 16 * 4 + 4
  assert held['trained_with_head'] == size


def test_a_served_transfer_is_counted_on_both_sides(cloud, tmp_path, capsys):
  _, _, folder = cloud
  features = folder / 'features' / 'all_float16'
  files = edge_training.pair_of(features, 'rotation')
  sent, before = [], tmp_path / 'features'
  before.mkdir()
  # What lies there from before gives way to what comes.
  stale = [before / f'{name}.npz' for name in ('rotation-train', 'older-train', 'older-test')]
  for path in stale:
    path.write_bytes(b'stale')
  with data.listening() as server:
    port = server.getsockname()[1]
    sets = {file.path.stem: file for file in files}
    thread = threading.Thread(target=lambda: sent.append(data.send_features(server, sets)))
    thread.start()
    arguments = [f'--cloud=127.0.0.1:{port}', f'--workdir={tmp_path}', '--suffix=.array_record']
    found = edge_command.main([*arguments, *(f'--config.{own}' for own in EDGE)])
    thread.join(60)
  assert found['received_bytes'] == sent[0] > 96 * 17 * 16 * 2
  assert set(found['accuracy']) == {'rotation'}
  assert not any(path.exists() for path in stale)
  again = edge_command.main(
    [f'--features={tmp_path / "features"}', f'--workdir={tmp_path}',
     *(f'--config.{own}' for own in EDGE)]
  )  # fmt: skip
  assert again['accuracy'] == found['accuracy']
  assert again['received_bytes'] == found['received_bytes']
  capsys.readouterr()


def test_the_cloud_serves_one_device_and_says_where(cloud, tmp_path, capsys):
  _, _, folder = cloud
  files = edge_training.pair_of(folder / 'features' / 'all_float16', 'rotation')
  said, sent = threading.Event(), []
  places = []

  def say(text):
    if place := re.search(r'--cloud=(\S+):(\d+)', text):
      places.append((place[1], int(place[2])))
      said.set()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gathered_features, 'say', say)
    with data.listening() as server:
      thread = threading.Thread(target=lambda: sent.append(gathered_features.serve(server, files)))
      thread.start()
      assert said.wait(60)
      _, received = data.receive_features(*places[0], tmp_path)
      thread.join(60)
  assert sent == [received]


@pytest.mark.parametrize(
  'broken', ['network', 'cut', 'missing', 'none', 'split', 'mixed', 'views', 'tested views']
)
def test_features_that_do_not_fit_end_the_command_before_any_training(
  cloud, tmp_path, broken, capsys
):
  _, _, folder = cloud
  features = tmp_path / 'features'
  features.mkdir()
  for path in (folder / 'features' / 'all_float16').iterdir():
    (features / path.name).write_bytes(path.read_bytes())
  test, arguments = features / 'rotation-test.npz', []
  if broken == 'network':
    arguments, message = ['--network=0123'], "network .* expected '0123'"
  elif broken == 'cut':
    test.write_bytes(test.read_bytes()[:-100])
    message = 'no whole file of features'
  elif broken == 'missing':
    test.unlink()
    message = 'rotation-test.npz: there is no such file'
  elif broken == 'none':
    for path in features.iterdir():
      path.unlink()
    message = 'holds no features'
  elif broken == 'mixed':
    for split in ('train', 'test'):
      held = data.FeatureFile(features / f'rotation-{split}.npz')
      other = dataclasses.replace(held.header, layers='0')
      data.write_feature_file(features / f'second-{split}.npz', held.batches(), other)
    message = r"expected the same layers in all tasks, got rotation-train.npz '0\+1\+2', second"
  elif 'views' in broken:
    # Of a second task: nothing is trained of the first one either.
    split = 'test' if broken == 'tested views' else 'train'
    for part in ('train', 'test'):
      held = data.FeatureFile(features / f'rotation-{part}.npz')
      header = dataclasses.replace(held.header, views=2 if part == split else 1)
      data.write_feature_file(features / f'second-{part}.npz', held.batches(), header)
    if split == 'train':
      arguments = ['--config.edge.rates=0.1,0.2', '--config.edge.held_out=8']
    message = (
      '2 views of each test image' if split == 'test' else 'records would be views of images'
    )
  else:
    held = data.FeatureFile(test)
    other = dataclasses.replace(held.header, network='other')
    data.write_feature_file(test, held.batches(), other)
    message = 'do not belong together: network'
  with pytest.raises(SystemExit) as stop:
    edge_command.command([f'--features={features}', f'--workdir={tmp_path / "w"}', *arguments])
  assert stop.value.code == 2
  assert re.search(message, capsys.readouterr().err)
  assert not (tmp_path / 'w' / 'edge.json').exists()
  assert not (tmp_path / 'w' / 'rotation' / 'checkpoints').exists()


def as_two_tasks(cloud, folder, records=48, suffix='.npz', **changes):
  """Writes a cloud's features as task `a`, and the first of them, with another header, as task `b`."""
  for split in ('train', 'test'):
    held = data.FeatureFile(cloud[2] / 'features' / 'all_float16' / f'rotation-{split}.npz')
    data.write_feature_file(folder / f'a-{split}{suffix}', held.batches(), held.header)
    header = dataclasses.replace(held.header, count=records, **changes)
    few = held.gather(np.arange(records))
    data.write_feature_file(
      folder / f'b-{split}{suffix}', [(few['features'], few['label'])], header
    )


@pytest.mark.parametrize(
  ('changes', 'options', 'message'),
  [
    ({'records': 6}, (), 'b-train.npz: batch_size=8 exceeds the 6 images'),
    ({'records': 20}, ('edge.rates=0.1,0.2', 'edge.held_out=16'), 'held_out=16 leaves 4 of 20 records'),
    ({'num_prefix_tokens': 0}, ('edge.pool=cls',), 'b-train.npz: pool=.cls., but there is no class token'),
  ],
)  # fmt: skip
def test_what_a_later_task_lacks_is_told_before_any_training(
  cloud, tmp_path, changes, options, message
):
  as_two_tasks(cloud, tmp_path / 'features', **changes)
  with pytest.raises(ValueError, match=message):
    edge_command.main(
      [f'--features={tmp_path / "features"}', f'--workdir={tmp_path / "w"}',
       *(f'--config.{own}' for own in (*EDGE, *options))]
    )  # fmt: skip
  assert not (tmp_path / 'w' / 'a').exists()


def test_a_rate_that_diverges_does_not_end_the_search(cloud, tmp_path):
  features = cloud[2] / 'features' / 'all_float16'

  def searched(rates, workdir):
    options = (*EDGE, f'edge.rates={rates}', 'edge.held_out=16')
    edge_command.main(
      [f'--features={features}', f'--workdir={workdir}', *(f'--config.{own}' for own in options)]
    )
    return read_metrics(workdir / 'rotation_search')

  rows = searched('1e30,0.01', tmp_path / 'one')
  assert 0 < rows[-1]['diverged'] <= 1 and np.isfinite(rows[-1]['loss'])
  with pytest.raises(FloatingPointError, match=r'loss is nan at step \d+[^,]*\.') as caught:
    searched('1e30,1e31', tmp_path / 'both')
  assert 'learning_rate' not in str(caught.value).partition('.')[0]


def test_files_of_features_are_told_by_their_names(cloud, tmp_path):
  as_two_tasks(cloud, tmp_path, suffix='.array_record')
  for name in ('a-train.npz.bak', 'c-train.npz.partial', 'd-test.npz'):
    (tmp_path / name).write_bytes(b'')
  assert edge_training.tasks_in(tmp_path) == ['a', 'b']
  (tmp_path / 'b-test.array_record').unlink()
  with pytest.raises(FileNotFoundError, match=r'b-test\.array_record: there is no such file'):
    edge_training.pair_of(tmp_path, 'b')


def test_addresses_and_folders_that_a_device_cannot_use_are_refused(tmp_path):
  for arguments, message in (
    (['--cloud=here:99999', f'--workdir={tmp_path}'], "'here:99999': expected host:port"),
    (['--cloud=here', f'--workdir={tmp_path}'], "'here': expected host:port"),
    (['--features=gs://a/b', f'--workdir={tmp_path}'], 'features=gs://a/b: expected a folder of this'),
    ([f'--features={tmp_path}', '--workdir=gs://a/b'], 'workdir=gs://a/b: expected a folder of this'),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      edge_command.main(arguments)


def test_a_device_that_is_stopped_leaves_nothing_half_received_and_says_how_it_goes_on(
  cloud, tmp_path, capsys
):
  _, _, folder = cloud
  file = data.FeatureFile(folder / 'features' / 'all_float16' / 'rotation-train.npz')

  class Stopping:
    header = file.header

    def batches(self, size):
      yield next(file.batches(8))
      os.kill(os.getpid(), signal.SIGTERM)

  def send(server):
    with contextlib.suppress(ConnectionError):
      data.send_features(server, {'a-test': file, 'a-train': Stopping()}, timeout=5.0)

  with data.listening() as server:
    arguments = [f'--cloud=127.0.0.1:{server.getsockname()[1]}', f'--workdir={tmp_path}']
    thread = threading.Thread(target=send, args=(server,))
    thread.start()
    with pytest.raises(SystemExit) as stop:
      edge_command.command(arguments)
    thread.join(60)
  assert stop.value.code == 0 and not list((tmp_path / 'features').iterdir())
  assert 'stopped; nothing was received' in capsys.readouterr().err
  as_two_tasks(cloud, tmp_path / 'features')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(edge_training, 'train', lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
      edge_command.command([f'--features={tmp_path / "features"}', f'--workdir={tmp_path}'])
  assert f'edge --workdir={tmp_path} --features={tmp_path}/features' in capsys.readouterr().err


def test_features_of_another_network_are_not_used_again(cloud, tmp_path):
  config, _, folder = cloud
  model = adaptation.backbone(config)
  other = random_variables(model, jnp.zeros((1, 16, 16, 1)))
  own = config.target['rotation'].data
  source = adaptation_comparison.sources(config, config.target['rotation']).train
  path = folder / 'features' / 'all_float16' / 'rotation-train.npz'
  arguments = Gather(None, 'float16'), Reading(own, ImageTask.of(own)), model
  with pytest.raises(ValueError, match='holds other features: network'):
    gathered_features.feature_file(config, path, *arguments, other, source)


def test_features_are_stored_in_the_widest_type_and_rounded_to_what_a_cloud_sends(cloud, tmp_path):
  config, _, folder = cloud
  variables, model = adaptation_comparison.load(config, folder), adaptation.backbone(config)
  source = adaptation_comparison.sources(config, config.target['rotation']).train
  own = config.target['rotation'].data
  path = tmp_path / 'rotation-train.npz'
  path.write_bytes((folder / 'features' / 'all_float16' / path.name).read_bytes())
  sent = data.FeatureFile(path)

  def stored(dtype):
    return gathered_features.feature_file(
      config, path, Gather(None, dtype), Reading(own, ImageTask.of(own)), model, variables, source
    )

  # A narrower file is written anew, a wider one is read.
  assert [stored(dtype).header.dtype for dtype in ('float16', 'float32', 'float16')] == [
    'float16', 'float32', 'float32'
  ]  # fmt: skip
  found = stored('float16').astype('float16')
  assert found.header == sent.header
  np.testing.assert_array_equal(*(x.gather(np.arange(48))['features'] for x in (found, sent)))


@pytest.mark.exhaustive
def test_views_are_augmented_and_records_alike_in_files_of_both_kinds(cloud, tmp_path):
  config, _, folder = cloud
  target = dataclasses.replace(
    config.target['rotation'],
    augment=dataclasses.replace(config.target['rotation'].augment, kind='pad_crop', flip=False),
  )
  variables, model = adaptation_comparison.load(config, folder), adaptation.backbone(config)
  source = adaptation_comparison.sources(config, target).train
  reading = Reading(target.data, ImageTask.of(target.data, target.augment), views=2)
  found = [
    gathered_features.feature_file(
      config, tmp_path / f'rotation-train{suffix}', Gather(), reading, model, variables, source
    ).gather(np.arange(96))
    for suffix in ('.npz', '.array_record')
  ]
  np.testing.assert_array_equal(found[0]['features'], found[1]['features'])
  first, second = np.split(found[0]['features'], 2)
  np.testing.assert_array_equal(*np.split(found[0]['label'], 2))
  assert np.mean(np.abs(first - second).max((1, 2)) > 1e-3) > 0.9


@pytest.mark.exhaustive
def test_devices_and_machines_that_have_both_agree(cloud):
  # The same network on the same features, as a row of the protocol and as a device's.
  from experiments.protocols.side_adaptation import gathered_attention

  config, _, folder = cloud
  variables, model = adaptation_comparison.load(config, folder), adaptation.backbone(config)
  images = jnp.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16, 1)
  method = gathered_attention(model, images, pool='mean_patches', rank=2, depth=2)
  edge = edge_training.Edge(rank=2, depth=2)
  params = edge.init(jax.random.key(0), 16, 4)
  params = jax.tree.map(lambda leaf: leaf + 0.1, params)
  features = method.features(
    {k: params[k] for k in ('modules', 'norm')}, variables, images, train=False, rngs={}
  )
  gathered = Gather().gathered(model, variables, images)
  assert_close(
    edge.logits(params, gathered, 1),
    features @ params['head']['kernel'] + params['head']['bias'],
    1e-5,
  )


def test_a_run_compares_devices_with_who_sees_the_network(tmp_path):
  config = tiny_config(
    'runs=linear,all_layers,linear_sum,mist,mist_float16', 'edge.rates=0.0,0.01', 'timed=2',
    'edge.held_out=16',
  )  # fmt: skip
  opened, read = [], data.FeatureFile._read_npz
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      data.FeatureFile, '_read_npz', lambda own: opened.append(own.path.name) or read(own)
    )
    found = launcher.launch(config, tmp_path)
  # One file a task and split, opened once, for all rows of the same layers.
  files = ['rotation-test.npz', 'rotation-train.npz']
  assert sorted(opened) == files
  assert sorted(str(own.relative_to(tmp_path)) for own in (tmp_path / 'features').rglob('*.*')) == [
    f'features/all/{name}' for name in files
  ]
  rows = {row['name']: row['metrics'] for row in found['rows']}
  one = 17 * 16 * 4 / 1e3
  sent = {name: own['kb_per_image'] for name, own in rows.items()}
  assert sent == pytest.approx({
    'linear probe': 16 * 4 / 1e3, 'attention on every layer': 3 * one, 'linear on the sum': one,
    'MIST': one, 'MIST, float16': one / 2,
  })  # fmt: skip
  assert rows['MIST']['trained'] == 2 * (4 * 16 * 2 + 2 * 16) + 2 * 16
  assert rows['linear on the sum']['trained'] == 2 * 16
  assert rows['MIST']['residual_mb'] < rows['attention on every layer']['residual_mb']
  assert rows['MIST']['step_over_forward'] > 0
  assert (tmp_path / 'mist_rotation_search' / 'metrics.jsonl').exists()
  assert (tmp_path / 'accuracy_over_transfer.png').stat().st_size > 5000


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('k=3', 'k=3: expected 0 to 2'),
    ('edge.rank=0', 'rank=0'),
    ('edge.held_out=0', 'held_out=0'),
    ('edge.rates=0.1,0.1', 'expected different numbers'),
    ('edge.pool=cls', "expected 'mean_patches', what the heads of linear"),
    ('runs=mist,last', "'last' are none of the rows"),
    ('serve=127.0.0.1:0', "expected role='cloud'"),
    ('views=0', 'views=0'),
    ('spaced=true', 'spaced=True: expected k'),
    ('sent=float16', 'mist and mist_float16 are the same'),
    ('recipe.batch_size=64', 'an epoch would have no step'),
    ('reference={ranks: 2}', "unexpected keyword argument 'ranks'"),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))


def test_unknown_tasks_are_refused_once():
  with pytest.raises(SettingsError, match=r"tasks=.'colors',") as caught:
    launcher.check(tiny_config('tasks=colors,'))
  assert len(caught.value.problems) == 1


def test_bytes_of_all_rows_are_those_of_the_type_that_is_sent():
  kinds = [tiny_config(f'sent={dtype}') for dtype in ('float32', 'float16')]
  for name in ('linear', 'all_layers'):
    wide, narrow = (mist.sent_by_others(config, name)['kb_per_image'] for config in kinds)
    assert wide == 2 * narrow


@pytest.mark.parametrize('role', ['both', 'cloud'])
def test_data_that_a_later_task_lacks_end_a_run_before_any_training(tmp_path, role):
  lacking = ('tasks=rotation,count', 'target.count.data.train_options.length=40')
  with pytest.raises(ValueError, match='train_size'):
    launcher.launch(tiny_config(*lacking, f'role={role}'), tmp_path)
  assert not (tmp_path / 'source').exists()


def test_features_are_gathered_by_one_process_and_read_by_record_on_local_disks_alone(monkeypatch):
  config = tiny_config('suffix=.array_record', 'runs=mist,')
  with pytest.raises(ValueError, match=r'expected \.npz in --workdir=gs://a/b'):
    mist.run(config, epath.Path('gs://a/b'))
  assert not list(mist.check(config))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert list(mist.check(config)) == ['features are gathered by one process; there are 2.']


def test_numbers_are_counted_on_the_network_that_is_judged_and_memory_in_the_type_of_a_step():
  def costs(*changes):
    config = tiny_config(*changes)
    return mist.edge_costs(config, mist.edge_table(config)['mist'], 0.0)

  own, wide = costs(), costs('accounted={width: 32}')
  assert wide['trained'] == own['trained'] and wide['kb_per_image'] == own['kb_per_image']
  assert (
    wide['residual_mb'] > own['residual_mb'] > costs('recipe.precision=bfloat16')['residual_mb']
  )


def test_rates_are_not_chosen_on_records_that_were_trained_on():
  rates = 'edge.rates=0.1,0.2'
  with pytest.raises(SettingsError, match=r'edge.held_out=41: .* a batch of 8 .* the 48 records'):
    launcher.check(tiny_config(rates, 'edge.held_out=41'))
  views = ('views=2', 'target.rotation.augment.kind=pad_crop')
  with pytest.raises(SettingsError, match='views of images trained on'):
    launcher.check(tiny_config(rates, 'edge.held_out=16', *views))


def test_devices_have_the_steps_of_who_sees_the_network_whatever_the_number_of_views():
  config = tiny_config('views=3', 'target.rotation.augment.kind=pad_crop', 'runs=linear,mist')
  runs = mist.programs(config)
  assert runs['mist_rotation'].data.train_size == 3 * 48
  assert runs['mist_rotation'].num_steps == runs['linear_rotation'].num_steps == 3 * 6


def test_a_device_alone_is_told_how_many_views_it_has(cloud, tmp_path):
  _, _, folder = cloud
  features = tmp_path / 'features'
  for part, views in (('train', 3), ('test', 1)):
    held = data.FeatureFile(folder / 'features' / 'all_float16' / f'rotation-{part}.npz')
    header = dataclasses.replace(held.header, views=views)
    data.write_feature_file(features / f'rotation-{part}.npz', held.batches(), header)
  changes = (f'--config.{own}' for own in EDGE)
  edge_command.main([f'--features={features}', f'--workdir={tmp_path / "w"}', *changes])
  # 48 records, three of each of 16 images, in batches of 8: two steps an epoch.
  kept = [int(path.name) for path in (tmp_path / 'w' / 'rotation' / 'checkpoints').glob('[0-9]*')]
  assert max(kept) == 3 * 2


def test_a_served_address_is_looked_at(tmp_path):
  for address in ('nowhere', '127.0.0.1:99999'):
    with pytest.raises(SettingsError, match='expected host:port'):
      launcher.check(tiny_config('role=cloud', f'serve={address}'))
  with data.listening() as server:
    config = tiny_config('role=cloud', f'serve=127.0.0.1:{server.getsockname()[1]}')
    with pytest.raises(ConnectionError, match='no device can be waited for'):
      mist.run(config, tmp_path)
  assert not list(tmp_path.iterdir())


def test_layers_are_chosen_by_either_reading():
  assert mist.layers(tiny_config()) is None
  assert mist.layers(tiny_config('k=1')) == (0, 1)
  assert mist.layers(tiny_config('k=2', 'spaced=true')) == (0, 2)
