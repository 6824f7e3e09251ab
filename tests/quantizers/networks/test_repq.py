import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from golden_vectors import assert_close, golden
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models.random_variables import call, random_images, random_variables
from quantizers.reference_vit import nhwc, vit_of

from jaxlab.models import GPT2, Anatomy, Hook, Llama, Norm, Swin, ViT, anatomy, apply
from jaxlab.models.checkpoint_names import torch_name
from jaxlab.models.vit import Block, stack_blocks
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.quantized import Quantized
from jaxlab.quantizers.networks.repq import layer_norm_pairs, norm_dense_pairs, reparametrize, repq
from jaxlab.quantizers.networks.rules import Rule, edge_rules, uniform_rules

VIT = ViT(patch_size=4, image_size=8, width=12, depth=2, num_heads=2, num_classes=5)
X = random_images((16, 8, 8, 3))


def spread(variables):
  """The variables with LayerNorms whose channels differ by a factor of 30, as RepQ-ViT found them."""
  flat = traverse_util.flatten_dict(variables, sep='/')
  for path, leaf in flat.items():
    if path.endswith(('norm1/scale', 'norm2/scale')):
      flat[path] = (leaf * np.geomspace(0.2, 6, len(leaf))).astype(leaf.dtype)
  return traverse_util.unflatten_dict(flat, sep='/')


VARIABLES = spread(random_variables(VIT, X))


@pytest.fixture(scope='module')
def quantized() -> Quantized:
  return repq(VIT, VARIABLES, X, edge_rules(4, 4))


def run(model, variables, x):
  return jax.jit(model.apply)(variables, x)


def below(tree, path):
  for name in path.split('/'):
    tree = tree[name]
  return tree


def reference_name(path, operand):
  """The reference's name of the quantizer of `operand` (input or kernel) at `path`."""
  matmuls = {
    'query': 'matmul1.quantizer_A',
    'key': 'matmul1.quantizer_B',
    'softmax': 'matmul2.quantizer_A',
    'value': 'matmul2.quantizer_B',
  }
  module, _, leaf = path.rpartition('/')
  if leaf in matmuls:
    return f'{torch_name(module)}.{matmuls[leaf]}'.replace('.attention.', '.attn.')
  name = torch_name(f'{path}/kernel').removesuffix('.weight')
  return f'{name}.{"input" if operand == "input" else "weight"}_quantizer'


@golden('qwt', 'tiny_vit_pipeline')
def test_pipeline_agrees_with_reference(vectors):
  bits = vectors.param('weight_bits'), vectors.param('act_bits')
  with jax.enable_x64(True):
    images = nhwc(vectors['in_calibration_images'])[: vectors.param('num_quant_calibration')]
    model, variables = vit_of(vectors.tree('init_'), vectors.param('num_heads'), images)
    quantized = repq(model, variables, images, edge_rules(*bits))
    test = nhwc(vectors['in_test_images'])
    assert_close(call(quantized.in_float(), test), vectors['out_logits_fp'], 1e-9)
    assert_close(call(quantized, test), vectors['out_logits_ptq'], 1e-9)

  flat = traverse_util.flatten_dict(quantized.variables['quantization'], sep='/')
  compared = set()
  for path, array in flat.items():
    module, operand, name = path.rsplit('/', 2)
    key = {'scale': 'q_delta_', 'zero_point': 'q_zero_point_'}.get(name)
    if key:
      key += reference_name(module, operand)
      assert_close(np.atleast_1d(array), vectors[key], 1e-9)
      compared.add(key)
  assert compared == {name for name in vectors if name.startswith('q_')}


@pytest.mark.exhaustive
def test_float_variables_are_the_float_network(quantized):
  exact = quantized.float_variables
  assert_close(run(VIT, exact.tree, X), run(VIT, VARIABLES, X), 1e-5)
  np.testing.assert_array_equal(call(quantized.in_float(), X), run(VIT, exact.tree, X))
  assert exact['quantization'] == {}
  assert call(quantized, X).std() > 0
  scale = quantized.float_variables['params']['blocks_0']['norm1']['scale']
  assert np.ptp(scale) < 0.5 * np.ptp(VARIABLES['params']['blocks_0']['norm1']['scale'])


@pytest.mark.exhaustive
def test_error_falls_with_bits_and_bits_share_one_compilation(quantized):
  expected = run(VIT, VARIABLES, X)

  @jax.jit
  def forward(network, x):
    return network(x)

  errors = []
  with compilations.counted() as count:
    for bits in (2, 4, 6, 8):
      at_bits = repq(VIT, VARIABLES, X, edge_rules(bits, bits))
      errors.append(float(np.std(forward(at_bits, X) - expected) / np.std(expected)))
  assert errors[0] > errors[1] > errors[2] > errors[3]
  assert errors[3] < 0.1
  assert count['forward'] == 1
  assert not {
    name: count[name] for name in ('_inside', '_quantize_kernel', '_quantize_rows') if count[name]
  }


def test_blocks_run_alone_under_one_compilation(quantized):
  block = Block(VIT.num_heads)
  traces = []

  @jax.jit
  def run_block(variables, x):
    traces.append(None)
    return apply(block, variables, x, hooks=quantized.hooks)

  def keep(site, x):
    site.write('input', x)
    return x

  hooks = [*quantized.hooks, Hook(r'blocks_\d+|norm', input=keep, collection='seen')]
  variables, _ = quantized.unbind()
  _, state = jax.jit(lambda v: apply(VIT, v, X, hooks=hooks, mutable=['seen']))(variables)
  x = state['seen']['blocks_0']['input']
  for index in range(VIT.depth):
    own = {name: tree.get(f'blocks_{index}', {}) for name, tree in variables.items()}
    x = run_block(own, x)
  assert_close(x, state['seen']['norm']['input'], 1e-5)
  assert len(traces) == 1


def test_kernels_are_codes_of_the_constants_beside_them(quantized):
  for path in ('blocks_1/mlp/fc1', 'head', 'patch_embed/proj'):
    kernel = np.asarray(below(quantized.variables['params'], path)['kernel'])
    own = below(quantized.variables['quantization'], path)['kernel']
    codes = np.round(kernel / own['scale']) + own['zero_point']
    assert codes.min() >= own['low'] and codes.max() <= own['high'] == (
      15 if 'fc1' in path else 255
    )
    np.testing.assert_allclose((codes - own['zero_point']) * own['scale'], kernel, rtol=1e-6)


@pytest.mark.exhaustive
def test_gradients_pass_straight_through(quantized):
  def loss(params):
    return jnp.sum(quantized.update(params=params)(X) ** 2)

  for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(quantized.variables['params'])):
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)


class Normed(nn.Module):
  """Norm, dense layer below a parent; the layer without bias."""

  norm: type[nn.Module]

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, use_bias=False, name='reduction')(self.norm(name='norm')(x))


NORMED = Anatomy(norms=[Norm('norm', readers=['reduction'])])


def normed(norm=nn.LayerNorm):
  """A network of norm and layer, its variables, a batch, and the rules that quantize it."""
  model = Normed(norm)
  x = np.random.default_rng(0).normal(size=(256, 6)).astype(np.float32)
  rules = [Rule('.*', 'kernel', 8), Rule('reduction', 'input', 8)]
  return model, random_variables(model, x), x, rules


@pytest.mark.exhaustive
def test_the_whole_is_one_jittable_function_also_of_a_sharded_batch():
  model, variables, x, rules = normed()
  expected = repq(model, variables, x, rules, anatomy=NORMED)
  mesh = Mesh(np.asarray(jax.devices()), ('data',))
  batch = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
  on_mesh = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
  whole = jax.jit(lambda v, x: repq(model, v, x, rules, anatomy=NORMED))(on_mesh, batch)
  for actual in (whole, repq(model, on_mesh, batch, rules, anatomy=NORMED)):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for leaf, own in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
      assert_close(leaf, own, 1e-5, atol=1e-6)


@pytest.mark.exhaustive
def test_bfloat16_networks_are_quantized_alike():
  model, variables, x, rules = normed()
  half, x_half = jax.tree.map(jnp.bfloat16, variables), x.astype(jnp.bfloat16)
  low = repq(model, half, x_half, rules, anatomy=NORMED)
  constants = traverse_util.flatten_dict(low.variables['quantization']['reduction'], sep='/')
  assert constants.pop('bias').dtype == jnp.bfloat16
  assert all(array.dtype == jnp.float32 for array in constants.values())
  assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(low.variables['params']))
  y = call(low, x_half)
  assert y.dtype == jnp.bfloat16
  expected = run(model, variables, x)
  assert np.std(y.astype(np.float32) - expected) < 0.05 * np.std(expected)


def test_a_constant_channel_survives_the_whole():
  model, variables, x, rules = normed()
  variables['params']['norm']['scale'][2] = 0
  variables['params']['norm']['bias'][2] = 50.1
  new = repq(model, variables, x, rules, anatomy=NORMED)
  expected = run(model, variables, x)
  assert new.variables['params']['norm']['bias'][2] == 0
  assert_close(call(new.in_float(), x), expected, 1e-5)
  noise = call(new, x) - expected
  assert np.std(noise) < 0.05 * np.std(expected)


def test_a_layer_without_bias_is_given_one_by_the_hooks():
  model, variables, x, rules = normed()
  new = repq(model, variables, x, rules, anatomy=NORMED)
  assert set(new.variables['params']['reduction']) == {'kernel'}
  assert np.any(new.variables['quantization']['reduction']['bias'] != 0)
  expected = run(model, variables, x)
  assert_close(call(new.in_float(), x), expected, 1e-5)
  assert_close(call(new, x), expected, 0.05)


@pytest.mark.exhaustive
def test_merging_channels_beats_one_range_a_tensor():
  model, variables, x, _ = normed()
  spread = np.geomspace(0.1, 10, 6, dtype=np.float32)
  variables['params']['norm']['scale'] *= spread
  variables['params']['reduction']['kernel'] /= spread[:, None]
  expected = apply(model, variables, x)
  errors = []
  for pairs in (None, ()):
    rules = [Rule('reduction', 'input', 4)]
    new = repq(model, variables, x, rules, pairs=pairs, anatomy=NORMED)
    errors.append(np.std(call(new, x) - expected))
  assert errors[0] < 0.3 * errors[1]


def test_an_rms_norm_is_left_alone():
  model, variables, x, rules = normed(nn.RMSNorm)
  new = repq(model, variables, x, rules, anatomy=NORMED)
  assert new.variables['quantization']['reduction']['input']['scale'].shape == ()
  chosen = [('norm', 'reduction')]
  with pytest.raises(ValueError, match=r"norm 'norm' has no bias .RMSNorm"):
    repq(model, variables, x, rules, pairs=chosen)
  with pytest.raises(ValueError, match=r'no bias. An RMSNorm cannot take the shift'):
    reparametrize({'scale': np.ones(2)}, {'kernel': np.ones((2, 2))}, np.ones(2), np.ones(2))


def test_pairs_are_found_by_paths_below_a_parent():
  params = VARIABLES['params']
  pairs = [('norm1', 'attention/qkv'), ('norm2', 'mlp/fc1')]
  expected = [(f'blocks_{i}/{n}', f'blocks_{i}/{d}') for n, d in pairs for i in (0, 1)]
  assert norm_dense_pairs(params, pairs) == tuple(expected)
  assert norm_dense_pairs(params, [('norm', 'head')]) == (('norm', 'head'),)
  assert norm_dense_pairs(params, []) == ()


@pytest.mark.parametrize(
  ('model', 'x', 'expected'),
  [
    (VIT, X, [('norm1', 'attention/qkv'), ('norm2', 'mlp/fc1')]),
    (
      Swin(2, 8, 2, 4, (1, 1), (1, 1)),
      X[:, :8, :8],
      [('norm1', 'attention/qkv'), ('norm2', 'mlp/fc1'), ('norm', 'reduction')],
    ),
    (
      GPT2(7, 4, 4, 1, 1, tied=False),
      np.ones((1, 4), np.int32),
      [('ln_1', 'attn/c_attn'), ('ln_2', 'mlp/c_fc')],
    ),
    (Llama(7, 4, 1, 1, hidden=4), np.ones((1, 4), np.int32), []),
  ],
  ids=['vit', 'swin', 'gpt2', 'llama'],
)
def test_the_norms_of_blocks_and_transitions_are_reparametrized(model, x, expected):
  """Those that are LayerNorms; the final one, which the head reads, is not."""
  params = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  found = layer_norm_pairs(anatomy(model), params)
  assert sorted(found) == sorted(norm_dense_pairs(params, expected))
  assert len(found) == len(set(found))


def test_a_network_of_unknown_parts_is_not_guessed():
  model, variables, x, rules = normed()
  with pytest.raises(ValueError, match=r'parts of Normed are not known .*anatomy='):
    repq(model, variables, x, rules)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (
      lambda: repq(VIT, VARIABLES, X, edge_rules(9, 4)),
      r"'blocks_0/attention/qkv' must lie in \[2, 8\]; got 9",
    ),
    (lambda: repq(VIT, VARIABLES, X, edge_rules(4, 1)), r'must lie in \[2, 8\]; got 1'),
    (
      lambda: repq(VIT, VARIABLES, X, uniform_rules(4, path='blocks_7/mlp/fc1')),
      "kernel rule 'blocks_7/mlp/fc1'. Closest",
    ),
    (
      lambda: repq(VIT, VARIABLES, X, [Rule('.*/gelu', 'input', 4)]),
      "input rule '.*/gelu'",
    ),
    (
      lambda: repq(VIT, VARIABLES, X, edge_rules(4, 4), pairs=[('norm3', 'mlp/fc1')]),
      "pair 'norm3'",
    ),
    (
      lambda: repq(
        VIT.copy(scan=True), {'params': stack_blocks(VARIABLES['params'])}, X, edge_rules(4, 4)
      ),
      'blocks/attention/qkv.* are stacked .nn.scan.: .*unstack_blocks',
    ),
    (
      lambda: apply(VIT, VARIABLES, X, hooks=operands.operand_hooks()),
      "no collection 'quantization'",
    ),
    (
      lambda: repq(VIT, VARIABLES, np.where(X > 2, np.inf, X), edge_rules(4, 4)),
      "The input of 'patch_embed/proj' is not finite",
    ),
    (
      lambda: repq(
        VIT, jax.tree.map(lambda a: np.full_like(a, np.nan), VARIABLES), X, edge_rules(4, 4)
      ),
      "The kernel of 'patch_embed/proj' is not finite",
    ),
    (
      lambda: reparametrize(
        {'scale': np.ones(2), 'bias': np.ones(2)},
        {'kernel': np.ones((3, 2))},
        np.ones(2),
        np.ones(2),
      ),
      r'kernel \(3, 2\) are not \[channels\]',
    ),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
