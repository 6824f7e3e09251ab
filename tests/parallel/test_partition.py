import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from small_program import FSDP_RULES, make_program

from jaxlab.parallel import (
  fsdp_shardings,
  fsdp_spec,
  make_mesh,
  shard_program,
  state_shardings,
  tree_paths,
)
from jaxlab.training import TrainState


def specs(state, mesh, rules, **options):
  shardings = state_shardings(state, mesh, rules, **options)
  return {path: sharding.spec for path, sharding in tree_paths(shardings)}


def abstract_state():
  return jax.eval_shape(make_program().init, jax.random.key(0))


def test_optimizer_and_teacher_follow_the_parameters():
  found = specs(abstract_state(), make_mesh(fsdp=4), FSDP_RULES)
  conv = {path: spec for path, spec in found.items() if path.endswith('conv/kernel')}
  assert set(conv) == {
    'params/conv/kernel', 'opt_state/0/trace/conv/kernel', 'extra/teacher/conv/kernel'
  }  # fmt: skip
  assert set(conv.values()) == {P(None, None, None, 'fsdp')}
  assert found['step'] == P() and found['params/conv/bias'] == P()


def test_first_matching_rule_wins():
  rules = [('head/.*', P()), ('.*/kernel', P('fsdp')), ('.*', P())]
  state = TrainState(
    jnp.int32(0), {'head': {'kernel': jnp.ones((8, 8))}, 'neck': {'kernel': jnp.ones(8)}}, ()
  )
  found = specs(state, make_mesh(fsdp=4), rules, fsdp_min_size=1)
  assert found['params/head/kernel'] == P()
  assert found['params/neck/kernel'] == P('fsdp')


def test_rules_reach_what_follows_no_parameter():
  rules = [('extra/queue', P('data'))]
  assert specs(abstract_state(), make_mesh(fsdp=4), rules)['extra/queue'] == P('data')


def test_automatic_rule_splits_the_largest_dimension_that_divides():
  mesh = make_mesh(fsdp=4)
  assert fsdp_spec((3, 3, 64, 128), mesh, 1) == P(None, None, None, 'fsdp')
  assert fsdp_spec((130, 64), mesh, 1) == P(None, 'fsdp')
  assert fsdp_spec((64, 64), mesh, 64 * 64 + 1) == P()
  assert fsdp_spec((3, 5), mesh, 1) == P()
  assert fsdp_spec((), mesh, 0) == P()
  assert fsdp_spec((64, 64), make_mesh(), 1) == P()


def test_weights_that_are_not_trained_are_split_by_rules_and_the_automatic_one():
  mesh = make_mesh(data=4, fsdp=2)
  weights = {'kernel': jnp.zeros((4, 6)), 'odd': jnp.zeros((5, 7)), 'scale': jnp.zeros(6)}
  found = fsdp_shardings(weights, mesh, fsdp_min_size=12)
  assert {name: own.spec for name, own in found.items()} == {
    'kernel': P(None, 'fsdp'), 'odd': P(), 'scale': P()
  }  # fmt: skip
  found = fsdp_shardings(weights, mesh, [('odd|scale', P()), ('k.*', P('data'))], fsdp_min_size=1)
  assert {name: own.spec for name, own in found.items()} == {
    'kernel': P('data'), 'odd': P(), 'scale': P()
  }  # fmt: skip
  with pytest.raises(ValueError, match="'kernle' match none of the 3 paths, such as kernel"):
    fsdp_shardings(weights, mesh, [('kernle', P())])


def test_automatic_rule_applies_to_the_whole_state():
  found = specs(abstract_state(), make_mesh(fsdp=4), (), fsdp_min_size=64)
  assert found['params/head/kernel'] == found['extra/teacher/head/kernel'] == P('fsdp')
  assert found['extra/queue'] == P('fsdp')
  assert found['params/head/bias'] == P()


@pytest.mark.parametrize(
  'rule, message',
  [
    (('hed/kernel', P()), r"'hed/kernel' match none of .*head/kernel"),
    (('head', P()), "'head' match none"),
    (('head/bias', P(None, 'fsdp')), r'head/bias of shape \[4\]: it has 2 entries for 1'),
    (('head/kernel', P('model')), r"not \['model'\]"),
    (('conv/kernel', P('fsdp')), 'dimension 0 of size 3 does not divide by fsdp = 4'),
    (('head/kernel', P(None, ('data', 'fsdp'))), 'size 4 does not divide by data x fsdp = 8'),
  ],
)
def test_rule_that_cannot_apply_is_an_error(rule, message):
  with pytest.raises(ValueError, match=message):
    state_shardings(abstract_state(), make_mesh(fsdp=4), [rule])


def test_batch_must_divide_over_the_mesh():
  with pytest.raises(ValueError, match='batch_size=12'):
    shard_program(make_program(batch=12), make_mesh())
