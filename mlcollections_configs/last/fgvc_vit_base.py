"""LAST on ViT-B/16 of ImageNet-21k and five fine-grained sets, all of their training images.

  python -m experiments.last --config=fgvc_vit_base --workdir=DIR

CUB-200, NABirds, Flowers, Dogs and Cars with the splits of VPT: lists `path label` in
`data/fgvc/<set>/{train,test}.txt`, photographs below `data/fgvc/<set>`. Random resized crops and flips,
which are inferred, as is the recipe: that of `vtab_vit_base`. Learning rates are chosen on 600 training
images, of every class its share, for the lists are in the order of classes.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation
from mlcollections_configs.last import vtab_vit_base

# Classes and training images.
SETS = dict(
  cub=(200, 5394), nabirds=(555, 21536), flowers=(102, 1020), dogs=(120, 10800), cars=(196, 7329)
)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = vtab_vit_base.get_config()
  config.target = {name: target(name, *sizes) for name, sizes in SETS.items()}
  config.tasks = tuple(SETS)
  images = config.target['cub']['data'].to_dict()
  config.network = adaptation.public_network(adaptation.VIT_BASE, images)
  config.held_out = 600
  config.held_out_order = 'by_class'
  config.claims = (
    vtab_vit_base.claim('mean above LoRA', 'mean', 'LoRA', 0.0),
    vtab_vit_base.claim('mean at least 5 points above the linear probe', 'mean', 'linear probe', 5.0),
  )  # fmt: skip
  config.reported = (
    'LAST: CUB 88.5, NABirds 84.4, Flowers 99.7, Dogs 86.0, Cars 88.9, mean 89.5 % with 0.66 M trained '
    'numbers; full tuning 88.5, linear probe 79.3, LoRA 84.8, SSF 90.7.'
  )
  return config


def target(name: str, classes: int, size: int) -> dict:
  """Returns a set."""
  root = f'data/fgvc/{name}'
  options = dict(root=root, decode=False, num_classes=classes)
  return dict(
    group='fine_grained',
    augment=dict(kind='resized_crop', interpolation='bicubic'),
    data=adaptation.photographs(
      classes, name='listed_images', train_options=options, test_options=options,
      train_split=f'{root}/train.txt', test_split=f'{root}/test.txt', train_size=size,
    ),
  )  # fmt: skip
