import pytest

from experiments.harness import launcher
from experiments.tools import compare

SMALL = (
  'network.vit.model.width=16',
  'network.vit.model.depth=1',
  'network.vit.model.num_heads=2',
  'network.vit.recipe.epochs=1',
  'network.vit.recipe.schedule.warmup_epochs=0',
)


def small_config():
  return launcher.load('qwt', 'embedded', SMALL)


@pytest.mark.exhaustive
def test_the_same_network_is_compared_in_all_forms(tmp_path):
  found = compare.compare(small_config(), tmp_path, bits=['4w8a'], repeats=1)
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
    compare.qwix_network(None, None, None, '3w8a')
  with pytest.raises(ValueError, match='named such as 2w4a'):
    compare.compare(small_config(), tmp_path, bits=['w8'])
  with pytest.raises(ValueError, match=r"network='vti': sections: .*vit"):
    compare.compare(small_config(), tmp_path, network='vti')


@pytest.mark.parametrize(
  'config, message',
  [('gml/embedded', 'no quantized networks'), ('qwt/embeded', 'Did you mean embedded')],
)
def test_settings_that_cannot_be_compared_end_the_command(config, message, tmp_path, capsys):
  with pytest.raises(SystemExit) as raised:
    compare.main([f'--config={config}', f'--workdir={tmp_path}'])
  assert raised.value.code == 2 and message in capsys.readouterr().err
