"""A module that compiles a part of itself has the names, and hence the checkpoints, of one that does not."""

import itertools

import pytest
import torch

from hookline import copy_state
from hookline.testing import Memory, TinyModule, digest, tiny_trainer


class Own(TinyModule):
    """Compiles its network, of which one weight is frozen."""

    def __init__(self, compiled):
        super().__init__()
        self.net[0].bias.requires_grad_(False)
        if compiled:
            self.net = torch.compile(self.net, backend="eager")


def run(compiled, state=None, **options):
    memory, module = Memory(state), Own(compiled)
    trainer = tiny_trainer([memory], module, evaluate_every=None, **options)
    trainer.train()
    return trainer, memory.state


def with_prefix(value):
    """Return a state as it was stored once, of a module that compiles its network."""
    if isinstance(value, dict):
        return {with_prefix(key): with_prefix(kept) for key, kept in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([with_prefix(kept) for kept in value])
    return value.replace("net.", "net._orig_mod.") if isinstance(value, str) else value


def test_names_are_those_of_a_module_that_compiles_nothing():
    plain, compiled = Own(False), Own(True)
    trainer, state = run(True)
    assert [*trainer.export_model()] == [*compiled.state_dict()] == [*plain.state_dict()]
    assert [name for name, _ in compiled.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert [*state["module"]] == [*plain.state_dict()]
    assert {*state["optimizers"][0]["state"]} <= {*plain.state_dict()}
    plain.load_state_dict(trainer.export_model())
    compiled.load_state_dict(plain.state_dict())
    compiled.load_state_dict(with_prefix(plain.state_dict()))
    assert digest(compiled.state_dict()) == digest(trainer.export_model())
    with pytest.raises(RuntimeError, match='Unexpected key.*"net.9.weight"'):
        compiled.load_state_dict({**plain.state_dict(), "net.9.weight": torch.zeros(1)})


def test_a_run_goes_on_compiled_or_not():
    whole = digest(run(False)[0].export_model())
    for first, then in itertools.product((False, True), repeat=2):
        _, state = run(first, max_steps=5)
        resumed, _ = run(then, state)
        assert resumed.global_step == 14
        assert digest(resumed.export_model()) == whole
        assert not resumed.module.get_parameter("net.0.bias").requires_grad
        old, _ = run(then, with_prefix(copy_state(state)))
        assert digest(old.export_model()) == whole
        assert not old.module.get_parameter("net.0.bias").requires_grad
