import json

import pytest

from experiments.harness import results, seeds
from experiments.harness.results import Results, row
from experiments.harness.sections import Claim, Experiment


def found(seed=0, method=2.0, **changes):
  config = Experiment(
    paper='paper [a]', setting='embedded', seed=seed, claims=(
      Claim('drops by 5 [x]', 'drop', 'base', 'ours', 5.0, higher_is_better=False),
      Claim('not measured', 'other', 'base', 'ours'),
    ), **changes,
  )  # fmt: skip
  rows = [
    row('base', 'baseline', {'drop': 10.0, 'hidden': 1}),
    row('ours', 'method', {'drop': method}),
  ]
  own = results.results(config, rows, ['drop'], 'drops in %')
  return own | {'seconds': 1.0, 'config': {'seed': seed}}


def test_results_are_the_dict_that_is_written_and_show_themselves(tmp_path):
  own = Results(found(), tmp_path)
  (tmp_path / 'a.png').write_bytes(b'picture')
  assert own['rows'][1]['metrics'] == {'drop': 2.0} and json.loads(json.dumps(own)) == dict(own)
  text = str(own)
  assert text.startswith('paper [a], embedded, seed 0: drops in %')
  assert 'holds: drops by 5 [x] (ours against base: +8, margin 5)' in text
  assert 'hidden' not in text and f'Picture: {tmp_path / "a.png"}' in text
  page = own._repr_html_()
  assert (
    '<td>10.0</td>' in page
    and 'hidden' not in page
    and 'data:image/png;base64,cGljdHVyZQ==' in page
  )


def test_seeds_are_summed_up_by_row_and_claim(tmp_path):
  runs = [found(seed, method) for seed, method in enumerate((8.0, 4.0, 3.0))]
  own = seeds.summary(runs, tmp_path)
  assert own['seeds'] == [0, 1, 2] and own['seconds'] == 3.0
  drop = own['rows'][1]['metrics']['drop']
  assert drop['mean'] == 5.0 and drop['deviation'] == pytest.approx(7**0.5)
  (verdict,) = results.judged(own)
  assert verdict.holds and verdict.difference == 5.0 and verdict.deviation == drop['deviation']
  assert '5.00 ± 2.65' in str(own) and 'holds: drops by 5' in str(own)
  assert not results.judged(seeds.summary(runs[:1]))[0].holds
  assert (
    json.loads(json.dumps(seeds.summary(runs[:1])))['rows'][0]['metrics']['drop']['deviation']
    is None
  )


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (None, ''),
    (0.5, '0.500'),
    (2.25, '2.25'),
    (12.345, '12.3'),
    (-300, '-300'),
    (float('nan'), 'nan'),
  ],
)
def test_cells_show_a_few_digits(value, text):
  assert results.cell(value) == text


def test_a_table_has_a_line_for_each_part_and_row():
  config = Experiment(paper='p', setting='s')
  rows = [
    results.row('plain', 'baseline', {'raw_accuracy': 1.0, 'raw_other': 2.0, 'relu_accuracy': 3.0}),
    results.row('needed', 'reference', {'raw_other': 4.0}),
  ]
  found = results.results(config, rows, ['accuracy'], parts=['raw', 'relu'])
  assert [(item['name'], item['metrics']['accuracy']) for item in results.lines(found)] == [
    ('raw plain', 1.0), ('relu plain', 3.0)
  ]  # fmt: skip
  assert 'raw plain' in str(results.Results(found)) and 'needed' not in str(results.Results(found))


def test_a_table_is_cut_by_metrics_and_leaves_out_rows_without_any(monkeypatch):
  monkeypatch.setenv('COLUMNS', '40')
  rows = [row('one', 'method', {'a' * 20: 1, 'b' * 20: 2}), row('other', 'baseline', {'a' * 20: 3})]
  text = results.table('title', rows, ['a' * 20, 'b' * 20])
  assert text.count('│ one ') == 2 and text.count('│ other ') == 1
  assert max(map(len, text.splitlines())) <= 40
