"""Keep a pole upright by proximal policy optimization, by a loop of one's own.

python -m examples.recipes.ppo.plain
"""

import gymnasium
import numpy as np
import torch
from examples.ppo import mlp
from torch.distributions import Categorical
from torch.nn.functional import mse_loss

DISCOUNT, SMOOTHING, CLIP = 0.98, 0.9, 0.2


@torch.no_grad()
def play(env, policy, value, length, passes, seed):
    """Return what the environments tell in `length` steps from a reset, and in which orders it is trained on."""
    draws = torch.Generator().manual_seed(seed)
    seen, _ = env.reset(seed=seed)
    steps = []
    for _ in range(length):
        logits = policy(torch.from_numpy(seen))
        action = torch.multinomial(logits.softmax(dim=1), 1, generator=draws).squeeze(1)
        after, reward, ended, cut, info = env.step(action.numpy())
        reward = torch.from_numpy(reward).float()
        for index in np.flatnonzero(cut & ~ended):  # not the end of the game, only of our patience
            reward[index] += DISCOUNT * value(torch.from_numpy(info["final_obs"][index])).item()
        likely = Categorical(logits=logits).log_prob(action)
        steps.append((torch.from_numpy(seen), action, likely, reward, torch.from_numpy(ended | cut)))
        seen = after
    seen, action, likely, reward, done = map(torch.stack, zip(*steps, strict=True))
    values = value(torch.cat([seen, torch.from_numpy(after)[None]])).squeeze(-1)
    advantage, following = torch.empty_like(reward), torch.zeros(env.num_envs)
    for step in reversed(range(length)):
        on = (~done[step]).float()
        surprise = reward[step] + DISCOUNT * on * values[step + 1] - values[step]
        following = advantage[step] = surprise + DISCOUNT * SMOOTHING * on * following
    target, advantage = advantage + values[:-1], (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    orders = [torch.randperm(advantage.numel(), generator=draws) for _ in range(passes)]
    return [part.flatten(0, 1) for part in (seen, action, likely, advantage, target)], orders


@torch.no_grad()
def validate(env, policy, games=5):
    """Return the mean length of games without chance."""
    total = 0
    for seed in range(games):
        (seen, _), over = env.reset(seed=seed), False
        while not over:
            seen, _, ended, cut, _ = env.step(policy(torch.from_numpy(seen)).argmax().item())
            total, over = total + 1, ended or cut
    return total / games


def train(policy, value, epochs=30, envs=8, length=128, passes=8, batch_size=256, learning_rate=1e-3, every=5):
    """Train both networks; return the loss of each step and the length of the games after each `every` epochs."""
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    env = gymnasium.make_vec("CartPole-v1", envs, "sync", vector_kwargs={"autoreset_mode": mode})
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], learning_rate)
    losses, lengths = [], []
    for epoch in range(epochs):
        seed = int(np.random.SeedSequence([0, epoch, 0]).generate_state(1)[0])
        rollout, orders = play(env, policy, value, length, passes, seed)
        for chosen in (part for order in orders for part in order.split(batch_size)):
            seen, action, likely, advantage, target = (part[chosen] for part in rollout)
            choices = Categorical(logits=policy(seen))
            ratio = (choices.log_prob(action) - likely).exp()
            gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
            value_loss, entropy = mse_loss(value(seen).squeeze(1), target), choices.entropy().mean()
            loss = 0.5 * value_loss - gain - 0.01 * entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if epoch % every == every - 1:
            lengths.append(validate(gymnasium.make("CartPole-v1"), policy))
            print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}, length of a game {lengths[-1]:.0f}")
            networks = {"policy": policy.state_dict(), "value": value.state_dict()}
            torch.save({**networks, "optimizer": optimizer.state_dict(), "epoch": epoch}, "last.pt")
    return losses, lengths


if __name__ == "__main__":
    torch.manual_seed(0)
    train(mlp(4, 64, 2), mlp(4, 64, 1))
