"""Single-branch learning with ResNet-18 on a hundredth of ImageNet: few images, for which the method is made.

As `imagenet_resnet50`, on the public list of 12811 images. Prepare the data once:
`tfds build imagenet2012_subset/1pct --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.efficient_ssl import imagenet_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_resnet50.get_config()
  config.data = dict(name='imagenet2012_subset/1pct', std=(0.228, 0.224, 0.225))
  config.model = dict(name='resnet18')
  config.recipe.eval_every = 250  # 10 epochs
  return config
