"""Configuration: what is read, what is refused and in which words, what is kept and what is masked."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
        (["trainer.epochs=many"], r'trainer\.epochs: Trainer takes epochs: int \| null, but got "many"'),
        (["trainer.epochs=true"], r"trainer\.epochs: Trainer takes epochs: int \| null, but got true"),
        (["trainer.seed=null"], r"trainer\.seed: Trainer takes seed: int, but got null"),
        (
            ["trainer.run_name=no"],
            r"run_name: str, but got false; YAML takes a bare yes, no, on and off for true or false",
        ),
        (["trainer.run_name=1e-3"], r"run_name: str, but got 0\.001; write a text in quotes"),
        (["trainer.epochs.x=3"], r'trainer\.epochs: Trainer takes epochs: int \| null, but got \{"x": 3\}'),
        (
            ["trainer.batch_size=3"],
            r"unknown key, did you mean .*; trainer has val_batch_size, train_batch_size, epochs,",
        ),
        (["epochs=3"], r"epochs: unknown key, did you mean 'trainer\.epochs'\?; the nodes are"),
        (["trainer=5"], r"trainer: this takes a mapping of keys, e\.g\. \{epochs: 3\}; not 5"),
        (["plugins=noise"], r"plugins: this takes a mapping of keys, .*, or a list of names; not \"noise\""),
        (["trainer.epochs="], r"'trainer\.epochs=' cannot be read: it has no value; write null for none"),
        (["trainer.=3"], r"'trainer\.=3' is no override"),
        (
            ["plugins.noise.strenght=1"],
            r"plugins\.noise\.strenght: unknown key, did you mean 'strength'\?; plugins\.noise has",
        ),
        (
            ["plugins.noise.strength=high"],
            r'plugins\.noise\.strength: Noise takes strength: float, but got "high"',
        ),
        (["plugins.teleport={}"], r"plugins\.teleport: no plugin named 'teleport' is installed"),
        pytest.param(
            ["plugins.clib={}"],
            r"plugins\.clib: no plugin named 'clib' is installed, did you mean 'clip'\?",
            marks=pytest.mark.plugins,
        ),
        (
            ["plugins.noise=3"],
            r"plugins\.noise: a plugin takes a mapping of options \(\{\} for none\) or null, not 3",
        ),
        ([f"plugins.strict={{_plugin_: {HERE}.Strict}}"], r"plugins\.strict\.needed: this key needs a value"),
        (
            ["module._target_=null"],
            r"module\._target_: this key needs a value, the dotted path of your ModuleInterface",
        ),
        (
            ["modul.x=1"],
            r"modul: unknown key, did you mean 'module'\?; the nodes are module, trainer, plugins, required_plugins, v",
        ),
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
    with pytest.raises(ValueError, match="is no configuration: it is empty"):
        load_config(write("# nothing\n"))
    with pytest.raises(ValueError, match="could not determine a constructor for the tag.*python/object"):
        load_config(write("module: !!python/object/apply:os.system ['true']"))


@pytest.mark.parametrize("node", ["module", "trainer", "plugins", "vars"])
@pytest.mark.parametrize("value", ["5", "hello", "true", "[[1]]"])
def test_a_node_that_is_no_mapping_is_refused_by_its_key(write, node, value):
    with pytest.raises(ValueError, match=rf"^{node}(\.0)?: ") as caught:
        load_config(write(yaml.safe_dump(yaml.safe_load(BASE) | {node: yaml.safe_load(value)})))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer:\n\tepochs: 3", r"line 2, column 1: found character '\\t' .*\(indent with spaces, not with a tab\)"),
        ("a: 1\nvars: {a: 'x}\nb: 1", r"line 2, column 11: found unexpected end of stream \(a quote is not closed\)"),
        ("trainer: epochs: 3", "line 1, column 16: mapping values are not allowed here"),
        ("trainer:\n  epochs: 1\n   seed: 2", "line 3, column 8: mapping values are not allowed here"),
        ("a: [1, 2\nb: 3", "line 2, column 2: "),
        ("a: *nobody", "line 1, column 4: found undefined alias 'nobody'"),
        ("null: 2", "the key in line 1 is empty"),
        ("plugins:\n  noise:\n", r"plugins\.noise in line 2 has no value; write \{\} for its defaults, or null"),
        ("plugins:\n- noise:\n", r"plugins\.noise in line 2 has no value"),
        ("\x00", "unacceptable character"),
    ],
)
def test_what_is_no_yaml_is_told_in_one_line_by_its_place(write, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_config(write(text))
    assert "\n" not in str(caught.value)


def test_plugins_may_be_a_list(write):
    listed = BASE.partition("plugins:")[0] + (
        f"plugins:\n- noise: {{_plugin_: {HERE}.Noise}}\n- around: {{_plugin_: {HERE}.Around}}\n- signals\n"
    )
    config = load_config(write(listed), ["plugins.noise.strength=0.5"], plugins=["no:signals"])
    as_mapping = BASE + f"  around: {{_plugin_: {HERE}.Around}}\n  signals: null\n"
    assert masked(config) == masked(load_config(write(as_mapping), ["plugins.noise.strength=0.5"]))
    assert list(masked(config)["plugins"]) == ["noise", "around", "signals"]
    by_hand = [f"plugins=[{{noise: {{_plugin_: {HERE}.Noise}}}}]", "plugins.noise.strength=0.5"]
    assert masked(load_config(write(BASE.partition("plugins:")[0]), by_hand)) == masked(
        load_config(write(), by_hand[1:])
    )


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        ("[clip, {clip: {max_norm: 1.0}}]", r"plugins\.1: 'clip' is in the list twice"),
        (
            "[{clip: {}, csv: {}}]",
            r"plugins\.0: in a list, a plugin is its name, or a mapping of its name alone to its",
        ),
        ("[3]", r"plugins\.0: in a list, a plugin is its name, .*; not 3"),
        (f"[{{_plugin_: {HERE}.Noise}}]", r"plugins\.0: in a list, a plugin is its name"),
    ],
)
def test_a_list_of_plugins_that_says_too_little_is_refused(write, plugins, words):
    with pytest.raises(ValueError, match=words):
        load_config(write(BASE.partition("plugins:")[0] + f"plugins: {plugins}\n"))


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Net:
    width: int
    drop: float = 0.1

    def __post_init__(self) -> None:
        if self.drop > 1:
            raise ValueError("drop is a share")


class Kinds(TinyModule):
    """A module that keeps what it is given."""

    def __init__(
        self,
        number: int = 1,
        share: float = 0.5,
        flag: bool = False,
        text: str = "a",
        path: Path = Path(),
        maybe: int | None = None,
        either: int | str = 0,
        word: Literal["sum", "mean"] = "sum",
        color: Color = Color.RED,
        sizes: list[int] = [],  # noqa: B006
        pair: tuple[int, float] = (1, 2.0),
        table: dict[str, float] = {},  # noqa: B006
        net: Net | None = None,
        layer: torch.nn.Module | None = None,
        call: Callable[[], int] | None = None,
        unknown: "Nowhere" = None,  # noqa: F821
        loose=None,
        sloppy: int = None,  # noqa: RUF013
    ) -> None:
        super().__init__()
        self.given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}


@dataclass(eq=False)
class Keeps(CallbackInterface):
    """A plugin with options of the same kinds."""

    number: int = 1
    share: float = 0.5
    flag: bool = False
    text: str = "a"
    path: Path = Path()
    maybe: int | None = None
    either: int | str = 0
    word: Literal["sum", "mean"] = "sum"
    color: Color = Color.RED
    sizes: list[int] = field(default_factory=list)
    pair: tuple[int, float] = (1, 2.0)
    table: dict[str, float] = field(default_factory=dict)
    net: Net | None = None

    @hookimpl
    def on_boundary(self): ...


KINDS = BASE.replace(".Module}", ".Kinds}").replace(".Noise}", ".Keeps}")


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("number=3", 3),
        ("number='3'", 3),
        ("number=08", 8),
        ("share=1", 1.0),
        ("share=1e-3", 0.001),
        ("share='0.25'", 0.25),
        ("share=.inf", float("inf")),
        ("flag=yes", True),
        ("flag='off'", False),
        ("flag=1", True),
        ("text='no'", "no"),
        ("text=08", "08"),
        ("text=1:30", "1:30"),
        ("text=2026-01-01", "2026-01-01"),
        ("text=7", "7"),
        ("path=a/b", Path("a/b")),
        ("maybe=null", None),
        ("maybe='4'", 4),
        ("either='3'", "3"),
        ("either=3", 3),
        ("word=mean", "mean"),
        ("color=BLUE", Color.BLUE),
        ("color=blue", Color.BLUE),
        ("sizes=[1, '2']", [1, 2]),
        ("pair=[3, 4]", (3, 4.0)),
        ("table={a: 1}", {"a": 1.0}),
        ("net={width: 3}", Net(3)),
    ],
)
def test_values_are_held_against_annotations(write, given, made):
    name = given.partition("=")[0]
    trainer = build_trainer(load_config(write(KINDS), [f"module.{given}", f"plugins.noise.{given}"]))
    for found in (trainer.module.given[name], getattr(trainer.plugins.get_plugin("noise"), name)):
        assert (type(found), found) == (type(made), made)
    again = load_config(write(to_yaml(trainer.config), "config.yaml"))
    assert build_trainer(again).module.given[name] == made


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("number=three", r'takes number: int, but got "three"$'),
        ("number=1.0", r"takes number: int, but got 1\.0$"),
        ("number=true", r"takes number: int, but got true$"),
        ("number=1:30", r'takes number: int, but got "1:30"$'),
        ("number=null", r"takes number: int, but got null$"),
        ("share=null", r"takes share: float, but got null$"),
        ("share=[1]", r"takes share: float, but got \[1\]$"),
        ("flag=maybe", r'takes flag: bool, but got "maybe"$'),
        ("flag=2", r"takes flag: bool, but got 2$"),
        ("text=no", r"takes text: str, but got false; YAML takes a bare yes, no, on and off for true or false; write"),
        ("text=1.5", r"takes text: str, but got 1\.5; write a text in quotes$"),
        ("path=on", r"takes path: \S*Path, but got true; YAML"),
        ("maybe=x", r'takes maybe: int \| null, but got "x"$'),
        ("either=off", r"takes either: int \| str, but got false; YAML"),
        ("word=meen", r"takes word: Literal\['sum', 'mean'\], but got \"meen\", did you mean 'mean'\?"),
        ("color=green", r'but got "green"; there are RED, BLUE, red, blue$'),
        ("sizes=3", r"takes sizes: list\[int\], but got 3$"),
        ("sizes=[a]", r'takes sizes: list\[int\], but got \["a"\]$'),
        ("sizes='12'", r'takes sizes: list\[int\], but got "12"$'),
        ("pair=[1, 2, 3]", r"takes pair: tuple\[int, float\], but got \[1, 2, 3\]; these are 3 values$"),
        ("table={a: x}", r'takes table: dict\[str, float\], but got \{"a": "x"\}$'),
        ("net={width: x}", r'\.net\.width: Net takes width: int, but got "x"$'),
        ("net={widht: 3}", r"\.net\.widht: unknown key, did you mean 'width'\?; Net takes width, drop$"),
        ("net={}", r"\.net: Net: missing a required argument: 'width' \(int\)$"),
        ("net={width: 1, drop: 2}", r"\.net: drop is a share$"),
    ],
)
@pytest.mark.parametrize("where", ["module", "plugins.noise"])
def test_values_of_another_type_are_refused(write, where, given, words):
    with pytest.raises(ValueError, match=words) as caught:
        build_trainer(load_config(write(KINDS), [f"{where}.{given}"]))
    assert str(caught.value).startswith(f"{where}.{given.partition('=')[0]}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("layer=relu", r'takes layer: torch.*Module \| null, but got "relu"; an object is a mapping with `_target_`'),
        (
            f"layer={{_target_: {HERE}.Part, size: 1}}",
            r'takes layer: torch.*Module \| null, but got "an object of Part"',
        ),
        (
            "layer={_target_: torch.nn.Sequential, args: [1]}",
            r"module\.layer\.args: Sequential takes args by place alone, which a configuration cannot give",
        ),
        (
            "call=relu",
            r'takes call: Optional.*Callable.*, but got "relu"|takes call: .*Callable.* \| null, but got "relu"',
        ),
    ],
)
def test_objects_are_held_against_annotations(write, given, words):
    layer = "module.layer={_target_: torch.nn.Linear, in_features: 1, out_features: 1}"
    assert isinstance(build_trainer(load_config(write(KINDS), [layer])).module.given["layer"], torch.nn.Linear)
    with pytest.raises(ValueError, match=words):
        build_trainer(load_config(write(KINDS), [f"module.{given}"]))


def test_annotations_that_say_nothing_take_what_is_given(write):
    given = ["module.unknown=no", "module.loose='3'", "module.sloppy=null"]
    module = build_trainer(load_config(write(KINDS), given)).module
    assert [module.given[name] for name in ("unknown", "loose", "sloppy")] == [False, "3", None]


def test_values_of_the_environment_have_the_annotated_type(write, monkeypatch):
    monkeypatch.setenv("SHARE", "0.25")
    monkeypatch.setenv("EPOCHS", "2")
    keys = ("module.share", "plugins.noise.share")
    trainer = build_trainer(
        load_config(write(KINDS), [*(f"{key}=${{oc.env:SHARE}}" for key in keys), "trainer.epochs=${oc.env:EPOCHS}"])
    )
    assert (trainer.module.given["share"], trainer.plugins.get_plugin("noise").share) == (0.25, 0.25)
    assert (trainer.options.epochs, trainer.config["trainer"]["epochs"]) == (2, "${oc.env:EPOCHS}")
    monkeypatch.setenv("SHARE", "much")
    for key in keys:
        with pytest.raises(ValueError, match=rf'{key}: \w+ takes share: float, but got "much"'):
            build_trainer(load_config(write(KINDS), [f"{key}=${{oc.env:SHARE}}"]))
        with monkeypatch.context() as longer:
            longer.setenv("SHARE", "hidden-in-messages")
            with pytest.raises(ValueError, match=rf'{key}: \w+ takes share: float, but got "\$\{{oc\.env:SHARE\}}"'):
                build_trainer(load_config(write(KINDS), [f"{key}=${{oc.env:SHARE}}"]))


def test_a_secret_of_the_wrong_type_is_not_shown(write):
    with pytest.raises(ValueError, match=r"module\.api_key: Module takes api_key: str, but got .*\*\*\*") as caught:
        build_trainer(load_config(write(), ["module.api_key=[s3cret]"]))
    assert "s3cret" not in str(caught.value)


def test_a_branch_is_merged_or_replaced(write):
    text = BASE.replace(".Module}", f".Module, width: 4, inner: {{_target_: {HERE}.Part, size: 3}}}}")
    merged = masked(load_config(write(text), ["module.inner={size: 5}", "module={width: 6}"]))["module"]
    assert merged == {"_target_": f"{HERE}.Module", "width": 6, "inner": {"_target_": f"{HERE}.Part", "size": 5}}
    replaced = masked(load_config(write(text), [f"module={{_target_: {HERE}.Kinds, number: 2}}"]))["module"]
    assert replaced == {"_target_": f"{HERE}.Kinds", "number": 2}
    inner = masked(load_config(write(text), [f"module.inner={{_target_: {HERE}.Net, width: 1}}"]))["module"]["inner"]
    assert inner == {"_target_": f"{HERE}.Net", "width": 1}
    assert masked(load_config(write(text), ["module.inner=null", "module.inner={a: 1}"]))["module"]["inner"] == {"a": 1}


@pytest.mark.parametrize("text", ["1e-3", "1:30", "08", "no", "2026-01-01", "0x1F", ".5e3", "1_000", "nan", "~", ""])
def test_a_text_stays_the_text_that_it_is(write, text):
    config = load_config(write(to_yaml(yaml.safe_load(BASE) | {"vars": {"a": text, "b": [text]}})))
    assert masked(config)["vars"] == {"a": text, "b": [text]}
    assert masked(load_config(write(to_yaml(masked(config)), "config.yaml")))["vars"]["a"] == text


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
        ("null", None),
    ],
)
def test_what_depends_on_the_environment_stays_as_it_was_written(given, kept, write, monkeypatch):
    monkeypatch.setenv("THE_KEY", "s3cret-value")
    own = ["vars.own=${oc.env:THE_KEY}", "vars.name=THE_KEY", "vars.both={a: '${vars.own}', b: [1, '${vars.own}']}"]
    assert masked(load_config(write(), [*own, f"vars.given={given}"]))["vars"]["given"] == kept


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
