"""DTL: reference vectors of ViT and Swin, what no gradient needs, delicate arguments."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from models.random_variables import random_images, random_variables

from jaxlab import adapters, losses, models
from jaxlab.models import Hook, ViT, from_torch, to_torch
from jaxlab.models.intercept import intercepting


@golden('dtl', 'swish_beta')
def test_swish_and_its_gradient_agree_with_official_code(vectors):
  beta = vectors.param('beta')
  x = jnp.asarray(vectors['in_x'], jnp.float32)
  assert_close(adapters.swish(x, beta), vectors['out_y'], 1e-5)
  gradient = jax.grad(lambda x: adapters.swish(x, beta).sum())(x)
  assert_close(gradient, vectors['grad_x'], 1e-5)
  assert adapters.swish(x.astype(jnp.float16), beta).dtype == jnp.float16


def kernels(vectors, down, up):
  """Returns the thin matrices of each block that has some, by its place, in our layout."""
  places = sorted(
    int(found[1]) for key in vectors if (found := re.fullmatch(down.format(r'(\d+)'), key))
  )
  return {
    i: {'down': vectors[down.format(i)].T, 'up': vectors[up.format(i)].T} for i in places
  }  # fmt: skip


def loss_and_gradients(model, variables, side, images, labels, adding, beta):
  head = variables['params']['head']

  def loss(trained):
    own_side, own_head = trained
    own = {'params': {**variables['params'], 'head': own_head}}
    logits = adapters.apply_side_network(model, own, own_side, images, adding=adding, beta=beta)
    return jnp.mean(losses.cross_entropy(logits, labels)), logits

  return jax.jit(jax.value_and_grad(loss, has_aux=True))((side, head))


@golden('dtl', 'vit_dtl')
def test_a_vit_with_its_gradients_agrees_with_official_code(vectors):
  patches = vectors['in_patch_embeddings']
  batch, tokens, width = patches.shape
  grid = round(tokens**0.5)
  depth = len([key for key in vectors if re.fullmatch(r'param_block\d+_norm1_weight', key)])
  model = ViT(
    patch_size=1, image_size=grid, width=width, depth=depth, num_heads=vectors.param('num_heads'),
    mlp_ratio=len(vectors['param_block0_mlp_fc1_bias']) / width,
    num_classes=len(vectors['param_head_bias']), epsilon=vectors.param('layer_norm_eps'),
    qkv_bias='param_block0_attn_qkv_bias' in vectors,
  )  # fmt: skip
  # Patches of a pixel, projected by the identity, are the patch embeddings of the file.
  images = jnp.asarray(patches.reshape(batch, grid, grid, width), jnp.float32)
  named = {'patch_embed.proj.weight': np.eye(width)[..., None, None]}
  named |= {'patch_embed.proj.bias': np.zeros(width)}
  for key, array in vectors.tree('param_').items():
    if found := re.fullmatch(r'block(\d+)_(norm\d|attn_\w+|mlp_\w+)_(weight|bias)', key):
      named[f'blocks.{found[1]}.{found[2].replace("_", ".")}.{found[3]}'] = array
    elif found := re.fullmatch(r'(norm|head)_(weight|bias)', key):
      named['.'.join(found.groups())] = array
    elif key in ('cls_token', 'pos_embed'):
      named[key] = array
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  variables = from_torch(shapes, named)
  blocks = {
    f'blocks_{i}': own for i, own in kernels(vectors, 'param_csn{}_down', 'param_csn{}_up').items()
  }
  side = {'blocks': blocks}
  if vectors.param('fusion_size'):
    side['fusion'] = {'blocks': vectors['param_fusion_kernel'].transpose(2, 3, 1, 0)}
  side = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), side)
  first = vectors.param('first_add_block')
  adding = [f'blocks_{i}' for i in range(first, depth)]
  labels = jnp.asarray(vectors['in_labels'])
  (loss, logits), (grads, head) = loss_and_gradients(
    model, variables, side, images, labels, adding, vectors.param('beta')
  )
  assert_close(logits, vectors['out_logits'], 1e-5)
  assert_close(loss, vectors['out_loss'], 1e-5)
  seen = {}
  look = Hook(r'blocks_\d+', input=lambda site, x: seen.setdefault(site.path, x))
  with intercepting([look]):
    adapters.apply_side_network(
      model, variables, side, images, adding=adding, beta=vectors.param('beta')
    )
  for path, x in seen.items():
    expected = vectors[path.replace('blocks_', 'out_block_input_')]
    assert_close(x[:, : expected.shape[1]], expected, 1e-5)
  assert len(seen) == depth
  for name, own in grads['blocks'].items():
    key = name.replace('blocks_', 'grad_csn')
    assert_close(own['down'].T, vectors[f'{key}_down'], 1e-5)
    assert_close(own['up'].T, vectors[f'{key}_up'], 1e-5)
  assert_close(head['kernel'].T, vectors['grad_head_weight'], 1e-5)
  assert_close(head['bias'], vectors['grad_head_bias'], 1e-5)
  if 'fusion' in side:
    gradient = grads['fusion']['blocks'].transpose(3, 2, 0, 1)
    assert_close(gradient, vectors['grad_fusion_kernel'], 1e-5)


@golden('dtl', 'swin_dtl')
def test_a_swin_with_its_gradients_agrees_with_official_code(vectors):
  images = jnp.asarray(vectors['in_image_nchw'].transpose(0, 2, 3, 1))
  depths, width = tuple(vectors.param('depths')), vectors.param('embed_dim')
  model = models.create(
    'swin_tiny_patch4_window7_224', image_size=images.shape[1:3], width=width,
    patch_size=vectors['param_patch_embed_proj_weight'].shape[-1],
    depths=depths, num_heads=tuple(vectors.param('num_heads')),
    mlp_ratio=len(vectors['param_layers_0_blocks_0_mlp_fc1_bias']) / width,
    window_size=vectors.param('window_size'), num_classes=len(vectors['param_head_bias']),
  )  # fmt: skip
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)

  def of_file(name):
    name = re.sub(
      r'^layers\.(\d+)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', name
    )
    return 'param_' + name.replace('head.fc', 'head').replace('.', '_')

  variables = from_torch(shapes, {name: vectors[of_file(name)] for name in to_torch(blank)})
  paths = models.anatomy(model).block_paths
  found = kernels(vectors, 'param_lora_dict_{}_lora_A', 'param_lora_dict_{}_lora_B')
  side = {'blocks': {paths[i]: own for i, own in found.items()}}
  if vectors.param('fusion_size'):
    side['fusion'] = {
      f'layers_{i}': vectors[f'param_lora_fusions_{i}_weight'].transpose(2, 3, 1, 0)
      for i in range(len(depths))
    }
  side = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), side)
  labels = jnp.asarray(vectors['in_labels'])
  adding = [paths[i] for i in vectors.param('add_blocks')]
  (loss, logits), (grads, head) = loss_and_gradients(
    model, variables, side, images, labels, adding, vectors.param('beta')
  )
  assert_close(logits, vectors['out_logits'], 1e-5)
  assert_close(loss, vectors['out_loss'], 1e-5)
  for i in found:
    own = grads['blocks'][paths[i]]
    assert_close(own['down'].T, vectors[f'grad_lora_dict_{i}_lora_A'], 1e-5)
    assert_close(own['up'].T, vectors[f'grad_lora_dict_{i}_lora_B'], 1e-5)
  for name, kernel in grads.get('fusion', {}).items():
    gradient, key = kernel.transpose(3, 2, 0, 1), name.replace('layers', 'grad_lora_fusions')
    # Of a stage behind which nothing is added, the official kernel has no gradient.
    expected = vectors.get(f'{key}_weight', np.zeros_like(gradient))
    assert_close(gradient, expected, 1e-5)
  assert_close(head['fc']['kernel'].T, vectors['grad_head_weight'], 1e-5)
  assert_close(head['fc']['bias'], vectors['grad_head_bias'], 1e-5)


FIELDS = {'patch_size': 4, 'image_size': (8, 12), 'width': 8, 'depth': 4, 'num_heads': 2}
IMAGES = jnp.asarray(random_images((2, 8, 12, 3)))
ADDING = ('blocks_2', 'blocks_3')


@pytest.fixture(scope='module')
def vit():
  model = ViT(**FIELDS, num_classes=3)
  return model, random_variables(model, IMAGES)


def drawn(model, **options):
  widths = adapters.block_widths(model, IMAGES)
  return adapters.init_side_network(jax.random.key(0), widths, 2, **options)


def of_width(width):
  widths = {f'blocks_{i}': width for i in range(4)}
  return adapters.init_side_network(jax.random.key(0), widths, 2, kernel_size=3)


def moved(side):
  wave = lambda leaf: leaf + 0.3 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)  # noqa: E731
  return jax.tree.map(wave, side)


@pytest.mark.parametrize('kernel_size', [None, 4])
def test_a_new_side_network_changes_nothing(vit, kernel_size):
  model, variables = vit
  side = drawn(model, kernel_size=kernel_size)
  plain = model.apply(variables, IMAGES)
  run = lambda own, **options: adapters.apply_side_network(  # noqa: E731
    model, variables, own, IMAGES, adding=ADDING, **options
  )
  assert_close(run(side, pool_patches=False), plain, 1e-6)
  assert np.abs(run(moved(side), pool_patches=False) - plain).max() > 1e-3
  _, seen = models.capture(model, variables, ['blocks_3'], IMAGES)
  mean = np.asarray(seen['blocks_3'][:, 1:], np.float64).mean(1)
  norm, head = variables['params']['norm'], variables['params']['head']
  unit = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
  expected = (unit * norm['scale'] + norm['bias']) @ head['kernel'] + head['bias']
  assert_close(run(side), expected, 1e-5)
  assert adapters.count_parameters(side['blocks']) == 4 * 2 * 2 * 8


def test_cut_gradients_are_those_of_the_whole_computation(vit, monkeypatch):
  model, variables = vit
  side = moved(drawn(model, kernel_size=3))

  def loss(own):
    logits = adapters.apply_side_network(model, variables, own, IMAGES, adding=ADDING)
    return jnp.sum(jnp.sin(3 * logits))

  def wide(own, variables, images):
    logits = adapters.apply_side_network(model, variables, own, images, adding=ADDING)
    return jnp.sum(jnp.sin(3 * logits))

  def gradients():
    """Returns gradients in float32, and in float64 throughout."""
    with jax.enable_x64(True):
      given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (side, variables, IMAGES))
      precise = jax.jit(jax.grad(lambda *args: wide(*args)))(*given)
    return jax.jit(jax.grad(lambda own: loss(own)))(side), precise

  (cut, precise), kept = gradients(), adapters.residual_bytes(loss, side)
  monkeypatch.setattr(jax.lax, 'stop_gradient', lambda x: x)
  whole, precise_whole = gradients()
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), cut, whole)
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), precise, precise_whole)
  assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(cut))
  layers = [f'blocks_{i}/attention/qkv' for i in range(4)]
  lora = adapters.init_lora(jax.random.key(0), variables['params'], layers, 2)
  hooks = adapters.lora_hooks(layers)
  tuned = adapters.residual_bytes(
    lambda own: jnp.sum(models.apply(model, {**variables, 'lora': own}, IMAGES, hooks=hooks)), lora
  )
  assert kept < 0.7 * tuned


def test_even_kernels_pad_more_below_and_on_the_right():
  state = jnp.asarray(random_images((2, 7, 3)))
  kernel = jnp.asarray(random_images((4, 4, 1, 3), seed=1))
  found = np.asarray(adapters.fuse_side(state, kernel, (2, 3), 1))
  padded = np.pad(np.asarray(state)[:, 1:].reshape(2, 2, 3, 3), ((0, 0), (1, 2), (1, 2), (0, 0)))
  expected = [
    [(padded[:, i : i + 4, j : j + 4] * kernel[:, :, 0]).sum((1, 2)) for j in range(3)]
    for i in range(2)
  ]
  assert_close(found[:, 1:], np.stack([own for row in expected for own in row], 1), 1e-5)
  np.testing.assert_array_equal(found[:, 0], state[:, 0])


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda m, v: drawn(m, kernel_size=0), 'kernel_size=0'),
    (
      lambda m, v: adapters.apply_side_network(
        models.create('resnet18'), v, drawn(m), IMAGES, adding=['layer4_1']
      ),
      'ViT or a Swin.*ResNet',
    ),
    (lambda m, v: adapters.mean_patch_hooks(models.create('resnet18')), 'ViT .*ResNet'),
    (lambda m, v: drawn(m, extracting=['blocks_9']), 'expected some of the blocks blocks_0'),
    (lambda m, v: drawn(m, extracting=[]), r'extracting=\[\]'),
    (
      lambda m, v: adapters.apply_side_network(m, v, drawn(m), IMAGES, adding=['blocks_4']),
      r"adding=\['blocks_4'\]",
    ),
    (
      lambda m, v: adapters.apply_side_network(
        m, v, drawn(m, extracting=['blocks_2', 'blocks_3']), IMAGES, adding=['blocks_1']
      ),
      "the state is 0 behind 'blocks_1'",
    ),
    (
      lambda m, v: adapters.apply_side_network(
        m.clone(remat=True), v, drawn(m), IMAGES, adding=ADDING
      ),
      'remat=False',
    ),
    (
      lambda m, v: adapters.fuse_side(jnp.ones((1, 6, 2)), jnp.ones((3, 3, 1, 2)), (2, 3), 1),
      '6 tokens',
    ),
    (
      lambda m, v: adapters.fuse_side(jnp.ones((1, 7, 2)), jnp.ones((3, 3, 1, 4)), (2, 3), 1),
      r'kernel is \(3, 3, 1, 4\): .* a state \(1, 7, 2\)',
    ),
    (
      lambda m, v: adapters.extract_side(
        0, jnp.ones((1, 7, 2)), jnp.ones((4, 1)), jnp.ones((1, 4))
      ),
      r'down is \(4, 1\), up is \(1, 4\): .* width 2 of the tokens',
    ),
    (
      lambda m, v: adapters.extract_side(
        jnp.ones((1, 7, 1)), jnp.ones((1, 7, 2)), jnp.ones((2, 1)), jnp.ones((1, 2))
      ),
      r'state is \(1, 7, 1\): expected that of tokens \(1, 7, 2\)',
    ),
    (
      lambda m, v: adapters.apply_side_network(m, v, of_width(16), IMAGES, adding=ADDING),
      r'blocks_0: down is \(16, 2\)',
    ),
    (
      lambda m, v: adapters.apply_side_network(
        m, v, {**drawn(m), 'fusion': of_width(16)['fusion']}, IMAGES, adding=ADDING
      ),
      r'fusion/blocks: The kernel is \(3, 3, 1, 16\)',
    ),
  ],
)
def test_side_networks_that_cannot_be_are_refused(vit, make, message):
  with pytest.raises(ValueError, match=message):
    make(*vit)


def test_a_stage_whose_state_nothing_fills_is_named():
  model = models.create(
    'swin_tiny_patch4_window7_224', image_size=56, width=8, depths=(1, 1), num_heads=(2, 2)
  )
  images = jax.ShapeDtypeStruct((1, 56, 56, 3), jnp.float32)
  widths = adapters.block_widths(model, images)
  assert widths == {'layers_0/blocks_0': 8, 'layers_1/blocks_0': 16}
  first, second = widths
  side = adapters.init_side_network(jax.random.key(0), widths, 2, extracting=[first])
  with pytest.raises(ValueError, match="the state is 0 behind 'layers_1/blocks_0'"):
    adapters.apply_side_network(model, {}, side, images, adding=[second])
  with pytest.raises(ValueError, match=r'norm of a ViT .* got Swin'):
    adapters.apply_side_network(model, {}, side, images, adding=[first], pool_patches=True)
