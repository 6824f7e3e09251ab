"""Adapters around frozen blocks: reference vectors, identities at the start, merging, drop path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden_vectors import assert_close, golden
from models.random_variables import random_images, random_variables

from jaxlab import adapters, models
from jaxlab.models import from_torch
from jaxlab.models.vit import Block

RENAMES = ((r'(.*)attention\.', r'\1attn.'),)


class Blocks(nn.Module):
  """Blocks of a vision transformer alone, over tokens."""

  depth: int
  num_heads: int
  mlp_ratio: float
  qkv_bias: bool
  epsilon: float

  @nn.compact
  def __call__(self, x):
    for index in range(self.depth):
      x = Block(
        self.num_heads, self.mlp_ratio, self.qkv_bias, epsilon=self.epsilon, name=f'blocks_{index}'
      )(x)
    return x


def frozen(vectors, x):
  """Returns the blocks of a file and their variables."""
  own = vectors.tree('param_')
  if 'block0_norm1_weight' not in own:
    own = {f'block0_{name}': array for name, array in own.items()}
  depth = len([name for name in own if name.endswith('_norm1_weight')])
  layers = ('norm1', 'norm2', 'attn_qkv', 'attn_proj', 'mlp_fc1', 'mlp_fc2')
  dotted = {
    f'blocks.{i}.{layer.replace("_", ".")}.{kind}': own[f'block{i}_{layer}_{kind}']
    for i in range(depth)
    for layer in layers
    for kind in ('weight', 'bias')
    if f'block{i}_{layer}_{kind}' in own
  }
  model = Blocks(
    depth, vectors.param('num_heads'), len(own['block0_mlp_fc1_bias']) / x.shape[-1],
    'block0_attn_qkv_bias' in own, vectors.param('layer_norm_eps'),
  )  # fmt: skip
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, x.dtype),
    jax.eval_shape(model.init, jax.random.key(0), x),
  )
  return model, from_torch(shapes, dotted, renames=RENAMES)


def check(vectors, collection, tree, hooks, gradients, expected, given='in_x', dtype='float32'):
  """Compares outputs, and gradients of the weighted sum by the names of the file."""
  x = jnp.asarray(vectors[given], dtype)
  model, variables = frozen(vectors, x)
  tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)

  def weighted(own):
    y = models.apply(model, {**variables, collection: own}, x, hooks=hooks)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

  found, y = jax.jit(jax.grad(weighted, has_aux=True))(tree)
  assert_close(y, vectors[expected], 1e-5)
  named = gradients(found)
  assert {f'grad_{name}' for name in named} == {key for key in vectors if key.startswith('grad_')}
  for name, gradient in named.items():
    assert_close(gradient, vectors[f'grad_{name}'], 1e-5)
  return model, variables, tree, x, y


@golden('peft_protocols', 'lora_block')
def test_lora_agrees_with_reference_and_merges(vectors):
  layers = ['blocks_0/attention/qkv']
  down, up = (vectors[f'param_attn_LoRA_{name}_weight'].T for name in 'ab')
  tree = {'blocks_0': {'attention': {'qkv': {'down': down, 'up': up}}}}

  def gradients(found):
    own = found['blocks_0']['attention']['qkv']
    return {'attn_LoRA_a_weight': own['down'].T, 'attn_LoRA_b_weight': own['up'].T}

  hooks = adapters.lora_hooks(layers)
  model, variables, lora, x, y = check(vectors, 'lora', tree, hooks, gradients, 'out_y')
  merged = adapters.merge_lora(variables['params'], lora)
  assert_close(model.apply({'params': merged}, x), y, 1e-5)


@golden('peft_protocols', 'adapter_block')
def test_adapters_agree_with_reference(vectors):
  names = {
    'down': 'adapter_ln1_weight', 'up': 'adapter_ln2_weight', 'down_bias': 'adapter_ln1_bias',
    'up_bias': 'adapter_sampled_bias_1',
  }  # fmt: skip
  tree = {'blocks_0': {own: vectors[f'param_{name}'].T for own, name in names.items()}}
  hooks = adapters.adapter_hooks(models.create('vit_tiny_patch16_224', depth=1))
  check(
    vectors, 'adapters', tree, hooks,
    lambda found: {name: found['blocks_0'][own].T for own, name in names.items()}, 'out_y',
  )  # fmt: skip


@golden('peft_protocols', 'ssf_block')
def test_ssf_agrees_with_reference_and_merges(vectors):
  names = {
    'norm1': 'ssf_{}_1', 'norm2': 'ssf_{}_2', 'attention/qkv': 'attn_ssf_{}_1',
    'attention/proj': 'attn_ssf_{}_2', 'mlp/fc1': 'mlp_ssf_{}_1', 'mlp/fc2': 'mlp_ssf_{}_2',
  }  # fmt: skip
  kinds = ('scale', 'shift')
  tree = {'blocks_0': {'attention': {}, 'mlp': {}}}

  def leaves(root, path):
    for part in path.split('/'):
      root = root.setdefault(part, {})
    return root

  for path, name in names.items():
    leaves(tree['blocks_0'], path).update(
      {kind: vectors[f'param_{name.format(kind)}'] for kind in kinds}
    )

  def gradients(found):
    return {
      name.format(kind): leaves(found['blocks_0'], path)[kind]
      for path, name in names.items()
      for kind in kinds
    }

  hooks = adapters.ssf_hooks([f'blocks_0/{path}' for path in names])
  model, variables, ssf, x, y = check(vectors, 'ssf', tree, hooks, gradients, 'out_y')
  merged = adapters.merge_ssf(variables['params'], ssf)
  assert_close(model.apply({'params': merged}, x), y, 1e-5)


def prompt_check(vectors, deep):
  prompts = [vectors['param_prompt'][0], *(vectors['param_deep_prompts'] if deep else ())]
  tree = {f'blocks_{i}': {'prompts': own} for i, own in enumerate(prompts)}
  depth = len([key for key in vectors if key.endswith('_norm1_weight')])
  blocks = [f'blocks_{i}' for i in range(depth)]

  def gradients(found):
    own = [found[path]['prompts'] for path in tree]
    return {'prompt': own[0][None], **({'deep_prompts': np.stack(own[1:])} if deep else {})}

  hooks = adapters.prompt_hooks(blocks, len(prompts[0]), deep=deep, keep=True)
  names = ('out_tokens_before_final_norm', 'in_embedded_tokens')
  model, variables, own, x, y = check(vectors, 'prompts', tree, hooks, gradients, *names)
  hooks = adapters.prompt_hooks(blocks, len(prompts[0]), deep=deep)
  short = models.apply(model, {**variables, 'prompts': own}, x, hooks=hooks)
  count = len(prompts[0])
  assert_close(short, np.delete(y, range(1, 1 + count), 1), 1e-6)


@golden('peft_protocols', 'vpt_shallow')
def test_shallow_prompts_agree_with_reference(vectors):
  prompt_check(vectors, False)


@golden('peft_protocols', 'vpt_deep')
def test_deep_prompts_agree_with_reference(vectors):
  prompt_check(vectors, True)


def test_tokens_that_a_network_does_not_know_are_not_averaged():
  sizes = {
    'image_size': 8,
    'patch_size': 4,
    'width': 8,
    'depth': 1,
    'num_heads': 2,
    'num_classes': 3,
  }
  model, images = models.create('vit_tiny_patch16_224', **sizes), random_images((2, 8, 8, 3))
  variables = random_variables(model, images)
  variables = {**variables, 'prompts': {'blocks_0': {'prompts': jnp.ones((2, 8))}}}

  def logits(keep):
    prompts = adapters.prompt_hooks(['blocks_0'], 2, deep=False, keep=keep)
    hooks = (*prompts, *adapters.mean_patch_hooks(model))
    return models.apply(model, variables, images, hooks=hooks)

  assert logits(keep=False).shape == (2, 3)
  message = '7 tokens reach the norm, but the model knows 5: 1 and a grid of 2 x 2'
  with pytest.raises(ValueError, match=message):
    logits(keep=True)


FIELDS = {
  'patch_size': 8,
  'image_size': 16,
  'width': 12,
  'depth': 2,
  'num_heads': 2,
  'num_classes': 5,
}
IMAGES = jnp.asarray(random_images((3, 16, 16, 3)))
LAYERS = [f'blocks_{i}/{layer}' for i in range(2) for layer in ('attention/qkv', 'mlp/fc1')]


@pytest.fixture(scope='module')
def vit():
  model = models.ViT(**FIELDS)
  return model, random_variables(model, IMAGES)


def test_what_starts_from_nothing_changes_nothing_at_first(vit):
  model, variables = vit
  expected = model.apply(variables, IMAGES)
  key, params = jax.random.key(3), variables['params']
  widths = adapters.block_widths(model, IMAGES)
  assert widths == {'blocks_0': 12, 'blocks_1': 12}
  for collection, tree, hooks in (
    ('lora', adapters.init_lora(key, params, LAYERS, 4), adapters.lora_hooks(LAYERS)),
    ('adapters', adapters.init_adaptformer(key, widths, 4), adapters.adaptformer_hooks(model)),
  ):
    found = models.apply(model, {**variables, collection: tree}, IMAGES, hooks=hooks)
    np.testing.assert_array_equal(found, expected)
    small = jax.tree.map(
      lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), tree
    )
    moved = models.apply(model, {**variables, collection: small}, IMAGES, hooks=hooks)
    assert np.abs(moved - expected).max() > 1e-3
  counted = adapters.count_parameters(adapters.init_lora(key, params, LAYERS, 4))
  assert counted == 4 * 2 * (12 + 36 + 12 + 48)


@pytest.mark.exhaustive
def test_adaptformer_reads_the_stream_between_the_branches(vit):
  model, variables = vit
  tree = adapters.init_adaptformer(jax.random.key(1), adapters.block_widths(model, IMAGES), 3)
  up = jax.random.normal(jax.random.key(2), (3, 12))
  tree['blocks_1']['up'] = up
  hooks = adapters.adaptformer_hooks(model, 0.5)
  own = {**variables, 'adapters': tree}
  _, seen = models.capture(model, own, ['blocks_1', 'blocks_1/residual'], IMAGES, hooks=hooks)
  _, plain = models.capture(model, variables, ['blocks_1'], IMAGES)
  added = 0.5 * np.maximum(seen['blocks_1/residual'] @ tree['blocks_1']['down'], 0) @ up
  assert_close(seen['blocks_1'], plain['blocks_1'] + added, 1e-5)
  expected = models.apply(model, own, IMAGES, hooks=hooks)
  again = models.apply(model.clone(remat=True), own, IMAGES, hooks=hooks)
  assert_close(again, expected, 1e-5)


def test_ssf_of_a_whole_network_merges(vit):
  model, variables = vit
  modules = adapters.ssf_modules(model)
  assert 'head' not in modules and {'patch_embed/proj', 'norm', 'blocks_1/norm2'} <= set(modules)
  ssf = adapters.init_ssf(jax.random.key(0), variables['params'], modules)
  hooks = adapters.ssf_hooks(modules)
  expected = models.apply(model, {**variables, 'ssf': ssf}, IMAGES, hooks=hooks)
  merged = adapters.merge_ssf(variables['params'], ssf)
  assert_close(model.apply({'params': merged}, IMAGES), expected, 1e-5)
  assert np.abs(expected - model.apply(variables, IMAGES)).max() > 1e-4


@pytest.mark.exhaustive
def test_layers_without_bias_are_left_out_where_ssf_is_to_merge():
  model = models.create(
    'swin_tiny_patch4_window7_224', image_size=56, width=8, depths=(1, 1), num_heads=(2, 2)
  )
  images = jnp.asarray(random_images((2, 56, 56, 3)))
  variables = random_variables(model, images)
  params, reduction = variables['params'], 'layers_1/downsample/reduction'
  everywhere = adapters.ssf_modules(model)
  modules = adapters.ssf_modules(model, mergeable=params)
  assert set(everywhere) - set(modules) == {reduction}
  whole = adapters.init_ssf(jax.random.key(0), params, everywhere)
  with pytest.raises(ValueError, match=f'{reduction}.* has no bias'):
    adapters.merge_ssf(params, whole)
  ssf = adapters.init_ssf(jax.random.key(0), params, modules)
  run = jax.jit(lambda tree, x: models.apply(model, tree, x, hooks=adapters.ssf_hooks(modules)))
  expected = run({**variables, 'ssf': ssf}, images)
  merged = adapters.merge_ssf(params, ssf)
  assert_close(jax.jit(model.apply)({'params': merged}, images), expected, 1e-5)


@pytest.mark.exhaustive
def test_prompts_are_dropped_for_each_example_anew(vit):
  model, variables = vit
  tree = {'blocks_0': {'prompts': jnp.ones((4, 12))}}
  hooks = adapters.prompt_hooks(['blocks_0', 'blocks_1'], 4, deep=False, dropout=0.5)
  seen = []
  spy = models.Hook('blocks_0', input=lambda site, x: seen.append(x) or x)
  rngs = {'dropout': jax.random.key(0)}
  own = {**variables, 'prompts': tree}
  # Outside of the prompts: what the block reads.
  models.apply(model, own, IMAGES, hooks=[spy, *hooks], rngs=rngs)
  prompts = np.asarray(seen[0][:, 1:5])
  assert set(np.unique(prompts)) == {0.0, 2.0}
  assert (prompts[0] != prompts[1]).any() and (prompts[1] != prompts[2]).any()
  batched = jnp.arange(3.0)[:, None, None] * jnp.ones((3, 2, 4))
  found = adapters.insert_prompts(jnp.zeros((3, 5, 4)), batched)
  np.testing.assert_array_equal(found[:, 1:3], batched)
  np.testing.assert_array_equal(adapters.replace_prompts(found + 1, batched)[:, 1:3], batched)
  with pytest.raises(ValueError, match=r'\(3, 5, 4\) and \(2, 2, 4\)'):
    adapters.insert_prompts(jnp.zeros((3, 5, 4)), batched[:2])


@pytest.mark.exhaustive
def test_adapters_stand_behind_drop_path(vit):
  model, variables = vit
  model = model.clone(drop_path=0.9)
  tree = adapters.init_adapters(jax.random.key(0), adapters.block_widths(model, IMAGES), 3)
  tree = jax.tree.map(lambda leaf: leaf + 0.3, tree)
  hooks = adapters.adapter_hooks(model)
  own = {**variables, 'adapters': tree}
  many = jnp.tile(IMAGES, (8, 1, 1, 1))
  names = ['blocks_1', 'blocks_1/residual', 'blocks_1/mlp']
  rngs = {'drop_path': jax.random.key(1)}
  _, seen = models.capture(model, own, names, many, True, hooks=hooks, rngs=rngs)
  branch = np.asarray(seen['blocks_1'] - seen['blocks_1/residual'])
  adapter = tree['blocks_1']
  hidden = adapter['down_bias']
  # Of a dropped branch the adapter alone is left, of zeros.
  left = (hidden * jax.nn.sigmoid(1.702 * hidden)) @ adapter['up'] + adapter['up_bias']
  dropped = np.abs(branch - left).max((1, 2)) < 1e-4
  assert dropped.any() and not dropped.all()


def test_lora_of_a_layer_drops_what_it_reads_and_scales():
  layer, x = nn.Dense(3), jnp.ones((64, 5))

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3, name='fc')(x)

  model = Net()
  variables = model.init(jax.random.key(0), x)
  lora = {'fc': {'down': jnp.ones((5, 1)), 'up': jnp.ones((1, 3))}}
  own, plain = {**variables, 'lora': lora}, model.apply(variables, x)
  added = models.apply(model, own, x, hooks=adapters.lora_hooks(['fc'], 2.0)) - plain
  assert_close(added, np.full((64, 3), 10.0), 1e-5)
  hooks = adapters.lora_hooks(['fc'], 1.0, dropout=0.5)
  rngs = {'dropout': jax.random.key(1)}
  added = np.asarray(models.apply(model, own, x, hooks=hooks, rngs=rngs) - plain)
  assert set(np.round(added.ravel()).astype(int)) <= {0, 2, 4, 6, 8, 10} and added.std() > 0
  assert abs(added.mean() - 5) < 1.5
  assert_close(adapters.merge_lora(variables['params'], lora, 2.0)['fc']['kernel'],
               variables['params']['fc']['kernel'] + 2, 1e-6)  # fmt: skip
  del layer


@pytest.mark.parametrize(
  ('merge', 'tree', 'message'),
  [
    ('lora', {'down': (3, 1), 'up': (1, 3)}, r'fc: down is \(3, 1\), up is \(1, 3\): .* \(5, 3\)'),
    ('lora', {'down': (5, 1), 'up': (2, 3)}, r'fc: down is \(5, 1\), up is \(2, 3\)'),
    ('lora', {'scale': (3,), 'shift': (3,)}, 'no layer with .*fc/scale'),
    (
      'ssf',
      {'scale': (5,), 'shift': (5,)},
      r'fc: scale is \(5,\), shift is \(5,\): expected \(3,\)',
    ),
    ('ssf', {'scale': (3,), 'shift': (1,)}, r'fc: scale is \(3,\), shift is \(1,\)'),
    ('ssf', {}, 'no module with .* got '),
  ],
)
def test_what_does_not_fit_is_not_merged(merge, tree, message):
  params = {'fc': {'kernel': jnp.ones((5, 3)), 'bias': jnp.ones(3)}}
  own = {'fc': {name: jnp.ones(shape) for name, shape in tree.items()}} if tree else {}
  with pytest.raises(ValueError, match=message):
    getattr(adapters, f'merge_{merge}')(params, own)


def test_bitfit_trains_biases_and_the_head(vit):
  _, variables = vit
  mask = adapters.bias_mask(variables['params'])
  params = variables['params']
  biases = 2 * (12 + 36 + 12 + 12 + 48 + 12) + 12 + 12
  assert adapters.count_parameters(params, mask) == biases + 12 * 5 + 5
  assert mask['head']['kernel'] and not mask['blocks_0']['norm1']['scale']


def test_residuals_are_those_of_the_pullback(vit):
  model, variables = vit
  lora = adapters.init_lora(jax.random.key(0), variables['params'], LAYERS, 2)

  def loss(own):
    hooks = adapters.lora_hooks(LAYERS)
    return jnp.sum(models.apply(model, {**variables, 'lora': own}, IMAGES, hooks=hooks))

  _, pullback = jax.vjp(loss, lora)
  expected = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
  assert abs(adapters.residual_bytes(loss, lora) / expected - 1) < 0.05
  full = adapters.residual_bytes(
    lambda p: jnp.sum(model.apply({'params': p}, IMAGES)), variables['params']
  )
  given = adapters.residual_bytes(
    lambda own, frozen: jnp.sum(
      models.apply(model, {**frozen, 'lora': own}, IMAGES, hooks=adapters.lora_hooks(LAYERS))
    ),
    lora, variables,
  )  # fmt: skip
  assert abs(given / expected - 1) < 0.05
  probe = adapters.residual_bytes(
    lambda h: jnp.sum(model.apply({'params': {**variables['params'], 'head': h}}, IMAGES)),
    variables['params']['head'],
  )
  assert probe < expected and probe < full


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda p: adapters.init_lora(jax.random.key(0), p, LAYERS, 0), 'rank=0'),
    (lambda p: adapters.init_lora(jax.random.key(0), p, ['norm'], 2), "no 'kernel' at 'norm'"),
    (
      lambda p: adapters.init_lora(jax.random.key(0), p, ['patch_embed/proj'], 2),
      r'kernel \[in, out\]',
    ),
    (lambda p: adapters.init_lora(jax.random.key(0), p, [], 2), 'No module is named'),
    (lambda p: adapters.init_ssf(jax.random.key(0), p, ['blocks_7']), "at 'blocks_7'"),
    (lambda p: adapters.lora_hooks(LAYERS, dropout=1.0), 'dropout=1.0'),
    (lambda p: adapters.init_adapters(jax.random.key(0), {'blocks_0': 4}, 0), 'rank=0'),
    (lambda p: adapters.adapter_hooks(models.create('resnet18')), 'no blocks with an MLP'),
    (lambda p: adapters.init_prompts(jax.random.key(0), ['blocks_0'], 0, 4), 'count=0'),
    (lambda p: adapters.prompt_hooks([], 2, deep=True), r'blocks=\(\)'),
    (
      lambda p: adapters.insert_prompts(jnp.ones((1, 2, 3)), jnp.ones((2, 4))),
      r'\(1, 2, 3\) and \(2, 4\)',
    ),
    (lambda p: adapters.replace_prompts(jnp.ones((1, 2, 3)), jnp.ones((2, 3))), 'at least 3'),
  ],
)
def test_what_cannot_be_adapted_is_refused(vit, make, message):
  with pytest.raises(ValueError, match=message):
    make(vit[1]['params'])


def test_prompts_are_drawn_by_patch_and_width():
  prompts = adapters.init_prompts(jax.random.key(0), ['blocks_0', 'blocks_1'], 50, 64, 4)
  bound = np.sqrt(6 / (3 * 16 + 64))
  for own in prompts.values():
    assert own['prompts'].shape == (50, 64)
    assert 0.95 * bound < np.abs(own['prompts']).max() <= bound
  assert np.any(prompts['blocks_0']['prompts'] != prompts['blocks_1']['prompts'])


def test_prompts_of_another_number_are_refused():
  model = models.ViT(4, 8, 12, 1, num_heads=3)
  x = jnp.zeros((1, 8, 8, 3))
  variables = dict(jax.jit(model.init)(jax.random.key(0), x))
  variables['prompts'] = adapters.init_prompts(jax.random.key(1), ['blocks_0'], 2, 12, 4)
  hooks = adapters.prompt_hooks(['blocks_0'], 4, deep=False)
  with pytest.raises(ValueError, match='blocks_0 has 2 prompts, count=4'):
    models.apply(model, variables, x, hooks=hooks)


def test_variables_in_place_of_parameters_and_a_text_in_place_of_a_list_are_told():
  model = models.create('vit_tiny_patch16_224', depth=1, image_size=32, width=16, num_heads=2)
  variables = random_variables(model, jnp.asarray(random_images((1, 32, 32, 3))))
  path = 'blocks_0/attention/qkv'
  with pytest.raises(ValueError, match=r"These are variables: give variables\['params'\]"):
    adapters.init_lora(jax.random.key(0), variables, [path], 4)
  with pytest.raises(ValueError, match='expected a list of paths, got one text'):
    adapters.init_lora(jax.random.key(0), variables['params'], path, 4)
