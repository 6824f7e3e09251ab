import json

import pytest

from experiments.harness import seeds
from experiments.tools import report


def write(folder, seed, baseline, method, metrics=('drop',), **changes):
  run = {
    'paper': 'paper',
    'setting': 'embedded',
    'seed': seed,
    'rows': [
      {'name': 'base', 'role': 'baseline', 'metrics': dict.fromkeys(metrics, baseline)},
      {'name': 'our|s', 'role': 'method', 'metrics': dict.fromkeys(metrics, method)},
    ],
    'claims': [
      {
        'statement': 'drops less',
        'metric': 'drop',
        'baseline': 'base',
        'method': 'our|s',
        'higher_is_better': False,
        'margin': 5.0,
      }
    ],
    'table': {'title': 'points', 'metrics': list(metrics)},
    'seconds': 1.0,
    'config': {'seed': seed, 'epochs': 3, 'reported': 'On ImageNet 4.2.', **changes},
    'versions': {'jax': '1.2.3'},
    'machine': {
      'processor': 'abacus', 'cores': 4, 'threads': 2, 'device': 'cpu', 'devices': 1, 'processes': 1,
    },
  }  # fmt: skip
  (folder / f'seed{seed}').mkdir(parents=True, exist_ok=True)
  (folder / f'seed{seed}' / 'results.json').write_text(json.dumps(run))


def test_a_report_holds_table_claims_what_the_paper_says_and_the_machine(tmp_path):
  for seed, method in enumerate((8.0, 4.0, 3.0)):
    write(tmp_path, seed, baseline=10.0, method=method)
  text = report.markdown(seeds.collect([tmp_path])['paper', 'embedded'])
  assert '| **our\\|s** | 5.00 ± 2.65 |' in text and '| base | 10.0 |' in text
  assert '| drops less | our\\|s against base, drop | +5 ± 2.6 | 5 | holds |' in text
  assert 'The paper reports: On ImageNet 4.2.' in text
  assert 'Seeds 0, 1, 2; abacus, 2 of 4 cores; jax 1.2.3; 1 s a seed.' in text
  assert 'python -m experiments.paper --seeds=0,1,2' in text


def test_a_claim_that_falls_short_is_said_not_to_hold(tmp_path):
  write(tmp_path, 0, baseline=10.0, method=5.1)
  text = report.markdown(seeds.collect([tmp_path])['paper', 'embedded'])
  assert '| +4.9 | 5 | **does not hold** |' in text


def test_many_metrics_stand_below_each_other(tmp_path):
  write(tmp_path, 0, 10.0, 5.1, metrics=('drop', *(f'm_{i}' for i in range(20))))
  text = report.markdown(seeds.collect([tmp_path])['paper', 'embedded'])
  assert '|  | base | **our\\|s** |' in text and '| m\\_19 | 10.0 | 5.10 |' in text


def test_the_page_keeps_what_is_written_by_hand(tmp_path):
  write(tmp_path / 'runs', 0, baseline=10.0, method=5.1)
  (tmp_path / 'runs' / 'seed0' / 'curve.png').write_bytes(b'picture')
  page = tmp_path / 'README.md'
  page.write_text('# Paper\n\nProse.\n\n## Measured\n\nWhat it shows.\n')
  report.main([str(tmp_path / 'runs'), f'--page={page}'])
  first = page.read_text()
  assert first.startswith('# Paper\n\nProse.\n\n## Measured\n\n<!-- report of embedded -->')
  assert first.rstrip().endswith('<!-- end of the report of embedded -->\n\nWhat it shows.')
  assert '![embedded, seed 0](paper_curve.png)' in first
  assert (tmp_path / 'paper_curve.png').read_bytes() == b'picture'
  report.main([str(tmp_path / 'runs'), f'--page={page}'])
  assert page.read_text() == first
  write(tmp_path / 'runs', 0, baseline=10.0, method=2.0)
  report.main([str(tmp_path / 'runs'), f'--page={page}'])
  again = page.read_text()
  assert (
    '| +8 | 5 | holds |' in again and 'does not hold' not in again and 'What it shows.' in again
  )


def test_other_settings_of_a_page_stay(tmp_path):
  page = report.placed('# Paper\n', 'embedded', 'one')
  page = report.placed(page, 'imagenet', 'two')
  page = report.placed(page, 'embedded', 'three')
  assert 'one' not in page and 'two' in page and 'three' in page and page.count('## Measured') == 1


def test_the_command_names_what_differs_from_the_setting(tmp_path):
  from experiments.harness import launcher, results
  from experiments.harness.settings import plain

  config = launcher.load('gml', 'cifar10_lt', ['network.epochs=3', 'runs=ce'])
  run = results.results(config, [results.row('CE', 'baseline', {'mean': 1.0})])
  run |= {'config': plain(config), 'seconds': 1.0}
  text = report.markdown([run])
  command = 'python -m experiments.gml --config=cifar10_lt --seeds=0 \'--config.runs=["ce"]\''
  assert f'{command} --config.network.epochs=3\n' in text
  assert 'GML over a cross-entropy ResNet-32 on CIFAR-10-LT' in text


def test_the_picture_is_drawn(tmp_path):
  write(tmp_path, 0, baseline=10.0, method=5.1)
  report.main([str(tmp_path), f'--picture={tmp_path / "claims.png"}'])
  assert (tmp_path / 'claims.png').stat().st_size > 1000


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r'no results\.json'):
    seeds.collect([tmp_path])
  write(tmp_path / 'a', 0, 1.0, 1.0)
  write(tmp_path / 'b', 1, 1.0, 1.0, epochs=4)
  with pytest.raises(ValueError, match='differ in epochs'):
    seeds.collect([tmp_path])
  write(tmp_path / 'b', 0, 1.0, 1.0)
  (tmp_path / 'b' / 'seed1' / 'results.json').unlink()
  with pytest.raises(ValueError, match='seed 0 twice'):
    seeds.collect([tmp_path])
