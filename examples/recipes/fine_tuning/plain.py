"""Fine-tune a model of transformers, by a loop of one's own.

python -m examples.recipes.fine_tuning.plain
"""

import torch
from examples.recipes.fine_tuning.data import Pieces
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForSequenceClassification, BertConfig, default_data_collator, get_scheduler


def shuffled(epoch, samples):
    return torch.randperm(samples)


def groups_of(model, weight_decay):
    """Return parameter groups: biases and the parameters of norms do not decay."""
    spared = {name for name, _ in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name}
    both = [(name, parameter) for name, parameter in model.named_parameters()]
    return [
        {"params": [parameter for name, parameter in both if name not in spared], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in both if name in spared], "weight_decay": 0.0},
    ]


@torch.no_grad()
def validate(model, val_data):
    model.eval()
    batch = default_data_collator(list(val_data))
    right = model(**batch).logits.argmax(dim=1) == batch["labels"]
    model.train()
    return right.float().mean().item()


def train(model, epochs=5, steps=None, batch_size=32, learning_rate=2e-3, order=shuffled):
    """Train the model; return the loss of each step and the accuracy of each epoch."""
    train_data, val_data = Pieces(), Pieces(validation=True)
    steps = steps or -(-len(train_data) // batch_size)
    optimizer = torch.optim.AdamW(groups_of(model, 0.01), learning_rate)
    schedule = get_scheduler("linear", optimizer, round(0.1 * steps * epochs), steps * epochs)
    losses, accuracies = [], []
    model.train()
    for epoch in range(epochs):
        for chosen in order(epoch, len(train_data)).split(batch_size)[:steps]:
            batch = default_data_collator([train_data[index] for index in chosen.tolist()])
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        accuracies.append(validate(model, val_data))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}, accuracy {accuracies[-1]:.4f}")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, "last.pt")
    model.save_pretrained("pretrained")
    return losses, accuracies


if __name__ == "__main__":
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "num_labels": 2}
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
    train(AutoModelForSequenceClassification.from_config(BertConfig(**sizes, **layers)))
