"""Meshes of four axes: their sizes, and which devices lie along which."""
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from diffusion_jax.runtime import sharding


def test_a_mesh_has_four_axes_of_which_one_takes_the_rest():
  mesh = sharding.make_mesh(data=-1, fsdp=2, tensor=2)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2, 'context': 1}
  assert mesh.axis_types == (AxisType.Auto,) * 4
  assert dict(sharding.make_mesh(data=1, tensor=-1, context=2).shape)['tensor'] == 4
  assert dict(sharding.make_mesh(devices=jax.devices()[:3]).shape)['data'] == 3


@pytest.mark.parametrize(('sizes', 'words'), [
    ({'tensor': 0}, 'mesh.tensor must be at least 1, or -1 for the rest, got 0'),
    ({'tensor': -1}, 'mesh.data and mesh.tensor cannot both be -1'),
    ({'tensor': 3}, 'data=-1, fsdp=1, tensor=3 does not fit on 8 devices: 8 is not a multiple of 3'),
    ({'data': 2, 'tensor': 4, 'context': 2}, 'data=2, fsdp=1, tensor=4, context=2 does not fit on 8 .* it takes 16')])
def test_bad_meshes_of_four_axes_are_named(sizes, words):
  with pytest.raises(ValueError, match=words):
    sharding.make_mesh(**sizes)


def fakes(num_slices, each, platform='cpu', processes=1):
  """Devices of several slices, in turns, as a cluster might list them."""
  return [types.SimpleNamespace(id=i, slice_index=i % num_slices, platform=platform, process_index=i % processes,
                                device_kind='fake') for i in range(num_slices * each)]


@pytest.mark.parametrize('shape', [(2, 4, 1, 1), (4, 2, 1, 1), (8, 1, 1, 1), (2, 2, 2, 1)])
def test_only_the_data_axis_crosses_slices(shape):
  placed = sharding._ordered(fakes(2, 4), shape)
  assert placed.shape == shape and len({d.id for d in placed.flat}) == 8
  halves = placed.reshape(2, -1)  # of the data axis
  assert [{d.slice_index for d in half} for half in halves] == [{0}, {1}]


def test_slices_that_data_cannot_cross_are_refused_where_it_matters():
  with pytest.raises(ValueError, match=r'of 2 slices.*mesh.data must be a multiple of 2.* got mesh.data=1'):
    sharding._ordered(fakes(2, 4, 'tpu'), (1, 8, 1, 1))
  assert sharding._ordered(fakes(2, 4, 'gpu'), (1, 8, 1, 1)).shape == (1, 8, 1, 1)  # a slice is a host there


def test_a_mesh_leaves_no_process_without_a_device():
  with pytest.raises(ValueError, match='a mesh of 1 of the 8 devices leaves process 1 without any'):
    sharding.make_mesh(data=1, devices=fakes(2, 4, processes=2))


def test_tensor_and_context_do_not_divide_the_batch():
  mesh = sharding.make_mesh(data=2, tensor=2, context=2)
  sharding.check_divides(mesh, 6, 'size')
  np.testing.assert_array_equal(sharding.rows(mesh, 6), np.arange(6))  # one process holds them all
  with pytest.raises(ValueError, match='size 5 must be a multiple of the 2 devices that share a batch'):
    sharding.check_divides(mesh, 5, 'size')
