"""Embeddings and tied heads are quantized by rules of their own, a range a row."""

import jax
import numpy as np
import pytest
import tables
from flax import linen as nn
from models.random_variables import call, random_variables

from jaxlab.models import Anatomy
from jaxlab.quantizers import (
  Rule,
  absmax_ptq,
  gptq_ptq,
  integer_network,
  lsq,
  percentile_ptq,
  ptq,
  repq,
  uniform_rules,
)
from jaxlab.quantizers.networks.operands import kernels_in_float

TOKENS = np.random.default_rng(0).integers(0, 9, (8, 5)).astype(np.int32)
PARTS = Anatomy(blocks=('block',), head=(), embeddings=('embed', 'other'), tied='embed')


class Tied(nn.Module):
  """A table for tokens and the head, and one for nothing else than tokens."""

  @nn.compact
  def __call__(self, tokens):
    embed, other = (nn.Embed(9, 6, name=name) for name in ('embed', 'other'))
    x = nn.relu(nn.Dense(6, name='block')(embed(tokens)))
    return embed.attend(x + other(inputs=tokens))


MODEL = Tied()
VARIABLES = random_variables(MODEL, TOKENS)


@pytest.mark.parametrize('method', tables.few([percentile_ptq, repq, gptq_ptq], repq))
def test_a_rule_names_a_table_and_the_head_that_is_tied_to_it(method):
  rules = [Rule('embed', 'embedding', 4), *uniform_rules(8, 8)]
  found = method(MODEL, VARIABLES, TOKENS, rules, anatomy=PARTS)
  table, new = (own['params']['embed']['embedding'] for own in (VARIABLES, found.variables))
  for row, own in zip(np.asarray(new), table):
    step = np.ptp(own) / 15
    assert len(np.unique(row)) <= 16 and np.max(np.abs(row - own)) < 0.6 * step
  constants = found.variables['quantization']['embed']
  codes = new / constants['embedding']['scale'] + constants['embedding']['zero_point']
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
  other = found.variables['params']['other']['embedding']
  np.testing.assert_array_equal(other, VARIABLES['params']['other']['embedding'])
  assert 'embed' not in found.skipped
  assert '1 embedding of 4 bits' in found.summary()
  # The head's input is quantized, the tokens are not.
  params = VARIABLES['params']
  x = np.maximum(table[TOKENS] @ params['block']['kernel'] + params['block']['bias'], 0)
  x = x + params['other']['embedding'][TOKENS]
  own = constants['input']
  assert own['scale'] * 255 == pytest.approx(np.ptp(np.append(x, 0)), rel=0.2)
  expected = jax.jit(MODEL.apply)({'params': {**params, 'embed': {'embedding': new}}}, TOKENS)
  assert 0 < np.std(found(TOKENS) - expected) < 0.1 * np.std(expected)
  np.testing.assert_allclose(
    found.in_float()(TOKENS), jax.jit(MODEL.apply)(VARIABLES, TOKENS), atol=1e-5
  )
  integers = integer_network(found)
  assert np.std(call(integers, TOKENS) - found(TOKENS)) < 0.02 * np.std(expected)


@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_the_largest_magnitude_of_a_table_is_that_of_all_its_uses(granularity):
  rules = [Rule('embed', 'embedding', 8, granularity), *uniform_rules(8, 8)]
  found = absmax_ptq(MODEL, VARIABLES, TOKENS, rules)
  params, constants = VARIABLES['params'], found.variables['quantization']
  table = np.asarray(params['embed']['embedding'])
  largest = np.abs(table).max(None if granularity == 'tensor' else 1)
  scale = np.broadcast_to(np.reshape(largest / 127, (-1, 1)), (9, 1))
  np.testing.assert_allclose(constants['embed']['embedding']['scale'], scale, rtol=1e-5)
  new = found.variables['params']['embed']['embedding']
  np.testing.assert_allclose(new, np.round(table / scale) * scale, atol=1e-5)
  x = np.maximum(table[TOKENS] @ params['block']['kernel'] + params['block']['bias'], 0)
  x = x + params['other']['embedding'][TOKENS]
  own = constants['embed']['input']['scale']
  np.testing.assert_allclose(
    127 * own, np.abs(x).max(), rtol=1e-5
  )  # of the head, not of the tokens
  assert not found.skipped and found.operands()['embed'] == {'embedding': 8, 'input': 8}
  exact = MODEL.apply(VARIABLES, TOKENS)
  assert 0 < np.std(call(found, TOKENS) - exact) < 0.1 * np.std(exact)
  integers = integer_network(found)
  assert np.std(call(integers, TOKENS) - call(found, TOKENS)) < 0.02 * np.std(exact)


def test_weights_that_are_no_kernels_are_said_and_tables_are_not():
  names = ('a/kernel', 'b/embedding', 'c/pos_embed', 'd/cls_token', 'e/bias_table', 'f/weight')
  flat = {name: np.ones((2, 3)) for name in names}
  assert kernels_in_float(flat, uniform_rules(4), ['a']) == {'f': 'its weight is no kernel'}


def test_tables_are_left_alone_by_other_rules_and_named_where_they_are_not_known():
  found = percentile_ptq(MODEL, VARIABLES, TOKENS, uniform_rules(4, 4), anatomy=PARTS)
  assert 'embed' not in found.variables['quantization']
  assert not found.skipped and 'embed' not in found.summary()
  with pytest.raises(ValueError, match=r"embedding rule 'embedding'. Closest .*embed"):
    percentile_ptq(MODEL, VARIABLES, TOKENS, [Rule('embedding', 'embedding', 4)])
  for method in (percentile_ptq, ptq):
    with pytest.raises(ValueError, match=r"kernel rule 'embed' names a table, which is no kernel"):
      method(MODEL, VARIABLES, TOKENS, [Rule('embed', 'kernel', 4)])
  for method, learned in ((ptq, False), (lsq, True)):
    with pytest.raises(
      ValueError, match=f"{method.__name__} cannot do Rule.'embed', 'embedding', 4"
    ):
      method(MODEL, VARIABLES, TOKENS, [Rule('embed', 'embedding', 4, learned=learned)])
