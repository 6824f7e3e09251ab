"""Work around named modules: read, change, replace and collect what flows through a network.

A model is a plain Linen module that knows nothing of quantization, adapters or pruning. A *hook* names
modules by a regular expression over their path (`layer1_0/conv1`) and says what to do there. `apply` is
`model.apply` under a list of hooks:

  ranges = lambda site, x: site.write('max', jnp.max(x)) or x
  y, state = apply(model, variables, images, hooks=[Hook(r'.*/relu\\d', output=ranges)],
                   mutable=['hooks'])

Arrays that hooks read (scales, masks, compensations) and write (features, statistics) are an ordinary
variable collection (`'hooks'` unless a hook says otherwise), a pytree that mirrors the module tree. So
`jax.grad` reaches them, `jit` and `vmap` see no side effect, and they are carried through `nn.remat` and
`nn.scan` with the parameters.
"""

import contextlib
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

Array = jax.Array
PyTree = Any


class HookPoint(nn.Module):
  """Returns its input. Gives a path to a value that no module of its own computes.

  Attention's operands, a softmax, the sum of a residual block: `HookPoint(name='softmax')(weights)`.
  """

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns `x` unchanged."""
    return x


@dataclasses.dataclass(frozen=True)
class Site:
  """The module call at which a hook is working, and the arrays that belong to it.

  Attributes:
    module: the bound Linen module.
    path: its path in the model, e.g. `layer1_0/conv1`; the empty string is the model itself.
    collection: the variable collection of `read` and `write`.
    method: that is called.
  """

  module: nn.Module
  path: str
  collection: str = 'hooks'
  method: str = '__call__'

  def read(self, name: str) -> Array:
    """Returns the array `name` stored for this module; raises ValueError where there is none."""
    value = self.module.scope.get_variable(self.collection, name)
    if value is None:
      raise ValueError(
        f'Module {self.path!r} has no {name!r} in collection {self.collection!r}: pass '
        f'`apply` variables that hold it (was the model calibrated?).'
      )
    return value

  def has(self, name: str) -> bool:
    """Returns whether an array `name` is stored for this module."""
    return self.module.scope.has_variable(self.collection, name)

  def write(self, name: str, value: PyTree) -> None:
    """Stores `value` as `name` for this module, if `apply` was asked for the collection."""
    if self.module.is_mutable_collection(self.collection):
      self.module.scope.put_variable(self.collection, name, value)

  def keep(self, name: str, value: PyTree) -> None:
    """Stores `value` as `name` for this module; raises ValueError where it would be lost."""
    if not self.module.is_mutable_collection(self.collection):
      raise ValueError(not_carried(self.path, self.collection))
    self.write(name, value)


def not_carried(path: str, collection: str) -> str:
  """Returns the message for a module under a transformation that loses what is stored for it."""
  return (
    f'{path!r} runs under a transformation (nn.vmap, nn.scan, nn.RNN) that does not carry the collection '
    f"{collection!r}: add it to the transformation's variable_axes, next to 'params', or leave the module "
    f'out of the rules.'
  )


Transform = Callable[[Site, Array], Array]
Replacement = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Hook:
  """What to do at the modules whose whole path matches `pattern`.

  Exactly one of the three is given.

  Attributes:
    pattern: regular expression that must match the whole path (`re.fullmatch`).
    input: `(site, x) -> x`, applied to the module's first argument, also where it is given by its name.
    output: `(site, y) -> y`, applied to what the module returns.
    call: `(site, call, *args, **kwargs) -> y`, in place of the module's call; `call` is the
      module's own (and the inner hooks'), so that a block can be dropped (`return args[0]`),
      wrapped, or compensated from its own input.
    collection: the variable collection of the site's arrays.
    methods: of the module at which the hook works, e.g. `('__call__', 'attend')` of embeddings.
  """

  pattern: str
  input: Transform | None = None
  output: Transform | None = None
  call: Replacement | None = None
  collection: str = 'hooks'
  methods: tuple[str, ...] = ('__call__',)

  def __post_init__(self):
    given = [name for name in ('input', 'output', 'call') if getattr(self, name) is not None]
    if len(given) != 1:
      raise ValueError(
        f'Hook({self.pattern!r}) takes exactly one of input=, output=, call=; got {given or "none"}.'
      )
    try:
      re.compile(self.pattern)
    except re.error as error:
      raise ValueError(
        f'Hook pattern {self.pattern!r} is no regular expression: {error}.'
      ) from None


def path_string(path: Sequence[str]) -> str:
  """Returns a module path as one string: `('layer1_0', 'conv1') -> 'layer1_0/conv1'`."""
  return '/'.join(path)


def any_of(paths: Iterable[str]) -> str:
  """Returns the regular expression that matches exactly these paths.

  >>> any_of(['layer1_0', 'layer1_1'])
  'layer1_0|layer1_1'
  """
  return '|'.join(map(re.escape, paths))


def check_linen(model: Any) -> None:
  """Raises ValueError unless `model` is a Linen module; says how to bridge one of flax NNX."""
  if isinstance(model, nn.Module):
    return
  if isinstance(model, type) and issubclass(model, nn.Module):
    raise ValueError(
      f'model is the class {model.__name__}: pass an instance, {model.__name__}(...).'
    )
  from flax import nnx  # not loaded by Linen; whoever has a module of it has loaded it

  name = type(model).__name__
  if isinstance(model, nnx.Module):
    raise ValueError(
      f'model is a flax NNX module, {name}; expected a Linen module, around whose named parts this library '
      f'works. Bridge it: `flax.nnx.bridge.to_linen({name}, ...)` with the arguments of its constructor, '
      f"and variables {{'params': nnx.to_pure_dict(nnx.state(model, nnx.Param))}}. The bridged module "
      f'has one path. For hooks on its blocks, bridge each within a Linen module: '
      f"`nnx.bridge.to_linen(Block, ..., name='blocks_0')(x)`."
    )
  raise ValueError(f'model must be a Linen module, got {name}.')


@contextlib.contextmanager
def intercepting(hooks: Sequence[Hook], prefix: str | None = None) -> Iterator[None]:
  """Runs Linen calls inside the context under `hooks`; the first hook of the list is the innermost.

  With a `prefix` the module that is called is a part of a larger model, in which it has this path: hooks see
  the paths of the larger model, and those that match nothing here are no error.

  Raises:
    ValueError: on leaving the context, if a hook has matched no module that was called. The message
      names the pattern and the closest paths.
  """
  matched: set[int] = set()
  paths: set[str] = set()
  patterns = [re.compile(hook.pattern) for hook in hooks]
  methods = {'__call__'}.union(*(hook.methods for hook in hooks))

  def interceptor(next_fun, args, kwargs, context):
    if context.method_name not in methods:
      return next_fun(*args, **kwargs)
    path = path_string(context.module.path)
    if prefix:
      path = f'{prefix}/{path}' if path else prefix
    paths.add(path)
    call = next_fun
    for index, (hook, pattern) in enumerate(zip(hooks, patterns, strict=True)):
      if context.method_name in hook.methods and pattern.fullmatch(path):
        matched.add(index)
        site = Site(context.module, path, hook.collection, context.method_name)
        call = _around(hook, site, call)
    return call(*args, **kwargs)

  with nn.intercept_methods(interceptor):
    yield
  unmatched = [hook.pattern for index, hook in enumerate(hooks) if index not in matched]
  if unmatched and prefix is None:
    raise_unmatched(unmatched, paths, 'hook pattern', 'module')


def _around(hook: Hook, site: Site, call: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `call` with `hook` around it."""

  def wrapped(*args, **kwargs):
    if hook.input is not None:
      x, given = first_argument(site, args, kwargs)
      args, kwargs = given(hook.input(site, x))
      return call(*args, **kwargs)
    if hook.output is not None:
      return hook.output(site, call(*args, **kwargs))
    return hook.call(site, call, *args, **kwargs)

  return wrapped


def arguments_in_order(site: Site, args: tuple, kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
  """Returns the arguments of a module's call, by position or name, in the order of its signature.

  Keywords that the signature does not name come last, in the order of their names.
  """
  names = list(inspect.signature(getattr(type(site.module), site.method)).parameters)
  known = [name for name in names if name in kwargs]
  order = [*known, *sorted(set(kwargs) - set(known))]
  return {**dict(enumerate(args)), **{name: kwargs[name] for name in order}}


def first_argument(
  site: Site, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[Any, Callable[[Any], tuple[tuple, dict[str, Any]]]]:
  """Returns the first argument of a module's call, and the function that puts another in its place.

  It is the first of the signature, whether it is given by position or by name.

  Raises:
    ValueError: for a module that is called without arguments.
  """
  first = next(iter(arguments_in_order(site, args, kwargs).items()), None)
  if first is None:
    raise ValueError(f'The input of {site.path!r}: the module is called without one.')
  name, x = first

  def given(new: Any) -> tuple[tuple, dict[str, Any]]:
    if name == 0:
      return (new, *args[1:]), dict(kwargs)
    return args, {**kwargs, name: new}

  return x, given


def raise_unmatched(patterns: Sequence[str], paths: Sequence[str], what: str, of: str) -> None:
  """Raises ValueError: `patterns` match none of `paths`; suggests the closest ones."""
  known = sorted(path for path in paths if path)
  close = [
    name for pattern in patterns for name in difflib.get_close_matches(pattern, known, 3, 0.5)
  ]
  shown = close or known[:8]
  raise ValueError(
    f'No {of} matches {what} {", ".join(map(repr, patterns))}. '
    f'{"Closest" if close else "Some"} of the {len(known)} paths: {", ".join(shown)}.'
  )


def apply(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  *args: Any,
  hooks: Sequence[Hook] = (),
  prefix: str | None = None,
  **kwargs: Any,
) -> Any:
  """Returns `model.apply(variables, *args, **kwargs)` with `hooks` around the named modules.

  Pure: what hooks write comes back as a collection, if `mutable` names it. A hook on the root module has
  the empty path. A hook whose pattern matches nothing raises ValueError (while tracing, under `jit`).

  With `prefix` the `model` is a part of a larger one, cut out: `prefix` is its path there, hook patterns
  are those of the larger model, and patterns without a match are ignored.

  Raises:
    ValueError: if `model` is no Linen module (the message says how to bridge one of NNX), or a pattern
      matches nothing.
  """
  check_linen(model)
  with intercepting(hooks, prefix):
    return model.apply(variables, *args, **kwargs)


def eval_mode_hooks(patterns: Sequence[str]) -> tuple[Hook, ...]:
  """Returns hooks under which modules `(x, train)` whose paths match run with `train=False`.

  Their batch normalization then keeps and uses its running statistics, as a frozen backbone's should.
  """

  def call(site: Site, call: Callable[..., Any], x: Any, *_: Any, **__: Any) -> Any:
    del site
    return call(x, False)

  return tuple(Hook(pattern, call=call) for pattern in patterns)


def module_paths(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
  """Returns the paths of all modules that `model(*args, **kwargs)` calls, in order of first call.

  Traces abstractly: no memory, no computation. Arguments may be `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: if `model` is no Linen module.
  """
  check_linen(model)
  paths: dict[str, None] = {}

  def record(next_fun, args, kwargs, context):
    if context.method_name == '__call__':
      paths.setdefault(path_string(context.module.path))
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(record):
    jax.eval_shape(lambda *a: model.init(jax.random.key(0), *a, **kwargs), *args)
  return [path for path in paths if path]


def capture(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  patterns: Sequence[str],
  *args: Any,
  hooks: Sequence[Hook] = (),
  **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
  """Returns the model's output and the outputs of the modules that match `patterns`, by path.

  `hooks` work as in `apply`. Capturing is outside of all of them: a captured value is what the module hands
  on, quantized, compensated or replaced, and captured modules within a block that a hook drops are not
  called. Gradients flow through captured values, so that losses can be made of them.

  With blocks under `nn.scan` a captured value has the blocks' axis in front. Of a module that is called
  several times, the last call's output is returned.

  Args:
    model: any Linen module.
    variables: its variables, and the arrays that `hooks` read.
    patterns: regular expressions over whole paths.
    *args: passed to the model.
    hooks: as for `apply`; what they write comes back with `mutable=`.
    **kwargs: passed to `apply`. With `mutable` the first result is the pair of output and state.

  Raises:
    ValueError: if `model` is no Linen module, or a pattern of `patterns` or `hooks` matches nothing.
  """
  if isinstance(patterns, str):
    raise ValueError(f'patterns is a list of regular expressions; got the string {patterns!r}.')

  def keep(site: Site, y: Any) -> Any:
    # No module is called `.output`, and in a tuple a returned dict is no part of the tree of paths.
    site.write('.output', (y,))
    return y

  wanted = kwargs.pop('mutable', False)
  names = [wanted] if isinstance(wanted, str) else wanted or ()
  mutable = True if wanted is True else [*names, 'captures']
  keeping = [Hook(pattern, output=keep, collection='captures') for pattern in patterns]
  out, state = apply(model, variables, *args, hooks=[*hooks, *keeping], mutable=mutable, **kwargs)
  state = dict(state)
  flat = traverse_util.flatten_dict(dict(state.pop('captures', {})), sep='/')
  captured = {path.removesuffix('.output').rstrip('/'): y for path, (y,) in flat.items()}
  return (out if wanted is False else (out, state)), captured


def map_matching(
  fn: Callable[[str, Array], Array], tree: PyTree, pattern: str, *, what: str = 'parameter'
) -> PyTree:
  """Returns `tree` with `fn(path, leaf)` at the leaves whose whole path matches `pattern`.

  The pure transform of a parameter tree that goes with hooks on activations: fake-quantize kernels, merge
  low-rank updates, mask.

  Raises:
    ValueError: if no leaf matches.
  """
  flat = traverse_util.flatten_dict(dict(tree), sep='/')
  chosen = {path for path in flat if re.fullmatch(pattern, path)}
  if not chosen:
    raise_unmatched([pattern], list(flat), 'pattern', what)
  new = {path: fn(path, leaf) if path in chosen else leaf for path, leaf in flat.items()}
  return traverse_util.unflatten_dict(new, sep='/')
