"""CUDA graphs of the fake device: they do what those of a real device do, and refuse what those refuse."""

import pytest
import torch

from hookline.testing import fake_cuda

pytestmark = pytest.mark.plugins


@pytest.fixture(autouse=True)
def device():
    with fake_cuda() as device:
        yield device


def capture(do, pool=None):
    """Capture what a function does; return the graph and the result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream()):
        result = do()
    return graph, result


def test_a_capture_does_nothing_and_a_replay_does_it_on_the_same_memory():
    given, total, ran = torch.full((3,), 2.0, device="cuda"), torch.zeros(3, device="cuda"), []

    def double():
        ran.append(torch.cuda.is_current_stream_capturing())
        doubled = given * 2
        total.add_(doubled)
        return doubled, doubled[1:]

    graph, (doubled, part) = capture(double)
    assert total.tolist() == [0, 0, 0]
    assert doubled.isnan().all()
    for number in (1.0, 5.0, 0.5):
        given.fill_(number)
        graph.replay()
        assert doubled.tolist() == [2 * number] * 3
        assert part.tolist() == [2 * number] * 2
    assert total.tolist() == [2 * (1 + 5 + 0.5)] * 3
    assert ran == [True]
    assert not torch.cuda.is_current_stream_capturing()


def test_gradients_and_optimizers_are_captured():
    weight = torch.ones(2, device="cuda", requires_grad=True)
    optimizer = torch.optim.AdamW([weight], 0.1, capturable=True)
    (weight * weight).sum().backward()
    optimizer.step()
    other = weight.detach().clone().requires_grad_()
    beside = torch.optim.AdamW([other], 0.1, capturable=True)
    beside.load_state_dict(optimizer.state_dict())

    def step():
        (gradient,) = torch.autograd.grad((weight * weight).sum(), [weight])
        weight.grad.copy_(gradient)
        optimizer.step()

    graph, _ = capture(step)
    for _ in range(3):
        graph.replay()
        (other.grad,) = torch.autograd.grad((other * other).sum(), [other])
        beside.step()
    assert weight.tolist() == other.tolist()


def test_numbers_of_the_host_stay_and_random_numbers_do_not():
    given, factor, number = torch.ones(4, device="cuda"), 3.0, torch.tensor(2.0)
    graph, (product, noise) = capture(lambda: (given * factor * number, torch.rand(4, device="cuda")))
    number.fill_(100.0)
    torch.cuda.manual_seed(5)
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append(noise.tolist())
    assert product.tolist() == [6.0] * 4
    torch.cuda.manual_seed(5)
    assert drawn == [torch.rand(4, device="cuda").tolist() for _ in range(2)]


def test_a_capture_draws_no_random_numbers():
    before = torch.cuda.get_rng_state()
    capture(lambda: torch.rand(4, device="cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_memory_that_nobody_holds_is_garbage_behind_the_graph_that_gave_it_back():
    weight, pool = torch.full((2,), 3.0, device="cuda", requires_grad=True), torch.cuda.graph_pool_handle()
    forward, loss = capture(lambda: (weight * weight).exp().sum(), pool)  # of which backward needs what is between
    backward, (gradient,) = capture(lambda: torch.autograd.grad(loss, [weight]), pool)
    right = (weight * weight).exp() * 2 * weight
    for _ in range(2):
        forward.replay()
        backward.replay()
        assert torch.allclose(gradient, right)
    backward.replay()
    assert gradient.isnan().all()


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.Stream().synchronize(),
        lambda x: capture(lambda: x + 1),
    ],
)
def test_what_a_capture_forbids_raises_and_makes_it_void(act):
    given, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    failed = pytest.raises(RuntimeError, match="operation failed due to a previous error during capture")
    with failed as raised, torch.cuda.graph(graph):
        act(given)
    assert "operation not permitted when stream is capturing" in str(raised.value.__context__)
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()
    assert capture(lambda: given + 1)[1].shape == (3,)  # and the next one is well


def test_the_state_of_random_numbers_is_not_to_be_had_in_a_capture():
    for act in (torch.cuda.get_rng_state, lambda: torch.cuda.manual_seed(1)):
        with pytest.raises(RuntimeError, match="during CUDA graph capture"):
            capture(act)


def test_waiting_can_be_made_an_error(device):
    torch.cuda.set_sync_debug_mode("error")
    assert torch.cuda.get_sync_debug_mode() == 2
    with pytest.raises(RuntimeError, match=r"called a synchronizing CUDA operation \(.*test_fake_graphs.py"):
        torch.ones(3, device="cuda").sum().item()
    torch.cuda.synchronize()  # which is asked for
    torch.cuda.set_sync_debug_mode("default")
    assert torch.ones(3, device="cuda").sum().item() == 3
