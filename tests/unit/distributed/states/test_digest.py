"""Digests of tensors: any bit counts, wherever it lies in memory, and nothing else does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_mnist.distributed.states.compare import RankStates
from dist_mnist.distributed.states.digest import ROW, SMALL, state_digest, tensor_digests

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool]
SHAPES = [(), (1,), (3,), (0, 4), (5, 7), (2, 3, 3, 5), (ROW // 4,), (ROW + 3,), (SMALL // 4 + 5,), (SMALL // 8, 9)]


@st.composite
def tensors(draw) -> torch.Tensor:
    """Of random bits, lying in memory in one of the ways in which they do."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ahead = draw(st.integers(0, 3))  # in a larger block of memory, as a view of it
    size = ahead + torch.Size(shape).numel()
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size * dtype.itemsize,), generator=generator)
    tensor = bits.to(torch.uint8).view(dtype)[ahead:].view(shape)
    return tensor.permute(draw(st.permutations(range(tensor.dim()))))


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its memory, to be changed: (n,) uint8."""
    step = tensor.element_size()
    return torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(), tensor.storage_offset() * step, (tensor.numel() * step,)
    )


@given(st.lists(tensors(), min_size=1, max_size=4), st.data())
def test_state_digest_changes_with_any_bit_and_comes_back_with_it(state, data):
    before, each = state_digest(state), tensor_digests(state)
    assert state_digest([tensor.clone() for tensor in state]) == before, "another place in memory"
    which = data.draw(st.integers(0, len(state) - 1))
    if not state[which].numel():
        return
    memory = words_of(state[which])
    at, bit = data.draw(st.integers(0, len(memory) - 1)), data.draw(st.integers(0, 7))
    memory[at] ^= 1 << bit
    assert state_digest(state) != before
    assert (tensor_digests(state) != each).tolist() == [one == which for one in range(len(state))]
    memory[at] ^= 1 << bit
    assert state_digest(state) == before and tensor_digests(state).equal(each)


@pytest.mark.parametrize("size", [40, SMALL])
def test_state_digest_tells_numbers_and_tensors_that_changed_places(size):
    one, other = torch.arange(size), torch.arange(size) * 3 + 1
    swapped = one.clone()
    swapped[[2, 7]] = swapped[[7, 2]]
    digests = [state_digest(state) for state in ([one, other], [other, one], [swapped, other], [one], [one, one])]
    assert len({int(digest) for digest in digests}) == len(digests)


def test_state_digest_is_of_memory_so_tells_channels_last_from_first():
    image = torch.rand(2, 3, 4, 5)
    last = image.contiguous(memory_format=torch.channels_last)
    assert state_digest([image]) != state_digest([last])
    assert state_digest([last]) == state_digest([last.permute(0, 2, 3, 1).contiguous()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_digest_on_a_gpu_is_that_of_a_cpu_and_arrives_by_the_next_call(alone):
    state = {"small": torch.rand(3, 5), "large": torch.rand(SMALL, 2), "count": torch.tensor(7)}
    on_gpu = {name: tensor.cuda() for name, tensor in state.items()}
    assert state_digest(on_gpu.values()).item() == state_digest(state.values()).item()
    states = RankStates(replace(alone, device=torch.device("cuda")), lambda: on_gpu, every=0)
    states.history.fill_(12)
    assert [states.facts(), states.facts()] == [(0, ~0), (12, ~12)]
