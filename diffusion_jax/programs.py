"""What a program does, read from it: the FLOPs of a traced one, the collectives of a compiled one."""
import collections
import math
import re
from typing import Any, NamedTuple

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')
# '%name = TYPE kind(' or '... kind-start(': what begins asynchronously ends in a '-done', which is no second one.
OP = re.compile(rf'^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|[^\s(]\S*) ({"|".join(KINDS)})(-start)?\((.*)$')
HEAD = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
CALLS = re.compile(r'(\w+)=(?:\{([^{}]*)\}|%?([\w.-]+))')
CALLERS = ('calls', 'to_apply', 'body', 'branch_computations', 'true_computation', 'false_computation',
           'called_computations')
TRIPS = re.compile(r'known_trip_count\W+n\W+(\d+)')
ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')


class Collective(NamedTuple):
  """All collectives of one kind and type that a device takes part in, in one run of a program.

  One that XLA has combined of several types counts with each.
  """
  kind: str
  dtype: str
  count: int
  bytes: int  # of what is reduced, gathered or moved, as large as it is on one device before or after, the larger
  sent: int   # bytes that a device sends, by the ring algorithm of each


def collectives(text: str, num_devices: int) -> list[Collective]:
  """The collectives of a compiled program, from `Compiled.as_text()`: the largest first.

  Those in loops count as often as the loop runs where XLA knows it, and once where it does not.
  """
  found, times = collections.defaultdict(lambda: [0, 0, 0.0]), _times(text)
  computation = ''
  for line in text.splitlines():
    if head := HEAD.match(line):
      computation = head[2]
    elif op := OP.match(line):
      shape, kind, start, rest = op.groups()
      group, repeats = _group(rest, num_devices), times.get(computation, 1)
      sizes = collections.Counter()
      for dtype, dims in ARRAY.findall(shape):
        if not (start and kind == 'collective-permute' and not dims):  # its two counters
          sizes[dtype] += math.prod(map(int, filter(None, dims.split(',')))) * bits(dtype) / 8
      for dtype, size in sizes.items():
        if start and kind == 'all-gather':  # the type has operands and results
          size *= group / (group + 1)
        elif start and kind == 'collective-permute':
          size /= 2
        elif kind == 'reduce-scatter':
          size *= group
        entry = found[kind, dtype]
        entry[0] += repeats
        entry[1] += repeats * size
        entry[2] += repeats * size * _sent(kind, group)
  rows = [Collective(*key, count, round(size), round(sent)) for key, (count, size, sent) in found.items()]
  return sorted(rows, key=lambda row: -row.sent)


def _times(text: str) -> dict[str, int]:
  """How often each computation of a program runs: loops by their trip counts."""
  calls, computation, entry = collections.defaultdict(list), '', ''
  for line in text.splitlines():
    if head := HEAD.match(line):
      computation = head[2]
      entry = computation if head[1] else entry
    elif computation and '=' in line:
      trips = int(found[1]) if (found := TRIPS.search(line)) else 1
      for key, several, one in CALLS.findall(line):
        if key in CALLERS:
          names = [name.strip(' %') for name in several.split(',')] if several else [one]
          calls[computation] += [(name, trips if key == 'body' else 1) for name in names]
    else:
      calls[computation] += []
  times = collections.Counter({entry: 1})
  for caller in reversed(list(calls)):  # what is called stands before what calls it
    for name, factor in calls[caller]:
      times[name] += times[caller] * factor
  return times


def bits(dtype: str) -> int:
  """Of one number of an HLO type: 'bf16' -> 16, 'pred' -> 8."""
  return int(re.search(r'\d+', dtype)[0]) if re.search(r'\d', dtype) else 8 if dtype == 'pred' else 0


def _group(text: str, num_devices: int) -> int:
  """How many devices take part in a collective, from its attributes."""
  if found := re.search(r'replica_groups=\[(?:\d+,)*(\d+)\]<=', text):
    return int(found[1])
  if found := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
    return found[1].count(',') + 1
  return num_devices


def _sent(kind: str, group: int) -> float:
  """Bytes that a device of `group` sends for each byte of the array, by the ring algorithm."""
  return {'all-reduce': 2 * (group - 1) / group, 'collective-permute': 1, 'collective-broadcast': 1}.get(
      kind, (group - 1) / group)


def flops(jaxpr: Any) -> dict[str, float]:
  """Of the matrix products and convolutions of a jaxpr, by the type of their inputs: {'bfloat16': 1e12}.

  Loops of known length count as often as they run, while loops once, a branch as its dearest. What is recomputed for
  gradients counts, for it is in the jaxpr; zeros that a convolution has between its inputs do not; padding does.
  """
  total = collections.Counter()
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    name, params = eqn.primitive.name, eqn.params
    if name in ('dot_general', 'conv_general_dilated', 'product'):
      total[str(eqn.invars[0].aval.dtype)] += _product(name, eqn, params)
      continue
    inner = [flops(sub) for sub in _jaxprs(params)]
    if name == 'cond':
      inner = [max(inner, key=lambda counts: sum(counts.values()))] if inner else []
    factor = params['length'] if name == 'scan' else params['mesh'].size if name == 'shard_map' else 1
    for counts in inner:
      for dtype, count in counts.items():
        total[dtype] += count * factor
  return dict(total)


def _product(name, eqn, params):
  (x, kernel), out = (v.aval.shape for v in eqn.invars), eqn.outvars[0].aval.shape
  if name == 'dot_general':
    return 2 * math.prod(out) * math.prod(x[i] for i in params['dimension_numbers'][0][0])
  if name == 'product':  # of nets.layers: x @ kernel
    return 2 * math.prod(out) * kernel[0]
  spec = params['dimension_numbers'].rhs_spec  # output channels, input channels, space
  return 2 * math.prod(out) * math.prod(kernel[i] for i in spec[1:]) / math.prod(params['lhs_dilation'])


def _jaxprs(params):
  for value in params.values():
    for item in value if isinstance(value, (list, tuple)) else [value]:
      if hasattr(getattr(item, 'jaxpr', item), 'eqns'):
        yield item
