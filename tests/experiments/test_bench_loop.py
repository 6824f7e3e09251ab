import pytest

from experiments.tools import bench, bench_loop


@pytest.fixture
def small(monkeypatch):
  from experiments.harness import launcher

  def configuration(size):
    del size
    model = "{'name': 'cifar_resnet18', 'stage_sizes': (1,), 'strides': (2,), 'width': 8}"
    heads = [f'heads.{name}=8' for name in ('hidden', 'features', 'predictor')]
    return launcher.load('ssql', 'embedded', [f'model={model}', *heads, 'recipe.batch_size=16'])

  monkeypatch.setattr(bench_loop, 'configuration', configuration)
  monkeypatch.setattr(bench_loop, 'STEPS', {'embedded': 2, 'resnet18': 1})


@pytest.mark.exhaustive
def test_ratios_come_out_of_one_run_and_bits_cause_no_recompilation(small, capsys):
  found = bench.main(['--models=', '--workers=', '--sizes=embedded', '--repeats=2'])['sizes'][
    'embedded'
  ]
  assert found['recompilations'] == 0
  assert found['loop_over_bare'] == pytest.approx(
    found['loop_ssql_seconds_per_step'] / found['bare_ssql_seconds_per_step']
  )
  assert found['quantized_over_plain'] == pytest.approx(
    found['bare_ssql_seconds_per_step'] / found['bare_base_seconds_per_step']
  )
  assert min(found.values()) >= 0 and 'loop_over_bare' in capsys.readouterr().out
