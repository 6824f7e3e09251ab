import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tables
from flax import traverse_util
from golden_vectors import OWN_DIR, assert_close, golden
from models.random_variables import random_images, random_variables, run, run_capture
from rule_weights import rule_tensor

from jaxlab.models import (
  ResNet,
  ViT,
  abstract_variables,
  create,
  from_torch,
  load_pretrained,
  read_state_dict,
  stack_blocks,
  to_torch,
  unstack_blocks,
)
from jaxlab.models.checkpoint_names import (
  HF_BERT_BARE,
  TIMM,
  TORCHVISION_EFFICIENTNET,
  TORCHVISION_SWIN,
  TORCHVISION_VIT,
  efficientnet_pytorch,
  timm_names,
  torch_name,
  torchvision_mobilenetv2,
)
from jaxlab.models.position_embedding import resample_position_embedding

CODE_BASES = {
  'timm': timm_names,
  'efficientnet_pytorch': efficientnet_pytorch,
  'transformers': HF_BERT_BARE,
}
RENAMED = {'efficientnet_pytorch/efficientnet_lite0': 'tf_efficientnet_lite0'}
VIT = {'patch_size': 4, 'image_size': 8, 'width': 12, 'depth': 2, 'num_heads': 2, 'num_classes': 5}
RESNET = {'stage_sizes': (1, 1), 'width': 4, 'widths': (4, 8), 'stem': 'cifar', 'num_classes': 5}


# torchvision's names of the networks that have ours in a checkpoint of theirs.
TORCHVISION = {
  'mobilenet_v2': ('mobilenetv2_100', torchvision_mobilenetv2),
  'efficientnet_b0': ('efficientnet_b0', TORCHVISION_EFFICIENTNET),
  'efficientnet_b4': ('efficientnet_b4', TORCHVISION_EFFICIENTNET),
  'swin_t': ('swin_tiny_patch4_window7_224', TORCHVISION_SWIN),
  'swin_b': ('swin_base_patch4_window7_224', TORCHVISION_SWIN),
  'vit_l_16': ('vit_large_patch16_224', TORCHVISION_VIT),
  'vit_h_14': ('vit_huge_patch14_224', TORCHVISION_VIT),
  'vit_b_32': ('vit_base_patch32_224', TORCHVISION_VIT),
}


def check_network(vectors, features_of):
  library, name = vectors.path.stem.split('_', 1)
  name = TORCHVISION[name][0] if library == 'torchvision' else name
  shapes = [json.loads(shape) for shape in vectors['checkpoint_shapes'].tolist()]
  names = vectors['checkpoint_names'].tolist()
  state_dict = {n: rule_tensor(n, tuple(s)) for n, s in zip(names, shapes, strict=True)}
  nchw = tuple(vectors['in_image_shape'])
  images = np.random.default_rng(int(vectors['in_image_seed'])).standard_normal(nchw)
  images = images.astype(np.float32).transpose(0, 2, 3, 1)

  fields = {'num_classes': vectors['out_logits'].shape[1]}
  if 'overrides_json' in vectors:
    fields |= json.loads(vectors['overrides_json'].item())
  model = create(name, **fields)
  variables = from_torch(model, state_dict)
  logits, captured = run_capture(model, variables, [features_of(model)], images)
  features = captured[features_of(model)]
  if features.ndim == 4 and not name.startswith('swin'):  # timm's Swin is channels-last
    features = features.transpose(0, 3, 1, 2)
  assert features.shape == tuple(vectors['out_features_shape'])
  for actual, expected in (
    (logits, vectors['out_logits']),
    (features[0].ravel()[:4096], vectors['out_features_flat_first_4096']),
  ):
    assert np.abs(actual - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@golden('models', 'timm_resnet')
def test_resnet_agrees_with_timm(vectors):
  check_network(vectors, lambda m: f'layer{len(m.stage_sizes)}_{m.stage_sizes[-1] - 1}')


@golden('models', 'timm_vit_')
def test_vit_agrees_with_timm(vectors):
  check_network(vectors, lambda m: 'norm')


@golden('models', 'timm_deit')
def test_deit_agrees_with_timm(vectors):
  check_network(vectors, lambda m: 'norm')


@golden('models', 'timm_swin_')
def test_swin_agrees_with_timm(vectors):
  check_network(vectors, lambda m: 'norm')


@golden('models', 'timm_mobilenetv2_')
def test_mobilenetv2_agrees_with_timm(vectors):
  check_network(vectors, lambda m: 'relu2')


@golden('models', 'timm_efficientnet_')
def test_efficientnet_agrees_with_timm(vectors):
  check_network(vectors, lambda m: 'silu2')


@golden('models', 'timm_tf_efficientnet_lite')
def test_tensorflows_efficientnet_lite_agrees_with_timm(vectors):
  check_network(vectors, lambda m: 'relu2')


@golden('models', 'timm_convnext_')
def test_convnext_agrees_with_timm(vectors):
  check_network(vectors, lambda m: 'stages_3')


@golden('models', 'timm_densenet')
def test_densenet_agrees_with_timm(vectors):
  check_network(vectors, lambda m: 'relu5')


@golden('models', 'timm_pvt_v2_')
def test_pvt_agrees_with_timm(vectors):
  check_network(vectors, lambda m: f'stages_{len(m.widths) - 1}')


@golden('models', 'timm_vgg')
def test_vgg_agrees_with_timm(vectors):
  check_network(vectors, lambda m: 'pool_4')


@golden('models', 'torchvision_mobilenet_v2')
def test_mobilenetv2_agrees_with_torchvision(vectors):
  check_network(vectors, lambda m: 'relu2')


@golden('models', 'torchvision_efficientnet_')
def test_efficientnet_agrees_with_torchvision(vectors):
  check_network(vectors, lambda m: 'silu2')


@golden('models', 'torchvision_swin_')
def test_swin_agrees_with_torchvision(vectors):
  check_network(vectors, lambda m: 'norm')


@golden('models', 'torchvision_vit_')
def test_vit_agrees_with_torchvision(vectors):
  check_network(vectors, lambda m: 'norm')


SHAPES = json.loads((OWN_DIR / 'models' / 'checkpoint_shapes.json').read_text())
# One of a family and library, small where there is a choice.
PUBLISHED = (
  'efficientnet_pytorch/efficientnet_lite0', 'timm/convnext_small', 'timm/resnet26d', 'timm/vgg13',
  'timm/vit_large_patch14_dinov2', 'torchvision/swin_b', 'transformers/minilm_l6',
)  # fmt: skip


@pytest.mark.parametrize('origin', tables.few(SHAPES, *PUBLISHED))
def test_names_and_shapes_are_those_of_the_published_network(origin):
  """Of networks too large to run here; `digest` is of the lines "name shape", sorted."""
  library, name = origin.split('/')
  # One block is traced for all of a vision transformer.
  scan = {'scan': True} if name.startswith('vit') else {}
  renames = CODE_BASES.get(library)
  if library == 'torchvision':
    name, renames = TORCHVISION[name]
  variables = abstract_variables(create(RENAMED.get(origin, name), **scan))
  if scan:
    variables['params'] = jax.eval_shape(unstack_blocks, variables['params'])
  renames = renames(variables['params']) if callable(renames) else renames
  lines = []
  for path, leaf in traverse_util.flatten_dict(variables, sep='/').items():
    shape = list(leaf.shape)
    if path.endswith('/kernel'):
      shape = [*shape[:-3:-1], *shape[:-2]]
    lines.append(f'{torch_name(path.split("/", 1)[1], renames)} {shape}')
  expected = SHAPES[origin]
  assert len(lines) == expected['entries']
  size = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  assert size == expected['parameters']
  assert hashlib.sha256('\n'.join(sorted(lines)).encode()).hexdigest() == expected['digest']


def test_weights_of_efficientnet_pytorch_are_read_from_a_file(tmp_path):
  from safetensors.numpy import save_file

  fields = {'stage_sizes': (1, 2), 'widths': (8, 12), 'stem_width': 8, 'head_width': 16}
  model = create('tf_efficientnet_lite0', **fields)
  variables = random_variables(model, random_images())
  state_dict = to_torch(variables, renames=efficientnet_pytorch(variables['params']))
  state_dict['_blocks.2._bn0.num_batches_tracked'] = np.array(3)
  save_file(state_dict, tmp_path / 'own.safetensors')
  loaded, back = load_pretrained(
    'tf_efficientnet_lite0', file=tmp_path / 'own.safetensors', **fields
  )
  assert loaded == model
  jax.tree.map(np.testing.assert_array_equal, back, variables)
  _, back = load_pretrained(
    'tf_efficientnet_lite0', file=tmp_path / 'own.safetensors', num_classes=None, **fields
  )
  assert 'classifier' not in back['params']
  assert back['params']['blocks_1_1'].keys() == variables['params']['blocks_1_1'].keys()


@pytest.mark.parametrize(
  'model, renames',
  [
    (ResNet(**RESNET, block='bottleneck', cardinality=2), TIMM),
    (ViT(**VIT, distilled=True), TIMM),
    (ViT(**VIT, scan=True), TIMM),
    (ViT(**VIT), TORCHVISION_VIT),
  ],
)
def test_round_trip_is_exact(model, renames):
  variables = random_variables(model, random_images())
  state_dict = to_torch(variables, renames=renames)
  back = from_torch(variables, state_dict)
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, back, variables)
  again = to_torch(back, renames=renames)
  assert again.keys() == state_dict.keys()
  for name, value in state_dict.items():
    np.testing.assert_array_equal(again[name], value)


def test_names_and_layouts_are_torchs():
  state_dict = to_torch(random_variables(ResNet(**RESNET), random_images()))
  assert state_dict['conv1.weight'].shape == (4, 3, 3, 3)
  assert state_dict['layer2.0.downsample.0.weight'].shape == (8, 4, 1, 1)
  assert state_dict['layer2.0.downsample.1.running_var'].shape == (8,)
  assert state_dict['fc.weight'].shape == (5, 8)
  state_dict = to_torch(random_variables(ViT(**VIT), random_images()), renames=TORCHVISION_VIT)
  assert set(state_dict) == {
    *('class_token', 'conv_proj.weight', 'conv_proj.bias', 'encoder.pos_embedding'),
    *(f'encoder.ln.{p}' for p in ('weight', 'bias')),
    *(f'heads.head.{p}' for p in ('weight', 'bias')),
    *(
      f'encoder.layers.encoder_layer_{i}.{name}'
      for i in range(2)
      for name in (
        *(
          f'{module}.{p}'
          for module in ('ln_1', 'ln_2', 'mlp.0', 'mlp.3')
          for p in ('weight', 'bias')
        ),
        *(f'self_attention.{n}' for n in ('in_proj_weight', 'in_proj_bias')),
        *(f'self_attention.out_proj.{p}' for p in ('weight', 'bias')),
      )
    ),
  }


def test_all_mismatches_are_listed_at_once():
  model = ResNet(**RESNET)
  state_dict = to_torch(random_variables(model, random_images()))
  state_dict['layer9.0.conv1.weight'] = state_dict.pop('conv1.weight')
  state_dict['fc.weight'] = state_dict['fc.weight'][:3]
  state_dict['bn1.num_batches_tracked'] = np.array(3)
  with pytest.raises(ValueError) as error:
    from_torch(model, state_dict)
  message = str(error.value)
  assert 'in 3 places' in message
  assert 'missing: conv1.weight' in message
  assert 'unexpected: layer9.0.conv1.weight' in message
  assert 'shape: fc.weight is (8, 3), params/fc/kernel needs (8, 5)' in message
  assert 'num_batches_tracked' not in message


def test_ignored_names_leave_a_backbone_and_useless_patterns_raise():
  state_dict = to_torch(random_variables(ResNet(**RESNET), random_images()))
  backbone = ResNet(**{**RESNET, 'num_classes': None})
  with pytest.raises(ValueError, match=r'unexpected: fc\.bias'):
    from_torch(backbone, state_dict)
  variables = from_torch(backbone, state_dict, ignore=[r'fc\..*'])
  assert 'fc' not in variables['params']
  with pytest.raises(ValueError, match=r"match no name of the checkpoint: \['head"):
    from_torch(backbone, state_dict, ignore=[r'fc\..*', r'head\..*'])


def test_position_embedding_is_resampled_on_request():
  state_dict = to_torch(random_variables(ViT(**VIT), random_images()))
  larger = ViT(**{**VIT, 'image_size': (16, 12)})
  with pytest.raises(ValueError, match=r'pos_embed is \(1, 5, 12\).*resample=True'):
    from_torch(larger, state_dict)
  variables = from_torch(larger, state_dict, resample=True)
  expected = resample_position_embedding(state_dict['pos_embed'], (4, 3))
  np.testing.assert_array_equal(variables['params']['pos_embed'], expected)
  square = ViT(**{**VIT, 'image_size': 16})
  variables = from_torch(abstract_variables(square), state_dict, resample=True)
  assert variables['params']['pos_embed'].shape == (1, 17, 12)


def test_scanned_model_loads_what_the_plain_one_does():
  plain = random_variables(ViT(**VIT), x := random_images())
  scanned = from_torch(ViT(**VIT, scan=True), to_torch(plain))
  jax.tree.map(np.testing.assert_array_equal, scanned['params'], stack_blocks(plain['params']))
  assert_close(run(ViT(**VIT, scan=True), scanned, x), run(ViT(**VIT), plain, x), 1e-5)


def test_files_are_read_without_pickles(tmp_path):
  from safetensors.flax import save_file

  state_dict = to_torch(random_variables(ResNet(**RESNET), random_images()))
  state_dict['fc.weight'] = state_dict['fc.weight'].astype(ml_dtypes.bfloat16)
  save_file(
    {name: jnp.asarray(a) for name, a in state_dict.items()}, tmp_path / 'model.safetensors'
  )
  loaded = read_state_dict(tmp_path / 'model.safetensors')
  assert loaded.keys() == state_dict.keys()
  for name, value in state_dict.items():
    np.testing.assert_array_equal(np.asarray(loaded[name], np.float32), value.astype(np.float32))
  del state_dict['fc.weight']
  np.savez(tmp_path / 'model.npz', **state_dict)
  assert read_state_dict(tmp_path / 'model.npz').keys() == state_dict.keys()
  np.savez(tmp_path / 'pickled.npz', weights=np.array([{'a': 1}], dtype=object))
  with pytest.raises(ValueError, match='allow_pickle'):
    read_state_dict(tmp_path / 'pickled.npz')
  with pytest.raises(ValueError, match=r'neither \.safetensors nor \.npz'):
    read_state_dict(tmp_path / 'model.pth')


def test_files_that_are_cut_off_or_of_an_unknown_type_are_named(tmp_path):
  from safetensors.numpy import save_file

  arrays = {'a': np.arange(100.0), 'b': np.ones(3, ml_dtypes.bfloat16)}
  save_file({'a': arrays['a']}, tmp_path / 'cut.safetensors')
  np.savez(tmp_path / 'cut.npz', a=arrays['a'])
  for name in ('cut.safetensors', 'cut.npz'):
    content = (tmp_path / name).read_bytes()
    for length in (0, 5, len(content) // 2):
      (tmp_path / name).write_bytes(content[:length])
      with pytest.raises(ValueError, match=rf'{name}.* is no whole'):
        read_state_dict(tmp_path / name)
  np.savez(tmp_path / 'half.npz', **arrays)
  with pytest.raises(ValueError, match=r'half\.npz.*: b has the type .*bfloat16'):
    read_state_dict(tmp_path / 'half.npz')
  with pytest.raises(FileNotFoundError, match=r'no file .*none\.npz'):
    read_state_dict(tmp_path / 'none.npz')


def test_pretrained_weights_without_network_or_tag_raise(monkeypatch, tmp_path):
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  with pytest.raises(
    ConnectionError, match=r'model.safetensors of huggingface.co/timm/resnet18.a1_in1k'
  ):
    load_pretrained('resnet18')
  with pytest.raises(ValueError, match='no default weights; give a tag'):
    load_pretrained('cifar_resnet20')


def test_pretrained_weights_fit_the_overridden_model(monkeypatch, tmp_path):
  from safetensors.numpy import save_file

  fields = {'depth': 1, 'width': 12, 'num_heads': 2, 'patch_size': 4}
  stored = create('vit_tiny_patch16_224', image_size=8, **fields)
  state_dict = to_torch(random_variables(stored, random_images()))
  save_file(state_dict, tmp_path / 'model.safetensors')
  asked = []

  def download(repository, filename):
    asked.append(repository)
    return str(tmp_path / filename)

  monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
  model, variables = load_pretrained(
    'vit_tiny_patch16_224.own', image_size=16, num_classes=None, **fields
  )
  assert asked == ['timm/vit_tiny_patch16_224.own']
  assert 'head' not in variables['params']
  np.testing.assert_array_equal(variables['params']['cls_token'], state_dict['cls_token'])
  assert run(model, variables, random_images((2, 16, 16, 3))).shape == (2, 12)


@pytest.mark.parametrize('classes', [7, None])
def test_the_weights_decide_on_the_number_of_classes(tmp_path, classes):
  model = ResNet(**{**RESNET, 'stem': 'imagenet', 'num_classes': classes})
  np.savez(tmp_path / 'own.npz', **to_torch(random_variables(model, random_images())))
  fields = {'stage_sizes': (1, 1), 'width': 4, 'widths': (4, 8)}
  loaded, variables = load_pretrained('resnet18', file=tmp_path / 'own.npz', **fields)
  assert loaded.num_classes == classes
  assert ('fc' in variables['params']) == (classes is not None)
  with pytest.raises(ValueError, match=r'shape: fc.weight|missing: fc.weight'):
    load_pretrained('resnet18', file=tmp_path / 'own.npz', num_classes=9, **fields)


def test_weights_of_another_architecture_are_refused_by_what_lacks_or_is_told(tmp_path):
  model = ResNet(**{**RESNET, 'stem': 'imagenet', 'num_classes': 7})
  fields = {'stage_sizes': (1, 1), 'width': 4, 'widths': (4, 8)}
  state_dict = to_torch(random_variables(model, random_images()))
  np.savez(tmp_path / 'model.npz', **state_dict)
  config = tmp_path / 'config.json'
  # Anti-aliased, as in timm: the same names and shapes.
  config.write_text(json.dumps({'architecture': 'resnetblur18', 'num_classes': 7}))
  with pytest.raises(ValueError, match=r"holds the weights of 'resnetblur18', as config.json"):
    load_pretrained('resnet18', file=tmp_path / 'model.npz', **fields)
  for own in ({'architecture': 'resnet18'}, {'num_classes': 7}):
    config.write_text(json.dumps(own))
    assert load_pretrained('resnet18', file=tmp_path / 'model.npz', **fields)[0].num_classes == 7
  # Anti-aliased, as by its authors: filters are stored.
  blurred = {**state_dict, 'layer2.0.downsample.0.filt': np.ones((4, 1, 4, 4), np.float32)}
  with pytest.raises(ValueError, match=r'unexpected: layer2\.0\.downsample\.0\.filt'):
    from_torch(model, blurred)
  # With group norms there are no running statistics.
  grouped = {name: value for name, value in state_dict.items() if 'running' not in name}
  with pytest.raises(ValueError, match=r'missing: bn1\.running_mean'):
    from_torch(model, grouped)


def test_load_pretrained_reads_a_decoder_of_several_files(monkeypatch, tmp_path):
  import json

  import ml_dtypes
  from huggingface_hub.errors import EntryNotFoundError
  from safetensors.numpy import save_file

  fields = {'width': 8, 'depth': 1, 'num_heads': 2, 'hidden': 12, 'vocab_size': 7}
  model = create('llama', **fields)
  tokens = np.arange(6, dtype=np.int32).reshape(1, 6)
  state_dict = to_torch(jax.jit(model.init)(jax.random.key(0), tokens))
  halves = {name: value.astype(ml_dtypes.bfloat16) for name, value in state_dict.items()}
  names = list(halves)
  parts = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for file, own in parts.items():
    save_file({name: halves[name] for name in own}, tmp_path / file)
  weight_map = {name: file for file, own in parts.items() for name in own}
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))

  def download(repository, filename):
    assert repository == 'someone/Tiny-3.1'
    if not (tmp_path / filename).exists():
      raise EntryNotFoundError(filename)
    return str(tmp_path / filename)

  monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
  _, variables = load_pretrained('llama.someone/Tiny-3.1', **fields)
  for name, value in to_torch(variables).items():
    np.testing.assert_array_equal(value, halves[name])

  index.unlink()
  save_file(state_dict, tmp_path / 'model.safetensors')
  _, whole = load_pretrained('llama.someone/Tiny-3.1', **fields)
  logits = jax.jit(model.apply)(whole, tokens), jax.jit(model.apply)(variables, tokens)
  np.testing.assert_allclose(logits[0], logits[1].astype(np.float32), atol=0.05)
