"""Every verb with every argument, wrapped, as of hookline 0.1.

Kept as it is for ever: a plugin that was written so goes on working. Do not mend, shorten or reformat it for a newer
hookline; `docs/hook-api.md` says what may change instead.
"""

from hookline import CallbackInterface, hookimpl


class Wrappers(CallbackInterface):
    """Wraps every verb, and keeps the last answer."""

    def __init__(self):
        self.answers = {}

    @hookimpl(wrapper=True)
    def get_ranks(self, trainer):
        answer = yield
        self.answers["get_ranks"] = [answer, trainer]
        return answer

    @hookimpl(wrapper=True)
    def get_share(self, trainer):
        answer = yield
        self.answers["get_share"] = [answer, trainer]
        return answer

    @hookimpl(wrapper=True)
    def get_device(self, trainer):
        answer = yield
        self.answers["get_device"] = [answer, trainer]
        return answer

    @hookimpl(wrapper=True)
    def adapt_module(self, trainer, module):
        answer = yield
        self.answers["adapt_module"] = [answer, trainer, module]
        return answer

    @hookimpl(wrapper=True)
    def run(self, trainer, stage):
        answer = yield
        self.answers["run"] = [answer, trainer, stage]
        return answer

    @hookimpl(wrapper=True)
    def find_state(self, trainer, stage):
        answer = yield
        self.answers["find_state"] = [answer, trainer, stage]
        return answer

    @hookimpl(wrapper=True)
    def get_window_size(self, trainer):
        answer = yield
        self.answers["get_window_size"] = [answer, trainer]
        return answer

    @hookimpl(wrapper=True)
    def convert_model(self, trainer, model):
        answer = yield
        self.answers["convert_model"] = [answer, trainer, model]
        return answer

    @hookimpl(wrapper=True)
    def split_model(self, trainer, model):
        answer = yield
        self.answers["split_model"] = [answer, trainer, model]
        return answer

    @hookimpl(wrapper=True)
    def compile_model(self, trainer, model):
        answer = yield
        self.answers["compile_model"] = [answer, trainer, model]
        return answer

    @hookimpl(wrapper=True)
    def shard_model(self, trainer, model):
        answer = yield
        self.answers["shard_model"] = [answer, trainer, model]
        return answer

    @hookimpl(wrapper=True)
    def get_sampler(self, trainer, stage):
        answer = yield
        self.answers["get_sampler"] = [answer, trainer, stage]
        return answer

    @hookimpl(wrapper=True)
    def join_loaders(self, trainer, loaders, sampler):
        answer = yield
        self.answers["join_loaders"] = [answer, trainer, loaders, sampler]
        return answer

    @hookimpl(wrapper=True)
    def setup_loader(self, trainer, loader, stage, key):
        answer = yield
        self.answers["setup_loader"] = [answer, trainer, loader, stage, key]
        return answer

    @hookimpl(wrapper=True)
    def setup_optimizers(self, trainer):
        answer = yield
        self.answers["setup_optimizers"] = [answer, trainer]
        return answer

    @hookimpl(wrapper=True)
    def restore(self, trainer, stage):
        answer = yield
        self.answers["restore"] = [answer, trainer, stage]
        return answer

    @hookimpl(wrapper=True)
    def get_run_state(self, trainer):
        answer = yield
        self.answers["get_run_state"] = [answer, trainer]
        return answer

    @hookimpl(wrapper=True)
    def set_run_state(self, trainer, state, stage):
        answer = yield
        self.answers["set_run_state"] = [answer, trainer, state, stage]
        return answer

    @hookimpl(wrapper=True)
    def allocate(self, trainer, path, shape, dtype):
        answer = yield
        self.answers["allocate"] = [answer, trainer, path, shape, dtype]
        return answer

    @hookimpl(wrapper=True)
    def train_epoch(self, trainer, batches):
        answer = yield
        self.answers["train_epoch"] = [answer, trainer, batches]
        return answer

    @hookimpl(wrapper=True)
    def take_window(self, trainer, batches):
        answer = yield
        self.answers["take_window"] = [answer, trainer, batches]
        return answer

    @hookimpl(wrapper=True)
    def count_samples(self, trainer, batch, stage):
        answer = yield
        self.answers["count_samples"] = [answer, trainer, batch, stage]
        return answer

    @hookimpl(wrapper=True)
    def get_weight(self, trainer, batch, stage):
        answer = yield
        self.answers["get_weight"] = [answer, trainer, batch, stage]
        return answer

    @hookimpl(wrapper=True)
    def update(self, trainer, window):
        answer = yield
        self.answers["update"] = [answer, trainer, window]
        return answer

    @hookimpl(wrapper=True)
    def run_window(self, trainer, window):
        answer = yield
        self.answers["run_window"] = [answer, trainer, window]
        return answer

    @hookimpl(wrapper=True)
    def forward_backward(self, trainer, batch, index, size):
        answer = yield
        self.answers["forward_backward"] = [answer, trainer, batch, index, size]
        return answer

    @hookimpl(wrapper=True)
    def prepare_batch(self, trainer, batch, stage):
        answer = yield
        self.answers["prepare_batch"] = [answer, trainer, batch, stage]
        return answer

    @hookimpl(wrapper=True)
    def call_model(self, trainer, batch, stage):
        answer = yield
        self.answers["call_model"] = [answer, trainer, batch, stage]
        return answer

    @hookimpl(wrapper=True)
    def scale_loss(self, trainer, loss, batch, size, index):
        answer = yield
        self.answers["scale_loss"] = [answer, trainer, loss, batch, size, index]
        return answer

    @hookimpl(wrapper=True)
    def run_backward(self, trainer, loss):
        answer = yield
        self.answers["run_backward"] = [answer, trainer, loss]
        return answer

    @hookimpl(wrapper=True)
    def should_step(self, trainer, optimizers):
        answer = yield
        self.answers["should_step"] = [answer, trainer, optimizers]
        return answer

    @hookimpl(wrapper=True)
    def step_optimizer(self, trainer, optimizer, closure):
        answer = yield
        self.answers["step_optimizer"] = [answer, trainer, optimizer, closure]
        return answer

    @hookimpl(wrapper=True)
    def step_schedulers(self, trainer, when, optimizers, metrics):
        answer = yield
        self.answers["step_schedulers"] = [answer, trainer, when, optimizers, metrics]
        return answer

    @hookimpl(wrapper=True)
    def evaluate(self, trainer, stage, loaders, limit):
        answer = yield
        self.answers["evaluate"] = [answer, trainer, stage, loaders, limit]
        return answer

    @hookimpl(wrapper=True)
    def gather_outputs(self, trainer, outputs, stage, key):
        answer = yield
        self.answers["gather_outputs"] = [answer, trainer, outputs, stage, key]
        return answer

    @hookimpl(wrapper=True)
    def get_mode(self, trainer, metric):
        answer = yield
        self.answers["get_mode"] = [answer, trainer, metric]
        return answer

    @hookimpl(wrapper=True)
    def get_watched_metrics(self, trainer):
        answer = yield
        self.answers["get_watched_metrics"] = [answer, trainer]
        return answer

    @hookimpl(wrapper=True)
    def save(self, trainer, reason, state):
        answer = yield
        self.answers["save"] = [answer, trainer, reason, state]
        return answer

    @hookimpl(wrapper=True)
    def export_model(self, trainer):
        answer = yield
        self.answers["export_model"] = [answer, trainer]
        return answer

    @hookimpl(wrapper=True)
    def filter_log(self, trainer, metrics):
        answer = yield
        self.answers["filter_log"] = [answer, trainer, metrics]
        return answer

    @hookimpl(wrapper=True)
    def all_reduce(self, trainer, value, op):
        answer = yield
        self.answers["all_reduce"] = [answer, trainer, value, op]
        return answer

    @hookimpl(wrapper=True)
    def all_gather(self, trainer, value):
        answer = yield
        self.answers["all_gather"] = [answer, trainer, value]
        return answer

    @hookimpl(wrapper=True)
    def vote(self, trainer, asked, seconds):
        answer = yield
        self.answers["vote"] = [answer, trainer, asked, seconds]
        return answer

    @hookimpl(wrapper=True)
    def rank_zero_first(self, trainer, each_machine):
        answer = yield
        self.answers["rank_zero_first"] = [answer, trainer, each_machine]
        return answer
