"""MiR with ResNet-34 on ImageNet: 50, 100, 500 and 1000 images.

  python -m experiments.mir --config=imagenet_resnet34 --workdir=gs://...

Half of the filters of the first convolution in each block that keeps the shape; 2000 steps of 64 images at
0.02, a tenth of it from 40 % and a hundredth from 80 % on; labels at 1e-4. The paper's runs have seeds 2021
to 2025. Without a single photograph: `--config.origin=synthetic --config.runs=mir_post_pool,mir`. Prepare
the data once: `tfds build imagenet2012 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mir import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = imagenet('resnet34', 'resnet34.tv_in1k')
  config.augment = dict(kind='resized_crop')
  config.totals = (50, 100, 500, 1000)
  config.tuning = dict(steps=2000, batch_size=64, rate=0.02, step_share=0.4, factor=0.1)
  config.claims = embedded.claims(50, 1000)
  config.seed = 2021
  config.timed = 500
  config.timed_batch = 64
  return config


def imagenet(name: str, weights: str) -> dict:
  """Returns a network with public weights, torchvision's (`tv_in1k`) or timm's."""
  return dict(
    data=dict(name='imagenet2012'),
    augment=dict(kind='resized_crop'),
    model=dict(name=name),
    pretrained=weights,
  )
