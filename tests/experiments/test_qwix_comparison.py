import pytest

from experiments import launcher, qwix_comparison


def small_config():
  config = launcher.load_config(launcher.CONFIGS / 'qwt' / 'embedded.py')
  own = config.network.vit
  own.model.update(width=16, depth=1, num_heads=2)
  own.epochs, own.schedule.warmup_epochs = 1, 0
  return config


def test_the_same_network_is_compared_in_all_forms(tmp_path):
  found = qwix_comparison.compare(small_config(), tmp_path, bits=['4w8a'], repeats=1)
  assert list(found) == ['float', '4w8a fake-quantized', '4w8a integer', '4w8a qwix']
  base, fake, ours, qwix = found.values()
  assert base['time'] == 1 and all(row['time'] > 0 for row in found.values())
  assert base['bytes'] == base['packed'] < fake['bytes']
  assert ours['packed'] == ours['bytes'] < 0.5 * base['bytes']
  assert qwix['packed'] < qwix['bytes'] < 0.6 * base['bytes']
  assert abs(ours['accuracy'] - fake['accuracy']) <= 3
  assert abs(qwix['accuracy'] - base['accuracy']) <= 10


def test_bad_input_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"bits='3w8a': qwix has integer types of 4 and 8 bits"):
    qwix_comparison.qwix_network(None, None, '3w8a')
  with pytest.raises(ValueError, match='named such as 2w4a'):
    qwix_comparison.compare(small_config(), tmp_path, bits=['w8'])
