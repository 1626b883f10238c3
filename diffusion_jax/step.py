"""The train step: one function of (state, metrics, data, batches), compiled once."""
import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from flax import struct

from diffusion_jax import model as model_lib
from diffusion_jax.core import diffusion, ema, schedules
from diffusion_jax.core.types import Array
from diffusion_jax.data import augment
from diffusion_jax.model import Model
from diffusion_jax.nets import codecs, layers
from diffusion_jax.runtime import distributed, sharding
from diffusion_jax.runtime.config import Config, build, explain
from diffusion_jax.runtime.state import TrainState

# What of the net's pass is computed again for its gradient. Products are most of the work, and half of what is kept.
REMAT = {'none': lambda net: net,
         'products': functools.partial(
             jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(layers.PRODUCT))}
BINS = np.linspace(-16, 16, 17)  # edges of the logsnr bins; what lies outside counts in the outer ones


@struct.dataclass
class Binned(clu_metrics.Metric):
  """The mean of a value in each bin of logsnr."""
  total: Array  # [bins]
  count: Array  # [bins]

  @classmethod
  def empty(cls):
    return cls(jnp.zeros(len(BINS) - 1), jnp.zeros(len(BINS) - 1))

  @classmethod
  def from_model_output(cls, losses: Array, logsnr: Array, **_):
    member = jax.nn.one_hot(jnp.clip(jnp.searchsorted(BINS, logsnr) - 1, 0, len(BINS) - 2), len(BINS) - 1)
    return cls(losses @ member, member.sum(0))

  def merge(self, other):
    return Binned(self.total + other.total, self.count + other.count)

  def compute(self):
    return jnp.where(self.count > 0, self.total / jnp.maximum(self.count, 1), jnp.nan)


@struct.dataclass
class Metrics(clu_metrics.Collection):
  """What is averaged between two log records."""
  loss: clu_metrics.Average.from_output('loss')
  grad_norm: clu_metrics.Average.from_output('grad_norm')
  loss_by_logsnr: Binned


def make_step(model: Model, optimizer: optax.GradientTransformation, where: TrainState | None = None) -> Callable:
  """steps(root, state, metrics, data, batches) -> (state, metrics), a step for each along the first axis of `batches`.

  root: the key of all randomness, which is a function of (root, step); see `root_key`.
  data: the whole data set on the device, images uint8 [N, *S, C] and labels [N], and batches are indices [K, B]; or
  None, and batches are themselves (images [K, B, *S, C], labels [K, B]). A model of text has tokens [.., L] for labels.
  where: the shardings of the state, without which all is left to the compiler.
  """
  config = model.config
  with explain('config'):
    spread = sharding.over_context(where.step.mesh, model.shape[0]) if where else lambda x: x
  place = sharding.over_batch(where.step.mesh) if where else lambda x: x
  draw, process = model.draw, model.diffusion.process
  rates = {name: build(spec) for name, spec in config.ema.items()}
  size, parts = config.train.batch_size, config.train.accumulate
  fetch_averages = store_averages = lambda emas: emas
  if where and config.train.ema_on_host:  # each leaf passes through the device by itself
    fetch_averages = lambda emas: jax.device_put(emas, sharding.on_device(where.emas))
    store_averages = lambda emas: jax.device_put(emas, where.emas)
  # Warns if sampling would start where training never was.
  schedules.check_terminal(process, process.init(root_key(config)))

  def one_step(root, carry, batch):
    state, metrics = carry
    images, labels = batch
    key = jax.random.fold_in(root, state.step)
    flip_key, drop_key, level_key, eps_key, dropout_key = jax.random.split(key, 5)
    if config.data.flip:
      images = mirror(flip_key, images)
    pixels, about = codecs.floats(images), model.about(labels)
    if config.data.augment:
      pixels, about['augment'] = augment.augment(jax.random.fold_in(key, 5), pixels, config.data.augment)
    frozen = dict(state.frozen)
    x0 = spread(model.codec.encode(frozen.get('codec', {}), pixels, jax.random.fold_in(key, 6)))
    eps = jax.random.normal(eps_key, x0.shape)
    if model.given:
      about['image'] = model.given(jax.random.fold_in(key, 7), pixels if model.control else x0)
    drop = jax.random.bernoulli(drop_key, config.label_dropout, (size,))

    def loss_of(trained, i):
      # Every parts-th example: each device keeps its own.
      part = lambda tree: jax.tree.map(lambda a: a.reshape(size // parts, parts, *a.shape[1:])[:, i], tree)
      params, given = model.whole(trained, frozen), part((about, drop))
      level, correction = part(draw.sample(level_key, size, process, params['process'], state.draw))
      cond = model.cond(params, *given)
      net = REMAT[config.train.remat](lambda nets, x, noise: model.apply(
          nets, x, noise, cond, train=True, rngs={'dropout': jax.random.fold_in(dropout_key, i)}))
      nets = {name: params[name] for name in ('net', 'control') if name in params}
      losses = diffusion.loss(functools.partial(net, nets), part(x0), part(eps), level, model.diffusion,
                              model.weight, params['process'], params.get('weight'))
      corrected = losses * correction
      return corrected.mean(), (losses, corrected, level)

    def accumulate(grads, i):
      with layers.gradients_leave_in(config.train.reduce), layers.placed(place):
        (_, seen), more = jax.value_and_grad(loss_of, has_aux=True)(state.params, i)
      return jax.tree.map(lambda a, b: a + b / parts, grads, more), seen

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, seen = loop(accumulate, zeros, jnp.arange(parts))
    losses, corrected, level = jax.tree.map(lambda a: a.swapaxes(0, 1).ravel(), seen)  # in the batch's order again
    with jax.named_scope('update'):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      project = getattr(model.net, 'project', None)
      if project and 'net' in params:  # a net whose weights keep their norm (EDM2)
        params = {**params, 'net': project(params['net'])}
      emas = {name: ema.update(average, params, rates[name](state.step, size))
              for name, average in fetch_averages(state.emas).items()}
    metrics = metrics.merge(Metrics.single_from_model_output(
        loss=corrected.mean(), grad_norm=optax.tree.norm(grads), losses=losses, logsnr=level.logsnr))
    remembered = draw.update(state.draw, level, losses, process, state.params['process'])
    return (state.replace(step=state.step + 1, params=params, opt_state=opt_state, emas=store_averages(emas),
                          draw=remembered), metrics), None

  def steps(root, state, metrics, data, batches):
    fetch = lambda batch: jax.tree.map(lambda a: a[batch], data) if data else batch
    body = lambda carry, batch: one_step(root, carry, fetch(batch))
    return loop(body, (state, metrics), batches)[0]

  def checked(*arguments):
    with explain('config'):
      sharding.check_convolutions(where.step.mesh, steps, *arguments)
    return steps(*arguments)

  return checked if where else steps


def root_key(config: Config) -> Array:
  """The key that the randomness of all train steps comes from."""
  return model_lib.key(config.seed, 'train')


def mirror(key: Array, images: Array) -> Array:
  """Images [B, *S, C], each turned left to right (along its last spatial axis) with probability 1/2."""
  chosen = jax.random.bernoulli(key, 0.5, (len(images),) + (1,) * (images.ndim - 1))
  return jnp.where(chosen, images[..., ::-1, :], images)


def loop(body: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
  """jax.lax.scan(body, carry, xs), written out where that is faster.

  Inside a while loop XLA's CPU backend runs backward convolutions on one thread: a step is many times slower there.
  """
  length = len(jax.tree.leaves(xs)[0])
  if length > 1 and jax.default_backend() != 'cpu':
    return jax.lax.scan(body, carry, xs)
  ys = []
  for i in range(length):
    carry, y = body(carry, jax.tree.map(lambda a, i=i: a[i], xs))
    ys.append(y)
  return carry, jax.tree.map(lambda *a: jnp.stack(a), *ys)


def initialise(model: Model, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
  """The state before the first step, made where it belongs: no device ever holds more than its part."""
  shardings = jax.tree.map(lambda a: a.sharding, abstract)
  init = jax.jit(lambda key: model_lib.initial_state(model, optimizer, key), out_shardings=shardings)
  key = model_lib.key(model.config.seed, 'init')
  # It runs once: on CPU, optimising the code of hundreds of random draws would take longer than all the rest.
  quick = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  return init.lower(key).compile(compiler_options=quick)(key)


class Steps:
  """The compiled train step: (state, metrics, data, batch) -> (state, metrics), the first two donated.

  Calls return at once, with at most `IN_FLIGHT` of them unfinished: more would only hold their batches in memory, and
  XLA's CPU client can lock up for ever with 32 programs waiting for the same two devices.
  """
  IN_FLIGHT = 8

  def __init__(self, compiled: jax.stages.Compiled, root: Array):
    self.compiled, self.root, self.unfinished = compiled, root, collections.deque()

  def __call__(self, *arguments: Any) -> tuple[TrainState, Metrics]:
    state, metrics, done = self.compiled(self.root, *arguments)
    self.unfinished.append(done)
    if len(self.unfinished) == self.IN_FLIGHT:
      self.unfinished.popleft().block_until_ready()
    return state, metrics


def jit_step(model: Model, optimizer: optax.GradientTransformation, state: TrainState, metrics: Metrics) -> Callable:
  """The jitted step (root, state, metrics, data, batch) -> (state, metrics, step), for arrays that lie where these do.

  The state and the metrics, or ShapeDtypeStructs with shardings, say only where; they are donated: the step writes over
  them.
  """
  where = jax.tree.map(lambda a: a.sharding, (state, metrics))
  steps = make_step(model, optimizer, where[0])

  def call(root, *arguments):  # the root is an argument so that seeds share one compiled program
    state, metrics = steps(root, *arguments)
    return state, metrics, state.step  # the state is donated to the next call: something must stay to be waited for

  return jax.jit(call, donate_argnums=(1, 2), out_shardings=(*where, where[0].step))


def compile_step(model: Model, optimizer: Any, *arguments: Any) -> tuple[Steps, float]:
  """The train step compiled for (state, metrics, data, batch), arrays or their shapes, and the seconds that took."""
  jitted, start = jit_step(model, optimizer, *arguments[:2]), time.perf_counter()
  root = distributed.everywhere(root_key(model.config), arguments[0].step.sharding)
  return Steps(jitted.lower(root, *arguments).compile(), root), time.perf_counter() - start
