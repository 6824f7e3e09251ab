import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close
from models.random_variables import random_variables

from jaxlab import compression, models
from jaxlab.models import GPT2, Bloom, Hook, Llama

SIZE = {'vocab_size': 19, 'width': 32, 'depth': 2, 'num_heads': 8, 'max_length': 16}
# Four heads of keys and values each; the Llama is a Qwen2.
LLAMA = Llama(**SIZE, num_kv_heads=4, hidden=24, attention_bias='qkv')
BLOOM = Bloom(**SIZE, num_kv_heads=4, hidden=24)
GPT = GPT2(**SIZE, num_kv_heads=4, hidden=24)
MODELS = {'llama': LLAMA, 'bloom': BLOOM, 'gpt2': GPT}
TOKENS = np.random.default_rng(0).integers(0, 19, (4, 12), np.int32)
RIGHT = [('llama', 'post'), ('llama', 'before'), ('llama', 'commuting'), ('bloom', None)]
ALL = [*RIGHT, ('gpt2', None)]


def ways(*always):
  """All ways, of which these run always."""
  return pytest.mark.parametrize('name, rope', tables.few(ALL, *always))


@functools.cache
def network(name):
  """A network, its variables and its logits."""
  model = MODELS[name]
  variables = random_variables(model, TOKENS)
  return model, variables, jax.jit(model.apply)(variables, TOKENS)


@functools.cache
def grams_of(name, group_size):
  model, variables, _ = network(name)
  return compression.cache_grams(model, variables, [TOKENS[:2], TOKENS[2:]], group_size)


def grouped(name, group_size, rope=None):
  model, variables, _ = network(name)
  bases = compression.head_bases(model, grams_of(name, group_size), rope)
  return compression.group_heads(model, variables, bases, rope), bases


def forward(own, tokens=TOKENS, **kwargs):
  run = lambda v: models.apply(own.model, v, tokens, hooks=own.hooks, **kwargs)  # noqa: E731
  return jax.jit(run)(own.variables)


@ways(('llama', 'post'), ('llama', 'commuting'), ('bloom', None))
def test_groups_of_one_head_leave_logits_unchanged(name, rope):
  assert_close(forward(grouped(name, 1, rope)[0]), network(name)[2], 1e-5)


def test_folding_across_a_rotation_is_wrong_already_with_groups_of_one_head():
  expected = network('llama')[2]
  error = lambda rope: np.abs(forward(grouped('llama', 1, rope)[0]) - expected).max()  # noqa: E731
  assert error('ignored') > 1e3 * max(error('post'), error('commuting'))
  assert error('ignored') > 0.1 * np.abs(expected).max()


def projected(bases, sites):
  """Hooks that project each group of heads on its basis, at the paths `{attention}/{site}`."""

  def hook(path, basis):
    def project(site, heads):
      groups, size, _ = basis.shape
      rows = heads.reshape(*heads.shape[:2], groups, size)
      rows = jnp.einsum('btgn,gnk,gmk->btgm', rows, basis, basis)
      return rows.reshape(heads.shape)

    return Hook(path, output=project)

  return tuple(
    hook(f'{path}/{site}', jnp.asarray(getattr(own, kind), jnp.float32))
    for path, own in bases.items()
    for kind, site in sites.items()
  )


@ways(('llama', 'post'), ('llama', 'before'), ('bloom', None))
def test_fewer_heads_compute_what_the_projected_caches_of_all_heads_do(name, rope):
  """Of keys behind the rotation; 'before', and any basis that commutes, of keys before it."""
  small, bases = grouped(name, 2, rope)
  model, variables, original = network(name)
  key = 'k_proj' if rope in ('before', 'commuting') else 'key'
  reference = compression.GroupedHeads(
    model, variables, projected(bases, {'key': key, 'value': 'value'})
  )
  expected = forward(reference)
  assert np.abs(expected - original).max() > 1e-3
  assert_close(forward(small), expected, 1e-5)


@ways(('llama', 'post'), ('llama', 'before'))
def test_shapes_are_known_ahead(name, rope):
  small, _ = grouped(name, 2, rope)
  ahead = compression.grouped_shapes(network(name)[0], 2, rope)
  described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
  assert (ahead.model, ahead.hooks) == (small.model, small.hooks)
  assert described(ahead.variables) == described(small.variables)


@ways(('llama', 'post'), ('llama', 'before'))
def test_the_cache_is_smaller_by_the_group_size_and_changes_nothing(name, rope):
  model, _, _ = network(name)
  small, _ = grouped(name, 2, rope)
  assert 2 * models.cache_bytes(small.model.init_cache(4)) == models.cache_bytes(
    model.init_cache(4)
  )
  # Left and right padding: positions are those of real tokens.
  mask = np.ones((4, 12), bool)
  mask[0, :3], mask[1, 7:] = False, False
  expected = forward(small, mask=mask)

  @jax.jit
  def step(cache, tokens, mask):
    variables = {**small.variables, 'cache': cache}
    return models.apply(
      small.model, variables, tokens, mask=mask, hooks=small.hooks, mutable=['cache']
    )

  first, state = step(small.model.init_cache(4, 12), TOKENS[:, :6], mask[:, :6])
  second, state = step(state['cache'], TOKENS[:, 6:], mask[:, 6:])
  logits = np.concatenate([first, second], axis=1)
  assert_close(logits, expected, 1e-5, where=np.broadcast_to(mask[..., None], logits.shape))
  kept = [leaf for leaf in jax.tree.leaves(state['cache']) if leaf.ndim == 4]
  assert {leaf.shape for leaf in kept} == {(4, 12, 2, 4)} and len(kept) == 4


@ways(('llama', 'post'))
def test_generation_is_the_argmax_of_the_whole_forward(name, rope):
  small, _ = grouped(name, 2, rope)
  small = small._replace(variables=jax.tree.map(lambda a: np.asarray(a), small.variables))
  prompt = TOKENS[:2, :4]
  found = models.generate(small.model, small.variables, prompt, max_new_tokens=5, hooks=small.hooks)
  tokens = np.zeros((2, 9), np.int32)
  tokens[:, :4] = prompt
  run = jax.jit(lambda t: models.apply(small.model, small.variables, t, hooks=small.hooks))
  for end in range(4, 9):
    tokens[:, end] = np.argmax(run(tokens)[:, end - 1], axis=-1)
  np.testing.assert_array_equal(found, tokens[:, 4:])


def test_caches_of_low_rank_are_kept_whole_in_every_way():
  """The second head of each group is the first one times a complex number a pair of channels."""
  model, variables, _ = network('llama')
  variables = jax.tree.map(np.array, variables)
  angles = np.random.default_rng(1).uniform(0, 6, 2)
  cos, sin = np.diag(1.5 * np.cos(angles)), np.diag(1.5 * np.sin(angles))
  turn = np.block([[cos, sin], [-sin, cos]]).astype(np.float32)
  for block in ('layers_0', 'layers_1'):
    for layer in ('k_proj', 'v_proj'):
      own = variables['params'][block]['self_attn'][layer]
      for name in ('kernel', 'bias'):
        heads = own[name].reshape(*own[name].shape[:-1], 2, 2, 4)
        heads[..., 1, :] = heads[..., 0, :] @ turn
  expected = jax.jit(model.apply)(variables, TOKENS)
  grams = compression.cache_grams(model, variables, [TOKENS], 2)
  for rope in ('post', 'before', 'commuting'):
    bases = compression.head_bases(model, grams, rope)
    assert_close(forward(compression.group_heads(model, variables, bases, rope)), expected, 1e-4)
  shares = [compression.energy_shares(g)[:, 3] for own in grams.values() for g in own]
  np.testing.assert_allclose(shares, 1, atol=1e-6)


@pytest.mark.parametrize('name', tables.first(['llama', 'bloom', 'gpt2']))
def test_pooled_heads_are_means_and_weights_alone_give_a_basis(name):
  model, variables, _ = network(name)
  small = compression.pool_heads(model, variables, 2)
  run = jax.jit(lambda m, v: compression.collect_caches(m, v, TOKENS), static_argnums=0)
  first = compression.attention_layout(model).paths[0]
  before, after = run(model, variables)[first], run(small.model, small.variables)[first]
  for kind in ('unrotated_key', 'value'):
    pairs = getattr(before, kind).reshape(4, 12, 2, 2, 4)
    assert_close(getattr(after, kind), pairs.mean(axis=3), 1e-5)
  # As if tokens were the rows of the kernels.
  grams = compression.weight_grams(model, variables, 2)
  layers = compression.attention_layout(model).read(at(variables['params'], first))
  kernel = layers.value.kernel.reshape(-1, 2, 8)
  assert_close(grams[first].value, np.einsum('ngi,ngj->gij', kernel, kernel), 1e-5)
  bases = compression.head_bases(model, grams)
  assert np.isfinite(forward(compression.group_heads(model, variables, bases))).all()


def at(tree, path):
  for name in path.split('/'):
    tree = tree[name]
  return tree


def test_layers_are_read_and_written_without_change():
  for name in MODELS:
    model, variables, _ = network(name)
    layout = compression.attention_layout(model)
    own = at(variables['params'], layout.paths[1])
    jax.tree.map(np.testing.assert_array_equal, layout.write(layout.read(own)), own)


def test_grams_are_streamed_and_padding_does_not_count():
  model, variables, _ = network('llama')
  padded, mask = np.full((4, 15), 7, np.int32), np.zeros((4, 15), bool)
  padded[:, 3:], mask[:, 3:] = TOKENS, True
  whole = compression.cache_grams(model, variables, [(padded, mask)], 2)
  device = compression.cache_grams(model, variables, [(padded, mask)], 2, on_device=True)
  caches = jax.jit(lambda v: compression.collect_caches(model, v, TOKENS))(variables)
  for path, own in grams_of('llama', 2).items():
    for kind, gram in own._asdict().items():
      rows = np.asarray(getattr(caches[path], kind), np.float64).reshape(-1, 2, 8)
      assert_close(gram, np.einsum('ngi,ngj->gij', rows, rows), 1e-5)
      assert gram.dtype == np.float64
      for other in (whole, device):
        assert_close(getattr(other[path], kind), gram, 1e-5)
  assert np.abs(own.key - own.unrotated_key).max() > 1e-2


def test_grams_of_smaller_groups_lie_in_those_of_larger_ones():
  cut = compression.subgroup_grams(grams_of('llama', 4), 2)
  for path, own in grams_of('llama', 2).items():
    for kind, gram in own._asdict().items():
      np.testing.assert_allclose(getattr(cut[path], kind), gram, rtol=1e-12)


def test_what_does_not_fit_raises():
  model, variables, _ = network('llama')
  fails = lambda match: pytest.raises(ValueError, match=match)  # noqa: E731
  with fails('heads of ViT are not known; known are those of Llama, Bloom and GPT2'):
    compression.attention_layout(models.ViT(depth=1))
  with fails('group_size=3 does not divide the 4 heads'):
    compression.cache_grams(model, variables, [TOKENS], 3)
  with fails('group_size=8 does not divide'):
    compression.pool_heads(model, variables, 8)
  with fails('there is none to calibrate on'):
    compression.cache_grams(model, variables, [], 2)
  with fails('hold 3 tokens, fewer than the 4 directions'):
    compression.cache_grams(model, variables, [TOKENS[:1, :3]], 2)
  with fails('parts=3 do not divide groups of 8'):
    compression.subgroup_grams(grams_of('llama', 2), 3)
  bases = compression.head_bases(model, grams_of('llama', 2), 'post')
  with fails('does not commute with rotations'):
    compression.group_heads(model, variables, bases, 'commuting')
  with fails("rope='folded': expected one of 'post'"):
    compression.group_heads(model, variables, bases, 'folded')
  with fails('the model has no rotary embedding'):
    compression.group_heads(*network('bloom')[:2], bases, 'post')
  with fails('there are none of layers_1/self_attn'):
    compression.group_heads(model, variables, {'layers_0/self_attn': bases['layers_0/self_attn']})
  with fails(r'4 heads of 4 channels in all; got \(2, 8, 3\), \(2, 8, 4\)'):
    first = bases['layers_0/self_attn']
    wrong = {**bases, 'layers_0/self_attn': first._replace(key=first.key[..., :3])}
    compression.group_heads(model, variables, wrong)
  small = compression.group_heads(model, variables, bases)
  with fails('grouped its keys already'):
    compression.cache_grams(small.model, small.variables, [TOKENS], 1)
  cached = {**small.variables, 'cache': small.model.init_cache(4)}
  with fails('holds 2 heads of 4 channels, and 4 of 4 are to be appended: are hooks missing'):
    small.model.apply(cached, TOKENS, mutable=['cache'])
  with fails('num_key_heads=3 is not a multiple of the 2'):
    Llama(**SIZE, num_kv_heads=2, num_key_heads=3)
  with pytest.warns(UserWarning, match='rank 3 and is asked for 4'):
    compression.head_bases(
      Llama(**SIZE, num_kv_heads=4, hidden=24),
      {k: _rank(v, 3) for k, v in grams_of('llama', 2).items()},
    )


def _rank(grams, rank):
  """Gram matrices of a cache with that many tokens."""
  rows = np.random.default_rng(0).standard_normal((2, rank, 8))
  return type(grams)(*[rows.swapaxes(1, 2) @ rows] * 3)
