"""Calls of public functions on float32 arrays, for a process in which jax's default types have 64 bits.

As a script it prints what went wrong: a line `name: error` for a call that raises, for parameters that are
not float32 and for results that are none of float32 (or are not finite).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import adapters, data, evaluation, losses, models, quantizers, training

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
IMAGE = jnp.asarray(RNG.random((16, 16, 3)), jnp.float32)
IMAGES = jnp.asarray(RNG.random((4, 32, 32, 3)), jnp.float32)
LOGITS = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 3, 0, 1])
PRESENT, QUEUED = (LABELS[:, None] == jnp.arange(4)).astype(int), jnp.eye(6, dtype=int)
COUNTS = np.array([9, 6, 3, 2])
TOKENS = jnp.array([[1, 2, 3], [3, 2, 1]])
ROWS = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)

SMALL = {'max_length': 16, 'depth': 1, 'width': 8, 'num_heads': 2, 'hidden': 16}
GPT2 = models.GPT2(vocab_size=11, **SMALL)
LLAMA = models.Llama(vocab_size=11, num_kv_heads=1, head_width=4, **SMALL)
VIT = {'image_size': 32, 'patch_size': 16, 'width': 8, 'depth': 1, 'num_heads': 2, 'num_classes': 4}
NETWORKS = {
  'cifar_resnet20': (models.create('cifar_resnet20', stage_sizes=(1, 1, 1), num_classes=4), IMAGES),
  'mobilenetv2_035': (
    models.create('mobilenetv2_035', stage_sizes=(1,) * 7, num_classes=4),
    IMAGES,
  ),
  'wrn10_1': (models.create('wrn10_1', num_classes=4), IMAGES),
  'vit': (models.ViT(**VIT), IMAGES),
  'deit distilled': (models.ViT(distilled=True, **VIT), IMAGES),
  'swin': (
    models.create('swin_tiny_patch4_window7_224', num_classes=4),
    jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
  ),
  'gpt2': (GPT2, TOKENS),
  'llama': (LLAMA, TOKENS),
  'bloom': (models.Bloom(vocab_size=11, num_kv_heads=1, **SMALL), TOKENS),
  'mlp': (models.create('mlp', num_classes=4), IMAGES),
  'linear': (models.create('linear', num_classes=4), IMAGES),
  'normed linear': (models.NormedLinear(4), ROWS),
  'weight norm': (models.WeightNormHead(4), ROWS),
  'learnable scaling': (models.LearnableWeightScaling(4), ROWS),
  'batch norm': (models.BatchNorm(), IMAGES),
  'csra': (models.CSRAMultiHead(4, 2, 0.5), IMAGES),
  'second order': (models.SecondOrderHead(4, reduction=2), IMAGES),
  'dino head': (models.DINOHead(4), ROWS),
  'simsiam projector': (models.simsiam_projector(8), ROWS),
}
PER_IMAGE = ('random_color_jitter', 'random_contrast_brightness', 'random_crop', 'random_erasing')
PER_IMAGE += (
  'random_flip',
  'random_gaussian_blur',
  'random_grayscale',
  'random_solarize',
  'rand_augment',
)


def generated(model):
  variables = jax.jit(model.init)(KEY, TOKENS)
  options = {'max_new_tokens': 3, 'key': KEY, 'temperature': 1.0, 'top_k': 3, 'top_p': 0.9}
  tokens = models.generate(model, variables, TOKENS, **options)
  assert tokens.dtype == jnp.int32, tokens.dtype
  return ()


def probed(fit, **options):
  probe = fit(features=ROWS, labels=LABELS, num_classes=4, **options)
  return probe, evaluation.probe_accuracy(probe, ROWS, LABELS)


def adapted():
  model, params = NETWORKS['vit'][0], jax.jit(NETWORKS['vit'][0].init)(KEY, IMAGES)['params']
  widths, layers = adapters.block_widths(model, IMAGES), ['blocks_0/attention/qkv']
  blocks, modules = [*widths], adapters.ssf_modules(model)
  side = adapters.init_side_network(KEY, widths, 2, kernel_size=3)
  yield side, adapters.apply_side_network(model, {'params': params}, side, IMAGES, adding=blocks)
  tokens = adapters.collect_features(model, {'params': params}, IMAGES)
  side = adapters.init_attention_side_network(KEY, 8, len(tokens) - 1)
  yield side, adapters.apply_attention_side_network(side, tokens)
  edge = adapters.init_edge_network(KEY, 8, 3)
  yield edge, adapters.apply_edge_network(edge, adapters.gather_sum(tokens))
  for collection, tree, hooks in (
    ('lora', adapters.init_lora(KEY, params, layers, 2), adapters.lora_hooks(layers)),
    ('ssf', adapters.init_ssf(KEY, params, modules), adapters.ssf_hooks(modules)),
    ('adapters', adapters.init_adapters(KEY, widths, 2), adapters.adapter_hooks(model)),
    ('adapters', adapters.init_adaptformer(KEY, widths, 2), adapters.adaptformer_hooks(model)),
    (
      'prompts',
      adapters.init_prompts(KEY, blocks, 2, 8),
      adapters.prompt_hooks(blocks, 2, deep=True),
    ),
  ):
    yield tree, models.apply(model, {'params': params, collection: tree}, IMAGES, hooks=hooks)


def tallied():
  tally = evaluation.tally_update(evaluation.tally_init(4), LOGITS, LABELS)
  return evaluation.tally_compute(tally)


CALLS = {
  **{f'generate {m.__class__.__name__}': lambda m=m: generated(m) for m in (GPT2, LLAMA)},
  **{name: lambda name=name: getattr(data, name)(KEY, IMAGE) for name in PER_IMAGE},
  'random_cutout': lambda: data.random_cutout(KEY, IMAGE, 4),
  'random_resized_crop': lambda: data.random_resized_crop(KEY, IMAGE, 8),
  'resized_crop_augment': lambda: data.resized_crop_augment(12)(KEY, IMAGE),
  'center_crop': lambda: data.center_crop(IMAGE, 8),
  'mixup': lambda: data.mixup(KEY, IMAGES, 0.2)[0],
  'mix schedule': lambda: data.mwh_mix_probability(jnp.int32(3), 10),
  'mix with probability': lambda: data.mix_with_probability(
    KEY, IMAGES, 0.5, lambda key, x: data.mixup(key, x, 0.5)
  )[::2],
  'normalize images': lambda: data.normalize(IMAGES, 0.5, 0.2),
  'cross_entropy': lambda: losses.cross_entropy(LOGITS, LABELS),
  'label_smoothing': lambda: losses.label_smoothing_cross_entropy(LOGITS, LABELS),
  'weighted': lambda: losses.weighted_cross_entropy(LOGITS, LABELS, 1 / COUNTS),
  'focal': lambda: losses.focal_loss(LOGITS, LABELS, 2.0),
  'ldam': lambda: losses.ldam_loss(LOGITS, LABELS, COUNTS),
  'balanced softmax': lambda: losses.balanced_softmax_loss(LOGITS, LABELS, COUNTS),
  'logit adjusted': lambda: losses.logit_adjusted_loss(LOGITS, LABELS, COUNTS),
  'gml': lambda: losses.gml_loss(LOGITS, LABELS, COUNTS, power=1.5),
  'distillation': lambda: losses.distillation_loss(LOGITS, LOGITS[::-1], 2.0),
  'dive': lambda: losses.dive_loss(LOGITS, LOGITS[::-1], LABELS, COUNTS),
  'ncl': lambda: losses.ncl_loss(jnp.stack([LOGITS, -LOGITS]), LABELS, COUNTS, num_hard=2),
  'paco': lambda: losses.paco_loss(losses.normalize(ROWS), LABELS, LOGITS, COUNTS, smoothing=0.1),
  'nt_xent': lambda: losses.nt_xent(ROWS, ROWS[::-1]),
  'info_nce': lambda: losses.info_nce_queue(ROWS, ROWS, losses.queue_init(KEY, 5, 8)[0]),
  'simsiam': lambda: losses.simsiam_loss(ROWS, ROWS[::-1], ROWS, ROWS[::-1]),
  'barlow': lambda: losses.barlow_twins_loss(ROWS, ROWS[::-1]),
  'dino': lambda: losses.dino_loss(LOGITS, LOGITS[:4], jnp.zeros(4, jnp.float32), 3),
  'next token': lambda: losses.next_token_cross_entropy(LOGITS[None, :2], TOKENS[:1] % 4),
  'token classifier': lambda: losses.token_classifier_loss(LOGITS, LABELS, LABELS > 0),
  'adapters': lambda: list(adapted()),
  'tally': tallied,
  'multi_label_bce': lambda: losses.multi_label_bce(LOGITS, PRESENT),
  'multi_label_metrics': lambda: evaluation.multi_label_metrics(
    jax.nn.sigmoid(LOGITS), PRESENT, top=2
  ),
  'csra head': lambda: models.csra_head(IMAGES, ROWS[:, :3], 2.0, 0.5),
  'isqrt_cov': lambda: jax.value_and_grad(lambda x: models.isqrt_cov(x).sum())(IMAGES),
  'compact bilinear': lambda: models.compact_bilinear(IMAGES, *models.draw_sketches(0, 3, 8), 8),
  'confidence penalties': lambda: (
    losses.max_entropy_loss(LOGITS, LABELS), losses.pairwise_confusion(LOGITS, LABELS)
  ),
  'max_residual': lambda: models.max_residual(IMAGES, 0.5),
  'multi_label_probe': lambda: evaluation.multi_label_probe(ROWS, PRESENT, steps=2),
  'average_precision': lambda: evaluation.average_precision(LOGITS, PRESENT),
  'shared_label_precision': lambda: evaluation.shared_label_precision(QUEUED, PRESENT, PRESENT),
  'neighbor_queue': lambda: losses.neighbor_queue_loss(ROWS, ROWS.T, QUEUED),
  'multi_label_queue': lambda: losses.multi_label_queue_loss(ROWS, ROWS.T, QUEUED),
  'top_k_accuracy': lambda: evaluation.top_k_accuracy(LOGITS, LABELS, 2),
  'calibration': lambda: evaluation.expected_calibration_error(
    jax.nn.softmax(LOGITS).max(1), LOGITS.argmax(1) == LABELS
  )[:2],
  'knn': lambda: evaluation.weighted_knn(ROWS, LABELS, ROWS, num_classes=4, k=2).scores,
  'logistic_probe': lambda: probed(evaluation.logistic_probe),
  'linear_probe_sgd': lambda: probed(
    evaluation.linear_probe_sgd, key=KEY, learning_rate=0.1, epochs=2, milestones=None
  ),
  'effective_rank': lambda: evaluation.effective_rank(ROWS),
  'tweo': lambda: losses.tweo_loss([ROWS, IMAGES]),
  'top_singular': lambda: jax.value_and_grad(losses.top_singular_loss)(ROWS),
  'colinearity': lambda: [
    losses.colinearity_loss(ROWS, ROWS.T, k) for k in ('product', 'row_power', 'excess', 'cosine')
  ],
  'mimic': lambda: losses.mimic_loss(IMAGES, IMAGES[::-1]),
  'qfd': lambda: losses.qfd_loss(LOGITS, LABELS, ROWS, ROWS[::-1]),
  'principal components': lambda: losses.fit_principal_components(ROWS, 2),
  'pca mimicking': lambda: losses.pca_mimicking_loss(ROWS, ROWS[::-1], ROWS[0], ROWS[:5].T[:, :2]),
  'outlier_statistics': lambda: evaluation.outlier_statistics([ROWS, IMAGES]),
  'channel_colinearity': lambda: evaluation.channel_colinearity(ROWS, ROWS.T, ROWS[:, 0], 1),
  'channel_gains': lambda: evaluation.channel_gains(ROWS, ROWS.T),
  'colinearity_index': lambda: evaluation.colinearity_index(ROWS, ROWS.T),
  'colinearity_decay': lambda: training.colinearity_decay([lambda p: (p, p.T)], 0.1).update(
    ROWS, training.ColinearityDecayState(jnp.int32(0), jnp.int32(0)), ROWS
  ),
  'range_quantize': lambda: jax.value_and_grad(
    lambda x: quantizers.range_quantize(x, -1.0, 1.0, 2, signed=True, delta=0.1).sum()
  )(ROWS),
  'quantize_feature': lambda: quantizers.quantize_feature(ROWS, *quantizers.activation_range(ROWS), 4),
  'first ranges': lambda: (quantizers.weight_range(ROWS), quantizers.output_scale(ROWS, 2 * ROWS)),
  'activation steps': lambda: jax.value_and_grad(
    lambda s: quantizers.activation_fake_quantize(ROWS, s, 4).sum()
  )(quantizers.step_of_range(-1.0, ROWS.max(0), 4)),
  'first step of a number': lambda: quantizers.lsq_scale(0.5, 3),
  'step_of_percentiles': lambda: quantizers.step_of_percentiles(ROWS, 4),
  'float8_fake_quantize': lambda: quantizers.float8_fake_quantize(ROWS, 3.0, jnp.float8_e4m3fn),
  'delayed scale': lambda: quantizers.update_delayed_scale(
    quantizers.init_delayed_scale(), 3.0, jnp.float8_e5m2
  ),
  'float8_dot': lambda: jax.value_and_grad(
    lambda x: quantizers.float8_dot(x, ROWS.T, quantizers.Float8Scales(1.0, 2.0, 3.0), 0.0).sum()
  )(ROWS),
}  # fmt: skip


# What looks at values; all else is compiled as a whole.
ON_HOST = {
  name for name in CALLS if name.startswith(('generate', 'tally', 'logistic', 'linear_probe'))
}


def problems():
  """Yields what went wrong, a line a call."""
  for name, (model, x) in NETWORKS.items():
    try:
      variables = jax.eval_shape(model.init, KEY, x)
      out = jax.eval_shape(model.apply, variables, x)
    except Exception as error:
      yield f'{name}: {error!r}'
      continue
    for path, leaf in jax.tree.leaves_with_path((variables, out)):
      if leaf.dtype != jnp.float32:
        yield f'{name}: {jax.tree_util.keystr(path)} is {leaf.dtype}'
  for name, call in CALLS.items():
    try:
      leaves = jax.tree.leaves(call() if name in ON_HOST else jax.jit(call)())
    except Exception as error:
      yield f'{name}: {error!r}'
      continue
    for leaf in leaves:
      if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:
        yield f'{name}: a result is {leaf.dtype}'
      if not np.isfinite(leaf).all():
        yield f'{name}: a result is not finite'


if __name__ == '__main__':
  assert jax.config.jax_enable_x64
  for line in problems():
    print(line.splitlines()[0][:400])
