"""Convolutions that are fast on a CPU too, and everywhere else exactly `jax.lax.conv_general_dilated`.

XLA's CPU backend computes a depthwise convolution, or one of a map that is smaller than the kernel, tens
of times slower than a few products of shifted arrays. `conv_general_dilated` here is the same function of the
same arguments. It is a primitive of its own with three properties:

- what is compiled for a CPU is the fastest formulation for the shapes at hand (`convolution_forms`); what is
  compiled for a TPU or GPU is the plain convolution, with nothing around it;
- derivatives, transposes and batching are those of JAX's convolution, expressed in this primitive again. So
  gradients of any order, forward mode, `vmap` over inputs and over kernels, `scan`, `remat` and `shard_map`
  work, the residuals are input and kernel alone, and each of these convolutions is formulated by its own
  shapes;
- it fits `flax.linen.Conv(conv_general_dilated=...)`. All models of the library use it; `fast_convolutions`
  gives it to a model that does not.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import lax
from jax.extend.core import Literal, Primitive
from jax.interpreters import ad, batching, mlir

from jaxlab.models.convolution_forms import formulate

Array = jax.Array


def conv_general_dilated(
  lhs: Array,
  rhs: Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
  precision: Any = None,
  preferred_element_type: Any = None,
  **kwargs: Any,
) -> Array:
  """Returns `jax.lax.conv_general_dilated` of the same arguments, fast on a CPU too.

  Equal to the plain convolution up to rounding: another order of summation, never a lower precision (half
  precision is summed in float32).

  >>> import jax.numpy as jnp
  >>> x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
  >>> y = conv_general_dilated(
  ...   x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=2
  ... )
  >>> y[0, :, :, 0]
  Array([[4., 6., 6., 4.],
         [6., 9., 9., 6.],
         [6., 9., 9., 6.],
         [4., 6., 6., 4.]], dtype=float32)

  Args:
    lhs: input of rank n + 2; axes as `dimension_numbers` says.
    rhs: kernel of rank n + 2.
    window_strides: n strides.
    padding: `'SAME'`, `'SAME_LOWER'`, `'VALID'`, or n pairs (low, high).
    lhs_dilation: n factors, or None.
    rhs_dilation: n factors, or None.
    dimension_numbers: three strings such as `('NHWC', 'HWIO', 'NHWC')`; None: `('NCHW', 'OIHW', 'NCHW')`.
    feature_group_count: groups of channels.
    batch_group_count: groups of the batch.
    precision: of the products, as JAX's.
    preferred_element_type: dtype of sums and result, as JAX's.
    **kwargs: what a newer JAX adds.

  Raises:
    TypeError, ValueError: as JAX's.
  """
  plain = functools.partial(
    lax.conv_general_dilated,
    window_strides=window_strides,
    padding=padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    batch_group_count=batch_group_count,
    precision=precision,
    preferred_element_type=preferred_element_type,
    **kwargs,
  )
  return _with_own_primitive(plain, lhs, rhs)


@contextlib.contextmanager
def fast_convolutions() -> Iterator[None]:
  """Lets every `flax.linen.Conv` that is called inside compute by `conv_general_dilated` of this module.

  For models that know nothing of it, unchanged:

    with fast_convolutions():
      logits = model.apply(variables, images)

  It acts while the model is traced, so it belongs inside of a function that is jitted or differentiated. A
  layer with a `conv_general_dilated` of its own keeps that.
  """

  def interceptor(call, args, kwargs, context):
    module = context.module
    if isinstance(module, nn.Conv) and module.conv_general_dilated is None:
      # Bound modules live for one `apply`; a clone would lose its scope.
      object.__setattr__(module, 'conv_general_dilated', conv_general_dilated)
    return call(*args, **kwargs)

  with nn.intercept_methods(interceptor):
    yield


def _bind_plain(lhs: Array, rhs: Array, **params: Any) -> Array:
  return lax.conv_general_dilated_p.bind(lhs, rhs, **params)


def _with_own_primitive(function: Callable[..., Array], *args: Array) -> Array:
  """Returns `function(*args)` with each convolution in it bound as this module's primitive.

  `function` is a convolution, or what JAX makes of one: a handful of operations without inner functions.
  """
  closed = jax.make_jaxpr(function)(*args)
  jaxpr = closed.jaxpr
  leaves = jax.tree.leaves(args)  # a quantization library may hand in a kernel that is a pytree
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *leaves], strict=True))

  def read(atom):
    return atom.val if isinstance(atom, Literal) else values[atom]

  for equation in jaxpr.eqns:
    plain = equation.primitive is lax.conv_general_dilated_p
    primitive = convolution_p if plain else equation.primitive
    outputs = primitive.bind(*map(read, equation.invars), **equation.params)
    outputs = outputs if primitive.multiple_results else [outputs]
    values.update(zip(equation.outvars, outputs, strict=True))
  (result,) = jaxpr.outvars
  return read(result)


def _abstract(lhs: Any, rhs: Any, **params: Any) -> Any:
  aval, _ = lax.conv_general_dilated_p.abstract_eval(lhs, rhs, **params)
  return aval


@functools.lru_cache(maxsize=1024)
def _compiled(**params: Any) -> Callable[[Array, Array], Array]:
  return jax.jit(functools.partial(convolution_p.bind, **params))


def _transpose_input(cotangent: Array, lhs: Any, rhs: Array, **params: Any) -> Array:
  def transposed(cotangent, rhs):
    forward = functools.partial(_bind_plain, rhs=rhs, **params)
    return jax.linear_transpose(forward, lhs.aval)(cotangent)[0]

  return _with_own_primitive(transposed, cotangent, rhs)


def _transpose_kernel(cotangent: Array, lhs: Array, rhs: Any, **params: Any) -> Array:
  def transposed(cotangent, lhs):
    forward = functools.partial(_bind_plain, lhs, **params)
    return jax.linear_transpose(forward, rhs.aval)(cotangent)[0]

  return _with_own_primitive(transposed, cotangent, lhs)


def _batch(args: Sequence[Array], axes: Sequence[Any], **params: Any) -> tuple[Array, int]:
  batched = jax.vmap(functools.partial(_bind_plain, **params), tuple(axes))
  return _with_own_primitive(batched, *args), 0


convolution_p = Primitive('convolution')
convolution_p.def_impl(lambda lhs, rhs, **params: _compiled(**params)(lhs, rhs))
convolution_p.def_abstract_eval(_abstract)
ad.defbilinear(convolution_p, _transpose_input, _transpose_kernel)
batching.primitive_batchers[convolution_p] = _batch
mlir.register_lowering(convolution_p, mlir.lower_fun(_bind_plain, multiple_results=False))
mlir.register_lowering(
  convolution_p, mlir.lower_fun(formulate, multiple_results=False), platform='cpu'
)
