"""Reinforcement learning: the module makes its own batches. PPO on CartPole, with gymnasium.

An epoch is a rollout: when the loop asks for the epoch's first batch, the policy plays, and what it has seen is
trained on in several passes. A rollout is a function of the weights, the seed, the epoch and the rank, because each
begins with environments that are reset. The loader tells its rollout and its place by `state_dict`, as loaders of
torchdata do, and checkpoints keep that: a run that was cut anywhere ends with the same bits.

python -m examples.ppo
"""

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical
from torch.utils.data import DataLoader

from hookline import ModuleInterface, Trainer, set_seed, sharded


def mlp(inputs, width, outputs):
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    )


class Rollouts:
    """A loader that plays one rollout each time it is iterated, and gives its minibatches for several passes."""

    def __init__(self, module, batch_size):
        self.module, self.batch_size, self.rollout, self.place = module, batch_size, None, 0

    def __len__(self):
        return self.module.passes * -(-self.module.envs * self.module.length // self.batch_size)

    def __iter__(self):
        if self.rollout is None:  # else this rollout was begun before the run was cut
            trainer = self.module.trainer
            seed = np.random.SeedSequence([trainer.options.seed, trainer.epoch, trainer.share]).generate_state(1)
            self.rollout = self.module.play(int(seed[0]))
        minibatches = [chosen for order in self.rollout["orders"] for chosen in order.split(self.batch_size)]
        for chosen in minibatches[self.place :]:
            self.place += 1
            yield tuple(self.rollout[name][chosen] for name in ("seen", "action", "likely", "advantage", "target"))

    def state_dict(self):
        return {"rollout": self.rollout, "place": self.place}

    def load_state_dict(self, state):
        self.rollout, self.place = state["rollout"], state["place"]


class Ppo(ModuleInterface):
    """Keep a pole upright by proximal policy optimization."""

    def __init__(
        self,
        env: str = "CartPole-v1",
        envs: int = 8,
        length: int = 128,
        passes: int = 8,
        width: int = 64,
        learning_rate: float = 1e-3,
        discount: float = 0.98,
        smoothing: float = 0.9,
        clip: float = 0.2,
    ):
        super().__init__()
        self.envs, self.length, self.passes, self.learning_rate = envs, length, passes, learning_rate
        self.discount, self.smoothing, self.clip = discount, smoothing, clip
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        self.env = gymnasium.make_vec(env, envs, "sync", vector_kwargs={"autoreset_mode": mode})
        self.one_env = gymnasium.make(env)
        inputs, actions = self.one_env.observation_space.shape[0], int(self.one_env.action_space.n)
        self.policy, self.value = mlp(inputs, width, actions), mlp(inputs, width, 1)

    # Playing --------------------------------------------------------------------------

    @torch.no_grad()
    def play(self, seed):
        """Return what `envs` environments tell in `length` steps from a reset, with advantages and targets."""
        draws = torch.Generator().manual_seed(seed)
        seen, _ = self.env.reset(seed=seed)
        steps = []
        for _ in range(self.length):
            logits = self.policy(self.tensor(seen)).cpu()
            action = torch.multinomial(logits.softmax(dim=1), 1, generator=draws).squeeze(1)
            after, reward, ended, cut, info = self.env.step(action.numpy())
            reward = torch.from_numpy(reward).float()
            for index in np.flatnonzero(cut & ~ended):  # not the end of the game, only of our patience
                reward[index] += self.discount * self.value(self.tensor(info["final_obs"][index])).item()
            done = torch.from_numpy(ended | cut)
            steps.append((torch.from_numpy(seen), action, Categorical(logits=logits).log_prob(action), reward, done))
            seen = after
        seen, action, likely, reward, done = map(torch.stack, zip(*steps, strict=True))
        values = self.value(self.tensor(torch.cat([seen, torch.from_numpy(after)[None]]))).squeeze(-1).cpu()
        advantage, following = torch.empty_like(reward), torch.zeros(self.envs)
        for step in reversed(range(self.length)):
            on = (~done[step]).float()
            surprise = reward[step] + self.discount * on * values[step + 1] - values[step]
            following = advantage[step] = surprise + self.discount * self.smoothing * on * following
        target = advantage + values[:-1]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        flat = {"seen": seen, "action": action, "likely": likely, "advantage": advantage, "target": target}
        return {
            **{name: tensor.flatten(0, 1) for name, tensor in flat.items()},
            "orders": torch.stack([torch.randperm(advantage.numel(), generator=draws) for _ in range(self.passes)]),
        }

    def tensor(self, seen):
        return torch.as_tensor(seen, device=self.value[0].weight.device)

    # Training -------------------------------------------------------------------------

    def train_step(self, global_step, batch, device):
        seen, action, likely, advantage, target = batch
        choices = Categorical(logits=self.policy(seen))
        ratio = (choices.log_prob(action) - likely).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage).mean()
        value_loss, entropy = F.mse_loss(self.value(seen).squeeze(1), target), choices.entropy().mean()
        self.log(value_loss=value_loss, entropy=entropy)
        return 0.5 * value_loss - gain - 0.01 * entropy

    def val_step(self, global_step, batch, device):
        """Play one game without chance; the loss is how much is missing to 500 steps."""
        seen, _ = self.one_env.reset(seed=batch.item())
        total, over = 0.0, False
        while not over:
            seen, reward, ended, cut, _ = self.one_env.step(self.policy(self.tensor(seen)).argmax().item())
            total, over = total + float(reward), ended or cut
        self.log(val_return=total)
        return (500.0 - total,)

    def get_train_dataloader(self, sampler, batch_size):
        return sharded(Rollouts(self, batch_size))  # each rank plays its own games

    def get_val_dataloaders(self, sampler, batch_size):
        games = range(5)  # by their seeds
        return DataLoader(games, 1, sampler=sampler(games))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.Adam(self.parameters(), self.learning_rate)], []

    def on_end_train(self, global_step):
        if "val_return" in self.trainer.metrics:
            print(f"steps that the pole was kept upright: {self.trainer.metrics['val_return']:.0f} of 500")


if __name__ == "__main__":
    set_seed(0)
    Trainer(Ppo(), epochs=30, train_batch_size=256, evaluate_every=None).train()
