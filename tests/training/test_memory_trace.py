"""The account of storages on steps that can be counted by hand, and what stands in for data and CUDA."""

from __future__ import annotations

import pytest
import torch

from internvl_hub.training.memory_fakes import AssumedData, CudaRules
from internvl_hub.training.memory_trace import MemoryTrace


def test_trace_of_a_step_that_can_be_counted_by_hand() -> None:
    weight = torch.zeros(100, 10, requires_grad=True)  # 4000 bytes, counted elsewhere
    inputs = torch.zeros(5, 10)
    trace = MemoryTrace()
    trace.ignore(weight)
    weight.register_post_accumulate_grad_hook(trace.gradient)
    with trace:
        trace.begin("forward")
        loss = (inputs @ weight.T).sum()  # an output of 2000 bytes, which the sum does not keep, and its 4 bytes
        assert trace.now == {"forward": 4, "ignored": 0}
        trace.begin("temporary")
        loss.backward()  # a 1 of 4 bytes, expanded over the output; the gradient of the weight
    assert trace.finish().total() == 4 + 4 + 4000
    assert {part: size for part, size in trace.now.items() if size} == {"forward": 4, "gradients": 4000}


@pytest.mark.parametrize("change", [1, -1])
def test_trace_counts_a_repeated_segment_as_often_as_it_says(change: int) -> None:
    trace = MemoryTrace()
    held = [torch.zeros(100) for _ in range(8)]
    for i in range(8):
        trace.track(held[i], "kept")
    with trace:
        trace.begin("work", "stack", repeats=5)
        passing = torch.ones(50)  # 200 bytes at the highest point of each
        del passing
        if change > 0:
            held.append(torch.ones(10))  # 40 bytes stay behind
        else:
            held.pop()
        trace.begin("rest")
    highest = trace.finish()
    assert highest.total() == (3200 + 4 * 40 + 200 if change > 0 else 3200 + 200)
    assert trace.now.total() == (3200 + 5 * 40 if change > 0 else 3200 - 5 * 400)


def test_trace_frees_what_repeated_segments_left_behind() -> None:
    trace = MemoryTrace()
    with trace:
        trace.begin("work", "stack", repeats=5)
        inside, outside = torch.ones(10), torch.ones(20)
        trace.begin("backward", "stack", repeats=5)
        del inside  # by each layer what it made itself
        trace.begin("rest")
        assert trace.now.total() == 5 * 80
        del outside  # of all layers at once
    assert trace.now.total() == 0


def test_masks_select_the_rows_that_are_assumed() -> None:
    with AssumedData({(2, 3): 4}, number=9):
        values, mask = torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.bool)
        assert values[mask].shape == (4, 7)
        assert int(torch.zeros((), dtype=torch.long)) == 9 and not bool(torch.ones((), dtype=torch.bool))


def test_cuda_rules() -> None:
    states = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    norm, dropout = torch.nn.LayerNorm(8), torch.nn.Dropout(0.5)
    with CudaRules():
        assert norm.to(torch.bfloat16)(states).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(states).dtype == states.softmax(-1).dtype == torch.float32
        dropped = dropout(states)
        assert dropped.grad_fn._saved_result1.dtype == torch.bool
        torch.testing.assert_close(dropped, states * 2 * dropped.grad_fn._saved_result1)
        assert dropout.eval()(states) is states
    assert norm.float()(states.float()).dtype == torch.float32
