import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from small_program import CONFIG, FSDP_RULES, Data, make_program

from jaxlab.parallel import make_mesh
from jaxlab.training import fit, read_metrics

ROOT = pathlib.Path(__file__).parents[2]


def run(num_steps, workdir=None, *, program=None, data=None, **options):
  return fit(
    program or make_program(),
    data or Data(),
    num_steps=num_steps,
    key=jax.random.key(0),
    workdir=workdir and str(workdir),
    **{'config': CONFIG, 'log_every': 1, 'checkpoint_every': 3, **options},
  )


def start(*arguments, **environment):
  """Starts `small_program` in a process of its own, with the devices and the cache of this one."""
  command = [sys.executable, str(ROOT / 'tests' / 'small_program.py'), *map(str, arguments)]
  paths = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
  cache = {'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir}
  environment = {**os.environ, **cache, 'PYTHONPATH': paths, **environment}
  return subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def signal_after(process, number, workdir, step):
  """Sends the signal once the run has written the metrics of `step`."""
  deadline = time.monotonic() + 240
  while not any(row['step'] >= step for row in read_metrics(workdir)):
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(number)
  return process.communicate(timeout=240)[0]


@pytest.fixture(scope='module')
def uninterrupted():
  state, _ = run(40)
  return jax.device_get(state)


def test_killed_and_terminated_run_ends_bit_for_bit_the_same(tmp_path, uninterrupted):
  arguments = ('--workdir', tmp_path, '--num_steps', 40, '--delay', 0.1)
  process = start(*arguments)
  signal_after(process, signal.SIGKILL, tmp_path, random.randint(4, 12))
  assert process.returncode == -signal.SIGKILL

  process = start(*arguments)
  text = signal_after(process, signal.SIGTERM, tmp_path, random.randint(17, 25))
  assert process.returncode == 0, text
  assert 'stopped, saved step' in text
  stopped = max(int(path.name) for path in (tmp_path / 'checkpoints').glob('[0-9]*'))
  assert 17 <= stopped < 40

  state, history = run(40, tmp_path)
  chex.assert_trees_all_equal(jax.device_get(state), uninterrupted)
  assert [row['step'] for row in history] == list(range(1, 41))


def test_run_goes_on_on_another_mesh(tmp_path, uninterrupted):
  run(20, tmp_path)
  program = make_program(FSDP_RULES)
  state, _ = run(40, tmp_path, program=program, mesh=make_mesh(fsdp=4))
  assert state.params['conv']['kernel'].addressable_shards[0].data.shape == (3, 3, 3, 4)
  chex.assert_trees_all_close(jax.device_get(state), uninterrupted, rtol=1e-3, atol=1e-4)


def test_two_processes_agree_with_one(tmp_path, uninterrupted):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=4')
  arguments = ('--workdir', tmp_path, '--num_steps', 5, '--fsdp', 4, '--out', tmp_path / 'out.npz')
  hosts = [
    start(
      *arguments,
      XLA_FLAGS=flags,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES='2',
      JAX_PROCESS_ID=str(index),
    )
    for index in range(2)
  ]
  texts = [host.communicate(timeout=300)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0], '\n'.join(texts)
  assert 'train 5/5' in texts[0] and 'train' not in texts[1]
  both = np.load(tmp_path / 'out.npz')
  one, history = run(5)
  chex.assert_trees_all_close(
    [both[name] for name in both.files], jax.tree.leaves(jax.device_get(one)), rtol=1e-4, atol=1e-5
  )
  losses = [[row['loss'] for row in rows] for rows in (read_metrics(tmp_path), history)]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  # One process reads what two have written, on another mesh.
  state, _ = run(6, tmp_path)
  assert int(state.step) == 6


def test_step_is_compiled_once(caplog):
  with jax.log_compiles():
    run(6, evaluate=lambda state: {'top1': 0.0}, eval_every=2)
  compiled = [record.getMessage() for record in caplog.records]
  # The wording of older versions differs.
  traced = re.compile(r'Finished tracing.* step for p?jit')
  assert sum(traced.match(text) is not None for text in compiled) == 1
  assert sum('Finished XLA compilation of jit(step)' in text for text in compiled) == 1


def test_rows_are_means_over_the_steps_since_the_last_row():
  _, every = run(6)
  _, thirds = run(6, log_every=3)
  losses = np.array([row['loss'] for row in every])
  assert [row['step'] for row in thirds] == [3, 6]
  np.testing.assert_allclose([row['loss'] for row in thirds], losses.reshape(2, 3).mean(1))


def test_a_state_is_revised_once_at_each_step_that_asks_for_it(tmp_path):
  seen = []

  def revise(state):
    seen.append(int(state.step))
    return state.replace(params=jax.tree.map(lambda leaf: 0.5 * leaf, state.params))

  options = {'revise': revise, 'revise_at': {0, 3, 4}}
  whole = jax.device_get(run(7, **options)[0])
  assert seen == [0, 3, 4]
  plain = jax.device_get(run(7)[0])
  assert not np.array_equal(*(jax.tree.leaves(own.params)[0] for own in (whole, plain)))
  # Left at a step that asks for it, and behind it.
  for stop in (3, 5, 7):
    found = run(stop, tmp_path, **{**options, 'revise_at': {k for k in (0, 3, 4) if k < stop}})[0]
  assert seen == [0, 3, 4, 0, 3, 4]
  chex.assert_trees_all_equal(jax.device_get(found), whole)


def test_a_revised_state_may_hold_an_array_twice_and_of_others():
  held = []

  def revise(state):
    first = jax.tree.leaves(state.params)[0]
    new = jax.numpy.zeros_like(first)
    held.append(new)
    leaves = [new if leaf.shape == new.shape else leaf for leaf in jax.tree.leaves(state.opt_state)]
    opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), leaves)
    params = jax.tree.map(lambda leaf: new if leaf is first else leaf, state.params)
    return state.replace(params=params, opt_state=opt_state)

  state, _ = run(5, revise=revise, revise_at=[1, 3])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
  assert not any(np.any(array) for array in held)


def test_a_revision_that_raises_loses_no_step(tmp_path):
  def broken(state):
    raise RuntimeError('no labels')

  with pytest.raises(RuntimeError, match='no labels'):
    run(7, tmp_path, revise=broken, revise_at=[4])
  found = run(7, tmp_path, revise=lambda state: state, revise_at=[4])[0]
  assert [row['step'] for row in read_metrics(tmp_path)] == list(range(1, 8))
  chex.assert_trees_all_equal(*map(jax.device_get, (found, run(7)[0])))


def test_finished_run_is_returned_without_a_step(tmp_path):
  first, history = run(4, tmp_path)
  again, rows = run(4, tmp_path, data=Data(end=0))
  chex.assert_trees_all_equal(first, again)
  assert rows == history


@pytest.mark.parametrize('mode, kept', [('max', 2), ('min', 4)])
def test_best_state_is_kept_beside_the_last_and_returned(tmp_path, mode, kept):
  scores = {2: 0.9, 4: 0.1, 6: 0.3, 8: 0.5}
  state, _ = run(
    8, tmp_path, keep=1, checkpoint_every=100, eval_every=2, best_metric='top1', best_mode=mode,
    evaluate=lambda state: {'top1': scores[int(state.step)]},
  )  # fmt: skip
  assert state.step == kept
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == [str(kept), '8']
  assert [row['top1'] for row in read_metrics(tmp_path) if 'top1' in row] == [*scores.values()]


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
  with pytest.raises(FloatingPointError, match=r'loss is nan at step 5.*good checkpoint is .*/3'):
    run(40, tmp_path, program=make_program(blow_up_at=5), log_every=10)
  assert os.listdir(tmp_path / 'checkpoints') == ['3']
  with pytest.raises(FloatingPointError, match=r'Without a workdir'):
    run(40, program=make_program(blow_up_at=5))


def test_the_metrics_that_are_not_finite_are_named_with_the_loss():
  program = make_program(blow_up_at=2)

  def step(*args):
    state, metrics = program.step(*args)
    return state, {**metrics, 'first': 2 * metrics['loss'], 'second': 0 * state.step}

  with pytest.raises(FloatingPointError, match=r'nan at step 2, with first\. Without'):
    run(3, program=program.replace(step=step))


def test_state_that_is_not_finite_is_never_saved(tmp_path):
  with pytest.raises(FloatingPointError, match=r'parameter is not finite after step 1'):
    run(2, tmp_path, program=make_program(learning_rate=np.inf), checkpoint_every=1)
  assert os.listdir(tmp_path / 'checkpoints') == []


def test_state_that_is_not_finite_is_never_returned():
  with pytest.raises(FloatingPointError, match=r'parameter is not finite after step 1'):
    run(1, program=make_program(learning_rate=np.inf))


def test_scores_that_are_not_finite_are_never_the_best(tmp_path):
  scores = iter([0.5, np.inf, np.nan])
  state, _ = run(
    3,
    tmp_path / 'a',
    eval_every=1,
    best_metric='top1',
    evaluate=lambda state: {'top1': next(scores)},
  )
  assert int(state.step) == 1
  with pytest.raises(FloatingPointError, match=r"best_metric='top1' was finite in no evaluation"):
    run(1, tmp_path / 'b', best_metric='top1', evaluate=lambda state: {'top1': np.nan})


@pytest.mark.parametrize('every', [0, -3])
def test_evaluations_need_a_positive_number_of_steps(every):
  with pytest.raises(ValueError, match=rf'eval_every={every}, expected a positive'):
    run(1, evaluate=lambda state: {}, eval_every=every)


def test_a_best_metric_that_is_not_evaluated_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"not in evaluate.*'top5'"):
    run(1, tmp_path, best_metric='top1', evaluate=lambda state: {'top5': 1.0})


class Spoiled(Data):
  def __init__(self, change):
    super().__init__()
    self.change = change

  def __next__(self):
    return self.change(super().__next__())


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda b: {'image': b['image']}, r"has no \['label'\].*it has \['image'\]"),
    (lambda b: {**b, 'image': b['image'][:8]}, r"batch\['image'\] is float32\[8, 8, 8, 3\].*16, 8"),
    (lambda b: {**b, 'label': b['label'].astype(np.int64)}, "'label'.*is int64.*for int32"),
    (lambda b: {**b, 'image': b['image'] * np.nan}, "'image'.*not finite"),
  ],
)
def test_batch_that_does_not_fit_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    run(2, data=Spoiled(change))


def test_a_workdir_beyond_the_last_step_is_refused(tmp_path):
  run(6, tmp_path)
  with pytest.raises(ValueError, match=r'num_steps=4, but .* holds a run at step 6'):
    run(4, tmp_path)


def test_an_evaluation_that_raises_loses_no_step(tmp_path):
  scores = {2: 0.9, 4: 0.1, 6: 0.3}
  options = {'checkpoint_every': 100, 'eval_every': 2, 'best_metric': 'top1'}
  broken = [True]

  def evaluate(state):
    if int(state.step) == 4 and broken:
      raise OSError('the disk is full')
    return {'top1': scores[int(state.step)]}

  with pytest.raises(OSError, match='the disk is full'):
    run(6, tmp_path, evaluate=evaluate, **options)
  assert '4' in os.listdir(tmp_path / 'checkpoints')
  broken.clear()
  state, rows = run(6, tmp_path, evaluate=evaluate, **options)
  assert state.step == 2  # the best
  assert [row['top1'] for row in rows if 'top1' in row] == [*scores.values()]
  assert [row['step'] for row in rows if 'loss' in row] == list(range(1, 7))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('step', [2, 4])
def test_a_signal_during_an_evaluation_is_answered_at_once(tmp_path, number, step):
  """In the middle of a run, and at its last step; the evaluation is done when the run goes on."""
  judged = []

  def evaluate(state):
    judged.append(int(state.step))
    if judged[-1] == step and judged.count(step) == 1:
      signal.raise_signal(number)
      pytest.fail('the signal was not answered')
    return {'top1': 0.5}

  before = signal.getsignal(number)
  options = {'evaluate': evaluate, 'eval_every': 2, 'checkpoint_every': 100}
  with pytest.raises(SystemExit) as stop:
    run(4, tmp_path, **options)
  assert stop.value.code == 0 and signal.getsignal(number) is before
  state, rows = run(4, tmp_path, **options)
  assert state.step == 4 and judged == sorted([2, 4, step])
  assert [row['step'] for row in rows if 'top1' in row] == [2, 4]


def test_a_signal_at_the_last_step_ends_the_process_behind_it(tmp_path):
  class Signals(Data):
    def __next__(self):
      if self.next == 2:
        signal.raise_signal(signal.SIGTERM)
      return super().__next__()

  with pytest.raises(SystemExit) as stop:
    run(3, tmp_path, data=Signals(end=3))
  assert stop.value.code == 0
  state, _ = run(3, tmp_path, data=Data(end=0))
  assert state.step == 3


def test_data_that_ends_too_early_is_an_error():
  with pytest.raises(ValueError, match='ended before step 4 of num_steps=9'):
    run(9, data=Data(end=3))


@pytest.mark.parametrize(
  'options, message',
  [
    ({'log_every': 0}, 'log_every=0'),
    ({'checkpoint_every': -1}, 'checkpoint_every=-1'),
    ({'best_metric': 'top1'}, 'needs evaluate'),
    ({'best_metric': 'top1', 'evaluate': lambda s: {'top1': 1.0}}, 'needs a workdir'),
  ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    run(1, **options)
