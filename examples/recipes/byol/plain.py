"""Learn from images without labels, by a loop of one's own.

python -m examples.recipes.byol.plain
"""

import copy

import torch
from examples.recipes.byol.model import KNOWN, distance, head, network, right, view
from examples.recipes.images.model import load
from torch.optim.lr_scheduler import CosineAnnealingLR


def shuffled(epoch, samples):
    return torch.randperm(samples)


@torch.no_grad()
def follow(student, teacher, decay):
    """Move the teacher towards the student."""
    for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
        its.lerp_(mine, 1 - decay)
    for mine, its in zip(student.buffers(), teacher.buffers(), strict=True):
        its.copy_(mine)


@torch.no_grad()
def validate(student, train_set, val_set):
    student.eval()
    (images, labels), (known, known_labels) = val_set.tensors, train_set[:KNOWN]
    accuracy = right(student[0](images), labels, student[0](known), known_labels).item()
    student.train()
    return accuracy


def train(student, predictor, epochs=40, batch_size=128, learning_rate=4e-3, decay=0.95, order=shuffled):
    """Train the student; return its teacher, the loss of each step and the accuracy of each epoch."""
    train_set, val_set = load()
    teacher = copy.deepcopy(student).requires_grad_(False)
    trained = [*student.parameters(), *predictor.parameters()]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=1e-3)
    schedule = CosineAnnealingLR(optimizer, -(-len(train_set) // batch_size) * epochs)
    losses, accuracies = [], []
    for epoch in range(epochs):
        for chosen in order(epoch, len(train_set)).split(batch_size):
            images, _ = train_set[chosen]
            one, other = view(images), view(images)
            with torch.no_grad():
                of_one, of_other = teacher(one), teacher(other)
            loss = distance(predictor(student(one)), of_other) + distance(predictor(student(other)), of_one)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            follow(student, teacher, decay)
            losses.append(loss.item())
        accuracies.append(validate(student, train_set, val_set))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}, accuracy {accuracies[-1]:.4f}")
        networks = {"student": student.state_dict(), "teacher": teacher.state_dict()}
        torch.save({**networks, "predictor": predictor.state_dict(), "optimizer": optimizer.state_dict()}, "last.pt")
    return teacher, losses, accuracies


if __name__ == "__main__":
    torch.manual_seed(0)
    train(network(16), head())
