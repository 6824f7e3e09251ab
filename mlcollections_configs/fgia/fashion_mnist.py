"""The upper-body classes of Fashion-MNIST, 2000 images: which pooling tells a shirt from a coat? Minutes.

T-shirt, pullover, coat and shirt, the first 2000 images of them for training, all 4000 of the test.
Retrieval: trained on 3000 images of seven classes; of 1000 test images of dress, sandal and bag each searches
all others.
"""

from ml_collections import ConfigDict

from mlcollections_configs.fgia import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.baseline = dict(rate=4.0)
  config.heads.isqrt.classifier_rate = 10.0
  upper = (0, 2, 4, 6)
  config.recognition = dict(
    data=dict(
      name='fashion_mnist',
      num_classes=len(upper),
      train_size=2000,
      train_options=dict(classes=upper, limit=2000),
      test_options=dict(classes=upper),
    ),
    recipe=embedded.recipe(15),
  )
  config.retrieval = dict(
    data=dict(
      name='fashion_mnist',
      num_classes=7,
      train_size=3000,
      train_options=dict(classes=(0, 1, 2, 4, 6, 7, 9), limit=3000),
      test_options=dict(classes=(3, 5, 8), limit=1000),
    ),
    recipe=embedded.recipe(10),
    pixels=True,
  )
  return config
