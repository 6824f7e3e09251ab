import sys

import jax
import pytest

from experiments.tools import bench_input
from jaxlab import data


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  root = tmp_path_factory.mktemp('photos')
  bench_input.photographs(root, count=36, classes=2)
  return root


def test_photographs_are_a_folder_a_class_and_some_stand_upright(photos):
  source = data.ImageFolder(photos)
  assert len(source) == 36 and source.num_classes == 2
  assert {record['image'].shape for record in source} == {(375, 500, 3), (500, 375, 3)}


def test_rates_are_of_both_rules_and_over_torch(photos, tmp_path):
  python = tmp_path / 'python'
  python.write_text(
    f"""#!{sys.executable}
import json, sys
assert "torchvision" in sys.argv[2] and sys.argv[3:] == [{str(photos)!r}, "32", "0", "1", "1"]
for name in ("test", "test_bytes", "train", "train_bytes"):
  print(json.dumps({{'torch_' + name: [50.0, 20.0]}}))
"""
  )
  python.chmod(0o755)
  found = bench_input.measure(0, torch_python=str(python), root=photos, batches=1, repeats=1)
  sides = ('test', 'train', 'torch_test', 'torch_test_bytes', 'torch_train', 'torch_train_bytes')
  ratios = (
    'test_over_torch',
    'test_over_torch_bytes',
    'train_over_torch',
    'train_over_torch_bytes',
  )
  assert set(found) == {*sides, *ratios, *(f'{side}_cpu_milliseconds' for side in sides)}
  assert found['torch_train_cpu_milliseconds'] == 20
  assert found['test_over_torch'] == found['test'] / 50
  python.write_text(f'#!{sys.executable}\nraise ImportError("no torch")\n')
  with pytest.raises(RuntimeError, match=r'(?s)did not measure: .*no torch'):
    bench_input.measure(0, torch_python=str(python), root=photos, batches=1, repeats=1)


def test_a_step_is_measured_with_resident_and_with_read_batches(photos):
  seen = []

  def step(state, batch):
    assert batch['image'].shape == (8, 224, 224, 3)
    seen.append(batch['index'].tolist())
    return state + 1, {'mean': batch['image'].mean()}

  found = bench_input.measure_step(
    step, jax.numpy.zeros(()), batch_size=8, root=photos, steps=3, repeats=1
  )
  assert found['loop_over_bare'] == pytest.approx(found['loop_seconds'] / found['bare_seconds'])
  assert len(seen) == 9  # a warm-up, the resident batch, the loader's
  assert seen[:6] == [seen[0]] * 6
  assert len({tuple(indices) for indices in [seen[0], *seen[6:]]}) == 4
