"""One file a framework, each with `train(work)` and, where it has an evaluation, `validate(work)`.

Both do what a user of it would write: its shortest documented form, with what it does by itself switched off where a
work does not ask for it (logs, bars, checkpoints).
"""
