import importlib.util
import json
import pathlib
import stat
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tables

from experiments.tools import bench, bench_comparison, bench_input, bench_models, bench_side
from experiments.tools.bench_comparison import Case
from jaxlab import models

TORCH_LACKS = [name for name in ('torch', 'timm') if importlib.util.find_spec(name) is None]


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setattr(bench_comparison, 'CASES', {'tiny': Case('linear', 4, 2)})
  monkeypatch.setattr(bench_comparison, 'STANDARD', ('tiny',))


@pytest.fixture
def fake_torch(tmp_path):
  """A Python for which torch and timm are there, and each step takes half a second."""
  second = {'wall': 0.5, 'cpu': 1.0}
  figures = {'first_step': {'wall': 4.0}, 'step': second, 'forward': second}
  line = {'figures': figures, 'parameters': 490, 'versions': {'torch': '0'}, 'threads': 2}
  path = tmp_path / 'python'
  path.write_text(f"#!/bin/sh\necho a warning\necho '{json.dumps(line)}'\n")
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return path


@pytest.mark.exhaustive
def test_both_sides_stand_in_one_table_and_in_the_file(tiny, fake_torch, tmp_path, capsys):
  output = tmp_path / 'speed.json'
  found = bench.main(
    ['--sizes=', '--workers=', '--steps=2', f'--torch-python={fake_torch}', f'--output={output}']
  )
  rows = found['models']['tiny']['rows']
  assert list(rows) == [
    'forward', 'step', 'forward, 1 thread', 'step, 1 thread',
    'compile', 'first step', 'first step, cached',
  ]  # fmt: skip
  for name in ('forward', 'step', 'forward, 1 thread', 'step, 1 thread'):
    assert rows[name]['ratio']['wall'] == pytest.approx(rows[name]['ours']['wall'] / 0.5)
    assert rows[name]['ratio']['cpu'] == pytest.approx(rows[name]['ours']['cpu'] / 1.0)
  assert 0 < rows['compile']['ours']['wall'] < rows['first step']['ours']['wall']
  assert 'torch' not in rows['compile'] and rows['first step']['torch'] == {'wall': 4.0}
  assert found['geometric_means']['step'] == pytest.approx(rows['step']['ratio'])
  assert found['models']['tiny']['versions']['torch'] == '0'
  assert json.loads(output.read_text()) == found
  printed = capsys.readouterr().out
  for text in ('tiny, batch 2', 'first step, cached', 'geometric mean'):
    assert text in printed
  assert max(map(len, printed.splitlines()[1:])) <= 80


@pytest.mark.exhaustive
def test_without_torch_there_is_our_side_alone(tiny, capsys):
  found = bench.main(['--sizes=', '--workers=', '--steps=1', '--rounds=1', '--threads=1'])[
    'models'
  ]['tiny']
  assert list(found['rows']) == ['forward, 1 thread', 'step, 1 thread']
  assert all(set(row) == {'ours'} for row in found['rows'].values())
  assert 'geometric' not in capsys.readouterr().out


@pytest.mark.exhaustive
def test_other_networks_are_not_compared(tiny, fake_torch):
  fake_torch.write_text(fake_torch.read_text().replace('490', '500'))
  with pytest.raises(RuntimeError, match=r"tiny: .*'ours': 490, 'torch': 500"):
    bench_comparison.measure(['tiny'], [1], torch_python=str(fake_torch), rounds=1, steps=1)


def test_what_a_process_dies_of_is_said(monkeypatch):
  monkeypatch.setattr(bench_comparison, 'CASES', {'tiny': Case('linea', 4, 2)})
  with pytest.raises(RuntimeError, match="no network is called 'linea'"):
    bench_comparison.measure(['tiny'], [None], rounds=1, steps=1)


def test_rows_keep_the_least_and_the_first_compilation():
  rows = {}
  for cached, wall in ((False, 3.0), (True, 2.0), (True, 2.5)):
    figures = {'compile': {'wall': wall}, 'first_step': {'wall': wall}, 'step': {'wall': wall}}
    for count in (None, 1):
      bench_comparison.collect(rows, 'ours', count, figures, cached=cached)
  assert {name: row['ours']['wall'] for name, row in rows.items()} == {
    'compile': 3.0,
    'first step': 3.0,
    'first step, cached': 2.0,
    'step': 2.0,
    'step, 1 thread': 2.0,
  }


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--models=resnet19', 'resnet19 is none of resnet18_64'),
    ('--sizes=resnet19', 'resnet19 is none of embedded'),
    ('--torch-python=/no/such/python', '/no/such/python: expected a Python or the folder'),
    ('--threads=0', '--threads=0: expected'),
    ('--workers=1,two', '--workers=1,two: expected numbers'),
    ('--threads=two', '--threads=two: expected'),
    ('--threads=100000', '--threads=100000: expected'),
    ('--steps=0', '--steps=0: expected'),
    ('--output=/no/such/folder/x.json', 'there is no folder /no/such/folder'),
  ],
)
def test_a_wrong_argument_is_refused_before_anything_is_measured(argument, message, capsys):
  with pytest.raises(SystemExit):
    bench.main([argument])
  assert message in capsys.readouterr().err


@pytest.mark.skipif(not TORCH_LACKS, reason='this environment has torch and timm')
def test_an_environment_without_torch_is_refused(capsys):
  with pytest.raises(SystemExit):
    bench.main([f'--torch-python={sys.executable}'])
  assert f"torch and timm: ModuleNotFoundError: No module named '{TORCH_LACKS[0]}'" in (
    capsys.readouterr().err
  )


def test_an_environment_is_named_by_its_folder(fake_torch, tmp_path):
  (tmp_path / 'bin').mkdir()
  fake_torch.rename(tmp_path / 'bin' / 'python')
  assert bench_comparison.interpreter(str(tmp_path)) == str(tmp_path / 'bin' / 'python')


def test_all_names_every_network():
  assert bench.parse(['--models=all']).models == tuple(bench_comparison.CASES)
  assert bench.parse(['--models=', '--sizes=']).models == ()


def test_input_is_measured_for_each_number_of_workers(monkeypatch, capsys):
  given = []

  def measure(count, *, torch_python, root):
    given.append((count, torch_python, sorted(path.name for path in pathlib.Path(root).iterdir())))
    return {'test': 100.0 + count}

  monkeypatch.setattr(bench_input, 'measure', measure)
  found = bench.main(['--models=', '--sizes=', '--workers=0,2'])
  assert found['input'] == {'0 workers': {'test': 100.0}, '2 workers': {'test': 102.0}}
  classes = [f'class{i}' for i in range(4)]
  assert given == [(0, None, classes), (2, None, classes)]
  assert '102' in capsys.readouterr().out


@pytest.mark.parametrize('case', bench_comparison.CASES.values(), ids=bench_comparison.CASES)
def test_every_network_is_known(case):
  assert models.create(case.network)


@pytest.mark.parametrize('name', tables.few(['resnet18_32', 'gpt2_128'], 'resnet18_32'))
def test_images_and_tokens_fit_the_step(name):
  case = bench_comparison.CASES[name]
  _, program = bench_models.make_program(case.network, case.size, case.batch)
  state = jax.eval_shape(program.init, jax.random.key(0))
  batch = bench_models.random_batch(program)
  assert jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, program.batch)
  after, metrics = jax.eval_shape(program.step, state, {}, batch)
  assert metrics['loss'].shape == ()
  assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.exhaustive
def test_a_step_trains():
  _, program = bench_models.make_program('linear', 4, 8)
  state, batch = jax.jit(program.init)(jax.random.key(0)), bench_models.random_batch(program)
  losses = []
  for _ in range(5):
    state, metrics = program.step(state, {}, batch)
    losses.append(float(metrics['loss']))
  assert np.all(np.diff(losses) < 0)


def test_the_least_leaves_out_the_first_calls():
  pauses = iter([0.2, 0.2, 0.0, 0.03])
  least = bench_side.least(lambda: time.sleep(next(pauses)), 2)
  assert least['wall'] < 0.03 and least['cpu'] < 0.1


def test_threads_are_bound():
  program = 'from experiments.tools import bench_side as b; b.use_threads(1); print(b.cpu_count())'
  root = pathlib.Path(bench.__file__).parent.parent.parent
  ran = subprocess.run([sys.executable, '-c', program], cwd=root, capture_output=True, text=True)
  assert ran.stdout.split() == ['1'], ran.stderr


@pytest.mark.skipif(bool(TORCH_LACKS), reason=f'needs {" and ".join(TORCH_LACKS)}')
def test_sides_have_equal_networks():
  torch_python = bench_comparison.interpreter(sys.executable)
  cases = {name: Case(case.network, 32, 1) for name, case in bench_comparison.CASES.items()}
  for case in (cases['resnet18_32'], cases['wrn16_4_32'], cases['cifar_resnet18_32']):
    theirs = bench_comparison.run('torch', case, None, 1, torch_python, '')['parameters']
    ours = bench_comparison.run('ours', case, None, 1, None, '')['parameters']
    assert ours == theirs
