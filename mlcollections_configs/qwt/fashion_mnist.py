"""QwT on a vision transformer and a ResNet for Fashion-MNIST.

  python -m experiments.qwt --config=mlcollections_configs/qwt/fashion_mnist.py

The first 10240 training images; needs the data set on disk (Debian's package `dataset-fashion-mnist`) or
prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.qwt import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  config.networks = ('vit', 'resnet')
  config.networks_dir = 'runs/networks_fashion_mnist'
  data = dict(
    name='fashion_mnist',
    train_split='train',
    test_split='test',
    train_options=dict(limit=10240),
    test_options=dict(limit=4000),
    train_size=10240,
    stored_image=(28, 28, 1),
    image_size=28,
    channels=1,
    mean=0.286,
    std=0.353,
  )
  vit = embedded.vit() | dict(data=data, epochs=12, batch_size=128)
  vit['model']['name'] = 'vit_tiny_patch4_28'
  resnet = embedded.resnet() | dict(data=data, epochs=4, batch_size=128)
  resnet['model']['strides'] = (2, 2, 2)
  config.network = dict(vit=vit, resnet=resnet)
  config.claims = tuple(
    claim
    for claim in config.claims
    if claim['metric'].startswith(('vit_2', 'resnet_2')) and claim['method'] == 'QwT'
  )
  return config
