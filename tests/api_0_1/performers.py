"""Every verb with every argument, performed by the core's way, as of hookline 0.1.

Kept as it is for ever: a plugin that was written so goes on working. Do not mend, shorten or reformat it for a newer
hookline; `docs/hook-api.md` says what may change instead.
"""

from hookline import CallbackInterface, hookimpl, hookspecs


class Performers(CallbackInterface):
    """Performs every verb as the core does, and keeps which."""

    def __init__(self):
        self.done = set()

    @hookimpl
    def get_ranks(self, trainer):
        self.done.add("get_ranks")
        return hookspecs.get_ranks(trainer=trainer)

    @hookimpl
    def get_share(self, trainer):
        self.done.add("get_share")
        return hookspecs.get_share(trainer=trainer)

    @hookimpl
    def get_device(self, trainer):
        self.done.add("get_device")
        return hookspecs.get_device(trainer=trainer)

    @hookimpl
    def adapt_module(self, trainer, module):
        self.done.add("adapt_module")
        return hookspecs.adapt_module(trainer=trainer, module=module)

    @hookimpl
    def run(self, trainer, stage):
        self.done.add("run")
        return hookspecs.run(trainer=trainer, stage=stage)

    @hookimpl
    def find_state(self, trainer, stage):
        self.done.add("find_state")
        return hookspecs.find_state(trainer=trainer, stage=stage)

    @hookimpl
    def get_window_size(self, trainer):
        self.done.add("get_window_size")
        return hookspecs.get_window_size(trainer=trainer)

    @hookimpl
    def convert_model(self, trainer, model):
        self.done.add("convert_model")
        return hookspecs.convert_model(trainer=trainer, model=model)

    @hookimpl
    def split_model(self, trainer, model):
        self.done.add("split_model")
        return hookspecs.split_model(trainer=trainer, model=model)

    @hookimpl
    def compile_model(self, trainer, model):
        self.done.add("compile_model")
        return hookspecs.compile_model(trainer=trainer, model=model)

    @hookimpl
    def shard_model(self, trainer, model):
        self.done.add("shard_model")
        return hookspecs.shard_model(trainer=trainer, model=model)

    @hookimpl
    def get_sampler(self, trainer, stage):
        self.done.add("get_sampler")
        return hookspecs.get_sampler(trainer=trainer, stage=stage)

    @hookimpl
    def join_loaders(self, trainer, loaders, sampler):
        self.done.add("join_loaders")
        return hookspecs.join_loaders(trainer=trainer, loaders=loaders, sampler=sampler)

    @hookimpl
    def setup_loader(self, trainer, loader, stage, key):
        self.done.add("setup_loader")
        return hookspecs.setup_loader(trainer=trainer, loader=loader, stage=stage, key=key)

    @hookimpl
    def setup_optimizers(self, trainer):
        self.done.add("setup_optimizers")
        return hookspecs.setup_optimizers(trainer=trainer)

    @hookimpl
    def restore(self, trainer, stage):
        self.done.add("restore")
        return hookspecs.restore(trainer=trainer, stage=stage)

    @hookimpl
    def get_run_state(self, trainer):
        self.done.add("get_run_state")
        return hookspecs.get_run_state(trainer=trainer)

    @hookimpl
    def set_run_state(self, trainer, state, stage):
        self.done.add("set_run_state")
        return hookspecs.set_run_state(trainer=trainer, state=state, stage=stage)

    @hookimpl
    def allocate(self, trainer, path, shape, dtype):
        self.done.add("allocate")
        return hookspecs.allocate(trainer=trainer, path=path, shape=shape, dtype=dtype)

    @hookimpl
    def train_epoch(self, trainer, batches):
        self.done.add("train_epoch")
        return hookspecs.train_epoch(trainer=trainer, batches=batches)

    @hookimpl
    def take_window(self, trainer, batches):
        self.done.add("take_window")
        return hookspecs.take_window(trainer=trainer, batches=batches)

    @hookimpl
    def count_samples(self, trainer, batch, stage):
        self.done.add("count_samples")
        return hookspecs.count_samples(trainer=trainer, batch=batch, stage=stage)

    @hookimpl
    def get_weight(self, trainer, batch, stage):
        self.done.add("get_weight")
        return hookspecs.get_weight(trainer=trainer, batch=batch, stage=stage)

    @hookimpl
    def update(self, trainer, window):
        self.done.add("update")
        return hookspecs.update(trainer=trainer, window=window)

    @hookimpl
    def run_window(self, trainer, window):
        self.done.add("run_window")
        return hookspecs.run_window(trainer=trainer, window=window)

    @hookimpl
    def forward_backward(self, trainer, batch, index, size):
        self.done.add("forward_backward")
        return hookspecs.forward_backward(trainer=trainer, batch=batch, index=index, size=size)

    @hookimpl
    def prepare_batch(self, trainer, batch, stage):
        self.done.add("prepare_batch")
        return hookspecs.prepare_batch(trainer=trainer, batch=batch, stage=stage)

    @hookimpl
    def call_model(self, trainer, batch, stage):
        self.done.add("call_model")
        return hookspecs.call_model(trainer=trainer, batch=batch, stage=stage)

    @hookimpl
    def scale_loss(self, trainer, loss, batch, size, index):
        self.done.add("scale_loss")
        return hookspecs.scale_loss(trainer=trainer, loss=loss, batch=batch, size=size, index=index)

    @hookimpl
    def run_backward(self, trainer, loss):
        self.done.add("run_backward")
        return hookspecs.run_backward(trainer=trainer, loss=loss)

    @hookimpl
    def should_step(self, trainer, optimizers):
        self.done.add("should_step")
        return hookspecs.should_step(trainer=trainer, optimizers=optimizers)

    @hookimpl
    def step_optimizer(self, trainer, optimizer, closure):
        self.done.add("step_optimizer")
        return hookspecs.step_optimizer(trainer=trainer, optimizer=optimizer, closure=closure)

    @hookimpl
    def step_schedulers(self, trainer, when, optimizers, metrics):
        self.done.add("step_schedulers")
        return hookspecs.step_schedulers(trainer=trainer, when=when, optimizers=optimizers, metrics=metrics)

    @hookimpl
    def evaluate(self, trainer, stage, loaders, limit):
        self.done.add("evaluate")
        return hookspecs.evaluate(trainer=trainer, stage=stage, loaders=loaders, limit=limit)

    @hookimpl
    def gather_outputs(self, trainer, outputs, stage, key):
        self.done.add("gather_outputs")
        return hookspecs.gather_outputs(trainer=trainer, outputs=outputs, stage=stage, key=key)

    @hookimpl
    def get_mode(self, trainer, metric):
        self.done.add("get_mode")
        return hookspecs.get_mode(trainer=trainer, metric=metric)

    @hookimpl
    def get_watched_metrics(self, trainer):
        self.done.add("get_watched_metrics")
        return hookspecs.get_watched_metrics(trainer=trainer)

    @hookimpl
    def save(self, trainer, reason, state):
        self.done.add("save")
        return hookspecs.save(trainer=trainer, reason=reason, state=state)

    @hookimpl
    def export_model(self, trainer):
        self.done.add("export_model")
        return hookspecs.export_model(trainer=trainer)

    @hookimpl
    def filter_log(self, trainer, metrics):
        self.done.add("filter_log")
        return hookspecs.filter_log(trainer=trainer, metrics=metrics)

    @hookimpl
    def all_reduce(self, trainer, value, op):
        self.done.add("all_reduce")
        return hookspecs.all_reduce(trainer=trainer, value=value, op=op)

    @hookimpl
    def all_gather(self, trainer, value):
        self.done.add("all_gather")
        return hookspecs.all_gather(trainer=trainer, value=value)

    @hookimpl
    def vote(self, trainer, asked, seconds):
        self.done.add("vote")
        return hookspecs.vote(trainer=trainer, asked=asked, seconds=seconds)

    @hookimpl
    def rank_zero_first(self, trainer, each_machine):
        self.done.add("rank_zero_first")
        return hookspecs.rank_zero_first(trainer=trainer, each_machine=each_machine)
