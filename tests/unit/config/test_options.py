"""Options as users give them: unknown names, wrong types, values that are none of the choices."""

from __future__ import annotations

import dataclasses

import pytest

from octavo.config import EngineArgs
from octavo.config.options import type_names
from octavo.config.server import ServerConfig
from octavo.errors import ConfigError


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"'max_modl_len'. Did you mean 'max_model_len'"):
        EngineArgs.from_options(max_modl_len=5)
    with pytest.raises(ConfigError, match=r"Unknown option 'zzz'. Known options: .*, dtype, "):
        EngineArgs.from_options(zzz=1)


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": "8k"},
        {"max_model_len": 1.0},
        {"max_model_len": True},
        {"model": None},
        {"model": 3},
        {"enforce_eager": 1},
        {"enforce_eager": "yes"},
        {"gpu_memory_utilization": "0.9"},
        {"gpu_memory_utilization": True},
        {"block_size": None},
        {"tokenizer": 5},
        {"async_scheduling": "auto"},
    ],
    ids=str,
)
def test_a_wrong_type_names_the_option(options: dict[str, object]) -> None:
    [name] = options
    with pytest.raises(ConfigError, match=f"Option '{name}' takes"):
        EngineArgs.from_options(**options)


@pytest.mark.parametrize("name", ["dtype", "load_format", "scheduling_policy"])
def test_a_value_that_is_no_choice_names_them_all(name: str) -> None:
    [field] = [f for f in dataclasses.fields(EngineArgs) if f.name == name]
    with pytest.raises(ConfigError, match=", ".join(field.metadata["choices"])):
        EngineArgs.from_options(**{name: "int3"})


def test_an_integer_will_do_for_a_float_and_none_where_it_is_allowed() -> None:
    args = EngineArgs.from_options(gpu_memory_utilization=1, max_model_len=None, model="x")
    assert (args.gpu_memory_utilization, args.max_model_len, args.model) == (1, None, "x")


@pytest.mark.parametrize("cls", [EngineArgs, ServerConfig])
def test_every_option_says_what_it_is_and_has_a_default_of_its_type(cls: type) -> None:
    for field in dataclasses.fields(cls):
        assert field.metadata["help"], field.name
        assert set(type_names(field)) <= {"str", "int", "float", "bool", "None"}, field.name
    cls.from_options(**{f.name: f.default for f in dataclasses.fields(cls)})  # type: ignore[attr-defined]


def test_a_flag_belongs_to_one_class() -> None:
    names = [f.name for cls in (EngineArgs, ServerConfig) for f in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


# ---- the server's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 65536}, "port"),
        ({"port": -1}, "port"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"num_text_threads": 0}, "num_text_threads"),
        ({"keep_alive_s": -1.0}, "keep_alive_s"),
        ({"read_timeout_s": float("nan")}, "read_timeout_s"),
        ({"api_key": "schlüssel"}, "api_key"),
        ({"served_model_name": " , "}, "served_model_name"),
        ({"generation_config": "mine"}, "auto, vllm"),
        ({"max_queue_requests": -1}, "max_queue_requests must be at least 0"),
        ({"request_timeout_s": -1.0}, "request_timeout_s"),
    ],
)
def test_the_servers_ranges(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig.from_options(**options)


def test_the_api_key_comes_from_the_environment_and_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "geheim")
    config = ServerConfig.from_options()
    assert config.api_key == "geheim"
    assert "geheim" not in repr(config)
    assert ServerConfig.from_options(api_key="other").api_key == "other"
    monkeypatch.delenv("OCTAVO_API_KEY")
    assert ServerConfig.from_options().api_key is None


def test_served_names() -> None:
    assert ServerConfig().served_names("org/model") == ("org/model",)
    assert ServerConfig(served_model_name="a, b").served_names("org/model") == ("a", "b")
