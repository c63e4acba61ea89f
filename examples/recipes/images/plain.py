"""Tell digits apart, by a loop of one's own.

python -m examples.recipes.images.plain
"""

import torch
from examples.recipes.images.model import augment, load, resnet
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR


def shuffled(epoch, samples):
    return torch.randperm(samples)


@torch.no_grad()
def validate(net, val_set):
    """Return the loss and the accuracy."""
    net.eval()
    images, labels = val_set.tensors
    logits = net(images)
    net.train()
    return cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).float().mean().item()


def train(net, epochs=10, batch_size=64, learning_rate=0.2, order=shuffled):
    """Train the network; return the loss of each step, and the accuracy of each epoch."""
    train_set, val_set = load()
    optimizer = torch.optim.SGD(net.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4)
    steps = -(-len(train_set) // batch_size) * epochs
    schedule = OneCycleLR(optimizer, learning_rate, steps, cycle_momentum=False)
    losses, accuracies, best = [], [], 0.0
    for epoch in range(epochs):
        for chosen in order(epoch, len(train_set)).split(batch_size):
            images, labels = train_set[chosen]
            loss = cross_entropy(net(augment(images)), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        val_loss, accuracy = validate(net, val_set)
        accuracies.append(accuracy)
        print(f"epoch {epoch + 1}: val_loss {val_loss:.4f}, accuracy {accuracy:.4f}")
        if accuracy > best:
            best = accuracy
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, "best.pt")
    return losses, accuracies


if __name__ == "__main__":
    torch.manual_seed(0)
    train(resnet(16))
