import json
import math

import pytest

from experiments.tools import report


def write(folder, seed, baseline, method, **changes):
  run = {
    'paper': 'paper',
    'setting': 'embedded',
    'seed': seed,
    'rows': [
      {'name': 'base', 'role': 'baseline', 'metrics': {'drop': baseline}},
      {'name': 'ours', 'role': 'method', 'metrics': {'drop': method}},
    ],
    'claims': [
      {
        'statement': 'drops less',
        'metric': 'drop',
        'baseline': 'base',
        'method': 'ours',
        'higher_is_better': False,
        'margin': 5.0,
      }
    ],
    'seconds': 1.0,
    'config': {'seed': seed, 'epochs': 3, **changes},
  }
  (folder / f'seed{seed}').mkdir(parents=True, exist_ok=True)
  (folder / f'seed{seed}' / 'results.json').write_text(json.dumps(run))


def test_a_claim_is_judged_by_the_mean_over_seeds(tmp_path):
  for seed, method in enumerate((8.0, 4.0, 3.0)):
    write(tmp_path, seed, baseline=10.0, method=method)
  groups = report.collect([tmp_path])
  (verdict,) = report.judge(groups['paper', 'embedded'])
  assert verdict['difference'][0] == pytest.approx(5.0)
  assert verdict['holds']
  text = report.markdown(groups)
  assert '**holds** (difference 5.00 ± 2.65, margin 5, 3 seeds)' in text
  assert '| drop | 10.0 ± 0.0 | 5.00 ± 2.65 |' in text


def test_a_claim_that_falls_short_is_said_not_to_hold(tmp_path):
  write(tmp_path, 0, baseline=10.0, method=5.1)
  groups = report.collect([tmp_path])
  (verdict,) = report.judge(groups['paper', 'embedded'])
  assert not verdict['holds'] and math.isnan(verdict['difference'][1])
  assert 'does NOT hold' in report.markdown(groups)


def test_the_picture_is_drawn(tmp_path):
  write(tmp_path, 0, baseline=10.0, method=5.1)
  report.main([str(tmp_path), f'--picture={tmp_path / "claims.png"}'])
  assert (tmp_path / 'claims.png').stat().st_size > 1000


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r'No results\.json'):
    report.collect([tmp_path])
  write(tmp_path / 'a', 0, 1.0, 1.0)
  write(tmp_path / 'b', 1, 1.0, 1.0, epochs=4)
  with pytest.raises(ValueError, match='differ in epochs'):
    report.collect([tmp_path])
  write(tmp_path / 'b', 0, 1.0, 1.0)
  (tmp_path / 'b' / 'seed1' / 'results.json').unlink()
  with pytest.raises(ValueError, match='Seed 0 twice'):
    report.collect([tmp_path])
