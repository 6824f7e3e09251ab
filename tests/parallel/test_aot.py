import importlib.util

import jax
import pytest
from small_program import FSDP_RULES, make_program

from jaxlab.parallel import make_mesh
from jaxlab.parallel.aot import collectives, compile_step, report, tpu_topology_mesh

HLO = """
HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %gathered = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0}) all-gather-start(%part), dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%gathered)
}

%condition (carry: (s32[], bf16[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.9_spmd (p0: f32[8,8], p1: s8[2]) -> f32[8,8] {
  %fusion.1 = f32[8,8]{1,0} fusion(%all-reduce.2), kind=kLoop, calls=%add
  %all-reduce.2 = (f32[8,8]{1,0:T(8,128)S(1)}, f32[]{:T(128)}) all-reduce(%a, %b), to_apply=%add
  %rs = bf16[2,8]{1,0} reduce-scatter(%all-reduce.2), dimensions={0}, to_apply=%add
  %send = (u8[6]{0}, u8[6]{0}, u32[], u32[]) collective-permute-start(%p1)
  %loop = (s32[]) while(%t), condition=%condition, body=%body, config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[8,8]{1,0} copy(%loop)
}
"""


def test_collectives_are_counted_with_their_bytes():
  assert collectives(HLO) == {
    'all-gather': {'count': 5, 'bytes': 5 * 16 * 8 * 2},
    'all-reduce': {'count': 1, 'bytes': 8 * 8 * 4 + 4},
    'collective-permute': {'count': 1, 'bytes': 6},
    'reduce-scatter': {'count': 1, 'bytes': 2 * 8 * 2},
  }


def test_report_of_a_step_adds_up():
  found = report(compile_step(make_program(FSDP_RULES), make_mesh(fsdp=4)))
  assert found['devices'] == 8
  memory = found['hbm']
  assert memory['available'] is None and memory['fits'] is None
  assert memory['arguments'] > 0 and memory['temporaries'] > 0
  assert memory['total'] == (
    memory['arguments']
    + memory['outputs']
    - memory['alias']
    + memory['temporaries']
    + memory['code']
  )
  assert found['collectives']['all-gather']['bytes'] > 0


def test_a_program_whose_text_jax_cannot_read_has_no_collectives(monkeypatch):
  compiled = compile_step(make_program(), make_mesh())

  def unreadable(message):
    def as_text(self):
      raise jax.errors.JaxRuntimeError(message)

    return as_text

  monkeypatch.setattr(jax.stages.Compiled, 'as_text', unreadable('INTERNAL: RET_CHECK failure'))
  found = report(compiled)
  assert found['collectives'] is None and found['flops'] > 0
  monkeypatch.setattr(jax.stages.Compiled, 'as_text', unreadable('UNAVAILABLE: gone'))
  with pytest.raises(jax.errors.JaxRuntimeError, match='gone'):
    report(compiled)


def test_one_device_communicates_nothing_and_computes_eight_times_as_much():
  one = report(compile_step(make_program(), make_mesh(devices=jax.devices()[:1])))
  eight = report(compile_step(make_program(), make_mesh()))
  assert one['collectives'] == {}
  assert eight['collectives']['all-reduce']['count'] > 0
  assert 4 < one['flops'] / eight['flops'] < 8.5


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is not None, reason='libtpu is installed')
def test_missing_compiler_says_how_to_install_it():
  with pytest.raises(ModuleNotFoundError, match=r'pip install .*tpu'):
    tpu_topology_mesh()


def test_least_time_is_the_longer_of_computing_and_moving(monkeypatch):
  import jax
  import jax.numpy as jnp

  from jaxlab.parallel import aot

  compiled = jax.jit(jnp.dot).lower(*(jnp.zeros((64, 64)),) * 2).compile()
  with pytest.raises(ValueError, match="peaks of 'cpu' are not known"):
    aot.least_seconds(compiled)
  monkeypatch.setitem(aot._KINDS, 'cpu', 'v5e')
  cost = compiled.cost_analysis()
  monkeypatch.setitem(aot.PEAK_FLOPS, 'v5e', 1.0)
  assert aot.least_seconds(compiled) == cost['flops'] >= 2 * 64**3
  monkeypatch.setitem(aot.PEAK_FLOPS, 'v5e', 1e30)
  assert aot.least_seconds(compiled) == cost['bytes accessed'] / aot.HBM_BYTES_PER_SECOND['v5e']
