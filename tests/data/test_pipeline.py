import json
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import data, parallel


def _source(n=23):
  rng = np.random.default_rng(0)
  return data.InMemory(
    {'image': rng.integers(0, 256, (n, 4, 4, 1), np.uint8), 'label': np.arange(n) % 5}
  )


class _Records:
  """The same records, without `gather`."""

  def __init__(self, source):
    self.source = source
    self.num_classes, self.class_names = source.num_classes, source.class_names

  def __len__(self):
    return len(self.source)

  def __getitem__(self, index):
    return self.source[index]


def _invert(record):
  return {**record, 'image': 255 - record['image']}


def _take(iterator, n):
  return [next(iterator) for _ in range(n)]


def _assert_same(batches, others):
  assert len(batches) == len(others)
  for a, b in zip(batches, others):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_each_epoch_is_another_permutation():
  loader = data.make_loader(_source(20), batch_size=5, seed=1)
  assert loader.steps_per_epoch == 4
  epochs = [np.concatenate([b['index'] for b in _take(loader, 4)]) for _ in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(20))
  assert len({tuple(e) for e in epochs}) == 3
  other = data.make_loader(_source(20), batch_size=5, seed=2)
  assert (np.concatenate([b['index'] for b in _take(other, 4)]) != epochs[0]).any()


def test_a_batch_holds_the_records_of_its_indices():
  source = _source()
  for s in (source, _Records(source), data.materialize(source)):
    batch = next(data.make_loader(s, batch_size=6, seed=3))
    assert batch['index'].dtype == batch['label'].dtype == np.int32
    np.testing.assert_array_equal(batch['image'], source.arrays['image'][batch['index']])
    np.testing.assert_array_equal(batch['label'], batch['index'] % 5)
    inverted = next(data.make_loader(s, batch_size=6, seed=3, transform=_invert))
    np.testing.assert_array_equal(inverted['image'], 255 - batch['image'])


@settings(max_examples=30, deadline=None)
@given(
  n=st.integers(1, 40),
  local=st.integers(1, 5),
  processes=st.integers(1, 4),
  pad=st.booleans(),
  shuffle=st.booleans(),
)
def test_the_processes_batches_joined_are_the_single_process_batch(
  n, local, processes, pad, shuffle
):
  batch_size = local * processes
  if not pad and n < batch_size:
    return
  options = {'batch_size': batch_size, 'num_epochs': 2, 'pad': pad, 'shuffle': shuffle, 'seed': 7}
  whole = list(data.make_loader(_source(n), **options))
  shares = [
    list(data.make_loader(_source(n), process_index=p, process_count=processes, **options))
    for p in range(processes)
  ]
  joined = [
    {name: np.concatenate([b[name] for b in parts]) for name in parts[0]} for parts in zip(*shares)
  ]
  _assert_same(whole, joined)
  assert len(whole) == 2 * (-(-n // batch_size) if pad else n // batch_size)


@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 14), threads=st.sampled_from([0, 2]), pad=st.booleans())
def test_resumed_iteration_goes_on_exactly(stop, threads, pad):
  def make(**options):
    return data.make_loader(_source(), batch_size=4, seed=5, num_epochs=3, pad=pad, **options)

  uninterrupted = list(make())
  first = make(num_threads=threads)
  head = _take(first, stop)
  state = json.loads(json.dumps(first.get_state()))
  first.close()
  second = make(num_threads=2 - threads)
  second.set_state(state)
  tail = list(second)
  _assert_same(uninterrupted, head + tail)
  with pytest.raises(StopIteration):
    next(second)
  second.set_state(state)  # and back again
  _assert_same(tail, list(second))


def test_worker_processes_give_the_same_batches_and_resume_exactly():
  def make(**options):
    return data.make_loader(_Records(_source()), batch_size=4, seed=5, num_epochs=2, **options)

  expected = list(make())
  first = make()
  head = _take(first, 3)
  second = make(num_workers=2)
  second.set_state(first.get_state())
  middle, states = zip(*_take(data.prefetch_to_device(second), 4))
  second.close()
  third = make()
  third.set_state(states[-1])
  _assert_same(expected, [*head, *middle, *third])


@pytest.mark.exhaustive
def test_worker_processes_leave_interrupts_to_the_one_that_trains():
  loader = data.make_loader(_Records(_source()), batch_size=4, num_workers=1)
  next(loader)
  (worker,) = multiprocessing.active_children()
  os.kill(worker.pid, signal.SIGINT)  # as Ctrl-C on a terminal, which reaches all of its processes
  worker.join(1)
  assert worker.is_alive() and next(loader)['label'].shape == (4,)
  loader.close()


def test_evaluation_sees_each_record_once():
  batches = list(data.epoch_batches(_source(10), 4))
  assert [len(b['image']) for b in batches] == [4, 4, 4]
  seen = np.concatenate([b['index'][b['mask']] for b in batches])
  assert seen.tolist() == list(range(10))
  assert batches[2]['mask'].tolist() == [True, True, False, False]


def test_remainder_is_kept_when_asked_for():
  sizes = [
    len(b['label'])
    for b in data.make_loader(_source(10), batch_size=4, num_epochs=2, drop_remainder=False)
  ]
  assert sizes == [4, 4, 2, 4, 4, 2]


@pytest.mark.parametrize('depth', [1, 2, 5])
def test_prefetched_state_belongs_to_the_batch_in_hand(depth):
  def make():
    return data.make_loader(_source(), batch_size=8, seed=5, num_epochs=4)

  mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), (jax.sharding.AxisType.Auto,) * 2)
  expected = list(make())
  pairs = list(data.prefetch_to_device(make(), mesh, depth))
  _assert_same(expected, [batch for batch, _ in pairs])
  assert len(pairs[0][0]['image'].addressable_shards) == 8
  assert pairs[0][0]['image'].sharding.shard_shape((8, 4, 4, 1)) == (1, 4, 4, 1)
  for step, (_, state) in enumerate(pairs):
    resumed = make()
    resumed.set_state(state)
    _assert_same(expected[step + 1 :], list(resumed))


def test_prefetch_takes_plain_iterables_and_the_default_device():
  batches = [{'x': np.arange(3)}, {'x': np.arange(3) + 1}]
  pairs = list(data.prefetch_to_device(batches))
  assert [state for _, state in pairs] == [None, None]
  _assert_same(batches, [batch for batch, _ in pairs])


class _Layout:
  """A sharding of 8 devices over 4 row blocks, of which this process holds the given ones."""

  is_fully_addressable = False

  def __init__(self, blocks):
    self.blocks, self.device_set = blocks, range(8)

  def shard_shape(self, shape):
    return (shape[0] // 4,)

  def addressable_devices_indices_map(self, shape):
    n = shape[0] // 4
    return {i: (slice(b * n, (b + 1) * n),) for i, b in enumerate(self.blocks)}


def test_process_shard_follows_the_rows_of_the_mesh():
  mesh = jax.make_mesh((4, 2), ('data', 'tensor'))
  assert data.process_shard(parallel.batch_sharding(mesh), 8) == (0, 1)
  assert data.process_shard(_Layout([2, 3]), 16) == (1, 2)
  assert data.process_shard(_Layout([1, 1]), 16) == (1, 4)  # shared with another process
  with pytest.raises(ValueError, match='not one equal contiguous block'):
    data.process_shard(_Layout([0, 2]), 16)
  with pytest.raises(ValueError, match='not one equal contiguous block'):
    data.process_shard(_Layout([1, 2]), 16)
  with pytest.raises(ValueError, match='batch_size 6 cannot be split over 4'):
    data.process_shard(_Layout([0, 1]), 6)


WORKER = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxlab import data, parallel
source = {'image': np.zeros((24, 2, 2, 1), np.uint8), 'label': np.arange(24)}
sharding = parallel.batch_sharding(jax.make_mesh((4,), ('data',)))
index, count = data.process_shard(sharding, 8)
loader = data.make_loader(source, batch_size=8, seed=4, num_epochs=1,
                          process_index=index, process_count=count)
total = jax.jit(lambda x: (x * (1 + np.arange(8))).sum())
for batch, state in data.prefetch_to_device(loader, sharding):
  assert batch['image'].shape == (8, 2, 2, 1), batch['image'].shape
  print('total', int(total(batch['label'])), state['step'], flush=True)
"""


def test_two_processes_make_the_global_batch(tmp_path):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  root = str(pathlib.Path(data.__file__).parents[2])
  flags = {'XLA_FLAGS': '--xla_force_host_platform_device_count=2', 'JAX_PLATFORMS': 'cpu'}
  environment = {**os.environ, **flags, 'PYTHONPATH': root}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', WORKER, address, str(i)],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  outputs = [p.communicate(timeout=120) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs[0][1][-2000:]
  source = {'image': np.zeros((24, 2, 2, 1), np.uint8), 'label': np.arange(24)}
  single = data.make_loader(source, batch_size=8, seed=4, num_epochs=1)
  expected = [
    f'total {(batch["label"] * (1 + np.arange(8))).sum()} {step + 1}'
    for step, batch in enumerate(single)
  ]
  for output, _ in outputs:
    assert [line for line in output.splitlines() if line.startswith('total')] == expected


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batch_size': 10, 'process_count': 4}, 'batch_size .* is 10, .* process_count 4'),
    ({'batch_size': 0}, 'is 0, expected a positive'),
    ({'batch_size': 24}, '23 records, fewer than batch_size 24'),
    ({'batch_size': 4, 'process_index': 2, 'process_count': 2}, 'process_index is 2'),
    ({'batch_size': 4, 'process_count': 2, 'drop_remainder': False}, 'needs pad=True'),
    ({'batch_size': 4, 'num_epochs': 0}, 'num_epochs is 0'),
    ({'batch_size': 4, 'seed': -1}, 'seed is -1'),
    ({'batch_size': 4, 'num_workers': -1}, 'num_workers is -1'),
  ],
)
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    data.make_loader(_source(), **options)


def test_state_of_another_data_order_is_refused():
  state = data.make_loader(_source(), batch_size=4, seed=1).get_state()
  other = data.make_loader(_source(), batch_size=8, seed=2)
  with pytest.raises(ValueError, match='seed was 1, is 2, batch_size was 4, is 8'):
    other.set_state(state)
  with pytest.raises(ValueError, match='expected 0 to 5'):
    short = data.make_loader(_source(), batch_size=4, seed=1, num_epochs=1)
    short.set_state({**state, 'step': 6})


def test_batches_that_do_not_fit_the_devices_are_refused():
  mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
  batches = data.prefetch_to_device([{'image': np.zeros((12, 2, 2, 1))}], mesh)
  with pytest.raises(ValueError, match="'image' has 12 rows, which cannot be split over 8"):
    next(batches)
  with pytest.raises(ValueError, match='depth is 0'):
    data.prefetch_to_device([], depth=0)


def test_pad_refuses_a_field_of_its_own_name():
  source = {'image': np.zeros((4, 2, 2, 1), np.uint8), 'mask': np.zeros(4)}
  with pytest.raises(ValueError, match="adds the field 'mask'"):
    next(data.epoch_batches(source, 2))


def test_check_batch_names_what_is_wrong():
  batch = {'image': np.zeros((6, 4, 4, 3), np.float32), 'label': np.arange(6)}
  data.check_batch(batch, num_classes=6, image_shape=(4, 4, 3), num_shards=3)
  with pytest.raises(ValueError, match=r'1 labels are out of range 0\.\.4'):
    data.check_batch(batch, num_classes=5)
  with pytest.raises(ValueError, match=r'image has shape \(4, 4, 3\), the model expects'):
    data.check_batch(batch, image_shape=(8, 8, 3))
  with pytest.raises(ValueError, match='6 rows cannot be split over 4'):
    data.check_batch(batch, num_shards=4)
  with pytest.raises(ValueError, match='NaN or infinity'):
    data.check_batch({'image': np.full((1, 2, 2, 1), np.nan, np.float32)})
  with pytest.raises(ValueError, match='expected a label'):
    data.check_batch({'image': batch['image']}, num_classes=5)
  with pytest.raises(ValueError, match='expected an image'):
    data.check_batch({'label': batch['label']})
  with pytest.raises(ValueError, match='differ in length'):
    data.check_batch({**batch, 'label': np.arange(5)})
  with pytest.raises(ValueError, match='label has dtype float64'):
    data.check_labels(np.zeros(3), 2)
