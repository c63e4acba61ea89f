"""Configuration: what is read, what is refused and in which words, what is kept and what is masked."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import yaml

from hookline import CallbackInterface, hookimpl
from hookline.config import build_trainer, load_config, masked, to_yaml
from hookline.masking import is_secret, mask
from hookline.testing import TinyModule, digest


class Module(TinyModule):
    def __init__(self, width: int = 16, *, inner: Any = None, api_key: str = "", samples: int = 16) -> None:
        super().__init__(samples=samples)
        self.width, self.inner, self.api_key = width, inner, api_key
        self.drawn = torch.rand(1)


class Part:
    def __init__(self, size: int) -> None:
        self.size = size


@dataclass(eq=False)
class Noise(CallbackInterface):
    """A plugin with options of several types."""

    strength: float = 0.1
    names: list[str] = field(default_factory=list)
    limit: int | None = None
    anything: Any = None

    @hookimpl
    def on_boundary(self): ...


@dataclass(eq=False)
class Strict(CallbackInterface):
    """A plugin that needs an option."""

    needed: int


HERE = __name__
BASE = f"""
module: {{_target_: {HERE}.Module}}
trainer: {{epochs: 1, train_batch_size: 8}}
plugins:
  noise: {{_plugin_: {HERE}.Noise}}
"""


@pytest.fixture
def write(tmp_path):
    def write(text=BASE, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_defaults_then_yaml_then_command_line(write):
    config = load_config(write(), ["trainer.epochs=2", "plugins.noise.strength=1e-3", "module.width=4"])
    trainer = build_trainer(config)
    assert (trainer.options.epochs, trainer.options.train_batch_size, trainer.options.val_batch_size) == (2, 8, 1)
    assert trainer.plugins.get_plugin("noise").strength == 0.001
    assert trainer.module.width == 4
    assert trainer.options.run_name == "run"


def test_the_python_door_is_equal(write):
    from hookline import Trainer, set_seed

    by_yaml = build_trainer(load_config(write()))
    set_seed(0)
    by_hand = Trainer(Module(), epochs=1, train_batch_size=8, plugins=[Noise()])
    by_yaml.train()
    by_hand.train()
    assert digest(by_yaml.module.state_dict()) == digest(by_hand.module.state_dict())


@dataclass(eq=False)
class Around(CallbackInterface):
    """Draws random numbers, and is around the making of the module."""

    def __post_init__(self) -> None:
        torch.randn(1)

    @hookimpl(wrapper=True)
    def adapt_module(self, module):
        self.given = module
        return (yield)


def test_the_module_is_made_within_what_plugins_wrap_and_under_the_seed(write):
    text = BASE + f"  around: {{_plugin_: {HERE}.Around}}\n"
    trainer, without = build_trainer(load_config(write(text))), build_trainer(load_config(write()))
    assert callable(trainer.plugins.get_plugin("around").given)
    assert trainer.module.drawn == without.module.drawn
    with pytest.raises(ValueError, match=r"module\.inner: Part: missing a required argument: 'size'") as caught:
        build_trainer(load_config(write(text), [f"module.inner={{_target_: {HERE}.Part}}"]))
    assert not getattr(caught.value, "__notes__", ())  # it is no fault of who only wraps


def test_what_is_built_may_nest(write):
    config = load_config(write(), [f"module.inner={{_target_: {HERE}.Part, size: 3}}"])
    assert build_trainer(config).module.inner.size == 3


def test_interpolation_and_environment(write, monkeypatch):
    monkeypatch.setenv("WIDTH", "7")
    text = BASE + "vars: {lr: 0.5}\n"
    config = load_config(
        write(text), ["plugins.noise.strength=${vars.lr}", "module.width=${oc.decode:${oc.env:WIDTH}}"]
    )
    trainer = build_trainer(config)
    assert (trainer.plugins.get_plugin("noise").strength, trainer.module.width) == (0.5, 7)


@pytest.mark.plugins
def test_plugins_are_turned_off_and_on(write):
    path = write()
    assert build_trainer(load_config(path, plugins=["no:noise"])).plugins.get_plugin("noise") is None
    assert build_trainer(load_config(path, ["plugins.noise=null"])).plugins.get_plugin("noise") is None
    with_clip = build_trainer(load_config(path, plugins=["clip"])).plugins
    assert [name for name, _ in with_clip.listed()] == ["noise", "clip"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["trainer.epoch=3"],
            r"trainer\.epoch: unknown key, did you mean 'epochs'\?; trainer has epochs, train_batch_size",
        ),
        (["trainer.epochs=many"], r"trainer\.epochs: Value 'many' of type 'str' could not be converted to Integer"),
        (
            ["plugins.noise.strenght=1"],
            r"plugins\.noise\.strenght: unknown key, did you mean 'strength'\?; plugins\.noise has",
        ),
        (
            ["plugins.noise.strength=high"],
            r"plugins\.noise\.strength: Value 'high' of type 'str' could not be converted",
        ),
        (["plugins.teleport={}"], r"plugins\.teleport: no plugin named 'teleport' is installed"),
        pytest.param(
            ["plugins.clib={}"],
            r"plugins\.clib: no plugin named 'clib' is installed, did you mean 'clip'\?",
            marks=pytest.mark.plugins,
        ),
        (["plugins.noise=3"], r"plugins\.noise: a plugin takes a mapping of options \(\{\} for none\) or null, not 3"),
        ([f"plugins.strict={{_plugin_: {HERE}.Strict}}"], r"plugins\.strict\.needed: this key needs a value"),
        (
            ["module._target_=null"],
            r"module\._target_: this key needs a value, the dotted path of your ModuleInterface",
        ),
        (["modul.x=1"], r"modul: unknown key, did you mean 'module'\?; the nodes are module, trainer, plugins, vars"),
        (["trainer.epochs"], r"'trainer\.epochs' is no override; write key\.of\.node=value"),
        (["trainer.epochs=[1"], r"'trainer\.epochs=\[1' cannot be read"),
    ],
)
def test_what_is_refused_when_it_is_read(write, overrides, words):
    with pytest.raises(ValueError, match=words):
        load_config(write(), overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["module.widht=1"], r"module\.widht: unknown key, did you mean 'width'\?; Module takes width, inner"),
        (["module._target_=nowhere.Module"], r"module\._target_: 'nowhere\.Module' cannot be imported: ModuleNotFound"),
        ([f"module._target_={HERE}.Modul"], r"cannot be imported: .* has no 'Modul', did you mean 'Module'\?"),
        ([f"module.inner={{_target_: {HERE}.Part}}"], r"module\.inner: Part: missing a required argument: 'size'"),
        (["module.width=${vars.none}"], r"module\.width: Interpolation key 'vars.none' not found"),
        (
            ["module.api_key='***'"],
            r"module\.api_key: this secret was masked when the configuration was saved; give it",
        ),
    ],
)
def test_what_is_refused_when_it_is_built(write, overrides, words):
    with pytest.raises(ValueError, match=words):
        build_trainer(load_config(write(), overrides))


def test_files_that_are_no_configuration(write, tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="the key 'epochs' is written twice, the second time in line 2"):
        load_config(write("trainer: {epochs: 1,\n  epochs: 2}"))
    with pytest.raises(ValueError, match="must be a mapping with the keys module, trainer, plugins"):
        load_config(write("- 1"))
    with pytest.raises(ValueError, match="could not determine a constructor for the tag.*python/object"):
        load_config(write("module: !!python/object/apply:os.system ['true']"))


def test_what_is_kept_reproduces_the_run(write, tmp_path):
    config = load_config(write(), ["trainer.seed=5", "plugins.noise.names=[a, b]"])
    again = load_config(write(to_yaml(masked(config)), "config.yaml"))
    assert masked(again) == masked(config)
    first, second = build_trainer(config), build_trainer(again)
    first.train()
    second.train()
    assert digest(first.module.state_dict()) == digest(second.module.state_dict())


def test_secrets_are_masked_and_stay_the_variable_that_they_were(write, monkeypatch):
    monkeypatch.setenv("THE_KEY", "s3cret-value")
    plain = masked(load_config(write(), ["module.api_key=s3cret-value"]))
    assert plain["module"]["api_key"] == "***"
    config = load_config(write(), ["module.api_key=${oc.env:THE_KEY}"])
    assert masked(config)["module"]["api_key"] == "${oc.env:THE_KEY}"
    trainer = build_trainer(config)
    assert trainer.module.api_key == "s3cret-value"
    assert "s3cret" not in yaml.safe_dump(trainer.config)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("${oc.env:THE_KEY}", "${oc.env:THE_KEY}"),
        ("${vars.own}/x", "${oc.env:THE_KEY}/x"),
        ("${vars.both}", {"a": "${oc.env:THE_KEY}", "b": [1, "${oc.env:THE_KEY}"]}),
        ("${oc.decode:${oc.env:${vars.name}}}", "${oc.decode:${oc.env:${vars.name}}}"),
        ("${vars.name}", "THE_KEY"),
        ("${oc.env:NO_SUCH_KEY,plain}", "${oc.env:NO_SUCH_KEY,plain}"),
        ("${oc.env:NO_SUCH_KEY,null}", "${oc.env:NO_SUCH_KEY,null}"),
        ("https://me:${oc.env:THE_KEY}@host", "https://me:${oc.env:THE_KEY}@host"),
        ("https://me:hunter2@${oc.env:THE_KEY}", "***"),
        ("", ""),
    ],
)
def test_what_depends_on_the_environment_stays_as_it_was_written(given, kept, write, monkeypatch):
    monkeypatch.setenv("THE_KEY", "s3cret-value")
    own = ["vars.own=${oc.env:THE_KEY}", "vars.name=THE_KEY", "vars.both={a: '${vars.own}', b: [1, '${vars.own}']}"]
    assert masked(load_config(write(), [*own, f"vars.given={given}"]))["vars"]["given"] == (kept or None)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("${oc.env:THE_KEY,hunter2}", "${oc.env:THE_KEY}"),
        ("${oc.env:A,hunter2}-${oc.env:B,hunter2}", "***"),
        ("a-${oc.env:THE_KEY}", "***"),
    ],
)
def test_what_is_literal_in_a_secret_is_not_kept(given, kept, write, monkeypatch):
    monkeypatch.setenv("THE_KEY", "s3cret-value")
    assert masked(load_config(write(), [f"module.api_key={given}"]))["module"]["api_key"] == kept


def test_options_that_are_no_plain_data_are_left_alone():
    data = {"plugins": {"mine": {"token": torch.ones(2), "values": torch.ones(3), "pair": (1, "hf_abcdefghijklmnop")}}}
    kept = mask(data, secrets={"plugins.mine.token"})["plugins"]["mine"]
    assert kept["token"] == "***"
    assert kept["values"] is data["plugins"]["mine"]["values"]
    assert kept["pair"] == (1, "***")


@pytest.mark.parametrize(
    ("key", "value", "secret"),
    [
        ("password", "x", True),
        ("wandb_api_key", "x", True),
        ("access-token", "x", True),
        ("token", "x", True),
        ("key", "default", False),
        ("max_tokens", 5, False),
        ("tokenizer", "bpe", False),
        ("pad_token", "<pad>", False),
        ("anything", "hf_abcdefghijklmnop", True),
        ("anything", "sk-abcdefghijklmnop", True),
        ("url", "https://user:pass@host/x", True),
        ("url", "https://host/x", False),
    ],
)
def test_what_looks_like_a_secret(key, value, secret):
    assert is_secret(key, value) == secret
