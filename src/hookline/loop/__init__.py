"""The parts of the loop, each of which owns its state; `hookline.trainer` holds them.

`hookline.hookspecs` says what a step, a window, an epoch and an evaluation are. Here stands what
surrounds them. Arrows lead downwards: a part knows those below it and `run.Run`, not the trainer's class.

- `training`: epochs, steps and boundaries.
- `evaluation`: validation in training, and evaluations on their own.
- `building`: the model, the optimizers and the length of a run, made from the module.
- `logs`: logged values until they are told; `reductions` are the running means and sums below it.
- `ends`: when training ends, who asks for the end or for a save, and what ranks agree on.
- `window`: the micro-batches of the optimizer step under way.
- `randomness`: the random states of a run.
"""
