import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import coarse_ssl
from experiments.harness import data as harness_data
from experiments.harness import launcher, runs
from experiments.harness.settings import SettingsError
from experiments.protocols import pretraining, siamese, siamese_methods
from jaxlab import data, localization, models

NET = "'stem': 'identity', 'stage_sizes': (1, 1, 1), 'widths': (2, 3, 4), 'strides': (1, 2, 2)"
TINY = (
  "model={'name': 'cifar_resnet18', 'stage_sizes': (1,), 'width': 4, 'strides': (4,)}",
  f"net.model={{'name': 'cifar_resnet18', {NET}}}",
  'net.features=layer3_0',
  'heads.hidden=8',
  'heads.features=8',
  'recipe.batch_size=128',
  'target.queue_size=128',
)


def tiny_config(*changes):
  """Returns the embedded setting with networks that compile in seconds."""
  return launcher.load('coarse_ssl', 'embedded', [*TINY, *changes])


def test_all_kinds_of_boxes_lie_in_the_image_and_random_ones_have_the_sizes_of_coarse_ones():
  scores = np.zeros((5, 16, 16))
  for index in range(5):
    scores[index, 2 : 5 + index, 3:7] = 1.0
    scores[index, 11:14, 9:14] = 0.7
  truth = [np.array([[12, 8, 28, 24], [40, 44, 56, 60]])] * 5
  config = tiny_config()
  found = coarse_ssl.find_boxes(config, scores, truth)
  assert found.keys() == coarse_ssl.TITLES.keys() and found['full'] is None
  for kind in ('grid', 'random', 'coarse', 'true'):
    assert [len(own) for own in found[kind]] == ([5] * 5 if kind == 'grid' else [2] * 5)
    localization.check_boxes(np.concatenate(found[kind]), (64, 64))
  sizes = [
    sorted((own[:, 2:] - own[:, :2]).tolist())
    for own in (np.concatenate(found[kind]) for kind in ('random', 'coarse'))
  ]
  assert sizes[0] == sizes[1]
  # 16 pixels times 1.2 about (20, 16): from 10.4 to 29.6, outwards.
  np.testing.assert_array_equal(found['true'][0][0], [10, 6, 30, 26])
  quality = localization.box_quality(found['true'], truth)
  assert quality['coverage'] == 1 and quality['objects'] == 1


def test_impossible_settings_are_named_all_at_once():
  changes = (
    *('runs=full,coarse,gt', 'boxes.expand=0.5', 'crop_size=0', 'target.queue_size=100'),
    *('judged.stored_image=(30, 30, 1)', 'net.features=layer9', 'truth=none'),
  )
  with pytest.raises(SettingsError) as caught:
    launcher.check(tiny_config(*changes))
  for message in (
    'gt',
    'expand=0.5',
    'crop_size=0',
    'queue_size=100',
    'expected one size',
    'layer9',
  ):
    assert message in str(caught.value)


@pytest.mark.parametrize('side', [24, 224])
def test_crops_of_files_reach_the_device_at_their_own_size(side, tmp_path):
  folder = tmp_path / 'train' / 'all'
  folder.mkdir(parents=True)
  pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
  for index in range(8):  # one a device
    Image.fromarray(pixels).save(folder / f'{index}.png')
  changes = (
    "model={'name': 'cifar_resnet18', 'stage_sizes': (1,), 'width': 4, 'strides': (4,)}",
    *(f'data.train_options.root={tmp_path}', 'data.train_size=8', 'data.num_workers=0'),
    *(f'crop_size={side}', 'recipe.batch_size=8', 'target.queue_size=8'),
    *('heads.hidden=8', 'heads.features=8'),
  )
  config = launcher.load('coarse_ssl', 'coco_moco', changes)
  scenes = harness_data.load(config.data, 'train')
  boxes = [np.array([[0, 0, 112, 224]])] * 8
  crops = data.Crops(scenes, boxes, side, coarse_ssl.read(config))
  own = coarse_ssl.training(config, 'coarse')
  loader = harness_data.loader(own.data, crops, 8, mesh=config.mesh, seed=0)
  batch = next(loader)
  loader.close()
  assert batch['image'].shape == own.program.batch['image'].shape == (8, side, side, 3)
  # Scenes are stretched to 224 before they are cut: their pixels, at their places.
  whole = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR)
  expected = np.asarray(
    whole.crop((0, 0, 112, 224)).resize((side, side), Image.Resampling.BILINEAR)
  )
  np.testing.assert_allclose(batch['image'], [expected] * 8, atol=1)
  other = dataclasses.replace(config.data, train_decode={'size': 224})  # cut at other places
  other = coarse_ssl.training(dataclasses.replace(config, data=other), 'coarse')
  assert own.identity != other.identity


VIT = (
  "model={'name': 'vit_tiny_patch16_224', 'patch_size': 7, 'image_size': 28, 'width': 8, 'depth': 1, "
  "'num_heads': 2}",
  "masking={'ratio': 0.5, 'width': 8, 'depth': 1, 'num_heads': 2}",
)


@pytest.mark.parametrize('base', [*siamese_methods.TITLES, 'mae'])
def test_any_method_learns_from_crops(base):
  changes = VIT * (base == 'mae') + ("prototypes={'count': 12, 'bottleneck': 4}", 'crop_size=40')
  config = tiny_config(f'base={base}', 'runs=full,coarse', *changes)
  launcher.check(config)
  found = coarse_ssl.programs(config)
  for kind, side in (('full', 64), ('coarse', 40)):
    found[kind].trace()
    assert found[kind].program.batch['image'].shape == (128, side, side, 1)
    assert found[kind].title == coarse_ssl.TITLES[kind]
  assert found['full'].identity['method'] == base


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (('base=mae',), 'MAE takes a ViT'),
    (('base=dino', 'recipe.optimizer.clip_global_norm=1.0'), 'clip_per_tensor'),
    (('base=moco', 'recipe.microbatches=2'), 'microbatches=1'),
    (('scenes_eval.bank=2001',), 'scenes_eval.bank=2001: expected at most 2000'),
    (('data.multi_label=False',), 'data.multi_label=False'),
    (('objectness=ssl', 'runs=coarse,'), "objectness='ssl': the features are of .* 'full'"),
    (('objectness=ssl', 'net.features=layer3_0'), 'net: .*layer3_0'),  # the backbone has one stage
    (('objectness=ssl', 'base=mae', *VIT), 'maps of a CNN; MAE trains a ViT'),
    (('objectness=pretrained',), "pretrained='': expected weights of cifar_resnet18"),
    (('objectness=pretrained', 'pretrained=resnet50.tv_in1k'), 'weights of cifar_resnet18'),
    (('pretrained=resnet50.tv_in1k',), "expected none without objectness='pretrained'"),
    (('weights=file.safetensors',), "weights='file.safetensors': give the name"),
  ],
)
def test_settings_of_method_and_evaluation_are_checked(changes, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(*changes))


SHORT = (
  *('recipe.epochs=1', 'recipe.schedule.warmup_epochs=0', 'data.train_size=128', 'eval.k=5'),
  *('log_every=1', 'data.train_options.length=128', 'eval_batch_size=256'),
  'judged.test_options={"canvas": 28, "side": 20, "pastes": 1}',
  "data.test_options={'length': 40, 'canvas': 64, 'num_objects': 2, 'side': (18, 24)}",
  "scenes_eval={'k': 5, 'bank': 128, 'steps': 5}",
)


@pytest.mark.parametrize('base', ['moco', 'mae'])
def test_a_run_learns_from_crops(base, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(pretraining, 'COLLAPSED', 1.1)
  config = tiny_config(f'base={base}', 'runs=coarse,', *SHORT, *(VIT * (base == 'mae')))
  launcher.check(config)
  found = coarse_ssl.run(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['untrained', 'coarse crops']
  for own in rows.values():
    assert all(0 <= own[name] <= 100 for name in ('knn_fp', 'mAP', 'precision'))
  crops = rows['coarse crops']
  assert 1 <= crops['boxes'] <= 5 and 0 < crops['coverage'] <= 1
  assert (tmp_path / 'boxes.png').stat().st_size > 5000
  assert (tmp_path / 'curves.png').stat().st_size > 1000
  assert 'coarse crops has collapsed' in capsys.readouterr().out


def test_boxes_come_from_the_backbone_that_whole_scenes_taught(tmp_path, monkeypatch):
  changes = ('objectness=ssl', 'net.features=layer1_0', 'runs=full,coarse', 'scenes_eval=None')
  config = tiny_config(*SHORT, *changes)
  launcher.check(config)
  seen = []
  monkeypatch.setattr(coarse_ssl, 'draw', lambda *args: seen.append(args[2]))
  found = coarse_ssl.run(config, tmp_path)
  assert [row['name'] for row in found['rows']] == ['untrained', 'whole scenes', 'coarse crops']
  # The maps again, of the variables that the folder of whole scenes holds.
  scenes = data.in_memory(harness_data.load(config.data, 'train'))
  full = runs.train(coarse_ssl.training(config, 'full'), scenes, tmp_path / 'full')
  variables = siamese.backbone_variables(full.variables)
  x = (scenes.arrays['image'] / 255 - config.data.mean) / config.data.std
  model = models.create(**config.model, num_classes=None)
  captured = models.capture(
    model, variables, ['layer1_0'], jnp.asarray(x, jnp.float32), train=False
  )
  np.testing.assert_allclose(seen[0], captured[1]['layer1_0'].sum(-1), rtol=1e-3, atol=1e-4)
  # Crops are refused a folder of boxes from other features.
  identities = [coarse_ssl.training(config, 'coarse').identity]
  for other in ('objectness=random', 'recipe.epochs=2', 'heads.hidden=4'):
    identities.append(coarse_ssl.training(tiny_config(*SHORT, *changes, other), 'coarse').identity)
  assert all(own['start'] != identities[0]['start'] for own in identities[2:])
  assert 'start' not in identities[1]


def test_boxes_come_from_public_weights(monkeypatch):
  changes = ('objectness=pretrained', 'pretrained=cifar_resnet18.some', 'data.train_size=128')
  config = tiny_config(*changes, 'data.train_options.length=128', 'scenes_eval=None')
  launcher.check(config)

  def load_pretrained(name, **fields):
    assert name == 'cifar_resnet18.some' and fields['num_classes'] is None
    assert fields['widths'] == (2, 3, 4)
    model = models.create('cifar_resnet18', **fields)
    return model, jax.tree.map(lambda leaf: np.ones(leaf.shape), models.abstract_variables(model))

  monkeypatch.setattr(models, 'load_pretrained', load_pretrained)
  found = coarse_ssl.beginning(config, None, None)
  assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(found))
  assert coarse_ssl.training(config, 'coarse').identity['pretrained'] == 'cifar_resnet18.some'
  assert 'pretrained' not in coarse_ssl.training(config, 'full').identity
