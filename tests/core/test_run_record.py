import json
import os
from pathlib import Path

import pytest
import torch

from sdxl_train.run_record import environment, without_secrets

WITH_SECRETS = """
from sdxl_train import Options, hookimpl, option

class Uploads:
    class Options(Options):
        api_key: str = option("", "key of the service")
        max_tokens_shown: int = option(5, "tokens that are shown")
        url: str = option("", "address")

    def __init__(self, options): pass

    @hookimpl
    def on_train_start(self, run): pass
"""


@pytest.mark.parametrize("name", ["api_key", "apikey", "WANDB_API_KEY", "hf_token", "token", "password", "db_password", "client_secret", "secret_key", "aws_access_key"])
def test_a_value_with_the_name_of_a_secret_is_masked_also_inside_tables(name: str) -> None:
    assert without_secrets({"a": [{name: "s3cret", "seed": 1}], name: {"inner": "s3cret"}}) == {"a": [{name: "***", "seed": 1}], name: "***"}
    assert without_secrets({name: None}) == {name: None}


def test_other_values_stay_as_they_are() -> None:
    values = {"max_token_length": 225, "tokenizer_cache_dir": "tokenizers", "img_key": "x", "path": Path("a"), "tables": {"lr": 0.1, "on": True}, "list": ["a", 1]}
    assert without_secrets(values) == values
    assert without_secrets({"a": "https://me:pass@host/x and s3://b"}) == {"a": "https://***@host/x and s3://b"}


def test_the_environment_holds_versions_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VARIABLE", "of-the-environment")
    found = environment(torch.device("cpu"))
    assert found["distributions"]["torch"].startswith(torch.__version__.partition("+")[0]) and found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads() and found["cpus"] == os.cpu_count()
    assert "of-the-environment" not in json.dumps(found)


def test_a_training_writes_what_it_was_started_with_beside_its_logs(cli, config, tmp_path: Path) -> None:
    (tmp_path / "up.py").write_text(WITH_SECRETS)
    plugin = f"{tmp_path}/up.py:Uploads"
    tables = f"[plugins_kwargs.{json.dumps(plugin)}]\napi_key = 's3cret'\nurl = 'https://me:s3cret@host'\n[sample_params]\nseed = 7\n"
    file = config("sdxl.toml", tables, plugins=[plugin], output_dir=str(tmp_path / "run-%index%"), trackers=["jsonl", "tensorboard"])
    ended = cli(file, "--set", "max_train_steps=1")
    assert ended.code == 0, ended.err
    (path,) = (tmp_path / "run-0").glob("logs/*/run.json")
    text = path.read_text("utf-8")
    record = json.loads(text)
    assert "s3cret" not in text
    values = record["configuration"]
    assert (values["learning_rate"], values["optimizer_type"], values["clip_skip"]) == (1e-3, "AdaFactor", 1), "defaults are effective too"
    assert values["plugins_kwargs"] == {plugin: {"api_key": "***", "max_tokens_shown": 5, "url": "https://***@host"}}
    assert {"max_train_steps", "learning_rate", "sample_params.seed"} <= set(record["given"]) and "clip_skip" not in record["given"]
    assert record["output_dir"] == str(tmp_path / "run-0") and (record["step"], record["num_train_steps"]) == (0, 1)
    plugins = {(entry["key"], entry["name"]): entry for entry in record["plugins"]}
    built_in = plugins["optimizer_type", "AdaFactor"]
    assert (built_in["distribution"], built_in["source"]) == ("sdxl-train", "sdxl_train_plugins.optimizers:AdaFactor") and built_in["version"]
    assert plugins["plugins", plugin] == {"key": "plugins", "name": plugin, "distribution": None, "version": None, "source": f"{tmp_path}/up.py"}
    assert ("trackers", "tensorboard") in plugins and record["environment"]["device"] == "cpu"
