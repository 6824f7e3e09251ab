"""B-CNN and iSQRT-COV with VGG-16 on CUB-200-2011 at 448 pixels; else as `cub_isqrt_resnet50`.

The map is the one before the last pooling. Heads are trained alone first, that of B-CNN by a rate of 1 over
a frozen network, then everything by 1e-3 (constants of the code; 50 and 100 epochs [inferred]). iSQRT-COV
reduces to 256 channels; it and average pooling take the same two steps, the first by a rate of 0.01
[inferred].
"""

from ml_collections import ConfigDict

from mlcollections_configs.fgia import cub_isqrt_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cub_isqrt_resnet50.get_config()
  config.model = dict(name='vgg16', hidden=None)
  config.map_path = 'blocks_4_2'
  config.pretrained = 'vgg16.tv_in1k'
  config.baseline = dict(classifier_rate=10.0)
  config.heads = dict(
    bilinear=dict(title='B-CNN', pooling='bilinear', classifier_rate=1000.0),
    isqrt=dict(title='iSQRT-COV', pooling='isqrt_cov', reduction=256, classifier_rate=10.0),
  )
  config.recognition.classifier = dict(config.recognition.recipe, epochs=50)
  for recipe in (config.recognition.classifier, config.recognition.recipe):
    recipe.schedule = dict(name='constant', base=1e-3)
  config.reported = (
    'CUB-200-2011, VGG-16: 84.1 % with B-CNN, 87.2 % with iSQRT-COV (87.0 in a re-run).'
  )
  return config
