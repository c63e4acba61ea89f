"""The loop that an expert writes."""

from __future__ import annotations

import json

import torch
from benchmarks.peers.work import Work
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler


def train(work: Work) -> nn.Module:
    if work.features:
        return _train_with_features(work)
    if work.ranks > 1:
        return _train_on_ranks(work)
    model = work.model()
    optimizer, callbacks = work.optimizer(model.parameters()), [Callback() for _ in range(work.callbacks)]
    for number, (inputs, targets) in enumerate(work.loader(), 1):
        loss = work.loss(model(inputs), targets)
        if work.accumulate > 1:
            loss = loss / work.accumulate
        loss.backward()
        if number % work.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        for callback in callbacks:
            callback.on_step_end(number)
    return model


def _train_on_ranks(work: Work) -> nn.Module:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = work.model()
    wrapped = DistributedDataParallel(model)
    optimizer = work.optimizer(wrapped.parameters())
    for inputs, targets in work.loader(lambda data: DistributedSampler(data, shuffle=False)):
        work.loss(wrapped(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class Callback:
    def on_step_end(self, number: int) -> None: ...


def _train_with_features(work: Work) -> nn.Module:
    from torchmetrics.classification import MulticlassAccuracy
    from tqdm import tqdm

    model, accuracy, losses = work.model(), MulticlassAccuracy(10, average="micro"), []
    optimizer = work.optimizer(model.parameters())
    with open(work.folder / "log.jsonl", "a") as log:
        for number, (inputs, targets) in enumerate(tqdm(work.loader()), 1):
            logits = model(inputs)
            loss = work.loss(logits, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            accuracy.update(logits.detach(), targets)
            losses.append(loss.detach())
            if number % 50 == 0:
                log.write(json.dumps({"step": number, "train_loss": torch.stack(losses).mean().item()}) + "\n")
                losses.clear()
        log.write(json.dumps({"accuracy": accuracy.compute().item()}) + "\n")
    torch.save([model.state_dict(), optimizer.state_dict()], work.folder / "checkpoint.pt")
    return model


def validate(work: Work) -> float:
    model, total, count = work.model().eval(), torch.zeros(()), 0
    with torch.no_grad():
        for inputs, targets in work.loader():
            total += work.loss(model(inputs), targets) * len(targets)
            count += len(targets)
    return total.item() / count
