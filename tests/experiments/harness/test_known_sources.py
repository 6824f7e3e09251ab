import pytest

from experiments.harness import launcher, sources

SETTINGS = [(paper, path.stem) for paper in launcher.papers() for path in launcher.settings(paper)]


@pytest.mark.parametrize(('paper', 'setting'), SETTINGS)
def test_every_setting_says_what_it_needs(paper, setting):
  needed = sources.needed(launcher.load(paper, setting))
  assert needed
  if setting == 'embedded':
    assert all(text.startswith('nothing: ') for text in needed)


@pytest.mark.parametrize(
  ('paper', 'setting', 'texts'),
  [
    ('gml', 'cifar100_lt', ['tfds build cifar100 --file_format=array_record', 'long-tailed selection']),
    ('gml', 'imagenet_lt', [
      'data/ImageNet_LT_train.txt', 'data/ImageNet_LT_test.txt', 'classifier-balancing, data/ImageNet_LT',
      'below data/ImageNet_LT', 'train/n01440764/*.JPEG', '"path label"',
    ]),
    ('gml', 'places_lt', ['data/Places_LT_val.txt', 'huggingface.co/timm/resnet152.tv_in1k']),
    ('btm', 'inaturalist2018', ['data/iNaturalist18_val.txt', 'train_val2018/Plantae']),
    ('gml', 'fashion_mnist', ['apt install dataset-fashion-mnist', '$JAXLAB_FASHION_MNIST_DIR']),
    ('mls', 'fashion_mnist', ['apt install dataset-fashion-mnist', 'tfds build fashion_mnist ']),
    ('mls', 'coco_400', ['COCO 2017: tfds build coco/2017 --file_format=array_record']),
    ('csra', 'voc2007_resnet101', ['PASCAL VOC 2007: tfds build voc/2007', 'timm/resnet101.tv_in1k']),
    ('csra', 'wider_vit_base', ['wider_attribute_trainval.json', 'below data/WIDER_Attribute/Image']),
    ('efpc', 'xlm_roberta_large', ['huggingface.co/FacebookAI/xlm-roberta-large']),
    ('qwt', 'llama3_8b', ['c4.npy, wikitext2.npy', 'huggingface.co/meta-llama/Meta-Llama-3-8B']),
    ('ssql', 'imagenet_resnet50', ['ILSVRC2012_img_train.tar', 'tfds build imagenet2012']),
  ],
)  # fmt: skip
def test_what_is_not_in_the_package_is_said_in_full(paper, setting, texts):
  needed = ' | '.join(sources.needed(launcher.load(paper, setting)))
  for text in texts:
    assert text in needed, text


def test_weights_are_where_they_are_loaded_from():
  text = sources.weights(['gpt2', 'resnet50', 'vgg16.tv_in1k', 'llama3_8b.own/Model-1.5'])
  for name in (
    'openai-community/gpt2',
    'timm/resnet50.a1_in1k',
    'timm/vgg16.tv_in1k',
    'own/Model-1.5',
  ):
    assert name in text.partition('huggingface.co/')[2].split(', ')
  assert 'timm/cifar_resnet20' in sources.weights(['cifar_resnet20'])


def test_folders_of_classes_are_described():
  assert 'photos/SPLIT/CLASS/*.jpg' in sources.needs('image_folder', 'photos')
