"""CURL with ResNet-50 on ImageNet: a quarter of the operations, trained on labels for 100 epochs.

Channels are ranked on 256 training images, in one pass each; 1.11 of 4.09 billion multiply-accumulates stay
(the code's list is cut at 8723 entries). The code's constants. Prepare the data once: `tfds build
imagenet2012 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.curl import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = dict(
    data=dict(name='imagenet2012'), model=dict(name='resnet50'), pretrained='resnet50.tv_in1k'
  )
  config.limited = dict()
  config.protected = ('stem', 'layer4')
  config.rankings = ('curl',)
  config.shares = (1.11 / 4.09,)
  config.augment = dict(kind='resized_crop')
  config.recipe = embedded.tuning(epochs=100, base=0.1, warmup_epochs=5, batch_size=512)
  config.distillation = None
  config.refinement = None
  config.quantized = ()
  config.claims = ()
  config.log_every = 200
  config.checkpoint_every = 2502
  return config
