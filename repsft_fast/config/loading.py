"""Settings from defaults, a YAML file, the environment and overrides, in that order; every problem reported
at once."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from repsft_fast.config import checks, foreign
from repsft_fast.config.explained import Key, explained
from repsft_fast.config.foreign_values import SCALARS
from repsft_fast.config.names import inner_section, setting_names, unknown_setting
from repsft_fast.config.paths import expand
from repsft_fast.config.sections import Section, Settings
from repsft_fast.config.yaml_file import parse_value, read_settings_file, write_settings
from repsft_fast.errors import ConfigError, describe, did_you_mean, spelled

PREFIX = "REPSFT_"
# of the ranks' meeting (docs/cluster.md): of one host, and in no run.yaml
NOT_SETTINGS = ("REPSFT_LISTEN", "REPSFT_SECRET")
RECIPES = Path(__file__).parent.parent / "recipes"


class Config(Settings):
    """The settings of one run, whole, typed and checked. Build it with `Config.of`."""

    @classmethod
    def of(
        cls,
        source: "Mapping[str, Any] | str | Path | Config | None" = None,
        overrides: Mapping[str, Any] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Settings from a nested dict, a YAML file (or the name of a recipe) or another Config.

        `overrides` may be nested (`{"optim": {"lr": 1e-5}}`) or dotted (`{"optim.lr": 1e-5}`) and win over
        everything; `environment` (pass `os.environ`) stands between the two. Raises ConfigError with every
        problem found.
        """
        layers = [] if source is None else [_source(source)]
        if environment is not None:
            layers.append(environment_layer(environment))
        if overrides:
            layers.append(Layer("overrides", _undotted(overrides, "overrides")))
        return cls.from_layers(layers)

    @classmethod
    def from_layers(cls, layers: "Iterable[Layer]") -> Self:
        """Merges the layers, later ones winning setting by setting."""
        problems: list[str] = []
        merged: dict[Key, Any] = {}
        origin: dict[Key, str] = {}
        for layer in layers:
            problems += layer.problems
            for key, value, problem in _flatten(Settings, layer.values, ()):
                if problem:
                    problems.append(f"{problem}{_at(layer.where(key))}")
                    continue
                for other in [k for k in merged if k[: len(key)] == key or k == key[: len(k)]]:
                    del merged[other]
                merged[key] = value
                origin[key] = layer.where(key)
        return cls._checked(merged, origin, problems)

    @classmethod
    def _checked(cls, merged: dict[Key, Any], origin: dict[Key, str], problems: list[str]) -> Self:
        wrong: set[str] = set()
        nested = _nest(merged)
        try:
            config = cls.model_validate(nested)
        except ValidationError as error:
            for key, problem in explained(error):
                wrong.add(".".join(key))
                problems.append(f"{problem}{_at(origin.get(key, ''))}")
            config = cls._without(merged, wrong)
        for read, problem in checks.contradictions(config):
            if not any(
                name == bad or name.startswith(f"{bad}.") or bad.startswith(f"{name}.")
                for name in read
                for bad in wrong
            ):
                problems.append(problem)
        if problems:
            raise ConfigError(problems)
        return config

    @classmethod
    def _without(cls, merged: dict[Key, Any], wrong: set[str]) -> Self:
        """The settings with the wrong ones left at their defaults, so that the rules over several sections
        still speak."""
        kept = {key: value for key, value in merged.items() if ".".join(key) not in wrong}
        if "run.folder" in wrong or ("run", "folder") not in kept:
            kept["run", "folder"] = "unset"
        if "data.train" in wrong or ("data", "train") not in kept:
            kept["data", "train"] = "unset"
        return cls.model_validate(_nest(kept))

    @property
    def warnings(self) -> list[str]:
        """Combinations that work but are probably not meant."""
        return checks.warnings(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `Config.of` reads them back."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Every setting, resolved; `Config.of` reads the file back to an equal Config."""
        return write_settings(self.to_dict())


@dataclass
class Layer:
    """One source of settings, and where in it each came from."""

    name: str
    values: Mapping[str, Any]
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def where(self, key: Key) -> str:
        return self.places.get(key, self.name)


def file_layer(path: str | Path) -> Layer:
    """A YAML file; a bare name that is no file may name a recipe that comes with the package."""
    try:
        file = Path(expand(str(path)))
        missing = not file.exists()
    # no such user or variable, too long, NUL inside
    except (PydanticCustomError, OSError, ValueError) as error:
        raise ConfigError(describe("--config", str(error), got=str(path))) from None
    if missing:
        recipe = RECIPES / f"{path}.yaml"
        if file.name != str(path) or not recipe.is_file():
            known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
            raise ConfigError(
                describe(str(path), "no such settings file", todo=f"give a path, or a recipe's name: {known}")
            )
        file = recipe
    values, lines = read_settings_file(file)
    places = {tuple(".".join(key).split(".")): f"{file.name} line {line}" for key, line in lines.items()}
    return Layer(file.name, _undotted(values, file.name), places)


def text_layer(name: str, settings: Mapping[str, str | list[str]], places: Mapping[str, str]) -> Layer:
    """Settings given as text under dotted names, read as YAML values: `1e-5`, `null`, `[a, b]`, `{task:
    file}`.

    A list of texts is a flag given several times: their lists are joined, their mappings merged.
    """
    values = {dotted: _value_of(text) for dotted, text in settings.items()}
    return Layer(
        name, _undotted(values, name), {tuple(dotted.split(".")): place for dotted, place in places.items()}
    )


def _value_of(text: str | list[str]) -> Any:
    values = [parse_value(one) for one in ([text] if isinstance(text, str) else text)]
    if len(values) == 1:
        return values[0]
    if all(isinstance(value, dict) for value in values):
        return {key: inner for value in values for key, inner in value.items()}
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def environment_layer(environment: Mapping[str, str]) -> Layer:
    """Variables such as REPSFT_OPTIM__LR=1e-5; a variable with the prefix that is no setting is an error."""
    settings: dict[str, str | list[str]] = {}
    places: dict[str, str] = {}
    for name, text in sorted(environment.items()):
        if name.upper().startswith(PREFIX) and name not in NOT_SETTINGS:
            dotted = name[len(PREFIX) :].lower().replace("__", ".")
            if dotted in settings:
                raise ConfigError(
                    describe(
                        f"environment variable {name}",
                        f"{dotted} is set twice",
                        got=f"also by {places[dotted]}",
                    )
                )
            settings[dotted] = text
            places[dotted] = f"environment variable {name}"
    return text_layer("environment", settings, places)


def _source(source: Mapping[str, Any] | str | Path | Config) -> Layer:
    if isinstance(source, Config):
        return Layer("config", source.to_dict())
    if isinstance(source, (str, Path)):
        return file_layer(source)
    if isinstance(source, Mapping):
        return Layer("", _undotted(source, "config"))
    raise ConfigError(
        describe(
            "config", "cannot be read", expected="a mapping, a path or a Config", got=type(source).__name__
        )
    )


def _undotted(values: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """Top keys may be dotted (`optim.lr`) beside sections (`optim: {...}`); the same setting twice is an
    error."""
    nested: dict[str, Any] = {}
    for dotted, value in values.items():
        for step in reversed(str(dotted).split(".")):
            value = {step: value}
        _merge_into(nested, value, (), name)
    return nested


def _merge_into(nested: dict[str, Any], values: Mapping[str, Any], above: Key, name: str) -> None:
    for step, value in values.items():
        key = (*above, step)
        if isinstance(nested.get(step), dict) and isinstance(value, Mapping):
            _merge_into(nested[step], value, key, name)
        elif step in nested:
            raise ConfigError(describe(name or "config", f"{spelled('.'.join(key))} is set twice"))
        else:
            nested[step] = dict(value) if isinstance(value, Mapping) else value


def _flatten(
    section: type[Section], values: Mapping[Any, Any], above: Key
) -> Iterator[tuple[Key, Any, str | None]]:
    """Every setting in `values` as (key, value, None), every key that is no setting as (key, None,
    problem)."""
    for name, value in values.items():
        key = (*above, str(name))
        if name not in section.model_fields:
            for whole in _unknown(key, value, section):
                yield (
                    whole,
                    None,
                    unknown_setting(".".join(whole), section=whole == key and isinstance(value, Mapping)),
                )
            continue
        inner, optional = inner_section(section.model_fields[name].annotation)
        if inner is None or (optional and (value is None or (isinstance(value, Mapping) and not value))):
            yield key, value, None
        elif isinstance(value, Mapping):
            yield from _flatten(inner, value, key)
        elif value is not None:  # an empty section in YAML is null
            yield key, None, _not_settings(".".join(key), value)


def _unknown(key: Key, value: Any, section: type[Section]) -> Iterator[Key]:
    """A section that is none, setting by setting (`train.epochs` means `budget.epochs`), unless its name says
    what is meant."""
    inside = value if isinstance(value, Mapping) else {}
    meant = foreign.ours(key[-1])
    if foreign.plain(key[-1]) in foreign.SECTIONS or meant in setting_names():
        said = False
    # a sentence about the whole (deepspeed, quantization_config), or a section of ours with a slip of the pen
    else:
        said = meant is not None or did_you_mean(key[-1], section.model_fields) is not None
    yield from [key] if said or not inside else [(*key, str(step)) for step in inside]


def _not_settings(section: str, value: Any) -> str:
    """The sentence about a section that holds one value: `model: owner/name`."""
    todo = f"did you mean {SCALARS[section]}?" if section in SCALARS else None
    if isinstance(value, bool):
        todo = f"write {section}: {{}} for its defaults" + (
            "" if value or "." not in section else ", or null for none of it"
        )
    return describe(section, "is a section", expected="settings below it", got=value, todo=todo)


def _nest(flat: Mapping[Key, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {"run": {}, "data": {}}
    for key, value in flat.items():
        inner = nested
        for step in key[:-1]:
            inner = inner.setdefault(step, {})
        inner[key[-1]] = value
    return nested


def _at(place: str) -> str:
    return f" ({place})" if place else ""
